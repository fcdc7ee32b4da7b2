"""Runs the rows of a grid, each as a notebook of its own, by an executor, and keeps summary.csv up to date.

What became of a row is read from its run folder (DONE.json or STOPPED.json, if they are of the row's own settings,
tokenizer and text) and, where it failed, from the error in its executed notebook.
"""

import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from plotarmour.cli import LINE_EVERY_S, UserError, duration, next_command
from plotarmour.config import Recipe, training_settings
from plotarmour.data.stories import PARTS
from plotarmour.data.token_file import TokenFile
from plotarmour.files import locked
from plotarmour.report.compare import write_csv
from plotarmour.resume import LOCK, read_info
from plotarmour.suite.executors import Executor, Local
from plotarmour.suite.grid import Grid, Row
from plotarmour.suite.notebooks import ROOT, read_executed, run_notebook, write_html
from plotarmour.suite.steps import different_settings, find_prepared, prepare
from plotarmour.training.checkpoint import latest_whole_step
from plotarmour.training.ending import Ending, Reason
from plotarmour.training.log import read_log

MEASURED = ("model", "params", "core_params", "seed", "learning_rate", "max_steps", "step", "tokens_seen",
            "best_step", "best_val_loss", "val_loss", "elapsed_s", "peak_memory_mib", "hardware")
ENOUGH = 3  # learning rates to compare: with two, each is at an edge
RATE_COLUMNS = ["model", "learning_rate", "best_val_loss", "chosen", "at_edge", "settings"]


@dataclass(frozen=True)
class State:
    """A row and what became of it."""

    row: Row
    status: str = "waiting"  # or running, done, stopped, failed
    reason: str = ""  # of DONE.json or STOPPED.json, or why the row failed
    error: str = ""  # kind of the exception of a failed row, such as "UserError"
    ending: Ending | None = None  # of the row's own run

    @property
    def advice(self) -> str:
        """Why the row is not done and what to do, in one line."""
        failed = self.status == "failed"
        remedy = f"see {self.row.executed.with_suffix('.log')}" if failed else "the same command continues it"
        return f"{self.row.run} {self.status}: {self.reason} ({remedy})"


def run_grid(grid: Grid, executor_of: Callable[[Grid], Executor] = Local) -> list[State]:
    """Run all rows of a grid that are not done; write summary.csv and, if rates were compared, learning_rates.csv.

    The same call continues: it skips rows that are done, resumes stopped ones and tries failed ones again. The states
    that it returns are in the grid's order. `executor_of` gives what runs the rows; see `plotarmour.suite.executors`.

    Raises:
        UserError: another process runs a grid in this folder, it holds another grid's summary, the executor cannot
            work here, or no token files could be made of the text. A new folder is removed again.
    """
    out, is_new = grid.out, not grid.out.exists()
    try:
        with locked(out / LOCK, out):
            summary = out / "summary.csv"
            runs = pd.read_csv(summary, dtype=str, keep_default_na=False)["run"].tolist() if summary.exists() else []
            if runs and not {row.run for row in grid.rows} & set(runs):
                raise UserError(f"{summary} is of another grid (its first run: {runs[0]}); expected a folder of its "
                                "own for this one. Use another --out.")
            executor = executor_of(grid)
            (out / "notebooks").mkdir(parents=True, exist_ok=True)
            if grid.data is not None:
                _make_token_files(grid)
            is_new = False  # from here on it holds work
            states = _run_rows(grid, executor)
            _write_rates([(state.row.recipe, state.ending) for state in states if state.row.recipe and state.ending
                          and (state.status == "done" or state.ending.reason == Reason.NON_FINITE)], out)
    except UserError:
        if is_new:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return states


