"""The rows of a grid, each in a papermill process of its own: one after the other, or some at a time."""

import csv
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.files import locked
from plotarmour.limits import cores
from plotarmour.suite.grid import Grid
from plotarmour.suite.grid_plan import Job, data_parameters, plan_grid, slots
from plotarmour.suite.grid_state import State, find_state, judge, stamps, write_summary
from plotarmour.suite.grid_table import Table
from plotarmour.suite.learning_rates import write_rates
from plotarmour.suite.notebooks import ROOT, tidy_streams
from plotarmour.suite.papermill import Execution, called_with, end_notebooks, last_words, run_notebook, start_notebook
from plotarmour.suite.steps import prepare

LOCK = ".lock"  # a folder in the results folder while a grid runs
LOOK_S = 0.2  # between two looks at who is still running


def run_grid(path: Path, notebook: Path, recipe: str, out: Path, text: Path | None = None,
             extra_text: Path | None = None, overrides: list[str] = (), gpus: int = 1, at_once: int = 1) -> list[State]:
    """Run all rows of a grid that are not done, and write summary.csv and, where rates were tried, learning_rates.csv.

    The same call goes on: rows that are done are skipped, stopped ones continue, failed ones are tried again.

    Args:
        path: of the CSV.
        notebook: for its rows.
        recipe: for rows that name none.
        out: results folder: token files, run folders, executed notebooks, summary.csv.
        text, extra_text: see `run_suite`.
        overrides: "key=value" for all rows.
        gpus: for rows that do not say.
        at_once: rows at a time.

    Returns:
        What has become of each row, in the grid's order.

    Raises:
        UserError: mistakes in the grid, before anything is started; text that does not become token files.
    """
    grid, jobs = plan_grid(path, notebook, recipe, out, text, extra_text, overrides, gpus, at_once)
    places = slots(at_once, jobs, cores())
    with locked(out / LOCK, out):  # two starts at a time would run rows twice
        check_summary(out / "summary.csv", jobs)
        (out / "notebooks").mkdir(parents=True, exist_ok=True)
        if jobs[0].recipe is not None:
            _prepare(jobs, out, text, extra_text)
        states = _run_rows(jobs, grid, out, places)
        rates = write_rates(states, out)
        if rates:
            print(rates)
    return states


def tell_failures(states: list[State]) -> list[str]:
    """Return a line for each row that is not done, with its reason."""
    lines = []
    for state in states:
        log = state.job.executed.with_suffix(".log")
        if state.status == "failed":
            lines.append(f"{state.job.row.run} failed: {state.reason} (see {log})")
        elif state.status not in ("done", "skipped"):
            lines.append(f"{state.job.row.run} {state.status}{': ' * bool(state.reason)}{state.reason}; the same "
                         "command goes on with it")
    return lines


def check_summary(path: Path, jobs: list[Job]) -> None:
    """Raise `UserError` where a folder holds another grid's summary: it would be written over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="") as file:
        names = [row.get("run") for row in csv.DictReader(file)]
    if names and not {job.row.run for job in jobs} & set(names):
        raise UserError(f"{path} is of another grid (its first run: {names[0]}); expected a folder of its own for this "
                        "one. Use another --out.")


def _prepare(jobs: list[Job], out: Path, text: Path | None, extra_text: Path | None) -> None:
    """Make the token files of all rows by notebook 1, or only see to it that they are still the right ones."""
    parameters, executed = data_parameters(jobs, text, extra_text), out / "notebooks" / "01_pretokenize.ipynb"
    print("token files ...", flush=True)
    begun = time.monotonic()
    if called_with(executed) == (parameters, True):
        prepare(jobs[0].recipe, out, text, extra_text)  # files that are there are taken as they are
    else:
        run_notebook(ROOT / "notebooks" / "01_pretokenize.ipynb", executed, parameters)
    print(f"token files done in {time.monotonic() - begun:.0f} s", flush=True)


def _run_rows(jobs: list[Job], grid: Grid, out: Path, places: list[dict[str, str]]) -> list[State]:
    """Run rows until all have ended.

    Args:
        jobs: of the grid.
        grid: for summary.csv.
        out: results folder.
        places: environment of each place in which a row runs.
    """
    states, table, summary = [find_state(job) for job in jobs], Table(len(places)), out / "summary.csv"
    free, running = list(range(len(places))), {}
    ahead = [i for i, state in enumerate(states) if state.status != "skipped"]
    write_summary(states, grid, summary)  # here, where a folder that cannot be written stops all
    for i, state in enumerate(states):
        if state.status == "skipped":
            table.event(states, i)

    def settle(i: int, status: str, reason: str) -> None:
        states[i] = replace(states[i], status=status, reason=reason, seconds=time.monotonic() - states[i].begun)
        try:
            write_summary(states, grid, summary)
        except OSError as error:  # it is written again after the next row
            warnings.warn(f"{summary} could not be written: {error.strerror}", stacklevel=2)
        table.event(states, i)

    try:
        while ahead or running:
            while ahead and free:
                i, place = ahead.pop(0), free.pop(0)
                states[i] = replace(states[i], status="running", reason="", begun=time.monotonic())
                table.event(states, i)
                before = stamps(jobs[i])
                try:
                    execution = _start(jobs[i], grid, places[place])
                except (UserError, OSError) as error:
                    free.append(place)
                    settle(i, "failed", str(error))
                else:
                    running[i] = (place, execution, before)
            table.draw(states)
            time.sleep(LOOK_S)
            for i, (place, execution, before) in list(running.items()):
                code = execution.process.poll()
                if code is not None:
                    del running[i]
                    free.append(place)
                    settle(i, *_ended(jobs[i], execution, before, code))
    except BaseException:  # interrupted: nobody must go on writing behind our back
        try:
            end_notebooks([execution for _, execution, _ in running.values()])
        finally:  # interrupted twice, too
            for i, (_, execution, before) in running.items():
                settle(i, *judge(jobs[i], before, None, last_words(execution.log), interrupted=True))
        raise
    finally:
        table.draw(states)
    write_summary(states, grid, summary)
    return states


def _start(job: Job, grid: Grid, environment: dict[str, str]) -> Execution:
    if job.recipe is None and (job.folder / "DONE.json").exists():  # nobody else would look whose it is
        raise UserError(f"{job.folder} holds a run of other settings; name this run otherwise, or use another --out")
    return start_notebook(grid.notebook, job.executed, job.parameters, environment)


def _ended(job: Job, execution: Execution, before: list, code: int) -> tuple[str, str]:
    """Status and reason of a row whose papermill has ended by itself."""
    status, reason = judge(job, before, code, last_words(execution.log))
    if code == 0:
        tidy_streams(execution.executed)
    elif status == "done":
        print(f"warning: {job.row.run} is done, and its notebook failed after that: {last_words(execution.log)}",
              file=sys.stderr, flush=True)
    return status, reason
