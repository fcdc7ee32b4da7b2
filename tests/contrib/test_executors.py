"""Grids on other machines: a real Slurm where its programs are installed, and a stand-in for Kaggle's servers."""

import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from contrib.kaggle_kernels import Kaggle
from contrib.slurm import Job, Slurm
from plotarmour.cli import UserError
from plotarmour.run import train_run
from plotarmour.suite.grid import plan_grid
from plotarmour.suite.runner import describe_status, run_grid
from plotarmour.suite.steps import find_prepared, prepare
from plotarmour.training.checkpoint import checkpoint_of
from plotarmour.training.log import RunLog, read_log

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kaggle_server import Account, serving  # noqa: E402
from slurm_cluster import call, missing, slurm  # noqa: E402

SMALL = ["corpus_stories=300", "tokenizer=bpe:400", "split=8:1:1", "n_embd=16", "max_steps=20", "warmup_steps=2",
         "eval_tokens=200", "eval_interval=5", "checkpoint_interval=5", "log_interval=1", "device=cpu"]
PARAMETERS = 'results = ""\nrun = ""\nmodel = "bdh"\nrecipe = "tiny"\noverrides = ""\ntrouble = ""\n'
TRAINS = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from plotarmour.config import load_recipe
from plotarmour.run import train_run
from plotarmour.suite.steps import find_prepared
rows, data, out = [], find_prepared(Path(results)), Path(results) / run
Path(results, f"{{run}}.nodes").open("a").write(os.environ.get("SLURMD_NODENAME", "") + " ")
is_first = not out.exists()
def strike():
    rows.append(1)
    if trouble and len(rows) >= 10 and is_first:
        Path(results, f"{{run}}.at").touch()
        time.sleep(1000 if trouble == "hangs" else 0.5)
train_run(load_recipe(recipe, model, overrides.split(";")), data["train"], data["val"], out, on_row=strike)
(out / "rows").open("a").write(f"{{len(rows)}} ")
"""


@pytest.fixture
def planned(root, tmp_path):
    """Plan a grid of six rows, of which the first hangs and the second is slow when they run for the first time."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(TRAINS.format(root=str(root)))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    (tmp_path / "grid.csv").write_text("run,model,overrides,trouble\na,bdh,seed=1,hangs\nb,gpt2,seed=1,slow\n"
                                       "c,bdh,seed=2,\nd,gpt2,seed=2,\ne,bdh,seed=3,\nf,gpt2,seed=3,\n")
    return plan_grid(tmp_path / "grid.csv", "tiny", tmp_path / "out", tmp_path / "n.ipynb", overrides=SMALL)