def describe_best(grid: Grid, states: list[State]) -> str:
    """Return which run of a grid is best on validation, and the command that compares its complete runs.

    Empty where no run of a recipe is complete.
    """
    done = [state for state in states if state.status == "done" and state.row.recipe]
    if not done:
        return ""
    best, paths = min(done, key=lambda state: state.ending.best_val_loss), find_prepared(grid.out)
    facts = ["--facts", paths["facts"]] if "facts" in paths else []
    command = next_command("compare", *(state.row.folder for state in done), "--data", paths["test"], "--train",
                           paths["train"], *facts, "--out", grid.out / "comparison")
    return f"best: {best.row.run}, {best.ending.best}\n{command}"


def describe_status(grid: Grid) -> str:
    """Return how far the runs of a grid are, by their folders alone: a line each, and one for all.

    A run without an ending whose log.csv has rows counts as running; the line says how old the log is.
    """
    states, lines = [_find_state(row) for row in grid.rows], []
    for i, state in enumerate(states):
        log, text = state.row.folder / "log.csv", state.status
        if state.ending:
            text += f": {state.ending.label}; {state.ending.best}"
        elif state.status == "waiting" and len(rows := read_log(log)):
            states[i] = replace(state, status="running")
            text = f"at step {rows['step'].iloc[-1]:,}; log.csv is {duration(time.time() - log.stat().st_mtime)} old"
        lines.append(f"{state.row.run} {text}")
    return "\n".join([*lines, _progress_line(states)])


def compare_rows(grid: Grid) -> None:
    """Compare the runs of a grid whose rows are all done, by notebook 3."""
    print("comparison (a minute or more) ...", flush=True)
    parameters = {"recipe": grid.data["recipe"], "results": grid.data["results"],
                  "runs": ";".join(row.run for row in grid.rows)}
    run_notebook(ROOT / "notebooks" / "03_compare.ipynb", grid.out / "notebooks" / "03_compare.ipynb", parameters)


def _make_token_files(grid: Grid) -> None:
    """Make the token files of all rows by notebook 1, or check that those of an earlier start are still right."""
    executed, begun = grid.out / "notebooks" / "01_pretokenize.ipynb", time.monotonic()
    print("token files (half a minute, or minutes for gigabytes) ...", flush=True)
    before = read_executed(executed)
    if before.is_complete and before.parameters == grid.data:  # `prepare` keeps files that are still right
        prepare(grid.rows[0].recipe, grid.out, grid.data["text"], grid.data["extra_text"])
    else:
        run_notebook(ROOT / "notebooks" / "01_pretokenize.ipynb", executed, grid.data)
    n = {part: TokenFile.open(path).n_stories for part, path in find_prepared(grid.out).items() if part in PARTS}
    print(f"token files done in {duration(time.monotonic() - begun)}; {sum(n.values()):,} stories: "
          + ", ".join(f"{n[part]:,} {part}" for part in PARTS), flush=True)


def _run_rows(grid: Grid, executor: Executor) -> list[State]:
    """Run all rows that are not done, and return the state of each row."""
    states, begun = [_find_state(row) for row in grid.rows], {}
    waiting = [i for i, state in enumerate(states) if state.status in ("waiting", "stopped")]
    line_at = time.monotonic()

    def report(i: int, text: str) -> None:
        _write_summary(states, grid)
        print(f"[{i + 1}/{len(states)}] {grid.rows[i].run} {text}", flush=True)

    def settle(i: int, state: State) -> None:
        states[i], reason, ending = state, state.reason, state.ending
        if state.status == "done":  # a notebook of one's own may state no loss
            reason = (ending.reason.label if ending.best_val_loss is None else
                      f"validation loss {ending.best_val_loss:.4f}")
        elif state.status == "stopped" and ending and ending.last_checkpoint is not None:
            reason += f", saved at step {ending.last_checkpoint:,}"
        report(i, f"{state.status} in {duration(time.monotonic() - begun.pop(i))}, {reason}")

    _write_summary(states, grid)
    if len(waiting) < len(states):
        print(_progress_line(states), flush=True)
    try:
        while waiting or begun:
            for i in executor.start(waiting):
                waiting.remove(i)
                states[i], begun[i] = State(grid.rows[i], "running"), time.monotonic()
                report(i, "...")
            time.sleep(executor.look_s)
            for i, outcome in executor.ended():
                settle(i, _judge(grid.rows[i], outcome))
                if isinstance(outcome, str) and states[i].status == "stopped":
                    waiting.append(i)
            if begun and time.monotonic() - line_at >= LINE_EVERY_S:
                line_at = time.monotonic()
                print(_progress_line(states), flush=True)
        executor.stop()  # nothing may stay behind
    except BaseException:  # interrupted: no process may go on writing in the background
        try:
            executor.stop()
        finally:  # also when interrupted again
            for i in list(begun):
                state = _find_state(grid.rows[i])
                settle(i, state if state.ending else State(grid.rows[i], "stopped", "interrupted"))
        raise
    return states


