"""Grids before and after they run: reading, checking, naming, judging, telling."""

import csv
import io
import json
import os
import time
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.suite import grid_state
from plotarmour.suite.grid import is_safe, parameters_of, read_grid, run_name
from plotarmour.suite.grid_plan import data_parameters, plan_grid, slots
from plotarmour.suite.grid_runs import check_summary, tell_failures
from plotarmour.suite.grid_state import State, find_state, judge, stamps, summary_row, write_summary
from plotarmour.suite.grid_table import Table, event_line, table_lines, time_left
from plotarmour.suite.learning_rates import compare_rates, tell_rates, write_rates
from plotarmour.suite.notebooks import ROOT
from plotarmour.suite.papermill import called_with
from plotarmour.suite.steps import prepare
from plotarmour.training.checkpoint import FILES, write_manifest
from plotarmour.training.log import COLUMNS

TRAIN = ROOT / "notebooks" / "02_train.ipynb"
SMALL = ["corpus_stories=300", "tokenizer=bpe:400", "split=8:1:1", "n_embd=16", "max_steps=20", "warmup_steps=2",
         "eval_tokens=200", "eval_interval=5"]
RATES = "model,overrides\n" + "".join(f"{m},learning_rate={r}\n" for m in ("bdh", "gpt2") for r in (0.001, 0.01, 0.1))
FINAL = {"reason": "max_steps", "step": 20, "tokens_seen": 8000, "best_step": 20, "best_val_loss": 1.25,
         "val_loss": 1.5, "elapsed_s": 3.5, "peak_memory_mib": 512.0}


