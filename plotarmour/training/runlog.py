"""`log.csv`: one row per logged step, in a fixed order of columns; empty means not measured."""

import csv
import io
from pathlib import Path

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
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_lines([row]))
            file.flush()

    def _cut(self, step: int) -> None:
        with self.path.open(encoding="utf-8", newline="") as file:
            header, *rows = list(csv.reader(file)) or [list(COLUMNS)]
        whole = [r for r in rows if len(r) == len(COLUMNS)]
        kept = [r for r in whole if int(r[1]) <= step]
        cut = [r for r in rows if r not in kept]
        if cut:
            cut_path = self.path.with_name("log.cut.csv")
            before = cut_path.read_text(encoding="utf-8") if cut_path.exists() else _lines([header])
            write_text(cut_path, before + _lines(cut))
            write_text(self.path, _lines([header, *kept]))


def _short(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _lines(rows) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
