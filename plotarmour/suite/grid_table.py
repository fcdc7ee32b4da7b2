"""A grid while it runs: on a terminal a table that is redrawn in its place, elsewhere a line per event."""

import csv
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from plotarmour.suite.grid_state import State, read_ending
from plotarmour.training.log import COLUMNS
from plotarmour.training.progress import duration

ENDED = ("done", "stopped", "failed", "skipped")
ORDER = ("running", "failed", "stopped", "done", "waiting", "skipped")  # what a small terminal shows first
TAIL = 1 << 16  # bytes of a log that are read again and again; rows are short
EVERY_S = 1.0
NUMBERS = 46  # columns beside the name, and one that stays free


class Table:
    """Shows the states of a grid's rows.

    Args:
        places: rows at a time.
        out: stream to show them on.
    """

    def __init__(self, places: int, out=None):
        self.places, self.out = places, out or sys.stdout
        self.lines, self.drawn_at = 0, -EVERY_S

    def event(self, states: list[State], i: int) -> None:
        """Tell that a row has changed; call before it is drawn."""
        if self.out.isatty():
            self.drawn_at = -EVERY_S
        else:
            print(event_line(states, i, self.places), file=self.out, flush=True)

    def draw(self, states: list[State]) -> None:
        """Redraw the table, on a terminal, once a second."""
        if not self.out.isatty() or time.monotonic() - self.drawn_at < EVERY_S:
            return
        self.drawn_at = time.monotonic()
        size = shutil.get_terminal_size()
        lines = [line[:size.columns - 1] for line in table_lines(states, self.places, size.lines - 2,
                                                                      size.columns)]
        up = f"\x1b[{self.lines}A" if self.lines else ""
        gone = "\x1b[J" if self.lines > len(lines) else ""
        self.out.write(up + gone + "".join(f"\x1b[2K{line}\n" for line in lines))
        self.out.flush()
        self.lines = len(lines)


def event_line(states: list[State], i: int, places: int) -> str:
    """Tell what has just become of a row, in one line."""
    state, run = states[i], states[i].job.row.run
    head = f"[{i + 1}/{len(states)}] {run}"
    if state.status == "running":
        return f"{head} ..."
    if state.status == "skipped":
        return f"{head} is done already ({state.reason})"
    loss = validation_loss(state)
    told = [f"{head} {state.status} in {duration(state.seconds)}",
            f"validation loss {loss:.4f}" if loss is not None and state.status == "done" else state.reason]
    return f"{', '.join(part for part in told if part)} | {counts(states, places)}"


def table_lines(states: list[State], places: int, height: int, columns: int) -> list[str]:
    """Return the table, a header and a line per row, and below it how many are in which state.

    Args:
        states: of the rows.
        places: rows at a time.
        height: lines at most; where there are more rows, those that run and those that failed are shown first.
        columns: of the terminal; of names that are too long, the end is shown: there they differ.
    """
    width = min(max(len("run"), *(len(state.job.row.run) for state in states)), max(8, columns - NUMBERS))
    lines = [f"{'run':<{width}}  {'state':<8}{'step':>16}{'val loss':>10}{'seconds':>9}"]
    room = max(1, height - 2)
    chosen = set(range(len(states)))
    if len(states) > room:
        chosen = set(sorted(chosen, key=lambda i: ORDER.index(states[i].status))[:room])
    for i, state in enumerate(states):
        if i in chosen:
            step, loss = progress(state)
            steps = state.job.recipe.training.max_steps if state.job.recipe else None
            at = "" if step is None else f"{step:,}" + (f" of {steps:,}" if steps else "")
            seconds = f"{seconds_of(state):,.0f}" if state.begun is not None else ""
            run = state.job.row.run
            run = run if len(run) <= width else f"…{run[1 - width:]}"
            lines.append(f"{run:<{width}}  {state.status:<8}{at:>16}"
                         f"{'' if loss is None else f'{loss:.4f}':>10}{seconds:>9}")
    hidden = len(states) - len(chosen)
    return [*lines, counts(states, places) + (f" ({hidden} rows not shown)" if hidden else "")]


def counts(states: list[State], places: int) -> str:
    """Tell how many rows are in which state, and when the rest will be done."""
    found = Counter(state.status for state in states)
    left = time_left(states, places)
    told = ", ".join(f"{found[status]} {status}" for status in (*ENDED, "running", "waiting") if found[status])
    return told + (f"; about {duration(left)} left" if left else "")


def time_left(states: list[State], places: int) -> float | None:
    """Return the seconds until all rows are done, by those that are done and by how far the running ones are.

    Args:
        states: of the rows.
        places: rows at a time.

    Returns:
        None while there is nothing to tell it by, and when all is done.
    """
    took = [state.seconds for state in states if state.status == "done"]
    running = [(seconds_of(state), share_done(state)) for state in states if state.status == "running"]
    took += [] if took else [seconds / share for seconds, share in running if share > 0.02]
    waiting = sum(state.begun is None and state.status not in ENDED[2:] for state in states)
    if not took or not (running or waiting):
        return None
    each = sum(took) / len(took)
    ends = [seconds / share - seconds if share > 0.1 else max(0.0, each - seconds) for seconds, share in running]
    return max([(sum(ends) + waiting * each) / places, *ends])


def share_done(state: State) -> float:
    """How much of a running row's steps is taken, from 0 to 1."""
    step = progress(state)[0]
    return step / state.job.recipe.training.max_steps if step and state.job.recipe else 0.0


def seconds_of(state: State) -> float:
    return time.monotonic() - state.begun if state.status == "running" else state.seconds


def validation_loss(state: State) -> float | None:
    """The best validation loss of a row that is done; of others the latest one in the log, if there is one."""
    done = read_ending(state.job, "DONE.json")
    return done.get("best_val_loss") if done else progress(state)[1]


def progress(state: State) -> tuple[int | None, float | None]:
    """Step and latest validation loss of a row's log; None for what it does not say."""
    if state.status == "waiting":
        return None, None
    rows = _last_rows(state.job.folder / "log.csv")
    losses = [row["val_loss"] for row in rows if row["val_loss"]]
    try:
        return (int(rows[-1]["step"]) if rows else None), (float(losses[-1]) if losses else None)
    except ValueError:  # somebody else's log
        return None, None


def _last_rows(log: Path) -> list[dict[str, str]]:
    """The last whole rows of a log.csv, which another process may be writing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    whole = text[:text.rfind("\n") + 1].splitlines()[1:]  # the first one is the header, or cut
    return [row for row in csv.DictReader(whole, fieldnames=COLUMNS) if None not in row.values()]