@pytest.fixture
def written(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "grid.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return path

    return write


@pytest.fixture
def notebook(tmp_path):
    def write(source, tags=("parameters",)):
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
        return tmp_path / "n.ipynb"

    return write


def plan(path, tmp_path, overrides=SMALL, **options):
    return plan_grid(path, options.pop("notebook", TRAIN), "tiny", tmp_path / "out", overrides=list(overrides),
                     **options)


def end(job, name="DONE.json", **changes):
    """Leave of a row what a run would leave, by its own token files."""
    info = grid_state.TokenFile.open(job.folder.parent / "tokens.train.bin").header
    val = grid_state.TokenFile.open(job.folder.parent / "tokens.val.bin").header
    job.folder.mkdir(exist_ok=True)
    (job.folder / "run.json").write_text(json.dumps({
        "format": 1, "recipe": job.recipe.to_dict(), "tokenizer": info["tokenizer"], "vocab_size": 400,
        "train": {"payload_sha256": info["payload_sha256"]}, "val": {"payload_sha256": val["payload_sha256"]},
        "dtype": "float32", "params": 1000, "params_non_embedding": 600, "hardware": "CPU, 2 threads"}))
    (job.folder / name).write_text(json.dumps(FINAL | changes))
    checkpoint = job.folder / "checkpoints" / f"step_{FINAL['step']:08d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        (checkpoint / file).write_bytes(b"weights")
    write_manifest(checkpoint, FINAL["step"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Token files of a small built-in corpus, and six rows: two models, three learning rates."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "grid.csv").write_text(RATES)
    grid, jobs = plan(folder / "grid.csv", folder)
    prepare(jobs[0].recipe, folder / "out")
    return grid, jobs


@pytest.fixture
def rates(prepared, tmp_path):
    """The grid and its jobs with empty run folders of their own."""
    grid, jobs = prepared
    for part in ("train", "val", "test"):
        os.link(jobs[0].folder.parent / f"tokens.{part}.bin", tmp_path / f"tokens.{part}.bin")
    return grid, [replace(job, folder=tmp_path / job.row.run, executed=tmp_path / f"{job.row.run}.ipynb")
                  for job in jobs]


def test_values_have_the_types_of_the_notebooks_defaults(written, notebook):
    """Guards: a number that arrives as text; a byte order mark in the first name; a comma that splits a cell."""
    path = written('\ufeffrun, rate ,n,deep,text\r\n"a",4e-3,2,TRUE,"x, ""y"""\r\n\r\nb,1,,false,\r\n')
    source = 'run = ""\nresults = ""\ntext = ""\nrate: float = 1.5\nn = -1\ndeep = False'
    grid, wrong = read_grid(path, notebook(source))
    assert wrong == [] and [row.run for row in grid.rows] == ["a", "b"] and [row.line for row in grid.rows] == [2, 4]
    assert grid.rows[0].values == {"rate": 0.004, "n": 2, "deep": True, "text": 'x, "y"'}
    assert grid.rows[1].values == {"rate": 1.0, "deep": False} and type(grid.rows[1].values["rate"]) is float


def test_all_mistakes_are_told_at_once(written, tmp_path):
    """Guards: a grid that is mended ten times, or whose ninth row is found wrong after a night."""
    path = written("model,overrides,gpus,depth,model\nbdh,,1,,\n")
    with pytest.raises(UserError) as refused:
        plan(path, tmp_path)
    told = str(refused.value).splitlines()
    assert "unknown column 'depth'; the parameters of 02_train.ipynb are model, recipe, run," in told[0]
    assert "column model is there twice" in told[1]
    path = written("model,overrides,gpus,extend\nbdh,,two,\ngpt2,n_head=5,,\nbdh,maxsteps=3,,yes\nbdh,seed=1\n"
                   "gtp2,,,\nbdh,seed=7,,\nbdh,seed=7,,\nbdh,seed= 7,,\n,,,\nbdh,corpus_stories=9,,\n")
    with pytest.raises(UserError) as refused:
        plan(path, tmp_path, text=tmp_path / "nowhere.txt")
    told = str(refused.value)
    for part in ("line 2: gpus = 'two' is not a whole number", "line 4: recipe tiny (bdh): --set maxsteps=3: unknown",
                 "line 4: extend = 'yes' is not True or False",
                 "line 5: 2 cells; expected 4", "line 8: the same as line 7", "line 10: all cells are empty",
                 "line 3: recipe tiny (gpt2): ", "line 6: unknown model 'gtp2' (did you mean 'gpt2'?)",
                 "line 9: it trains the same as line 7",
                 "line 11: it needs other token files than line 2: corpus_stories is 9, there 300", "nowhere.txt does"):
        assert part in told, part
    assert told.count("\n") == 10 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty; expected a header"), ("model\n", "has a header and no rows"),
    ('model,overrides\nbdh,\n"bdh,seed=1\ngpt2,\n', "line 3: a quote is opened and not closed"),
    ('model,overrides\nbdh,"seed=1"2\n', "line 2: ',' expected after '\"'"),
    ("model\nb\xe9\n".encode("latin-1"), "is not UTF-8: byte 0xe9 at offset 7"),
    ("model;overrides\nbdh;seed=1\n", "cells are separated by commas"),
    ("results\nx\n", "the column results is what --out says"), ("reason\nx\n", "is a column of summary.csv"),
    ("run\na b\n", "'a b' cannot be the name of a run folder"), ("run\nnotebooks\n", "cannot be the name"),
    ("run,overrides\nA,seed=1\na,seed=2\n", "line 3: its run has the name a of the one in line 2"),
])
def test_a_file_that_is_no_grid_is_one_line(written, tmp_path, text, message):
    """Guards: a traceback of the csv module; a run folder that replaces others; Run and run in one place on a Mac."""
    with pytest.raises(UserError) as refused:
        plan(written(text), tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("source", "message"), [
    (None, "does not exist"), ("not a notebook", "cannot be read as a notebook"),
    (("run = ''", ()), "no cell tagged parameters"), (("run = = 1",), "not Python (line 1"),
    (("x = 1",), "has no parameter results; expected results and run"),
])
def test_a_notebook_without_parameters_is_one_line(written, notebook, tmp_path, source, message):
    """Guards: papermill started on what it cannot parameterize; a row whose end nobody can see."""
    path = tmp_path / "n.ipynb"
    if isinstance(source, tuple):
        notebook(*source)
    elif source:
        path.write_text(source)
    with pytest.raises(UserError) as refused:
        plan(written("x\n1\n"), tmp_path, (), notebook=path)
    assert message in str(refused.value).splitlines()[0]
    assert parameters_of(TRAIN)["from_step"] == -1


def test_names_come_from_the_rows_own_values(written):
    """Guards: a run that changes its folder when a row is put before it; a name that is no folder's."""
    texts = ["gpt2,learning_rate=0.004;seed=2,", 'bdh,"seed=1",2', "bdh,,"]
    names = {}
    for order in ([0, 1, 2], [2, 0], [1]):
        grid, wrong = read_grid(written("model,overrides,gpus\n" + "\n".join(texts[i] for i in order)), TRAIN)
        assert wrong == []
        for i, row in zip(order, grid.rows, strict=True):
            assert names.setdefault(i, row.run) == row.run
    assert list(names.values()) == ["gpt2_learning_rate-0.004_seed-2", "bdh_gpus-2_seed-1", "bdh"]
    assert run_name({"overrides": "seed=2;learning_rate=1"}, {"model": "bdh"}) == "bdh_learning_rate-1_seed-2"
    odd = [run_name({"recipe": text}, {"model": "bdh"}) for text in ("/a b/x.toml", "/a-b/x.toml", "y" * 300)]
    assert len(set(odd)) == 3 and all(is_safe(name) and len(name) <= 64 for name in odd)
    assert not any(map(is_safe, ("", "..", "a/b", "con", "NUL.txt", "tokens.train.bin", "summary.csv", "é", "a.")))


def test_rows_get_their_share_of_the_machine(prepared, monkeypatch):
    """Guards: two runs on one GPU; every run with all cores; a GPU number that means another one in the run."""
    jobs = prepared[1]
    assert slots(1, jobs, 4) == [{}]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert slots(3, jobs, 4) == [{"OMP_NUM_THREADS": "1"}] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(2, jobs, 8)] == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(2, jobs, 8)] == ["3", "GPU-5f"]
    with pytest.raises(UserError, match="--at-once 3, and torch sees 2 GPUs here.*Set --at-once 2"):
        slots(3, jobs)
    with pytest.raises(UserError, match="expected 1 or more"):
        slots(0, jobs)
    with pytest.raises(UserError, match="asks for several"):
        slots(2, [replace(jobs[0], parameters=jobs[0].parameters | {"gpus": 2})])


