"""The curves of a run while it trains: in a notebook, one figure that is redrawn in its place.

It is an ordinary display with an id, not a widget: papermill and nbclient keep its last state in the executed notebook.
Drawing takes at most 1 % of the time, and an error in it never stops training.
"""

import time
import warnings
from pathlib import Path
from typing import Any

from plotarmour.cli import UserError
from plotarmour.evaluation.arms import Arm
from plotarmour.report.figures import training_curves
from plotarmour.training.log import read_log

EVERY_S = 30.0
SHARE = 0.01  # largest share of the time that drawing takes
WAITING = "The curves appear here, after half a minute of training at the earliest."


class LiveCurves:
    """Draws the curves of log.csv during training and once more at its end; outside notebooks it does nothing.

    Args:
        model: kind of the model.
        run: the run folder; the figure is also written to its figures/training.png.
        every_s: least seconds between two drawings.

    Example:
        with LiveCurves("bdh", out) as live:
            train_run(recipe, train, val, out, on_row=live.row)
    """

    def __init__(self, model: str, run: Path, every_s: float = EVERY_S):
        self.arm, self.run, self.every_s = Arm(model, model, (model,), (0,)), run, every_s
        self.handle, self.took_s = None, 0.0

    def __enter__(self) -> "LiveCurves":
        self.handle = _display(WAITING)
        self.drawn_at = time.perf_counter()
        return self

    def __exit__(self, kind: type | None, *rest) -> None:
        if not (kind and issubclass(kind, UserError)):  # a refused run has no new rows
            self._draw()

    def row(self) -> None:
        """Draw if it is time to; called after every row of log.csv."""
        if time.perf_counter() - self.drawn_at >= max(self.every_s, self.took_s / SHARE):
            self._draw()

    def _draw(self) -> None:
        """Replace the figure; after an error, warn and draw no more."""
        if self.handle is None:
            return
        from IPython.display import Image

        begun = time.perf_counter()
        try:
            log = read_log(self.run / "log.csv")
            if log["val_loss"].notna().any():
                path = training_curves([self.arm], {self.arm.name: log}, self.run / "figures" / "training.png")
                self.handle.update(Image(data=path.read_bytes(), format="png"))
        except Exception as error:  # of any kind: training continues, and log.csv has the numbers
            self.handle = None
            warnings.warn(f"the curves could not be drawn ({type(error).__name__}: {error}); training continues, and "
                          f"its numbers are in {self.run / 'log.csv'}.", stacklevel=3)
        self.drawn_at = time.perf_counter()
        self.took_s = self.drawn_at - begun


def _display(text: str) -> Any:
    """Display a text that can be replaced later, and return its handle; None outside notebooks."""
    try:
        from IPython.core.interactiveshell import InteractiveShell
        from IPython.display import Pretty, display
    except ImportError:
        return None
    return display(Pretty(text), display_id=True) if InteractiveShell.initialized() else None
