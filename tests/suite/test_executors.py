"""Grids on other machines: Slurm, with a real cluster where its programs are installed."""

import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import pytest

from plotarmour.cli import UserError
from plotarmour.run import train_run
from plotarmour.suite.executors import Job, Slurm
from plotarmour.suite.grid import plan_grid
from plotarmour.suite.runner import describe_status, run_grid
from plotarmour.suite.steps import find_prepared
from plotarmour.training.checkpoint import checkpoint_of
from plotarmour.training.log import RunLog

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
rows, data, met = [], find_prepared(Path(results)), Path(results) / f"{{run}}.met"
met.open("a").write(os.environ.get("SLURMD_NODENAME", "") + " ")
def strike():
    rows.append(1)
    if trouble and len(rows) >= 10 and len(met.read_text().split()) == 1:
        Path(results, f"{{run}}.at").touch()
        time.sleep(1000 if trouble == "hangs" else 0.5)
train_run(load_recipe(recipe, model, overrides.split(";")), data["train"], data["val"], Path(results) / run,
          on_row=strike)
"""


@pytest.fixture
def planned(root, tmp_path):
    """Plan a grid of four rows, of which the first hangs and the second is slow when they run for the first time."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(TRAINS.format(root=str(root)))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    (tmp_path / "grid.csv").write_text("run,model,overrides,trouble\na,bdh,seed=1,hangs\nb,gpt2,seed=1,slow\n"
                                       "c,bdh,seed=2,\nd,gpt2,seed=2,\n")
    return plan_grid(tmp_path / "grid.csv", "tiny", tmp_path / "out", tmp_path / "n.ipynb", overrides=SMALL)


def until(condition):
    """Wait for an event."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def same_bits_as_uninterrupted(grid, tmp_path):
    """Whether the last checkpoints of all rows have the bits of runs that nothing interrupted."""
    data = find_prepared(grid.out)
    for row in grid.rows:
        train_run(row.recipe, data["train"], data["val"], tmp_path / "whole" / row.run)
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (checkpoint_of(folder, 20) / file for folder in (row.folder, tmp_path / "whole" / row.run))
            assert ours.read_bytes() == theirs.read_bytes(), (row.run, file)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"needs Slurm: apt install slurm-wlm munge ({missing()} not found)")
def test_rows_on_slurm_survive_preemption_walltime_and_a_drained_node(planned, tmp_path, monkeypatch, capsys):
    """Guards: a preempted job that starts anew or never again, a row lost at its walltime or with its node, and jobs
    of a killed controller that train the same run beside the new ones."""
    monkeypatch.setattr(Slurm, "look_s", 0.5)
    out, done = planned.out, threading.Event()

    def events():
        until(lambda: (out / "a.at").exists() and (out / "b.at").exists())
        node = {run: (out / f"{run}.met").read_text().strip() for run in "ab"}
        jobs = {line.split()[1]: line.split()[0]
                for line in call("squeue", "--noheader", "--format=%A %N", "--states=running").splitlines()}
        call("sbatch", "--partition=high", f"--nodelist={node['a']}", "--output=/dev/null", "--wrap=sleep 1")
        call("scontrol", "update", f"nodename={node['b']}", "state=drain", "reason=test")
        call("scancel", "--signal=USR2", jobs[node["b"]])  # as Slurm does shortly before the walltime is over
        done.set()

    with slurm():
        thread = threading.Thread(target=events, daemon=True)
        thread.start()
        states = run_grid(planned, partial(Slurm, at_once=None, minutes=5, options=["partition=low"]))
        assert done.is_set() and {state.status for state in states} == {"done"}
        assert call("squeue", "--noheader") == ""
        assert "drain" in call("sinfo", "--noheader", "--format=%T")
    nodes = {run: (out / f"{run}.met").read_text().split() for run in "abcd"}
    assert [len(nodes[run]) for run in "abcd"] == [2, 2, 1, 1] and nodes["b"][0] != nodes["b"][1], nodes
    same_bits_as_uninterrupted(planned, tmp_path)
    assert describe_status(planned).splitlines()[-1] == "4 done"


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
    if texts is None:
        monkeypatch.setenv("PATH", "")
    else:
        commands(**texts)
    with pytest.raises(UserError, match=message) as error:
        run_grid(grid, partial(Slurm, at_once=None, minutes=minutes, options=[]))
    assert "\n" not in str(error.value) and not any(row.folder.exists() for row in grid.rows)


def test_a_job_that_saves_nothing_before_its_walltime_is_not_started_again(planned, monkeypatch):
    """Guards: a job that Slurm starts again and again because its walltime ends before the first checkpoint."""
    job = Job(planned.notebook, planned.rows[0])
    job.first_step = job.process = None
    monkeypatch.setattr("plotarmour.suite.executors.stop_notebooks", lambda processes: None)
    with pytest.raises(TimeoutError):
        job.checkpoint()
    monkeypatch.setattr("plotarmour.suite.executors.latest_whole_step", lambda folder: 5)
    assert job.checkpoint().function == job


def test_status_reads_folders_alone(planned, tmp_path):
    """Guards: a night's grid elsewhere of which nobody can say how far it is; a question that changes files."""
    run = planned.rows[1].folder
    RunLog(run / "log.csv", -1).append(step=5, elapsed_s=1.0)
    before = sorted(tmp_path.rglob("*"))
    lines = describe_status(planned).splitlines()
    assert lines[0] == "a waiting" and lines[1].startswith("b at step 5; log.csv is 0 s old")
    assert lines[-1].startswith("1 running, 3 waiting (b at step 5 of 20)") and sorted(tmp_path.rglob("*")) == before