def test_notebook_1_gets_what_makes_tokens_and_nothing_else(written, tmp_path):
    """Guards: token files of other settings than the rows'; a shape of GPT-2 that is none for BDH."""
    _, jobs = plan(written("model,overrides\ngpt2,n_head=8;n_embd=24;context_length=40\n"), tmp_path)
    assert data_parameters(jobs, None, None)["overrides"] == (
        "corpus_stories=300;tokenizer=bpe:400;split=8:1:1;context_length=40")
    assert jobs[0].parameters["overrides"].endswith("eval_interval=5;n_head=8;n_embd=24;context_length=40")


@pytest.mark.parametrize(("said", "whole"), [
    ({"end_time": "2026-11-21T16:09:58", "exception": None}, True), ({"end_time": "2026", "exception": True}, False),
    ({"end_time": None, "exception": None}, False),
])
def test_an_executed_notebook_says_how_it_was_called_and_whether_it_is_whole(tmp_path, said, whole):
    """Guards: notebook 1 run anew at every start of a grid; one that failed taken for one that has made everything."""
    notebook = nbformat.v4.new_notebook(metadata={"papermill": {"parameters": {"recipe": "tiny"}} | said})
    nbformat.write(notebook, tmp_path / "n.ipynb")
    assert called_with(tmp_path / "n.ipynb") == ({"recipe": "tiny"}, whole)
    assert called_with(tmp_path / "nowhere.ipynb") == ({}, False)


