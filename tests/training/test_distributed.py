"""Two gloo processes, as torchrun starts them, against one: real processes, real signals."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
from lost_process import ALONE_FAILS

from plotarmour import run as runs
from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.run import train_run
from plotarmour.suite.display import describe_ending
from plotarmour.training import distributed as ranks_module
from plotarmour.training.distributed import ALONE, LostProcess, Ranks

SETTINGS = {"context_length": 24, "windows": "stream", "rows_per_step": 8, "micro_batch_size": 2, "max_steps": 20,
            "warmup_steps": 4, "learning_rate": "1e-3", "log_interval": 1, "eval_interval": 5, "eval_tokens": 400,
            "checkpoint_interval": 4, "n_layer": 2, "n_embd": 32, "n_head": 2, "dropout": 0.1, "device": "cpu"}
LIMIT_S = 600  # of work that takes seconds on an idle machine


def start(root, files, out, model, tool=None, processes=2, **changes):
    """Start tools/train.py (or another tool with its arguments) in some processes under torchrun."""
    settings = [word for key, value in (SETTINGS | changes).items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(tool or root / "tools" / "train.py"), "--recipe", "tiny", "--model", model,
               "--train", str(files["train"]), "--val", str(files["val"]), "--out", str(out), *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def alone(files, out, model, **changes):
    """The same in this process."""
    recipe = load_recipe("tiny", model, [f"{key}={value}" for key, value in (SETTINGS | changes).items()])
    return train_run(recipe, files["train"], files["val"], out)


def column(out, name):
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def rank_pids(out, rank):
    """Process ids of a rank of the run that writes a folder."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(out) in command and "torch.distributed.run" not in command:
            found += [process.pid] if process.environ().get("RANK") == str(rank) else []
    return found


def wait_for_step(process, out, step):
    while not (out / "log.csv").exists() or len(column(out, "step")) <= step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize("model", ["bdh", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_learns(model, root, token_files, tmp_path):
    """Guards: rows read twice, gradients averaged twice, other dropout, a log that both write. 20 steps."""
    alone(token_files, tmp_path / "run_1", model)
    process = start(root, token_files, tmp_path / "run_2", model)
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    for name, tolerance in (("train_loss", 1e-5), ("val_loss", 1e-5), ("tokens_seen", 0)):
        one, two = (column(tmp_path / f"run_{n}", name) for n in (1, 2))
        assert len(one) == len(two) and max(abs(a - b) for a, b in zip(one, two, strict=True)) <= tolerance, name
    assert json.loads((tmp_path / "run_2" / "run.json").read_text())["processes"] == 2
    one, two = ({p.relative_to(tmp_path / n).as_posix() for p in (tmp_path / n).rglob("*")} for n in ("run_1", "run_2"))
    assert one ^ two <= {"samples_by_step.csv"}  # there are samples only where they take little of the time


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_that_loses_a_process_says_so_and_goes_on(lost, root, token_files, tmp_path):
    """Guards: a process that waits for ever for one that has died; a folder that nothing goes on from."""
    for attempt in range(3):  # gloo misses a death now and then; torchrun then kills the other process after 30 s
        out = tmp_path / f"run_{attempt}"
        process = start(root, token_files, out, "gpt2", max_steps=2000)
        wait_for_step(process, out, 6)
        [pid] = rank_pids(out, lost)
        os.kill(pid, signal.SIGKILL)
        said, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1
        if "another process of this run has died; the same command continues" in said:
            break
    else:
        pytest.fail(said)
    if lost == 1:
        stopped = json.loads((out / "STOPPED.json").read_text())
        assert stopped["reason"] == "lost a process" and stopped["last_checkpoint"] >= 4
    reached = max(column(out, "step"))
    final = alone(token_files, out, "gpt2", max_steps=2000, max_minutes=1e-6)
    assert final.reason == "time budget" and final.step > reached - 5
    assert json.loads((out / "run.json").read_text())["changes"][0]["processes"] == [2, 1]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_one_process_that_is_asked_to_stop_stops_all_of_them(root, token_files, tmp_path):
    """Guards: processes that stop at different steps, and then wait for each other."""
    out = tmp_path / "run"
    process = start(root, token_files, out, "gpt2", max_steps=2000)
    wait_for_step(process, out, 3)
    [pid] = rank_pids(out, 1)
    os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    stopped = json.loads((out / "STOPPED.json").read_text())
    assert stopped["reason"] == "signal to another process" and stopped["step"] == stopped["last_checkpoint"] >= 3


@pytest.mark.slow
def test_a_users_mistake_is_said_once(root, token_files, tmp_path):
    """Guards: every process that complains of the same folder, or one that waits for the others for ever."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    process = start(root, token_files, tmp_path / "full", "gpt2")
    said, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1 and said.count("error: ") == 1, said
    assert "is not empty and not a run folder" in said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("where", "processes", "first_says"), [
    ("Windows.micro_batch", 3, "another process of this run has died"),
    ("runs._fingerprint", 2, "another process of this run has died before training began"),
])
@pytest.mark.slow
def test_what_the_second_process_alone_has_met_is_said(where, processes, first_says, root, token_files, tmp_path):
    """Guards: a disk that fails under one process, of which the user hears only that "another process has died"."""
    tool = tmp_path / "tool.py"
    tool.write_text(ALONE_FAILS.format(root=str(root), train=str(root / "tools" / "train.py"), where=where,
                                       said=str(tmp_path / "said")))
    process = start(root, token_files, tmp_path / "run", "gpt2", tool, processes, rows_per_step=6)
    said, _ = process.communicate(timeout=LIMIT_S)
    line = "error: process 1: /data/t.train.bin: Input/output error. Check the path, its permissions and the disk.\n"
    assert process.returncode == 1 and said.count(line) == said.count("error: process") == 1, said
    assert first_says in said[:said.index(line)]


def test_a_process_lost_before_the_first_checkpoint_is_told_like_any_other(root, token_files, tmp_path, monkeypatch,
                                                                           capsys):
    """Guards: a traceback instead of "another process has died" in the first evaluation; not a word where torchrun's
    SIGTERM comes between the end of training and what the tool prints."""
    class Lost(Ranks):
        def first(self, act):
            return act()

        def sum(self, *numbers):
            raise LostProcess("closed by peer")

    monkeypatch.setattr(runs, "joined", lambda device: nullcontext(Lost(0, 2)))
    final = alone(token_files, tmp_path / "run", "gpt2")
    assert (final.reason, final.step, final.last_checkpoint) == ("lost a process", 0, 0)
    assert "another process of this run has died; the same command continues" in capsys.readouterr().err
    assert "continues from the checkpoint of step 0" in " ".join(describe_ending(final, tmp_path / "run").split())


def test_alone_nothing_is_asked_of_others():
    """Guards: a single process that starts a process group."""
    assert ALONE.sum(1.5, True) == [1.5, 1.0] and ALONE.first(lambda: 7) == 7
    assert not torch.distributed.is_initialized()


def test_the_others_hear_of_what_the_first_one_met(monkeypatch):
    """Guards: an error in the first process that the others wait for."""
    monkeypatch.setattr(ranks_module.dist, "broadcast_object_list", lambda told, src: told.__setitem__(1, "no folder"))
    with pytest.raises(UserError, match="no folder"):
        Ranks(1, 2).first(lambda: pytest.fail("only the first process acts"))
