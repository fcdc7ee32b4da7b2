"""`log.csv`: one row per logged step, in a fixed order of columns; empty means not measured."""

import csv
import io
from pathlib import Path

from plotarmour.errors import UserError
from plotarmour.files import write_text

COLUMNS = ("utc", "step", "epoch", "tokens_seen", "elapsed_s", "learning_rate", "train_loss", "grad_norm", "val_loss",
           "val_perplexity", "val_bits_per_byte", "tokens_per_s", "peak_memory_mib", "skipped_steps",
           "scaler_overflows")


class RunLog:
    """Appends rows; a resumed run continues the same file.

    Args:
        path: of log.csv.
        step: the step that training continues from; later rows are moved to log.cut.csv beside it.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        if path.exists():
            self._cut(step)
        else:
            write_text(path, _lines([COLUMNS]))

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
                file.write(_lines([row]))
                file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}. Free some disk space, or mend the disk "
                            "or its permissions, and give the same command again: it goes on from the latest "
                            "checkpoint.") from None

    def _cut(self, step: int) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace")  # after a loss of power, a tail of anything
        torn = bool(text) and not text.endswith("\n")
        header, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [list(COLUMNS)]
        whole = [_is_row(row) and not (torn and i == len(rows) - 1) for i, row in enumerate(rows)]
        kept = [row for row, fine in zip(rows, whole, strict=True) if fine and int(row[1]) <= step]
        cut = [row for row, fine in zip(rows, whole, strict=True) if not (fine and int(row[1]) <= step)]
        if cut:
            cut_path = self.path.with_name("log.cut.csv")
            before = cut_path.read_text(encoding="utf-8") if cut_path.exists() else _lines([header])
            # A start that was killed here had kept them already; no two rows have the same time and measurements.
            known = set(before.splitlines())
            new = "".join(line for row in cut if (line := _lines([row])).rstrip("\n") not in known)
            if new:
                write_text(cut_path, before + new)
            write_text(self.path, _lines([header, *kept]))


def last_step(path: Path) -> int | None:
    """Return the step of the last whole row, or None."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        steps = [int(row[1]) for row in csv.reader(file) if _is_row(row)]
    return steps[-1] if steps else None


def _is_row(row: list[str]) -> bool:
    return len(row) == len(COLUMNS) and row[1].isascii() and row[1].isdigit()


def _short(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _lines(rows) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
