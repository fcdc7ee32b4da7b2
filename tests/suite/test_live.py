import base64
import sys
import time
import warnings

import nbformat
import pytest
from nbclient import NotebookClient

from plotarmour.cli import UserError
from plotarmour.evaluation.arms import Arm
from plotarmour.report.figures import training_curves
from plotarmour.suite import live
from plotarmour.suite.live import LiveCurves
from plotarmour.training.log import RunLog, read_log

CELL = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from plotarmour.suite.live import LiveCurves
from plotarmour.training.log import RunLog

log = RunLog(Path("{run}") / "log.csv", -1)
with LiveCurves("bdh", Path("{run}"), every_s=0.0) as curves:
    for step in range(4):
        log.append(utc="2026-11-21T09:34:00Z", step=step, tokens_seen=step, elapsed_s=step, val_loss=4.0 - step)
        curves.row()
        curves.every_s = 0.0 if step == 0 else 1e9  # the last rows are drawn at the end only
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
    monkeypatch.setattr(live, "_display", lambda text: handles.append(Handle()) or handles[-1])
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


def test_an_error_while_drawing_warns_once_and_training_goes_on(notebook, log, tmp_path, monkeypatch):
    """Guards: hours of training lost to a figure."""
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(live, "training_curves", fail)
    with pytest.warns(UserWarning, match="OSError: no space left.*training continues") as warned:
        with LiveCurves("bdh", tmp_path, every_s=0.0) as curves:
            for _ in range(3):
                curves.row()
    assert len(warned) == 1


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

    monkeypatch.setattr(live, "training_curves", draw)
    with LiveCurves("bdh", tmp_path, every_s=30.0) as curves:
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
    """Guards: figures and other standard error for whoever calls from a script."""
    monkeypatch.setattr(live, "training_curves", None)
    before = sys.stderr
    with LiveCurves("bdh", tmp_path, every_s=0.0) as curves:
        curves.row()
        assert sys.stderr is before
