"""What has become of the rows of a grid, by what their run folders hold; never by what papermill says."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.data.token_file import TokenFile
from plotarmour.files import write_text
from plotarmour.resume import differences, read_info
from plotarmour.suite.grid import Grid
from plotarmour.suite.grid_plan import Job
from plotarmour.suite.papermill import Value, called_with
from plotarmour.suite.steps import find_prepared
from plotarmour.training.checkpoint import latest_whole_step

ENDINGS = ("DONE.json", "STOPPED.json")
DEAD = ("DeadKernelError", "Kernel died")
FOUND = ("model", "params", "params_non_embedding", "seed", "learning_rate", "max_steps", "step", "tokens_seen",
         "best_step", "best_val_loss", "val_loss", "elapsed_s", "peak_memory_mib", "hardware")


@dataclass(frozen=True)
class State:
    """A row, and what is known of it by now.

    Attributes:
        job: the row.
        status: waiting, running, done, stopped, failed, or skipped: done before this start.
        reason: of DONE.json or STOPPED.json, or the last line of a failure.
        begun: of the row, by time.monotonic(); None before.
        seconds: that the row took in this start, from papermill's start to its end.
    """

    job: Job
    status: str = "waiting"
    reason: str = ""
    begun: float | None = None
    seconds: float = 0.0


def find_state(job: Job) -> State:
    """What an earlier start has left of a row."""
    if (done := read_ending(job, "DONE.json")) is not None and _has_weights(job, done):
        return State(job, "skipped", str(done["reason"]))
    if (stopped := read_ending(job, "STOPPED.json")) is not None:
        return State(job, "stopped", str(stopped["reason"]))
    return State(job)


def read_ending(job: Job, name: str) -> dict | None:
    """Return DONE.json or STOPPED.json of a row's run folder; None where it is not there, damaged, or of another run.

    Args:
        job: the row.
        name: of the file.
    """
    try:
        ending = json.loads((job.folder / name).read_text(encoding="utf-8"))
        return ending if "reason" in ending and is_of(job) else None
    except (OSError, ValueError, TypeError):
        return None


def is_of(job: Job) -> bool:
    """Whether a run folder holds the run of this row: its settings, tokenizer and text."""
    if job.recipe is None:  # nothing but the executed notebook knows what it was called with
        return called_with(job.executed)[0] == job.parameters
    try:
        before = read_info(job.folder)
        prepared = find_prepared(job.folder.parent)
        headers = {part: TokenFile.open(prepared[part]).header for part in ("train", "val")}
        asked = job.recipe.training.dtype
        wanted = {"recipe": job.recipe.to_dict(), "tokenizer": headers["train"]["tokenizer"],
                  "dtype": before["dtype"] if asked == "auto" else asked}  # as computed, where it was free to
        return not differences(job.folder, before | wanted | headers)
    except UserError:
        return False


def _has_weights(job: Job, done: dict) -> bool:
    """Whether the checkpoint that a DONE.json speaks of is there: the zip to download holds none."""
    return job.recipe is None or latest_whole_step(job.folder) == done.get("step")


def stamps(job: Job) -> list[tuple[int, int] | None]:
    """By which it shows whether a DONE.json or STOPPED.json is a new one."""
    paths = [job.folder / name for name in ENDINGS]
    return [(path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None for path in paths]


def judge(job: Job, before: list, code: int | None, said: str, interrupted: bool = False) -> tuple[str, str]:
    """Return status and reason of a row whose papermill has ended.

    Args:
        job: the row.
        before: `stamps` when it began.
        code: papermill's exit code, which decides nothing: a dead kernel may leave a 0, and a whole run a 1.
        said: last line of its log.
        interrupted: whether it was ended from here.
    """
    if (done := read_ending(job, "DONE.json")) is not None:
        if not _has_weights(job, done):
            return "failed", f"its last checkpoint in {job.folder} is missing or damaged"
        return "done", str(done["reason"])
    if stamps(job)[1] not in (None, before[1]) and (stopped := read_ending(job, "STOPPED.json")) is not None:
        return "stopped", str(stopped["reason"])
    if interrupted:
        return "stopped", "interrupted"
    if any(word in said for word in DEAD):
        return "failed", f"its kernel was killed, by hand or for want of memory ({said})"
    if code == 0:
        return "failed", f"its notebook came to an end without a DONE.json of this run in {job.folder}"
    return "failed", said.split("UserError: ", 1)[-1]


def summary_row(state: State, grid: Grid) -> dict[str, object]:
    """Return a row of summary.csv: the grid's columns, then what run.json and DONE.json or STOPPED.json say."""
    job, found = state.job, {}
    if job.recipe is not None:
        t = job.recipe.training
        found = {"model": job.recipe.model, "seed": t.seed, "learning_rate": t.learning_rate, "max_steps": t.max_steps}
    name = "DONE.json" if state.status in ("done", "skipped") else "STOPPED.json"
    if state.status in ("done", "skipped", "stopped"):
        found |= _numbers(job.folder / "run.json", job) | (read_ending(job, name) or {})
    row = {"run": job.row.run, "status": {"skipped": "done", "running": "waiting"}.get(state.status, state.status),
           "reason": " ".join(state.reason.split())}
    for column in grid.columns:
        if column != "run":
            row[column] = job.row.values.get(column, found.get(column, grid.defaults[column]))
    return row | {column: found.get(column) for column in FOUND if column not in row}


def write_summary(states: list[State], grid: Grid, path: Path) -> list[dict[str, object]]:
    """Replace summary.csv atomically, a row per run, in the grid's order; return its rows."""
    rows = [summary_row(state, grid) for state in states]
    write_table(rows, path)
    return rows


def write_table(rows: list[dict[str, object]], path: Path) -> None:
    """Write rows of equal keys as CSV, atomically; floats with nine significant digits, None as nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.9g}" if isinstance(value, float) else value for key, value in row.items()}
                     for row in rows)
    write_text(path, text.getvalue())


def _numbers(path: Path, job: Job) -> dict[str, Value]:
    """Of run.json what belongs into a table; nothing where it is of another run."""
    try:
        info = json.loads(path.read_text(encoding="utf-8")) if is_of(job) else {}
    except (OSError, ValueError):
        return {}
    training = info.get("recipe", {}).get("training", {})
    return {**{key: training[key] for key in FOUND if key in training},
            **{key: info[key] for key in FOUND if key in info}}
