"""What a notebook shows of a run."""

import base64
import os
import time
import warnings
import zipfile
from dataclasses import replace

import nbformat
import pytest
from nbclient import NotebookClient

from plotarmour.cli import UserError
from plotarmour.evaluation.arms import Arm
from plotarmour.report.figures import training_curves
from plotarmour.suite import display
from plotarmour.suite.display import LiveCurves, describe_ending, describe_samples, download_links, list_files
from plotarmour.training.ending import Ending, Reason
from plotarmour.training.log import RunLog, add_sample, read_log

ENDING = Ending(Reason.MAX_STEPS, step=2200, tokens_seen=926179, elapsed_s=83.0, train_loss=0.5, val_loss=0.6,
                best_step=2000, best_val_loss=0.5, skipped_steps=0, scaler_overflows=0, peak_memory_mib=512.0,
                last_checkpoint=2200, micro_batch_size=4, input_wait_s=0.25)

CELL = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from plotarmour.suite import display
from plotarmour.training.log import RunLog

log, display.EVERY_S = RunLog(Path("{run}") / "log.csv", -1), 0.0
with display.LiveCurves("bdh", Path("{run}")) as curves:
    for step in range(4):
        log.append(utc="2026-11-21T09:34:00Z", step=step, tokens_seen=step, elapsed_s=step, val_loss=4.0 - step)
        curves.row()
        display.EVERY_S = 0.0 if step == 0 else 1e9  # the last rows are drawn at the end only
        if step == 1:
            print("a line to keep", file=sys.stderr)
        if step == 2 and {interrupted}:
            raise KeyboardInterrupt