def test_only_a_done_of_the_same_settings_and_tokens_is_done(rates):
    """Guards: a row that is skipped for another one's result; a finished one that is trained again."""
    _, jobs = rates
    job = jobs[0]
    assert find_state(job).status == "waiting"
    end(job)
    assert (find_state(job).status, find_state(job).reason) == ("skipped", "max_steps")
    other = replace(job.recipe, training=replace(job.recipe.training, seed=5))
    assert find_state(replace(job, recipe=other)).status == "waiting"
    elsewhere = replace(job.recipe, training=replace(job.recipe.training, device="cpu", log_interval=3))
    assert find_state(replace(job, recipe=elsewhere)).status == "skipped"
    (job.folder / "checkpoints" / "step_00000020" / "model.safetensors").unlink()
    assert find_state(job).status == "waiting", "the zip to download has no weights, either"
    assert judge(job, stamps(job), 0, "") == ("failed", f"its last checkpoint in {job.folder} is missing or damaged")
    end(job)
    (job.folder / "DONE.json").write_text('{"reason": "max_')
    assert find_state(job).status == "waiting"
    end(job)
    train, val = (job.folder.parent / f"tokens.{part}.bin" for part in ("train", "val"))
    train.unlink()
    os.link(val, train)
    assert find_state(job).status == "waiting"


def test_a_row_is_judged_by_its_folder_and_not_by_papermill(rates):
    """Guards: a dead kernel that counts as done; a stop of yesterday that hides today's failure."""
    job = rates[1][0]
    before = stamps(job)
    assert judge(job, before, 0, "Executing: 100%")[0] == "failed"
    assert judge(job, before, 1, "nbclient.exceptions.DeadKernelError: Kernel died")[1].startswith("its kernel was")
    assert judge(job, before, 1, "plotarmour.cli.UserError: found this.") == ("failed", "found this.")
    assert judge(job, before, None, "", interrupted=True) == ("stopped", "interrupted")
    end(job, "STOPPED.json", reason="time budget")
    assert judge(job, before, 1, "") == ("stopped", "time budget")
    assert judge(job, stamps(job), 1, "RuntimeError: boom") == ("failed", "RuntimeError: boom")
    end(job)
    assert judge(job, before, 1, "RuntimeError: the figure") == ("done", "max_steps")


