"""Grids that run: rows that end well, are killed, raise, find the disk full or are interrupted."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits")

PARAMETERS = 'results = ""\nrun = ""\ntrouble = ""  # what happens to the first start of this run\n'
FIRST = """
import os, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
out, met = Path(results) / run, Path(results) / f"{{run}}.met"
trouble, started = "" if met.exists() else trouble, met.touch()
"""
WRITES = FIRST + """
from plotarmour.files import write_json
if trouble == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if trouble == "exception":
    raise RuntimeError("the cable came out")
out.mkdir()
write_json(out / "DONE.json", {{"reason": "max_steps", "step": 1, "threads": os.environ.get("OMP_NUM_THREADS")}})
if trouble == "late":
    raise RuntimeError("the figure could not be drawn")
"""
TRAINS = FIRST + """
from plotarmour.config import load_recipe
from plotarmour.run import train_run
from plotarmour.suite.steps import find_prepared
rows, data = [], find_prepared(Path(results))
def strike():
    rows.append(1)
    if len(rows) == 10 and trouble == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(rows) == 10 and trouble == "exception":
        raise RuntimeError("the cable came out")
if trouble == "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
train_run(load_recipe(recipe, model, overrides.split(";")), data["train"], data["val"], out, on_row=strike)
"""
SMALL = ["corpus_stories=300", "tokenizer=bpe:400", "split=8:1:1", "n_embd=16", "max_steps=20", "warmup_steps=2",
         "eval_tokens=200", "eval_interval=5", "checkpoint_interval=5", "log_interval=1", "device=cpu"]


@pytest.fixture
def suite(root, tmp_path):
    """Write a grid and its notebook; returns what starts the command on them."""
    def make(csv_text, source, parameters="", options=()):
        cells = [nbformat.v4.new_code_cell(PARAMETERS + parameters, metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(source.format(root=str(root)))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
        (tmp_path / "grid.csv").write_text(csv_text)
        return [sys.executable, str(root / "tools" / "run_suite.py"), "--grid", str(tmp_path / "grid.csv"), "--out",
                str(tmp_path / "out"), "--notebook", str(tmp_path / "n.ipynb"), *options]

    return make


def call(command):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)


def rows_of(tmp_path):
    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def started(done):
    return [line.split()[1] for line in done.stdout.splitlines() if line.endswith(" ...") and line.startswith("[")]


def test_a_failed_row_stops_no_other_and_is_all_that_the_next_start_runs(suite, tmp_path):
    """Guards: a night lost to its second row; a dead kernel that counts as done, a late failure that counts as none;
    finished rows that are run again."""
    command = suite("run,trouble\na,killed\nb,exception\nc,late\nd,\n", WRITES, options=("--at-once", "2"))
    done = call(command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [row["status"] for row in rows_of(tmp_path)] == ["failed", "failed", "done", "done"]
    assert "a failed: its kernel was killed" in done.stderr and "b failed: RuntimeError: the cable came" in done.stderr
    assert "warning: c is done, and its notebook failed after that" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out" / "d" / "DONE.json").read_text())["threads"] == os.environ.get(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    again = call(command)
    assert again.returncode == 0 and sorted(started(again)) == ["a", "b"] and again.stderr == ""
    assert {row["status"] for row in rows_of(tmp_path)} == {"done"}
    (tmp_path / "grid.csv").write_text("run,trouble\na,other\nd,\n")
    other = call(command)
    assert other.returncode == 1 and "a failed: " in other.stderr and "holds a run of other settings" in other.stderr
    assert [row["status"] for row in rows_of(tmp_path)] == ["failed", "done"]


def test_an_interrupt_lets_the_row_save_and_leaves_nobody_behind(suite, tmp_path):
    """Guards: a kernel that trains on after Ctrl-C or SIGTERM; a stop that is called a failure; a lost summary."""
    command = suite("run,trouble\na,\nb,\n", FIRST + """
from plotarmour.files import write_json
from plotarmour.training.stopping import StopRequest
out.mkdir()
with StopRequest() as stop:
    (out / "pid").write_text(str(os.getpid()))
    while not stop.asked:
        time.sleep(0.05)
write_json(out / "STOPPED.json", {{"reason": "signal " + stop.asked}})
""")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "a" / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2, "papermill and its kernel"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE] == []
    assert [(row["status"], row["reason"]) for row in rows_of(tmp_path)] == [("stopped", "signal SIGINT"),
                                                                             ("waiting", "")]


@pytest.mark.slow
def test_of_twelve_runs_the_three_that_die_are_named_and_alone_run_again(suite, tmp_path):
    """Guards: a grid that ends with its first killed kernel, exception or full disk; a summary that lacks the dead."""
    dies = {2: "killed", 5: "exception", 9: "disk"}
    lines = [f'{"bdh" if i % 2 else "gpt2"},"seed={i}",{dies.get(i, "")}' for i in range(12)]
    sets = [part for setting in SMALL for part in ("--set", setting)]
    command = suite("model,overrides,trouble\n" + "\n".join(lines), TRAINS,
                    'model = "bdh"\nrecipe = "tiny"\noverrides = ""\n', ("--at-once", "2", *sets))
    done = call(command)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert len(rows) == 12 and [i for i, row in enumerate(rows) if row["status"] != "done"] == sorted(dies)
    assert len(done.stderr.splitlines()) == 3
    for i, why in {2: "its kernel was killed", 5: "RuntimeError: the cable came out", 9: "File too large"}.items():
        assert rows[i]["status"] == "failed" and why in rows[i]["reason"], rows[i]
        assert sum(rows[i]["run"] in line and why in line for line in done.stderr.splitlines()) == 1
    assert all(float(row["best_val_loss"]) < 7 and row["step"] == "20" for row in rows if row["status"] == "done")
    again = call(command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert sorted(started(again)) == sorted(rows[i]["run"] for i in dies)
    assert {row["status"] for row in rows_of(tmp_path)} == {"done"}
    assert not [path for path in (tmp_path / "out").rglob("*") if "unfinished" in path.name]