"""


class Handle:
    """What display(..., display_id=True) returns; remembers what it was given."""

    def __init__(self):
        self.shown = []

    def update(self, what):
        self.shown.append(what)


@pytest.fixture
def notebook(monkeypatch):
    """As in a notebook: the handles of what is displayed, in order."""
    handles = []
    monkeypatch.setattr(display, "_display", lambda text: handles.append(Handle()) or handles[-1])
    return handles


@pytest.fixture
def log(tmp_path):
    written = RunLog(tmp_path / "log.csv", -1)
    written.append(step=0, tokens_seen=0, elapsed_s=0.0, val_loss=5.0)
    written.append(step=1, tokens_seen=9, elapsed_s=1.0, train_loss=4.0, val_loss=4.5)
    return written


def test_an_executed_notebook_holds_one_figure_as_it_last_was(root, tmp_path):
    """Guards: a figure per drawing, and nothing at all after an interrupt."""
    cells = [nbformat.v4.new_code_cell(CELL.format(root=str(root), run=run, interrupted=run == "b")) for run in "ab"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jupyter's own
        NotebookClient(nbformat.v4.new_notebook(cells=cells), allow_errors=True, kernel_name="python3",
                       resources={"metadata": {"path": str(tmp_path)}}).execute()
    for run, cell in zip("ab", cells, strict=True):
        [curves] = (output.data for output in cell.outputs if output.output_type == "display_data")
        log = read_log(tmp_path / run / "log.csv")
        arm = Arm("bdh", "bdh", ("bdh",), (0,))
        last = training_curves([arm], {"bdh": log}, tmp_path / "whole_log.png").read_bytes()
        assert len(log) == 4 - (run == "b") and base64.b64decode(curves["image/png"]) == last
        assert last == (tmp_path / run / "figures" / "training.png").read_bytes()
        assert "".join(o.text for o in cell.outputs if o.output_type == "stream") == "a line to keep\n"
    assert [o.ename for o in cells[1].outputs if o.output_type == "error"] == ["KeyboardInterrupt"]


def test_an_error_while_drawing_warns_once_and_training_goes_on(notebook, log, tmp_path, monkeypatch, warned):
    """Guards: hours of training lost to a figure."""
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(display, "training_curves", fail)
    monkeypatch.setattr(display, "EVERY_S", 0.0)
    with warned("OSError: no space left.*training continues") as messages:
        with LiveCurves("bdh", tmp_path) as curves:
            for _ in range(3):
                curves.row()
    assert len(messages) == 1


def test_drawing_takes_a_hundredth_of_the_time_at_most(notebook, log, tmp_path, monkeypatch):
    """Guards: a slow disk or a long log whose drawing eats the training."""
    now, drawn = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def draw(arms, logs, path):
        now[0] += 2.0
        drawn.append(now[0])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"png")
        return path

    monkeypatch.setattr(display, "training_curves", draw)
    with LiveCurves("bdh", tmp_path) as curves:
        drawn.clear()
        begun = now[0]
        for _ in range(10_000):
            now[0] += 1.0
            curves.row()
        spent = 2.0 * len(drawn)
    assert 0.009 * (now[0] - begun) < spent <= 0.01 * (now[0] - begun)


def test_a_users_mistake_draws_nothing(notebook, log, tmp_path):
    """Guards: the curves of another run in place of the one that was refused."""
    with pytest.raises(UserError), LiveCurves("bdh", tmp_path):
        raise UserError("another run")
    assert notebook[0].shown == [] and not (tmp_path / "figures").exists()


def test_outside_notebooks_nothing_is_drawn(log, tmp_path, monkeypatch):
    """Guards: figures for whoever calls from a script."""
    monkeypatch.setattr(display, "training_curves", None)
    monkeypatch.setattr(display, "EVERY_S", 0.0)
    with LiveCurves("bdh", tmp_path) as curves:
        curves.row()


def test_an_ending_comes_with_what_to_do_next(tmp_path):
    """Guards: a dict that the reader must decode; a stopped run that nobody knows how to continue."""
    lines = describe_ending(ENDING, tmp_path / "bdh").splitlines()
    assert lines == ["bdh      done: all steps taken", "trained  2,200 steps, 926,179 tokens, 83 s over all sessions",
                    "best     validation loss 0.5000 (perplexity 1.65) at step 2,000",
                    "waited   0.2 s for batches, in the last session",
                    "memory   0.50 GiB at most, in micro-batches of 4 rows"]
    stopped = " ".join(describe_ending(replace(ENDING, reason=Reason.SIGINT), tmp_path / "bdh").split())
    assert "stopped by signal SIGINT" in stopped and "continues from the checkpoint of step 2,200" in stopped
    assert "attach the output of this one" in stopped and "find the run bdh there" in stopped
    failed = " ".join(describe_ending(replace(ENDING, reason=Reason.NON_FINITE), tmp_path / "bdh").split())
    assert "with a lower learning_rate" in failed and "continue_from" not in failed


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "working" / "results" / "tiny" / "bdh"
    (folder / "figures").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "figures" / "training.png").write_bytes(b"png")
    for name in ("run.json", "DONE.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    RunLog(folder / "log.csv", -1).append(utc="2026-11-21T09:34:59Z", step=1)
    os.utime(folder / "log.csv", (1795253699,) * 2)
    return folder


def names_in(path):
    with zipfile.ZipFile(path) as bundle:
        return sorted(bundle.namelist())


SMALL = ["bdh/DONE.json", "bdh/figures/training.png", "bdh/log.csv", "bdh/run.json"]


def test_a_link_leads_to_a_zip_of_what_is_small_and_no_weights(run, monkeypatch):
    """Guards: gigabytes to download for a curve."""
    monkeypatch.chdir(run.parent)
    html = download_links(run, gather=True).data
    assert "href='bdh_20261121-0934.zip'" in html, "no server follows an absolute path"
    assert names_in("bdh_20261121-0934.zip") == SMALL and html.count("href") == 1


def test_on_kaggle_what_one_wants_lies_flat_in_the_working_folder(run, tmp_path, monkeypatch, warned):
    """Guards: results that one finds only in a tree of checkpoints; no weights to play with; 20 GB that are exceeded
    without a word; a grid of fifty runs that fills the working folder."""
    best = run / "checkpoints" / "step_00000001"
    best.mkdir()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        (best / name).write_bytes(b"weights")
    monkeypatch.setattr(display, "find_checkpoint", lambda *_: best)
    monkeypatch.setattr(display.machine, "host", lambda: "kaggle")
    monkeypatch.setattr(display.machine, "KAGGLE", tmp_path)
    monkeypatch.chdir(tmp_path / "working")
    assert "results/tiny/bdh_2026" in download_links(run).data and os.listdir() == ["results"]
    html = download_links(run, gather=True).data
    names = ["bdh_20261121-0934.zip", "bdh_best.zip", "bdh_log.csv", "bdh_training.png"]
    assert sorted(os.listdir()) == [*names, "results"] and all(f"href='{name}'" in html for name in names)
    assert names_in("bdh_best.zip") == sorted([*SMALL, "bdh/tokenizer.json", *(
        f"bdh/checkpoints/step_00000001/{name}" for name in ("model.safetensors", "state.json"))])
    monkeypatch.setattr(display.machine, "free_disk", lambda folder: 2**30)
    with warned("has 1.0 GiB left of the 20 that Kaggle keeps"):
        download_links(run, gather=True)


def test_a_list_of_files_has_a_line_for_each_run_and_no_hidden_folders(tmp_path):
    """Guards: pages of checkpoints below a notebook that trains 20 runs; the lock of a grid; sizes of "0.000" MiB."""
    for name in (".lock/owner.json", ".hidden", "figures/a.png", "run/run.json", "run/checkpoints/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x" * 812)
    (tmp_path / "data.bin").write_bytes(bytes(3 * 2**10))
    assert list_files(tmp_path).splitlines()[1:] == ["     3.0 KiB  data.bin", "   812 bytes  figures/a.png",
                                                     "     1.6 KiB  run/ (a run)"]
    assert [line.split()[-1] for line in list_files(tmp_path / "run").splitlines()] == [
        f"{tmp_path / 'run'}:", "checkpoints/model", "run.json"]


def test_a_run_that_has_not_begun_is_refused(tmp_path):
    """Guards: an empty zip with a made-up name."""
    with pytest.raises(UserError, match="has no CSV; expected"):
        download_links(tmp_path)


def test_samples_are_listed_by_step(tmp_path):
    """Guards: a missing table that ends notebook 02; long samples that run out of the page."""
    assert describe_samples(tmp_path) == "no samples yet"
    add_sample(tmp_path, 512, "Once upon a time")
    add_sample(tmp_path, 1024, "Once upon a time " * 8)
    lines = describe_samples(tmp_path).splitlines()
    assert lines[0] == "step 512    Once upon a time" and lines[1].startswith("step 1,024  Once")
    assert lines[2].startswith(" " * 12) and max(map(len, lines)) <= 100
