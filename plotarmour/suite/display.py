"""What a notebook displays of a run: its settings, its curves while it trains, how it ended, its files."""

import os
import shutil
import tempfile
import textwrap
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from plotarmour.cli import UserError, duration, file_size, warn
from plotarmour.config import Recipe
from plotarmour.evaluation.arms import Arm
from plotarmour.report.figures import training_curves
from plotarmour.training.ending import Ending, Reason
from plotarmour.training.log import read_log

SHARE = 0.01  # largest share of the time that drawing takes
WIDTH = 100  # characters of a line
WAITING = "The curves appear here, after half a minute of training at the earliest."
NEW_SESSION = " In a new session, attach the output of this one first, and set continue_from to its run folder {run}."


def describe_recipe(recipe: Recipe, *only: str) -> str:
    """Return the settings of a resolved recipe, by group, in lines of at most 100 characters.

    The groups are the model's kind, "data" and "training", or `only` some of them.
    """
    groups = {recipe.model: recipe.architecture, "data": vars(recipe.data),
              "training": vars(recipe.training) | {"tokens_per_step": f"at most {recipe.training.tokens_per_step:,}"}}
    return _two_columns({name: ", ".join(f"{key} {value}" for key, value in group.items())
                         for name, group in groups.items() if name in (only or groups)})


def describe_ending(ending: Ending, run: Path) -> str:
    """Return how the run in the folder `run` ended, in lines for people, and what to do if it is not complete."""
    rows = {run.name: ending.label,
            "trained": f"{ending.step:,} steps, {ending.tokens_seen:,} tokens, {duration(ending.elapsed_s)} over all "
                       "sessions",
            "best": ending.best,
            "waited": f"{ending.input_wait_s:.1f} s for batches, in the last session"}
    if ending.peak_memory_mib:
        rows["memory"] = (f"{ending.peak_memory_mib / 1024:.2f} GiB at most, in micro-batches of "
                          f"{ending.micro_batch_size} rows")
    if ending.skipped_steps or ending.scaler_overflows:
        rows["no update"] = (f"in {ending.skipped_steps:,} steps that were not finite, and in "
                             f"{ending.scaler_overflows:,} that overflowed float16")
    if not ending.is_done:
        rows["next"] = ending.advice("This cell, run again,")
        if ending.reason != Reason.NON_FINITE:
            rows["next"] += NEW_SESSION.format(run=run.name)
    return _two_columns(rows)


def _two_columns(rows: dict[str, str]) -> str:
    """Return names and texts in two columns, of which the second is wrapped."""
    indent = 2 + max(map(len, rows))
    return "\n".join(textwrap.fill(text, WIDTH, initial_indent=f"{name:<{indent}}", subsequent_indent=" " * indent,
                                   break_long_words=False, break_on_hyphens=False) for name, text in rows.items())


class LiveCurves:
    """Draws the curves of log.csv during training and once more at its end; outside notebooks it does nothing.

    The figure is an ordinary display with an id, not a widget: papermill and nbclient keep its last state in the
    executed notebook. It is also written to figures/training.png in the run folder. Drawing takes at most 1 % of the
    time, with at least `every_s` seconds between two drawings, and an error in it never stops training.
    """

    def __init__(self, model: str, run: Path, every_s: float = 30.0):
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
            warn(f"the curves could not be drawn ({type(error).__name__}: {error}); training continues, and "
                 f"its numbers are in {self.run / 'log.csv'}.")
        self.drawn_at = time.perf_counter()
        self.took_s = self.drawn_at - begun


def _display(text: str) -> Any:
    """Display a text that can be replaced later, and return its handle; None outside notebooks."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import Pretty, display

    return display(Pretty(text), display_id=True) if InteractiveShell.initialized() else None


def list_files(folder: Path) -> str:
    """Return the files below a folder with their sizes, one per line, without hidden ones."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return "\n".join([f"{folder}:", *(f"{file_size(folder / name):>12}  {name}" for name in shown)])


def download_link(run: Path) -> Any:
    """Zip the small files of a run folder, such as log, settings and figures, and return a link to the zip, to display.

    The zip, which has no weights, is beside the run folder. Its name ends with the UTC time of the last row of log.csv,
    as in bdh_20261121-0934.zip.

    Raises:
        UserError: the log has no row.
    """
    from IPython.display import FileLink

    log = read_log(run / "log.csv")
    if log.empty:
        raise UserError(f"{run / 'log.csv'} has no row; expected a run that has begun. Train it first.")
    name = f"{run.name}_{datetime.fromisoformat(log['utc'].iloc[-1]):%Y%m%d-%H%M}"
    with tempfile.TemporaryDirectory() as folder:
        large = shutil.ignore_patterns("checkpoints", "tokenizer.json", ".*")
        shutil.copytree(run, Path(folder) / run.name, ignore=large)
        packed = shutil.make_archive(str(run.with_name(name)), "zip", folder, run.name)
    return FileLink(os.path.relpath(packed))  # Jupyter and Kaggle serve only what is below the working folder
