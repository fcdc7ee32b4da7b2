"""One notebook in a papermill process of its own: start it, hear its last words, end it and its kernel."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil

from plotarmour.cli import UserError
from plotarmour.suite.notebooks import ROOT, tidy_streams

Value = int | float | bool | str  # what a parameter of a notebook can be
SAVE_S = 60.0  # for a run that is asked to stop: to finish its step, save and end its notebook
QUIT_S = 10.0  # for papermill to end its kernel


@dataclass(frozen=True)
class Execution:
    """A notebook that papermill executes.

    Attributes:
        process: papermill's; in a session of its own, so that a Ctrl-C at the terminal reaches us alone.
        executed: the notebook with its outputs, written while it goes on.
        log: what papermill and the kernel print.
    """

    process: subprocess.Popen
    executed: Path
    log: Path


def start_notebook(source: Path, executed: Path, parameters: dict[str, Value],
                   environment: dict[str, str] | None = None) -> Execution:
    """Start one notebook; its noise goes to a log beside the executed notebook.

    Args:
        source: the notebook.
        executed: where it goes with its outputs.
        parameters: of it, by name.
        environment: variables on top of this process's own.
    """
    command = [sys.executable, "-m", "papermill", str(source), str(executed), "--cwd", str(ROOT), "--kernel", "python3",
               "--language", "python", "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-r" if isinstance(value, str) else "-p", name, str(value)]  # -r: text, whatever it looks like
    log = executed.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                   env=os.environ | (environment or {}), start_new_session=True)
    return Execution(process, executed, log)


def run_notebook(source: Path, executed: Path, parameters: dict[str, Value],
                 progress: Callable[[], str] | None = None) -> None:
    """Run one notebook to its end.

    Args:
        source, executed, parameters: see `start_notebook`.
        progress: says how far it is; shown on a terminal.

    Raises:
        UserError: that the notebook has met.
        SystemExit: it failed for another reason: exit code 1.
    """
    execution, shown = start_notebook(source, executed, parameters), progress and sys.stdout.isatty()
    try:
        while execution.process.poll() is None:
            try:
                execution.process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                if shown:
                    print(f"\r{progress():<79}", end="", flush=True)
    except BaseException:  # interrupted: nobody must go on writing behind our back
        end_notebooks([execution])
        raise
    if shown:
        print("\r" + " " * 79, end="\r")
    if not execution.process.returncode:
        tidy_streams(executed)
        return
    last = last_words(execution.log)
    if "UserError: " in last:
        raise UserError(last.split("UserError: ", 1)[1])
    # Not the user's mistake: exit code 1.
    raise SystemExit(f"error: {executed.name} failed: {last}\nSee {executed} and {execution.log}; the same command "
                     "goes on from there.")


def called_with(executed: Path) -> tuple[dict[str, Value], bool]:
    """Return the parameters that an executed notebook was called with, and whether it came to its end.

    Args:
        executed: its path; no parameters, and False, where there is no such notebook.
    """
    try:
        papermill = nbformat.read(executed, as_version=4).metadata.get("papermill", {})
    except Exception:  # whatever is there is no notebook
        return {}, False
    return dict(papermill.get("parameters", {})), bool(papermill.get("end_time")) and not papermill.get("exception")


def last_words(log: Path) -> str:
    """Return the last line of a log that says something."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return f"{log}: {error.strerror}"
    return lines[-1].strip() if lines else "no output"


def end_notebooks(executions: list[Execution]) -> None:
    """End notebooks and everything they have started; returns when nobody is left to write behind our back.

    A kernel that trains is asked first, as by its stop button: it finishes its step and saves. Interrupted once more
    meanwhile, all end at once.
    """
    families = {run.process.pid: _family(run.process.pid) for run in executions if run.process.poll() is None}
    try:
        if os.name == "posix":  # there is no such signal elsewhere
            for family in families.values():
                for member in family:
                    with suppress(psutil.Error):
                        if any("ipykernel" in part for part in member.cmdline()):
                            member.send_signal(signal.SIGINT)
            _wait(executions, SAVE_S)
            _look_again(executions, families)
            for run in executions:
                if run.process.poll() is None:
                    run.process.send_signal(signal.SIGINT)
            _wait(executions, QUIT_S)
    finally:
        _look_again(executions, families)
        for family in families.values():
            for member in family:
                with suppress(psutil.Error):  # psutil knows a process by its start, too: no other one is hit
                    member.kill()
        for run in executions:
            run.process.wait()


def _look_again(executions: list[Execution], families: dict[int, list[psutil.Process]]) -> None:
    """Add who was born since: an interrupt may come before there is a kernel."""
    for run in executions:
        if run.process.poll() is None:
            known = families.setdefault(run.process.pid, [])
            known += [member for member in _family(run.process.pid) if member not in known]


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return []


def _wait(executions: list[Execution], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(run.process.poll() is None for run in executions):
        time.sleep(0.1)
