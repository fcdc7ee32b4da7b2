"""`log.csv`: one row per logged step, in a fixed order of columns; empty means not measured."""

import warnings
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.files import write_text

COLUMNS = ("utc", "step", "epoch", "tokens_seen", "elapsed_s", "learning_rate", "train_loss", "grad_norm", "val_loss",
           "val_perplexity", "val_bits_per_byte", "tokens_per_s", "peak_memory_mib", "skipped_steps",
           "scaler_overflows")
HEADER = ",".join(COLUMNS)


class RunLog:
    """Appends rows; a resumed run continues the same file.

    Args:
        path: of log.csv.
        step: the step that training continues from; later rows are moved to log.cut.csv beside it.
        n_rows: rows when that checkpoint was saved, if known; fewer are warned of, more are moved, too.

    Attributes:
        n_rows: rows now.
    """

    def __init__(self, path: Path, step: int, n_rows: int | None = None):
        self.path, self.n_rows = path, 0
        if path.exists():
            self._cut(step, n_rows)
        else:
            write_text(path, HEADER + "\n")
        if n_rows is not None and self.n_rows < n_rows:
            warnings.warn(f"{path} has lost rows: found {self.n_rows} up to step {step:,}, the checkpoint knows of "
                          f"{n_rows}. Training goes on; what was measured then is gone.", stacklevel=2)

    def append(self, **values: object) -> None:
        """Write one row at once, values by column name.

        Raises:
            KeyError: a name that is no column.
        """
        unknown = set(values) - set(COLUMNS)
        if unknown:
            raise KeyError(f"no such log columns: {sorted(unknown)}")
        row = ["" if values.get(c) is None else _short(values[c]) for c in COLUMNS]
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(",".join(row) + "\n")
                file.flush()
            self.n_rows += 1
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}. Free some disk space, or mend the disk "
                            "or its permissions, and give the same command again: it goes on from the latest "
                            "checkpoint.") from None

    def _cut(self, step: int, n_rows: int | None) -> None:
        *lines, torn = _read(self.path).split("\n")  # after a loss of power, a tail of anything
        header, rest = (lines[0], lines[1:]) if lines else (HEADER, [])
        kept = [line for line in rest if (at := _step(line)) is not None and at <= step][:n_rows]
        known, cut = set(kept), []
        for line in rest + [torn] * bool(torn):
            if line in known:
                known.remove(line)
            else:
                cut.append(line)
        self.n_rows = len(kept)
        if cut:
            cut_path = self.path.with_name("log.cut.csv")
            before = _read(cut_path) if cut_path.exists() else header + "\n"
            # A start that was killed here had kept them already; no two rows have the same time and measurements.
            there = set(before.split("\n"))
            new = "".join(line + "\n" for line in cut if line not in there)
            if new:
                write_text(cut_path, before + new)
            write_text(self.path, "".join(line + "\n" for line in [header, *kept]))


def last_step(path: Path) -> int | None:
    """Return the step of the last whole row, or None."""
    steps = [_step(line) for line in _read(path).split("\n")[:-1]] if path.exists() else []
    return next((step for step in reversed(steps) if step is not None), None)


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return file.read()


def _step(line: str) -> int | None:
    """The step of a line of the log; None for what is no row. No column holds commas or quotes."""
    row = line.split(",")
    return int(row[1]) if len(row) == len(COLUMNS) and row[1].isascii() and row[1].isdigit() else None


def _short(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)
