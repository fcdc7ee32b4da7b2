"""One notebook in a papermill process of its own: read its parameters, start it, read its result, stop it."""

import ast
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil

from plotarmour.cli import UserError
from plotarmour.suite.multi_gpu import family, kill
from plotarmour.suite.notebooks import ROOT

Value = int | float | bool | str  # of a notebook's parameter
SAVE_S = 60.0  # how long a run that is asked to stop may take to finish its step, save and end its notebook


@dataclass(frozen=True)
class Executed:
    """What an executed notebook holds.

    Attributes:
        parameters: that papermill passed.
        is_complete: whether every code cell ran to its end.
        error: kind of the exception that ended it, such as "UserError"; "" for none.
        message: of that exception.
    """

    parameters: dict[str, Value]
    is_complete: bool = False
    error: str = ""
    message: str = ""


def parameters_of(notebook: Path) -> dict[str, Value | None]:
    """Return the parameters of a notebook with their defaults, from its cell tagged `parameters`.

    The cell is parsed as Python, because `papermill.inspect_notebook` loses a line with a second "=". A default that is
    not a literal is None.

    Raises:
        UserError: not a notebook, or one without such a cell.
    """
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except ValueError as error:
        raise UserError(f"{notebook} is not a notebook: {error}; expected the .ipynb that the rows run.") from None
    sources = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if not sources:
        raise UserError(f"{notebook} has no cell tagged parameters; expected a default for each column of the grid.")
    defaults = {}
    for node in ast.parse(sources[0]).body:
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and node.value is not None:
            try:
                defaults[target.id] = ast.literal_eval(node.value)
            except ValueError:
                defaults[target.id] = None
    return defaults


def start_notebook(source: Path, executed: Path, parameters: dict[str, Value],
                   environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start one notebook; what papermill and the kernel print goes to a .log beside the executed notebook.

    Args:
        source: the notebook.
        executed: where papermill writes it with its outputs, cell by cell.
        parameters: by name.
        environment: variables to add to those of this process.

    Returns:
        The process, in a session of its own, so that a Ctrl-C at the terminal reaches only us.
    """
    command = [sys.executable, "-m", "papermill", str(source), str(executed), "--cwd", str(ROOT), "--kernel", "python3",
               "--language", "python", "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-r" if isinstance(value, str) else "-p", name, str(value)]  # -r: text, whatever it looks like
    executed.unlink(missing_ok=True)  # so that nobody reads the error of an earlier start
    with executed.with_suffix(".log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | (environment or {}), start_new_session=True)


def run_notebook(source: Path, executed: Path, parameters: dict[str, Value]) -> None:
    """Run one notebook to its end.

    Args:
        source, executed, parameters: see `start_notebook`.

    Raises:
        UserError: a cell raised one.
        SystemExit: the notebook failed for another reason; exit code 1.
    """
    process = start_notebook(source, executed, parameters)
    try:
        process.wait()
    except BaseException:  # interrupted: no process may go on writing in the background
        stop_notebooks([process])
        raise
    result = read_executed(executed)
    if result.error == "UserError":
        raise UserError(result.message)
    if process.returncode:
        raise SystemExit(f"error: {executed.name} failed: {failure(result)}. See {executed} and "
                         f"{executed.with_suffix('.log')}; the same command starts it again.")


def read_executed(executed: Path) -> Executed:
    """Return what an executed notebook holds; an empty result where there is no such notebook."""
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):  # not there, or half written
        return Executed({})
    states = notebook.metadata.get("papermill", {})
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    error = next((o for cell in cells for o in cell.outputs if o.output_type == "error"), {"ename": "", "evalue": ""})
    is_complete = all(cell.metadata.get("papermill", {}).get("status") == "completed" for cell in cells)
    return Executed(dict(states.get("parameters", {})), is_complete, error["ename"], error["evalue"])


def failure(result: Executed) -> str:
    """Return why a notebook failed, in one line."""
    kind = "" if result.error == "UserError" else f"{result.error}: "
    return (" ".join(f"{kind}{result.message}".split()) if result.error else
            "it ended without an error and without a result; the machine may have run out of memory")


def stop_notebooks(processes: list[subprocess.Popen]) -> None:
    """End papermill processes and everything that they started; return when none of them is left.

    A kernel is first interrupted, as by its stop button: a run that trains finishes its step and saves. Another
    interrupt while this waits ends all of them at once.
    """
    members = family(processes)
    try:
        if os.name == "posix":  # no such signal on Windows
            for member in members:
                with suppress(psutil.Error):
                    if any("ipykernel" in part for part in member.cmdline()):
                        member.send_signal(signal.SIGINT)
            psutil.wait_procs([member for member in members if member.pid in {p.pid for p in processes}], SAVE_S)
    finally:
        kill(members | family(processes))  # a kernel may have started after the first look
        for process in processes:
            process.wait()
