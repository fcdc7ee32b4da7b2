"""Grids that run: what became of a row, summary.csv, rows that are killed, raise, find the disk full or are stopped."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import nbformat
import pandas as pd
import psutil
import pytest

from plotarmour.cli import UserError
from plotarmour.config import restored
from plotarmour.data.token_file import TokenFile
from plotarmour.machine import cores
from plotarmour.resume import read_info
from plotarmour.run import train_run
from plotarmour.suite.grid import plan_grid
from plotarmour.suite.notebooks import Executed, read_executed
from plotarmour.suite.runner import (
    State,
    _compare_rates,
    _describe_rates,
    _find_state,
    _judge,
    _progress_line,
    _write_rates,
    _write_summary,
    describe_best,
    run_grid,
)
from plotarmour.suite.steps import find_prepared, prepare
from plotarmour.training.checkpoint import FILES, write_manifest
from plotarmour.training.ending import Ending, Reason
from plotarmour.training.log import RunLog, read_log

posix_only = pytest.mark.skipif(os.name != "posix", reason="signals and limits")
SMALL = ["corpus_stories=300", "tokenizer=bpe:400", "split=8:1:1", "n_embd=16", "max_steps=20", "warmup_steps=2",
         "eval_tokens=200", "eval_interval=5"]
RATES = "model,overrides\n" + "".join(f"{m},learning_rate={r}\n" for m in ("bdh", "gpt2") for r in (0.001, 0.01, 0.1))
ENDING = Ending(Reason.MAX_STEPS, step=20, tokens_seen=8000, elapsed_s=3.5, train_loss=1.5, val_loss=1.5, best_step=20,
                best_val_loss=1.25, skipped_steps=0, scaler_overflows=0, peak_memory_mib=512.0, last_checkpoint=20,
                micro_batch_size=4, input_wait_s=0.25)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Token files of a small built-in corpus, and six rows: two models, three learning rates."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "grid.csv").write_text(RATES)
    grid = plan_grid(folder / "grid.csv", "tiny", folder / "out", overrides=SMALL)
    prepare(grid.rows[0].recipe, folder / "out")
    return grid


@pytest.fixture
def grid(prepared, tmp_path):
    """The grid with empty run folders of its own."""
    for part in ("train", "val", "test"):
        os.link(prepared.out / f"tokens.{part}.bin", tmp_path / f"tokens.{part}.bin")
    rows = [replace(row, folder=tmp_path / row.run, executed=tmp_path / f"{row.run}.ipynb") for row in prepared.rows]
    return replace(prepared, out=tmp_path, rows=rows)


def end(row, name="DONE.json", **changes):
    """Leave in a row's folder what a run would leave, by its own token files."""
    train, val = (TokenFile.open(row.folder.parent / f"tokens.{part}.bin").header for part in ("train", "val"))
    row.folder.mkdir(exist_ok=True)
    (row.folder / "run.json").write_text(json.dumps({
        "format": 1, "recipe": asdict(row.recipe), "tokenizer": train["tokenizer"], "vocab_size": 400,
        "train": {"file": "train.bin", "payload_sha256": train["payload_sha256"], "order_sha256": "0"},
        "val": {"file": "val.bin", "payload_sha256": val["payload_sha256"]}, "device": "cpu",
        "dtype": "float32", "params": 1000, "core_params": 600, "hardware": "CPU, 2 threads",
        "processes": 1, "versions": {}}))
    (row.folder / name).write_text(json.dumps(asdict(ENDING) | changes))
    checkpoint = row.folder / "checkpoints" / f"step_{ENDING.step:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        (checkpoint / file).write_bytes(b"weights")
    write_manifest(checkpoint, ENDING.step)


def executed_with(row, error="", message=""):
    """Write the executed notebook of a row."""
    cell = nbformat.v4.new_code_cell("...", metadata={"papermill": {"status": "failed" if error else "completed"}})
    if error:
        cell.outputs = [nbformat.v4.new_output("error", ename=error, evalue=message, traceback=[])]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"parameters": row.parameters}})
    nbformat.write(notebook, row.executed)


def test_an_executed_notebook_says_how_it_was_called_and_what_ended_it(grid):
    """Guards: notebook 1 run anew at every start of a grid; an error that is looked for in the last line of a log."""
    row = grid.rows[0]
    assert read_executed(row.executed) == Executed()
    executed_with(row)
    assert read_executed(row.executed) == Executed(row.parameters, is_complete=True)
    executed_with(row, "UserError", "line 1\nline 2")
    assert read_executed(row.executed) == Executed(row.parameters, False, "UserError", "line 1\nline 2")
    row.executed.write_text("{")
    assert read_executed(row.executed) == Executed()