def _find_state(row: Row) -> State:
    """Return the state of a row by its run folder.

    It is waiting, too, where the folder holds a run of other settings, tokenizer or text, and where the last checkpoint
    of a finished run is missing.
    """
    ending = Ending.read(row.folder)
    if ending is None:
        return State(row)
    has_weights = row.recipe is None or not ending.is_done or latest_whole_step(row.folder) == ending.step
    if has_weights and _holds_run_of(row):
        return State(row, "done" if ending.is_done else "stopped", ending.reason, ending=ending)
    if row.recipe is None and ending.is_done:  # such a notebook does not check whose run the folder holds
        return State(row, "failed", f"{row.folder} holds a run of other settings. Give this run another name, or use "
                     "another --out", "UserError")
    return State(row)


def _holds_run_of(row: Row) -> bool:
    """Return whether a run folder holds the run of this row: its settings, tokenizer and text."""
    if row.recipe is None:  # only the executed notebook holds the settings
        return read_executed(row.executed).parameters == row.parameters
    try:
        return not different_settings(row.folder, row.recipe, row.folder.parent)
    except UserError:
        return False


def _judge(row: Row, outcome: int | str) -> State:
    """Return the state of a row that has ended, by its folder and by what the executor says.

    The exit code is 0 for some dead kernels, and 1 for a finished run whose figure failed.
    """
    write_html(row.executed)
    state, executed = _find_state(row), read_executed(row.executed)
    if isinstance(outcome, str):
        return state if state.status == "done" else replace(state, status="stopped", reason=outcome)
    failed = outcome != 0 or executed.error
    if state.status == "done" and failed:
        print(f"warning: {row.run} is done, and its notebook failed after that: {executed.failure}", file=sys.stderr,
              flush=True)
    if state.status == "done" or (state.status == "stopped" and not failed):
        return state
    return State(row, "failed", executed.failure, executed.error)


def _write_summary(states: list[State], grid: Grid) -> None:
    """Replace summary.csv: per run, in the grid's order, the grid's columns and numbers of its run folder."""
    rows = []
    for state in states:
        row, measured = state.row, vars(state.ending) if state.ending else {}
        if row.recipe is not None:
            info = read_info(row.folder) if state.ending else {}
            measured = info | {"model": row.recipe.model} | vars(row.recipe.training) | measured
        status = "waiting" if state.status == "running" else state.status
        cells = {"run": row.run, "status": status, "reason": state.reason}
        cells |= {name: row.values.get(name, measured.get(name, grid.defaults.get(name)))
                  for name in (*grid.columns, *MEASURED) if name not in cells}
        rows.append({name: f"{cell:.9g}" if isinstance(cell, float) else cell for name, cell in cells.items()})
    write_csv(pd.DataFrame(rows, dtype=object), grid.out / "summary.csv")  # as objects, counts stay whole


