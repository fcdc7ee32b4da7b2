"""What a run writes down as it goes: a row of `log.csv` per logged step, some samples, and changes in `run.json`.

The columns of `log.csv` have a fixed order; an empty cell means "not measured".
"""

import csv
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from plotarmour.cli import AnyPath, UserError, as_path, warn
from plotarmour.files import complete_file, read_json, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("utc", "step", "epoch", "tokens_seen", "elapsed_s", "learning_rate", "train_loss", "grad_norm", "val_loss",
           "val_perplexity", "val_bits_per_byte", "tokens_per_s", "peak_memory_mib", "skipped_steps",
           "scaler_overflows")
HEADER = ",".join(COLUMNS)
SAMPLES = "samples_by_step.csv"


class RunLog:
    """Appends rows to log.csv; a resumed run continues the same file.

    Rows after the step of the checkpoint that training continues from move to log.cut.csv beside it. So do rows beyond
    the number that the checkpoint knows, if it is given.
    """

    def __init__(self, path: Path, step: int, n_rows: int | None = None):
        self.path, self.n_rows = path, 0
        if path.exists():
            self._cut(step, n_rows)
        else:
            write_text(path, HEADER + "\n")
        if n_rows is not None and self.n_rows < n_rows:
            warn(f"{path} has lost rows: found {self.n_rows} up to step {step:,}, the checkpoint knows of "
                 f"{n_rows}. Training continues without them.")

    def append(self, **values: object) -> None:
        """Write one row at once, values by column name. A full or damaged disk raises `UserError`."""
        row = {name: f"{value:.7g}" if isinstance(value, float) else value for name, value in values.items()}
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
            self.n_rows += 1
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}. Free some disk space, or mend the disk "
                            "or its permissions, and give the same command again: it continues from the latest "
                            "checkpoint.") from None

    def _cut(self, step: int, n_rows: int | None) -> None:
        """Keep the rows up to a step, and move everything else to log.cut.csv."""
        lines, unfinished = _lines(self.path)
        kept = [line for line in lines if (at := _step(line)) is not None and at <= step][:n_rows]
        self.n_rows = len(kept)
        if unfinished or len(kept) < len(lines):
            cut_path = self.path.with_name("log.cut.csv")
            before, _ = _lines(cut_path)
            # No two rows are equal in every column: a start that was killed at this point has already moved them.
            known = {*kept, *before}
            cut = [line for line in [*lines, unfinished] if line and line not in known]
            write_text(cut_path, "\n".join([HEADER, *before, *cut, ""]))
            write_text(self.path, "\n".join([HEADER, *kept, ""]))


def read_log(path: AnyPath) -> "pd.DataFrame":
    """Return the rows of a log.csv, also while another process writes it.

    Args:
        path: of log.csv; it may be missing.

    Returns:
        A row per logged step, with the columns of `COLUMNS`. A half-written last line and damaged lines are left out.
    """
    import pandas as pd  # not at the top: training itself does without it

    rows = [line for line in _lines(as_path(path))[0] if _step(line) is not None]
    log = pd.read_csv(io.StringIO("\n".join([HEADER, *rows])))
    return log.assign(**log[[*COLUMNS[1:]]].apply(pd.to_numeric, errors="coerce"))  # a text is "not measured"


def last_step(path: Path) -> int | None:
    """Return the step of the last row of a log.csv; None where there is no row."""
    return next((step for line in reversed(_lines(path)[0]) if (step := _step(line)) is not None), None)


def read_samples(run: Path) -> dict[int, str]:
    """Return what the model of a run folder wrote as it learned, by step; {} where there is nothing yet."""
    if not (run / SAMPLES).exists():
        return {}
    with (run / SAMPLES).open(encoding="utf-8", errors="replace", newline="") as file:
        return {int(row[0]): row[1] for row in csv.reader(file) if len(row) == 2 and row[0].isdecimal()}


def add_sample(run: Path, step: int, text: str) -> None:
    """Add a sample to a run folder, in place of samples of this step and later ones if training has gone back."""
    rows = {at: text for at, text in read_samples(run).items() if at < step} | {step: text}
    with complete_file(run / SAMPLES) as file:
        csv.writer(file, lineterminator="\n").writerows([("step", "text"), *rows.items()])


def record_change(run: Path, step: int, why: str, holds: dict | None = None, **changed: list) -> None:
    """Append an entry to the list `changes` in run.json.

    Args:
        run: the run folder.
        step: from which the change holds.
        why: such as "--extend" or "out of memory".
        holds: entries of run.json, such as the recipe, that hold from now on.
        changed: [before, after] by setting.
    """
    path = run / "run.json"
    info = read_json(path)
    info["changes"] = [*(info.get("changes") or []), {"utc": utc_now(), "step": step, "why": why} | changed]
    write_json(path, info | (holds or {}))


def utc_now() -> str:
    """Return the time as in log.csv and run.json."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines(path: Path) -> tuple[list[str], str]:
    """Return the lines below the header, and what follows the last line break: after a loss of power, anything."""
    if not path.exists():
        return [], ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        *lines, unfinished = file.read().split("\n")
    return lines[1:], unfinished


def _step(line: str) -> int | None:
    """Return the step of a line; None where the line is not a row. No cell holds commas or quotes."""
    row = line.split(",")
    return int(row[1]) if len(row) == len(COLUMNS) and row[1].isascii() and row[1].isdigit() else None