def test_only_a_done_of_the_same_settings_and_tokens_is_done(grid):
    """Guards: a row that is skipped for another one's result; a finished one that is trained again."""
    row = grid.rows[0]
    assert _find_state(row).status == "waiting"
    end(row)
    assert (_find_state(row).status, _find_state(row).reason) == ("done", "max_steps")
    other = replace(row.recipe, training=replace(row.recipe.training, seed=5))
    assert _find_state(replace(row, recipe=other)).status == "waiting"
    elsewhere = replace(row.recipe, training=replace(row.recipe.training, device="cpu", log_interval=3))
    assert _find_state(replace(row, recipe=elsewhere)).status == "done"
    (row.folder / "checkpoints" / "step_00000020" / "model.safetensors").unlink()
    assert _find_state(row).status == "waiting", "the zip to download has no weights, either"
    end(row)
    (row.folder / "DONE.json").write_text('{"reason": "max_')
    assert _find_state(row).status == "waiting"
    end(row)
    train, val = (row.folder.parent / f"tokens.{part}.bin" for part in ("train", "val"))
    train.unlink()
    os.link(val, train)
    assert _find_state(row).status == "waiting"


def test_a_row_is_judged_by_its_run_folder_and_the_error_in_its_notebook(grid, capsys):
    """Guards: a dead kernel that counts as done; a stop of yesterday that hides today's failure."""
    row = grid.rows[0]

    def judged(code, *error):
        executed_with(row, *error)
        state = _judge(row, code)
        return state.status, state.reason, state.error

    assert judged(0) == judged(1)
    assert judged(0)[1] == "it ended without an error and without a result; the machine may have run out of memory"
    assert judged(1, "UserError", "found this.\nDo that.") == ("failed", "found this. Do that.", "UserError")
    end(row, "STOPPED.json", reason="time budget")
    assert judged(0) == ("stopped", "time budget", "")
    assert judged(1, "RuntimeError", "boom") == ("failed", "RuntimeError: boom", "RuntimeError")
    end(row)
    assert judged(1, "RuntimeError", "the figure") == ("done", "max_steps", "")
    assert "is done, and its notebook failed after that: RuntimeError: the figure" in capsys.readouterr().err