def _progress_line(states: list[State]) -> str:
    """Return how far a grid is; the time left follows from the steps left and the seconds of the steps so far.

    Example: 2 done, 2 running, 8 waiting (bdh_seed-2 at 14 %, step 300 of 2,200, ...); about 70 min left
    """
    n, runs, left, steps, seconds = Counter(state.status for state in states), [], 0, 0, 0.0
    text = ", ".join(f"{n[status]} {status}" for status in ("done", "failed", "stopped", "running", "waiting")
                     if n[status])
    for state in states:
        if state.row.recipe is None or state.status not in ("done", "running", "waiting"):
            continue
        step, of, took_s = 0, state.row.recipe.training.max_steps, 0.0
        if state.status == "done":
            step, of, took_s = state.ending.step, state.ending.step, state.ending.elapsed_s
        elif state.status == "running":
            log = read_log(state.row.folder / "log.csv")
            step, took_s = (int(log["step"].iloc[-1]), log["elapsed_s"].iloc[-1]) if len(log) else (0, 0.0)
            runs.append(f"{state.row.run} at {100 * step // of} %, step {step:,} of {of:,}")
        left, steps, seconds = left + of - step, steps + step, seconds + took_s
    text += f" ({', '.join(runs)})" * bool(runs)
    return f"{text}; about {duration(left * seconds / steps / n['running'])} left" if steps and n["running"] else text


def _write_rates(runs: list[tuple[Recipe, Ending]], out: Path) -> None:
    """Compare runs that differ only in their learning rate: print which one is best, and write learning_rates.csv.

    `runs` are those of a grid that are complete or have diverged. Only where at least three rates were tried, the table
    has a row for each run, rates ascending: best_val_loss in nats per token (none where the loss was not finite, which
    shows that the rate is too high), chosen, at_edge (smallest or largest tried), and settings, in what runs of this
    model differ besides.
    """
    (out / "learning_rates.csv").unlink(missing_ok=True)  # of an earlier grid
    if runs and len(table := _compare_rates(runs)):
        write_csv(table, out / "learning_rates.csv")
        print(_describe_rates(table))


def _compare_rates(runs: list[tuple[Recipe, Ending]]) -> pd.DataFrame:
    """Return the table of `_write_rates`."""
    identity = [name for name in training_settings("identity") if name != "learning_rate"]
    settings = [vars(recipe.data) | {name: getattr(recipe.training, name) for name in identity} | recipe.architecture
                for recipe, _ in runs]
    table = pd.DataFrame([(recipe.model, recipe.training.learning_rate,
                           math.nan if ending.reason == Reason.NON_FINITE else ending.best_val_loss)
                          for recipe, ending in runs], columns=RATE_COLUMNS[:3]).astype({"best_val_loss": float})
    differs = pd.DataFrame(settings, dtype=object).groupby(table["model"]).nunique(dropna=False) > 1
    table["settings"] = [", ".join(f"{name}={value}" for name, value in own.items() if differs.at[model, name])
                         for model, own in zip(table["model"], settings, strict=True)]
    groups = table.groupby(["model", "settings"], sort=False)
    rates, losses = groups["learning_rate"], groups["best_val_loss"]
    table["chosen"] = table["best_val_loss"] == losses.transform("min")
    table["at_edge"] = table["learning_rate"].eq(rates.transform("min")) | table["learning_rate"].eq(
        rates.transform("max"))
    table = table.assign(group=groups.ngroup())[rates.transform("nunique") >= ENOUGH]
    return table.sort_values(["group", "learning_rate"], ignore_index=True)[RATE_COLUMNS]


def _describe_rates(table: pd.DataFrame) -> str:
    """Return which learning rate is best, a line for each choice."""
    lines = []
    for (model, settings), group in table.groupby(["model", "settings"], sort=False):
        low, high = group["learning_rate"].min(), group["learning_rate"].max()
        for best in group[group["chosen"]].itertuples():
            line = (f"{model}{' with ' * bool(settings)}{settings}: of {len(group)} learning rates from {low:g} to "
                    f"{high:g}, {best.learning_rate:g} is best on validation, with a loss of {best.best_val_loss:.4f}.")
            if best.at_edge:
                side, further = ("smallest", "smaller") if best.learning_rate == low else ("largest", "larger")
                line += f" It is the {side} one tried: the best may be {further} still. Add {further} ones to the grid."
            lines.append(line)
    return "\n".join(lines)
