"""The curves of a run while it trains: in a notebook, one figure that is redrawn in its place.

It is an ordinary display with an id, not a widget: papermill and nbclient keep its last state in the executed notebook.
Drawing takes at most 1 % of the time, and an error in it never stops training.
"""

import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from plotarmour.cli import UserError
from plotarmour.evaluation.arms import Arm
from plotarmour.report.figures import training_curves
from plotarmour.training.log import read_log

EVERY_S = 30.0
SHARE = 0.01  # of the time, at most, goes into drawing
WAITING = "The curves appear here, after half a minute of training at the earliest."


class LiveCurves(contextlib.ExitStack):
    """Draws log.csv when told of a new row, unless it drew not long ago, and once more at the end.

    Outside notebooks it does nothing.

    Args:
        model: "bdh" or "gpt2".
        run: the run folder; the figure is its figures/training.png, too.
        every_s: seconds between two drawings, or more where drawing is slow.

    Example:
        with LiveCurves("bdh", out) as live:
            train_run(recipe, train, val, out, on_row=live.row)
    """

    def __init__(self, model: str, run: Path, every_s: float = EVERY_S):
        super().__init__()
        self.model, self.run, self.every_s = model, run, every_s
        self.handle, self.took_s, self.has_failed = None, 0.0, False
        self.drawn_at = time.perf_counter()

    def __enter__(self) -> "LiveCurves":
        self.handle = _display(WAITING)
        if self.handle is not None:
            self._try(self._rehearse)
            self.drawn_at = time.perf_counter()
            self.push(self._draw_the_end)
        return self

    def row(self) -> None:
        """Draw, if it is time to; called after every row of log.csv."""
        if self.handle is None:
            return
        if time.perf_counter() - self.drawn_at >= max(self.every_s, self.took_s / SHARE):
            self._try(lambda: self._timed(self._draw))

    def _draw_the_end(self, kind: type | None, *rest) -> None:
        if not (kind and issubclass(kind, UserError)):  # which has drawn nothing new
            self._try(lambda: self._timed(self._draw))

    def _draw(self) -> None:
        log = read_log(self.run / "log.csv")
        if log["val_loss"].notna().any():
            path = self._curves(log, self.run / "figures" / "training.png")
            from IPython.display import Image

            self.handle.update(Image(data=path.read_bytes(), format="png"))

    def _curves(self, log: pd.DataFrame, path: Path) -> Path:
        return training_curves([Arm(self.model, self.model, (self.model,), (0,))], {self.model: log}, path)

    def _rehearse(self) -> None:
        """Draw twice where nobody looks: the first drawing of a process is slow, the second tells what one takes."""
        made_up = pd.DataFrame({"tokens_seen": [0, 1000], "elapsed_s": [0.0, 1.0], "train_loss": [3.0, 2.0],
                                "val_loss": [3.0, 2.0]})
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):
                self._timed(lambda: self._curves(made_up, Path(folder) / "curves.png"))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever it is: training goes on, and log.csv has the numbers
            if not self.has_failed:
                self.has_failed = True
                warnings.warn(f"the curves could not be drawn ({type(error).__name__}: {error}); training goes on, and "
                              f"its numbers are in {self.run / 'log.csv'}.", stacklevel=3)

    def _timed(self, act: Callable[[], object]) -> None:
        begun = time.perf_counter()
        try:
            act()
        finally:
            self.drawn_at = time.perf_counter()
            self.took_s = self.drawn_at - begun


def _display(text: str) -> Any:
    """Show a text that can be replaced; None outside notebooks."""
    try:
        from IPython.core.interactiveshell import InteractiveShell
        from IPython.display import Pretty, display
    except ImportError:
        return None
    return display(Pretty(text), display_id=True) if InteractiveShell.initialized() else None
