"""Notebooks as functions: their parameters, a papermill process of their own for each, and what came of it."""

import ast
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil

from plotarmour.cli import LINE_EVERY_S, UserError, say, warn
from plotarmour.files import write_text
from plotarmour.suite.multi_gpu import family, kill

ROOT = Path(__file__).resolve().parents[2]
Value = int | float | bool | str  # of a notebook's parameter
SAVE_S = 60.0  # how long a run that is asked to stop may take to finish its step, save and end its notebook


def parameters_of(notebook: Path) -> dict[str, Value | None]:
    """Return the parameters of a notebook with their defaults, from its cell tagged `parameters`.

    The cell is parsed as Python, because `papermill.inspect_notebook` loses a line with a second "=". A default that is
    not a literal is None.

    Raises:
        UserError: not a notebook, or one without such a cell.
    """
    try:
        cells = nbformat.read(notebook, as_version=4).cells
        source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    except (ValueError, StopIteration):
        raise UserError(f"{notebook} is not a notebook with a cell tagged parameters; expected an .ipynb that has a "
                        "default for each column of the grid.") from None
    defaults = {}
    for node in ast.parse(source).body:
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if isinstance(target, ast.Name) and node.value is not None:
            defaults[target.id] = None
            with suppress(ValueError):
                defaults[target.id] = ast.literal_eval(node.value)
    return defaults


@dataclass(frozen=True)
class Executed:
    """What an executed notebook holds."""

    parameters: dict[str, Value] = field(default_factory=dict)  # that papermill passed
    is_complete: bool = False  # every code cell ran to its end
    error: str = ""  # kind of the exception that ended it, such as "UserError"
    message: str = ""  # of that exception
    last_line: str = ""  # of progress that it printed; papermill saves a running notebook now and then

    @property
    def failure(self) -> str:
        """Why the notebook failed, in one line."""
        if not self.error:
            return "it ended without an error and without a result; the machine may have run out of memory"
        kind = "" if self.error == "UserError" else f"{self.error}: "
        return " ".join(f"{kind}{self.message}".split())


def read_executed(executed: Path) -> Executed:
    """Return what an executed notebook holds; an empty result where there is no such notebook."""
    try:
        notebook = nbformat.read(executed, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError):  # not there, or half written
        return Executed()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    error = next((output for output in outputs if output.output_type == "error"), {"ename": "", "evalue": ""})
    printed = "\n".join(output.get("text", "") for output in outputs)
    last_line = next((line for line in reversed(printed.splitlines()) if "% of " in line), "")
    is_complete = all(cell.metadata.get("papermill", {}).get("status") == "completed" for cell in cells)
    parameters = notebook.metadata.get("papermill", {}).get("parameters", {})
    return Executed(dict(parameters), is_complete, error["ename"], error["evalue"], last_line)


def write_html(executed: Path) -> None:
    """Write an executed notebook as HTML beside it, where nbconvert is installed."""
    try:
        from nbconvert import HTMLExporter

        write_text(executed.with_suffix(".html"), HTMLExporter().from_filename(str(executed))[0])
    except (ImportError, FileNotFoundError):  # it is not installed, or the notebook has not begun
        pass
    except Exception as error:  # of any kind: the notebook itself is there
        warn(f"{executed.name} could not be written as HTML ({type(error).__name__}: {error})")


def start_notebook(source: Path, executed: Path, parameters: dict[str, Value],
                   environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start one notebook, which papermill writes to `executed` with its outputs, cell by cell.

    What papermill and the kernel print goes to a .log beside it. `environment` has variables to add to those of this
    process. The new process has a session of its own, so that a Ctrl-C at the terminal reaches only us.
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
    """Run one notebook to its end; see `start_notebook`. Every half minute, the last line that it printed is shown.

    Raises:
        UserError: a cell raised one.
        SystemExit: the notebook failed for another reason; exit code 1.
    """
    process = start_notebook(source, executed, parameters)
    try:
        while process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(LINE_EVERY_S)
            if process.poll() is None and (line := read_executed(executed).last_line):
                say(f"{executed.stem}: {line}")
    except BaseException:  # interrupted: no process may go on writing in the background
        stop_notebooks([process])
        raise
    write_html(executed)
    result = read_executed(executed)
    if result.error == "UserError":
        raise UserError(result.message)
    if process.returncode:
        raise SystemExit(f"error: {executed.name} failed: {result.failure}. See {executed} and "
                         f"{executed.with_suffix('.log')}; the same command starts it again.")


def stop_notebooks(processes: list[subprocess.Popen]) -> None:
    """End papermill processes and everything that they started; return when none of them is left.

    A kernel is first interrupted, as by its stop button: a run that trains finishes its step and saves. Another
    interrupt while this waits ends all of them at once.
    """
    members = family(processes)
    try:
        say("stopping: a run that trains finishes its step and saves, which takes some seconds; Ctrl-C once more ends "
            "it at once")
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