def test_the_summary_has_a_tidy_row_for_every_run(grid):
    """Guards: a column twice; numbers of another run; counts of tokens rounded to nine digits; missing rows."""
    rows = grid.rows
    end(rows[0], tokens_seen=12_345_678_901, best_val_loss=1 / 3)
    end(rows[1], "STOPPED.json", reason="time budget", step=7)
    end(rows[2])
    states = [_find_state(rows[0]), _find_state(rows[1]), State(rows[2], "failed", "the cable came out"),
              *(State(row) for row in rows[3:])]
    _write_summary(states, grid)
    with (grid.out / "summary.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:6] == ["run", "status", "reason", "model", "overrides", "params"]
    assert len(set(table[0])) == len(table[0]) == 18 and len(table) == 6
    assert [row["status"] for row in table] == ["done", "stopped", "failed", "waiting", "waiting", "waiting"]
    assert (table[0]["tokens_seen"], table[0]["best_val_loss"]) == ("12345678901", "0.333333333")
    assert (table[1]["step"], table[1]["hardware"], table[1]["learning_rate"]) == ("7", "CPU, 2 threads", "0.01")
    assert (table[2]["reason"], table[2]["best_val_loss"]) == ("the cable came out", "")
    assert states[1].advice == "bdh_learning_rate-0.01 stopped: time budget (the same command continues it)"
    assert states[2].advice.startswith("bdh_learning_rate-0.1 failed: the cable came out (see ")


def test_the_end_of_a_grid_names_the_best_run_and_the_comparison(grid, monkeypatch):
    """Guards: a grid whose user must find out by himself which run is best, and how runs are compared."""
    end(grid.rows[0])
    end(grid.rows[1], best_val_loss=1.125)
    end(grid.rows[2], "STOPPED.json", reason="time budget", best_val_loss=0.5)
    states = [_find_state(row) for row in grid.rows]
    monkeypatch.setattr(sys, "argv", ["tools/run_suite.py"])
    best, following = describe_best(grid, states).splitlines()
    assert best.startswith(f"best: {grid.rows[1].run}, validation loss 1.1250 ")
    runs = [str(row.folder) for row in grid.rows[:2]]
    assert shlex.split(following)[:9] == ["next:", "python", "tools/compare.py", *runs, "--data",
                                          str(grid.out / "tokens.test.bin"), "--train",
                                          str(grid.out / "tokens.train.bin")]
    assert describe_best(grid, states[2:]) == ""


def test_one_line_tells_how_far_a_grid_is(grid):
    """Guards: a log file full of control characters; a night without a word of how far it is."""
    end(grid.rows[0])
    log = RunLog(grid.rows[5].folder / "log.csv", -1)
    states = [_find_state(grid.rows[0]), *(State(row) for row in grid.rows[1:5]), State(grid.rows[5], "running")]
    log.append(step=5, elapsed_s=1.5)
    assert _progress_line(states) == (
        "1 done, 1 running, 4 waiting (gpt2_learning_rate-0.1 at 25 %, step 5 of 20); about 19 s left")
    assert _progress_line(states[:1]) == "1 done"


def test_the_time_left_of_a_grid_falls_while_its_rows_train(grid):
    """Guards: a forecast that grows, because a running row counts as untouched; none before the first row is done."""
    states, left = [State(row, "running") for row in grid.rows[:2]] + [State(grid.rows[2])], []
    assert "left" not in _progress_line(states)
    for step in range(1, 19):
        for i, row in enumerate(grid.rows[:2], 1):
            RunLog(row.folder / "log.csv", step).append(step=step, elapsed_s=10.0 * i * step)
        left.append(re.search(r"about (.*) left", _progress_line(states))[1])
    assert (left[0], left[8], left[-1]) == ("7 min", "5 min", "3 min") and left == sorted(left, reverse=True)


def test_the_best_rate_is_chosen_on_validation_and_an_edge_is_reported(grid, tmp_path, capsys):
    """Guards: a rate at the edge of the grid reported as the best there is; a diverged run that is chosen or hidden."""
    losses = (1.5, 1.2, 1.3, 1.1, 1.2, 1.3)
    runs = [(row.recipe, replace(ENDING, best_val_loss=loss)) for row, loss in zip(grid.rows, losses, strict=True)]
    _write_rates(runs, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("bdh: of 3 learning rates from 0.001 to 0.1, 0.01 is best on validation, with a loss of "
                        "1.2000.")
    assert "gpt2" in lines[1] and "It is the smallest one tried" in lines[1]
    assert (tmp_path / "learning_rates.csv").read_text().splitlines()[:3] == [
        "model,learning_rate,best_val_loss,chosen,at_edge,settings", "bdh,0.001,1.5,False,True,",
        "bdh,0.01,1.2,True,False,"]
    runs[2] = runs[2][0], replace(ENDING, reason=Reason.NON_FINITE, best_val_loss=0.9)
    rows = _compare_rates(runs)
    assert rows["best_val_loss"].isna()[2] and not rows["chosen"][2] and "0.01 is best" in _describe_rates(rows)
    assert list(_compare_rates(runs[:2] + runs[3:])["model"]) == ["gpt2"] * 3
    seeds = [(replace(recipe, training=replace(recipe.training, seed=i)), ENDING) for i, (recipe, _) in enumerate(runs)]
    assert _compare_rates(seeds).empty
    widths = [(replace(recipe, architecture=recipe.architecture | {"n_embd": 32}), ENDING) for recipe, _ in runs[:3]]
    assert set(_compare_rates([*runs, *widths])["settings"]) == {"n_embd=16", "n_embd=32", ""}
    _write_rates([], tmp_path)
    assert capsys.readouterr().out == "" and not (tmp_path / "learning_rates.csv").exists()


def test_a_folder_with_another_grids_summary_is_refused(grid, tmp_path):
    """Guards: learning rates, found in hours, written over by the next grid in the same folder."""
    path = tmp_path / "summary.csv"
    path.write_text("run,status\nbdh_lr-0.1,done\n")
    with pytest.raises(UserError, match="is of another grid .its first run: bdh_lr-0.1.*Use another --out"):
        run_grid(grid)
    assert path.read_text() == "run,status\nbdh_lr-0.1,done\n" and not (tmp_path / ".lock").exists()


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
WAITS = FIRST + """
from plotarmour.files import write_json
from plotarmour.training.ending import StopRequest
out.mkdir()
with StopRequest() as stop:
    (out / "pid").write_text(str(os.getpid()))
    while not stop.asked:
        time.sleep(0.05)
write_json(out / "STOPPED.json", {{"reason": stop.asked}})
"""


@pytest.fixture
def command(root, tmp_path):
    """Write a grid and its notebook; returns the command line that runs them."""
    def make(csv_text, source, parameters="", options=()):
        cells = [nbformat.v4.new_code_cell(PARAMETERS + parameters, metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(source.format(root=str(root)))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
        (tmp_path / "grid.csv").write_text(csv_text)
        return [sys.executable, str(root / "tools" / "run_suite.py"), "--grid", str(tmp_path / "grid.csv"), "--out",
                str(tmp_path / "out"), "--notebook", str(tmp_path / "n.ipynb"), *options]

    return make


def call(command):
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)


def rows_of(tmp_path):
    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def started(output):
    return [line.split()[1] for line in output.splitlines() if line.endswith(" ...") and line.startswith("[")]


@posix_only
def test_a_failed_row_stops_no_other_and_is_all_that_the_next_start_runs(command, tmp_path, capsys):
    """Guards: a night lost to its second row; a dead kernel that counts as done, a late failure that counts as none;
    finished rows that are run again."""
    command("run,trouble\na,killed\nb,exception\nc,late\nd,\n", WRITES)

    def start():
        grid = plan_grid(tmp_path / "grid.csv", "tiny", tmp_path / "out", tmp_path / "n.ipynb", at_once=2)
        states = run_grid(grid)
        assert [row["status"] for row in rows_of(tmp_path)] == [state.status for state in states]
        return states, capsys.readouterr()

    states, printed = start()
    assert [(state.status, state.reason) for state in states[1:]] == [
        ("failed", "RuntimeError: the cable came out"), ("done", "max_steps"), ("done", "max_steps")]
    assert states[0].status == "failed" and states[0].reason.startswith("it ended without an error")
    assert "warning: c is done, and its notebook failed after that" in printed.err and "Traceback" not in printed.err
    assert json.loads((tmp_path / "out" / "d" / "DONE.json").read_text())["threads"] == str(max(1, cores() // 2))
    states, printed = start()
    assert {state.status for state in states} == {"done"}
    assert sorted(started(printed.out)) == ["a", "b"] and printed.err == ""
    (tmp_path / "grid.csv").write_text("run,trouble\na,other\nd,\n")
    states, printed = start()
    assert [(state.status, state.error) for state in states] == [("failed", "UserError"), ("done", "")]
    assert "holds a run of other settings" in states[0].reason and started(printed.out) == []


@posix_only
def test_an_interrupt_lets_the_row_save_and_leaves_nobody_behind(command, tmp_path):
    """Guards: a kernel that trains on after Ctrl-C or SIGTERM; a stop that is called a failure; a lost summary."""
    process = subprocess.Popen(command("run,trouble\na,\nb,\n", WAITS), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "a" / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2, "papermill and its kernel"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 130, out + err
    assert out.startswith(f"2 runs; results go to {tmp_path / 'out'}\n"), "before the imports"
    assert err.startswith("stopping: a run that trains finishes its step and saves") and "Traceback" not in err
    assert err.splitlines()[-1].startswith("stopped; ") and err.endswith("The same command continues.\n")
    assert [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE] == []
    assert [(row["status"], row["reason"]) for row in rows_of(tmp_path)] == [("stopped", "signal SIGINT"),
                                                                             ("waiting", "")]


@posix_only
@pytest.mark.slow
def test_of_four_runs_the_three_that_die_are_named_and_alone_run_again(command, tmp_path):
    """Guards: a grid that ends with its first killed kernel, exception or full disk; a run that cannot be resumed, or
    that ends with other numbers than one that nobody killed."""
    dies = {0: ("killed", "it ended without an error"), 1: ("exception", "RuntimeError: the cable came out"),
            3: ("disk", "File too large")}
    lines = [f'{"bdh" if i % 2 else "gpt2"},"seed={i}",{dies.get(i, ("",))[0]}' for i in range(4)]
    sets = [part for s in (*SMALL, "checkpoint_interval=5", "log_interval=1", "device=cpu") for part in ("--set", s)]
    grid = command("model,overrides,trouble\n" + "\n".join(lines), TRAINS,
                   'model = "bdh"\nrecipe = "tiny"\noverrides = ""\n', ("--at-once", "2", *sets))
    done = call(grid)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = rows_of(tmp_path)
    assert [i for i, row in enumerate(rows) if row["status"] != "done"] == sorted(dies)
    assert len(done.stderr.splitlines()) == 3
    for i, (_, why) in dies.items():
        assert rows[i]["status"] == "failed" and why in rows[i]["reason"], rows[i]
        assert sum(rows[i]["run"] in line and why in line for line in done.stderr.splitlines()) == 1
    assert float(rows[2]["best_val_loss"]) < 7 and rows[2]["step"] == "20"
    again = call(grid)
    assert again.returncode == 0, again.stdout + again.stderr
    assert sorted(started(again.stdout)) == sorted(rows[i]["run"] for i in dies)
    assert {row["status"] for row in rows_of(tmp_path)} == {"done"}
    assert not [path for path in (tmp_path / "out").rglob("*") if "unfinished" in path.name]
    out, data = tmp_path / "out", find_prepared(tmp_path / "out")
    train_run(restored(read_info(out / rows[0]["run"])["recipe"]), data["train"], data["val"], tmp_path / "whole")
    killed, whole = (read_log(folder / "log.csv")[["step", "tokens_seen", "train_loss", "grad_norm", "val_loss"]]
                     for folder in (out / rows[0]["run"], tmp_path / "whole"))
    pd.testing.assert_frame_equal(killed, whole, rtol=1e-5)  # other numbers of threads add in another order
