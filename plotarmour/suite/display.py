"""What a notebook displays of a run: its settings, its curves while it trains, how it ended, its files."""

import os
import shutil
import textwrap
import time
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plotarmour import machine
from plotarmour.cli import UserError, duration, file_size, warn
from plotarmour.config import Recipe
from plotarmour.evaluation.arms import Arm
from plotarmour.files import complete_file
from plotarmour.report.figures import training_curves
from plotarmour.training.checkpoint import find_checkpoint
from plotarmour.training.ending import Ending, Reason
from plotarmour.training.log import read_log, read_samples

EVERY_S = 30.0  # least seconds between two drawings
SHARE = 0.01  # largest share of the time that drawing takes
WIDTH = 100  # characters of a line
WAITING = "The curves appear here, after half a minute of training at the earliest."
NEW_SESSION = (" In a new session on Kaggle, attach the output of this one (Add Input > Your Work): the same cells "
               "find the run {run} there. Elsewhere, set continue_from to its folder.")
SMALL = (".csv", ".html", ".json", ".png")  # endings of results that are small


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


def describe_samples(run: Path) -> str:
    """Return how a run continued one prompt as it learned, a paragraph per step; a line where it took no samples."""
    samples = read_samples(run)
    return _two_columns({f"step {step:,}": text for step, text in samples.items()}) if samples else "no samples yet"


def _two_columns(rows: dict[str, str]) -> str:
    """Return names and texts in two columns, of which the second is wrapped."""
    indent = 2 + max(map(len, rows))
    return "\n".join(textwrap.fill(text, WIDTH, initial_indent=f"{name:<{indent}}", subsequent_indent=" " * indent,
                                   break_long_words=False, break_on_hyphens=False) for name, text in rows.items())


class LiveCurves:
    """Draws the curves of log.csv during training and once more at its end; outside notebooks it does nothing.

    The figure is an ordinary display with an id, not a widget: papermill and nbclient keep its last state in the
    executed notebook. It is also written to figures/training.png in the run folder. Drawing takes at most 1 % of the
    time, and an error in it never stops training.
    """

    def __init__(self, model: str, run: Path):
        self.arm, self.run = Arm(model, model, (model,), (0,)), run
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
        if time.perf_counter() - self.drawn_at >= max(EVERY_S, self.took_s / SHARE):
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
    """Return the files below a folder with their sizes, one per line, without hidden ones; a run in it is one line."""
    sizes = Counter()
    for path in sorted(folder.rglob("*")):
        first, *rest = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in (first, *rest)):
            name = f"{first}/ (a run)" if (folder / first / "run.json").is_file() else path.relative_to(folder)
            sizes[name] += path.stat().st_size
    return "\n".join([f"{folder}:", *(f"{file_size(size):>12}  {name}" for name, size in sizes.items())])


def download_links(folder: Path, gather: bool = False) -> Any:
    """Zip what is small in a folder, such as CSVs, figures and a report, and return links to display, with sizes.

    The zip is beside the folder. Its name ends with the UTC time of the latest CSV, as in bdh_20261121-0934.zip.

    Args:
        folder: a run folder, or another one with results.
        gather: on Kaggle and Colab, also zip the best weights, as a run folder; on Kaggle, put the zips and the
            CSVs, figures and report by themselves into /kaggle/working, where one finds and downloads them at once.

    Raises:
        UserError: the folder has no CSV.
    """
    from IPython.display import HTML, FileLink

    where, name = machine.host() if gather else "", folder.resolve().name
    small = [path for path in sorted([*folder.glob("*"), *folder.glob("figures/*")])
             if path.suffix in SMALL and path.name != "tokenizer.json" or path.name == "summary.txt"]
    times = [path.stat().st_mtime for path in small if path.suffix == ".csv"]
    if not times:
        raise UserError(f"{folder} has no CSV; expected results. Run the cells above first.")
    base = machine.KAGGLE / "working" if where == "kaggle" else folder.parent
    links = [_zip(base / f"{name}_{datetime.fromtimestamp(max(times), UTC):%Y%m%d-%H%M}.zip", folder, small)]
    if where in ("kaggle", "colab") and (folder / "checkpoints").is_dir():
        best = find_checkpoint(folder, "best", ["model.safetensors"])
        weights = [folder / "tokenizer.json",
                   *(path for path in best.iterdir() if not path.name.startswith("optimizer"))]
        links.append(_zip(base / f"{name}_best.zip", folder, [*small, *weights]))
    if where == "kaggle":
        for path in small:
            if path.suffix in (".csv", ".png", ".html"):
                links.append(base / f"{name}_{path.name}")
                shutil.copyfile(path, links[-1])
        if (free := machine.free_disk(base)) < 2 * 2**30:
            warn(f"{base} has {free / 2**30:.1f} GiB left of the 20 that Kaggle keeps; delete what you do not need, "
                 "such as checkpoints of runs that are done.")
    # Jupyter and Kaggle serve only what is below the working folder.
    return HTML("<br>".join(f"{FileLink(os.path.relpath(path))._repr_html_()} {file_size(path.stat().st_size)}"
                            for path in links))


def _zip(path: Path, folder: Path, files: list[Path]) -> Path:
    """Write a zip with files of a folder, below the folder's name, and return its path."""
    with complete_file(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for each in files:
            archive.write(each, Path(folder.resolve().name) / each.relative_to(folder))
    return path