def until(condition):
    """Wait for an event."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def same_bits_as_uninterrupted(grid, tmp_path, interrupted):
    """Check that all rows end as runs that nothing interrupts, and that the interrupted ones, alone, were resumed."""
    data, last = find_prepared(grid.out), {row.run: (row.folder / "rows").read_text().split()[-1] for row in grid.rows}
    assert {run for run, rows in last.items() if int(rows) < 20} == interrupted, last
    for row in grid.rows:
        train_run(row.recipe, data["train"], data["val"], tmp_path / "whole" / row.run)
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (checkpoint_of(folder, 20) / file for folder in (row.folder, tmp_path / "whole" / row.run))
            assert ours.read_bytes() == theirs.read_bytes(), (row.run, file)
        ours, theirs = (read_log(folder / "log.csv") for folder in (row.folder, tmp_path / "whole" / row.run))
        for column in ("step", "tokens_seen", "train_loss", "val_loss"):
            assert ours[column].equals(theirs[column]), (row.run, column)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"needs Slurm: apt install slurm-wlm munge ({missing()} not found)")
def test_rows_on_slurm_survive_preemption_walltime_and_a_drained_node(planned, tmp_path, monkeypatch, capsys):
    """Guards: a preempted job that starts anew or never again, a row lost at its walltime or with its node, and jobs
    of a killed controller that train the same run beside the new ones."""
    monkeypatch.setattr(Slurm, "look_s", 0.5)
    grid = replace(planned, rows=planned.rows[:4])
    out, done = grid.out, threading.Event()

    def events():
        until(lambda: (out / "a.at").exists() and (out / "b.at").exists())
        node = {run: (out / f"{run}.nodes").read_text().strip() for run in "ab"}
        jobs = {line.split()[1]: line.split()[0]
                for line in call("squeue", "--noheader", "--format=%A %N", "--states=running").splitlines()}
        call("sbatch", "--partition=high", f"--nodelist={node['a']}", "--output=/dev/null", "--wrap=sleep 1")
        call("scontrol", "update", f"nodename={node['b']}", "state=drain", "reason=test")
        call("scancel", "--signal=USR2", jobs[node["b"]])  # as Slurm does shortly before the walltime is over
        done.set()

    with slurm():
        thread = threading.Thread(target=events, daemon=True)
        thread.start()
        states = run_grid(grid, partial(Slurm, at_once=None, minutes=5, options=["partition=low"]))
        assert done.is_set() and {state.status for state in states} == {"done"}
        assert call("squeue", "--noheader") == ""
        assert "drain" in call("sinfo", "--noheader", "--format=%T")
    nodes = {run: (out / f"{run}.nodes").read_text().split() for run in "abcd"}
    assert [len(nodes[run]) for run in "abcd"] == [2, 2, 1, 1] and nodes["b"][0] != nodes["b"][1], nodes
    same_bits_as_uninterrupted(grid, tmp_path, {"a", "b"})
    assert describe_status(grid).splitlines()[-1] == "4 done"


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Commands of Slurm that do what their texts, by name, say; nothing else is found."""
    def make(**texts):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name in ("sbatch", "srun", "squeue", "scancel"):
            (folder / name).write_text("#!/bin/sh\n" + texts.get(name, "exit 0") + "\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return make


@pytest.mark.parametrize(("texts", "minutes", "message"), [
    (None, 60, "sbatch is not found; expected the commands of Slurm"),
    ("no submitit", 60, "--executor slurm needs the package submitit. Install it: pip install"),
    ({}, 2, "--walltime 2 leaves no time to train beside the 90 s in which a job saves"),
    ({"squeue": "exit 1"}, 60, "Slurm does not answer squeue"),
    ({"sbatch": "echo error: invalid partition specified: gpu >&2; exit 1"}, 60,
     "sbatch refuses the job: .*invalid partition"),
    ({"sbatch": "echo Submitted batch job 7"}, 60, "job 7 has ended and has written nothing into .*slurm; expected a "
     "results folder that the nodes see"),
])
def test_what_slurm_cannot_do_is_said_in_one_line_and_nothing_is_left(planned, commands, monkeypatch, texts, minutes,
                                                                      message):
    """Guards: a stack trace for a laptop without Slurm; rows that fail one by one in silence, because the nodes do not
    see the folder; token files made for minutes before the refusal."""
    monkeypatch.setattr(Slurm, "look_s", 0)
    monkeypatch.setattr(Slurm, "result_s", 0)
    grid = replace(planned, data=None)
    if texts == "no submitit":
        monkeypatch.setitem(sys.modules, "submitit", None)
    commands(**(texts if isinstance(texts, dict) else {}))
    if texts is None:
        monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=message) as error:
        run_grid(grid, partial(Slurm, at_once=None, minutes=minutes, options=[]))
    assert "\n" not in str(error.value) and not any(row.folder.exists() for row in grid.rows)


def test_a_job_that_saves_nothing_before_its_walltime_is_not_started_again(planned, monkeypatch):
    """Guards: a job that Slurm starts again and again because its walltime ends before the first checkpoint."""
    job = Job(planned.notebook, planned.rows[0])
    job.first_step = job.process = None
    monkeypatch.setattr("contrib.slurm.stop_notebooks", lambda processes: None)
    with pytest.raises(TimeoutError):
        job.checkpoint()
    monkeypatch.setattr("contrib.slurm.latest_whole_step", lambda folder: 5)
    assert job.checkpoint().function == job