def test_the_summary_has_a_tidy_row_for_every_run(rates, tmp_path):
    """Guards: a column twice; numbers of another run; counts of tokens rounded to nine digits; missing rows."""
    grid, jobs = rates
    end(jobs[0], tokens_seen=12_345_678_901, best_val_loss=1 / 3)
    end(jobs[1], "STOPPED.json", reason="time budget", step=7)
    end(jobs[2])
    states = [find_state(jobs[0]), find_state(jobs[1]), State(jobs[2], "failed", "line 1\nline 2"),
              *(State(job) for job in jobs[3:])]
    write_summary(states, grid, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["run", "status", "reason", "model", "overrides", "params"]
    assert len(set(rows[0])) == len(rows[0]) == 18 and len(rows) == 6
    assert [row["status"] for row in rows] == ["done", "stopped", "failed", "waiting", "waiting", "waiting"]
    assert (rows[0]["tokens_seen"], rows[0]["best_val_loss"]) == ("12345678901", "0.333333333")
    assert rows[1]["step"] == "7" and rows[1]["hardware"] == "CPU, 2 threads" and rows[1]["learning_rate"] == "0.01"
    assert rows[2]["reason"] == "line 1 line 2" and rows[2]["best_val_loss"] == "" and rows[2]["learning_rate"] == "0.1"
    assert summary_row(State(replace(jobs[0], recipe=None)), grid)["model"] == "bdh"  # the grid's own, where else?
    assert [line.split(":")[0] for line in tell_failures(states)][:2] == [
        "bdh_learning_rate-0.01 stopped", "bdh_learning_rate-0.1 failed"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_table_is_redrawn_in_its_place_and_elsewhere_events_are_lines(rates, monkeypatch):
    """Guards: a log file full of control characters; a table that scrolls; running rows that a small screen hides."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "9")
    _, jobs = rates
    end(jobs[0])
    for job, step in ((jobs[0], 20), (jobs[5], 5)):
        job.folder.mkdir(exist_ok=True)
        head = ",".join(COLUMNS)
        (job.folder / "log.csv").write_text(f"{head}\nutc,{step},0,9,1,,2.5,,2.25,,,,,,\nutc,{step + 1},")
    states = [State(jobs[0], "done", "max_steps", 0.0, 8.0), *(State(job) for job in jobs[1:5]),
              State(jobs[5], "running", begun=time.monotonic() - 2)]
    assert 36.0 < time_left(states, 1) < 40.5 and 16.0 < time_left(states, 2) < 22.0
    lines = table_lines(states, 1, 5, 80)
    assert len(lines) == 5 and any("running" in line and "5 of 20    2.2500" in line for line in lines)
    assert lines[-1].startswith("1 done, 1 running, 4 waiting; about") and "3 rows not shown" in lines[-1]
    assert "…g_rate-0.1  running" in table_lines(states, 1, 9, 57)[6]
    terminal, file = Terminal(), io.StringIO()
    for out in (terminal, file):
        table = Table(1, out)
        for _ in range(2):
            table.event(states, 0)
            table.draw(states)
    drawn = terminal.getvalue()
    assert drawn.count("\x1b[7A") == 1 and drawn.count("\n") == 14 and all(len(x) < 70 for x in drawn.split("\n"))
    assert "\x1b" not in file.getvalue() and file.getvalue().count("\n") == 2
    assert event_line(states, 0, 1).startswith("[1/6] bdh_learning_rate-0.001 done in 8 s, validation loss 1.2500 |")
    assert time_left([State(jobs[0], "skipped")], 1) is None


def test_the_best_rate_is_chosen_on_validation_and_an_edge_is_said(rates, tmp_path):
    """Guards: a rate at the edge of the grid reported as the best there is; a diverged run that is chosen or hidden."""
    _, jobs = rates
    for job, loss in zip(jobs, (1.5, 1.2, 1.3, 1.1, 1.2, 1.3), strict=True):
        end(job, best_val_loss=loss)
    text = write_rates([find_state(job) for job in jobs], tmp_path)
    assert text.splitlines()[0] == ("bdh: of 3 learning rates from 0.001 to 0.1, 0.01 is best on validation, with a "
                                    "loss of 1.2000.")
    assert "gpt2" in text.splitlines()[1] and "It is the smallest one tried" in text.splitlines()[1]
    assert (tmp_path / "learning_rates.csv").read_text().splitlines()[:3] == [
        "model,learning_rate,best_val_loss,chosen,at_edge,settings", "bdh,0.001,1.5,False,True,",
        "bdh,0.01,1.2,True,False,"]
    (jobs[2].folder / "DONE.json").unlink()
    end(jobs[2], "STOPPED.json", reason="non-finite", best_val_loss=0.9)
    rows = compare_rates([find_state(job) for job in jobs])
    assert rows[2]["best_val_loss"] is None and not rows[2]["chosen"] and rows[1]["chosen"]
    assert "0.01 is best" in tell_rates(rows)
    (jobs[2].folder / "STOPPED.json").unlink()
    assert [row["model"] for row in compare_rates([find_state(job) for job in jobs])] == ["gpt2"] * 3
    seeds = [replace(job, recipe=replace(job.recipe, training=replace(job.recipe.training, seed=i)))
             for i, job in enumerate(jobs)]
    for job in seeds:
        end(job)
    assert compare_rates([find_state(job) for job in seeds]) == []
    assert write_rates([], tmp_path) == "" and not (tmp_path / "learning_rates.csv").exists()


def test_a_folder_with_another_grids_summary_is_refused(tmp_path):
    """Guards: learning rates, found in hours, written over by the next grid in the same folder."""
    path = tmp_path / "summary.csv"
    path.write_text("run,status\nbdh_lr-0.1,done\n")
    jobs = [SimpleNamespace(row=SimpleNamespace(run=name)) for name in ("bdh_seed-1", "bdh_seed-2")]
    with pytest.raises(UserError, match="is of another grid .its first run: bdh_lr-0.1.*Use another --out"):
        check_summary(path, jobs)
    path.write_text("run,status\nbdh_seed-1,done\nold,failed\n")
    check_summary(path, jobs)  # a grid that was changed