def test_status_reads_folders_alone(planned, tmp_path):
    """Guards: a night's grid elsewhere of which nobody can say how far it is; a question that changes files."""
    run = planned.rows[1].folder
    RunLog(run / "log.csv", -1).append(step=5, elapsed_s=1.0)
    before = sorted(tmp_path.rglob("*"))
    lines = describe_status(planned).splitlines()
    assert lines[0] == "a waiting" and lines[1].startswith("b at step 5; log.csv is 0 s old")
    assert lines[-1].startswith("1 running, 5 waiting (b at 25 %, step 5 of 20)")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """Serve an account in the place of Kaggle; gives what makes an executor with it."""
    from kagglesdk import kaggle_env

    with ExitStack() as stack:
        def make(login=True, minutes=60, installed=True, **settings):
            if not installed:
                monkeypatch.setitem(sys.modules, "kaggle.api.kaggle_api_extended", None)
            account = Account(tmp_path / "kaggle", **settings)
            monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD,
                                stack.enter_context(serving(account)))
            monkeypatch.setenv("HOME", str(tmp_path))
            monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
            for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
                monkeypatch.setenv(name, "me") if login else monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
            for name, seconds in {"look_s": 0.3, "later_s": 1.0}.items():
                monkeypatch.setattr(Kaggle, name, seconds)
            return account, partial(Kaggle, minutes=minutes)

        yield make


@pytest.mark.slow
def test_rows_on_kaggle_survive_a_dead_kernel_a_hanging_one_and_refusals(planned, kaggle, tmp_path):
    """Guards: rows lost with their kernel or trained anew; a kernel that bills on after the last row; an answer that
    cannot be read taken for the end; a third kernel at a time."""
    events = {1: None, 2: "hang", 3: "Maximum batch GPU session count of 2 reached."}
    account, executor_of = kaggle(push=events.get, garbled=lambda n: n % 3 == 0)
    made = []

    def meddle():
        until(lambda: list(account.folder.glob("*/working/a.at")))  # then its kernel dies, and the other one is late
        slugs = list(account.kernels)
        until(lambda: len(made[0].kernels) == 2)
        os.killpg(account.kernels[slugs[0]].pid, 9)
        made[0].kernels[slugs[1]]["deadline"] = 0.0

    threading.Thread(target=meddle, daemon=True).start()
    states = run_grid(planned, lambda grid: made.append(executor_of(grid)) or made[0])
    assert {state.status for state in states} == {"done"}, [state.advice for state in states]
    assert account.kernels == {} and account.most == 2 and account.pushes >= 5
    assert [path.name for path in (account.folder / "datasets").iterdir()] == [made[0]._dataset().split("/")[1]]
    assert json.loads((planned.out / "kaggle" / "ledger.json").read_text()) == {}
    same_bits_as_uninterrupted(planned, tmp_path, {"a"})
    table = pd.read_csv(planned.out / "summary.csv")
    assert list(table["status"]) == ["done"] * 6 and list(table["step"]) == [20] * 6


@pytest.mark.parametrize(("settings", "message"), [
    ({"installed": False}, "--executor kaggle needs the package kaggle. Install it: pip install"),
    ({"login": False}, "Kaggle needs credentials, and there are none"),
    ({"is_known": False}, "Kaggle refuses the credentials, which may have expired"),
    ({"quota_hours": 0.1}, "quota is used up: 6 minutes are left until 2026-12-05 00:00 UTC; expected 15 or more"),
    ({"minutes": 1000}, "--walltime 1000 is out of range; expected 15 to 690 minutes"),
])
def test_what_kaggle_cannot_do_is_said_in_one_line_before_anything_is_pushed(planned, kaggle, settings, message):
    """Guards: a stack trace for missing or expired credentials; a week's quota that ends in the middle of a push."""
    account, executor_of = kaggle(**settings)
    with pytest.raises(UserError, match=message) as error:
        run_grid(planned, executor_of)
    assert "\n" not in str(error.value) and account.pushes == 0 and not planned.out.exists()


def test_kernels_of_a_killed_process_are_known_and_all_are_deleted_on_the_way_out(planned, kaggle):
    """Guards: kernels that bill for hours after Ctrl-C or a crash, and rows that two kernels train at once."""
    account, executor_of = kaggle(push=lambda n: "hang")
    prepare(planned.rows[0].recipe, planned.out)
    first = executor_of(planned)
    assert sorted(first.start(list(range(6)))) == list(range(6)) and len(account.kernels) == 2
    second = executor_of(planned)
    assert sorted(second.start(list(range(6)))) == list(range(6)) and account.pushes == 2
    second.stop()
    assert account.kernels == {} and second.kernels == {}
