"""Command lines: options that several tools share, exit codes, and the user's mistakes in one line each."""

import argparse
import errno
import io
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from tqdm import tqdm

LINE_EVERY_S = 30.0  # seconds between two lines of progress outside a terminal
OTHERS_WAIT_S = 10.0  # seconds before a process of torchrun other than the first reports its error and ends
AnyPath = str | Path  # of a function's parameter; `as_path` makes a Path of it
LAUNCHED = "PLOTARMOUR_LAUNCHED"  # set for processes that suite/multi_gpu.py starts and whose error.json it reads


class UserError(ValueError):
    """A mistake that the user can mend. The message says what was found, what was expected and what to do."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or action.default is False or action.default == []  # 0 is a default
        return action.help if has_none else super()._get_help_string(action)


def add_common(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options that mean the same in every tool: "device", "checkpoint", "force" and "set".

    With "set", --device is short for --set device=...; `overrides_of` returns both.
    """
    options = {
        "device": {"default": None if "set" in names else "auto", "metavar": "auto|cpu|cuda",
                   "help": "where to compute" + ("; without it, the recipe's" if "set" in names else "")},
        "checkpoint": {"default": "best", "type": _checkpoint, "metavar": "best|latest|STEP",
                       "help": "checkpoint of a run: best by validation loss, latest, or a step that was kept"},
        "force": {"action": "store_true", "help": "replace results that exist"},
        "set": {"action": "append", "default": [], "metavar": "key=value", "dest": "overrides",
                "help": "override a setting of the recipe; may be repeated"}}
    for name in options:
        if name in names:
            parser.add_argument(f"--{name}", **options[name])


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return "key=value" for each --set, and for --device where it is given."""
    return [*args.overrides, *([f"device={args.device}"] if args.device is not None else [])]


def as_path(path: AnyPath) -> Path:
    """Return a path with the home folder in place of "~" at its beginning; the type of every path on a command line."""
    return Path(os.path.expanduser(path))


def next_command(tool: str, *arguments: object) -> str:
    """Return a line with a command of another tool to go on with, typed as this one was."""
    path = Path(sys.argv[0]).with_name(f"{tool}.py")
    return "next: " + shlex.join(["python", *(a.as_posix() if isinstance(a, Path) else str(a)
                                              for a in (path, *arguments))])


def refuse_existing(path: Path, force: bool) -> None:
    """Raise `UserError` if a result exists and the user has not said --force."""
    if path.exists() and not force:
        raise UserError(f"{path} exists already; expected a new --out. Use another --out, or --force to replace it.")


def require_run(folder: Path) -> None:
    """Raise `UserError` unless a folder is a run folder; tools check this before their heavy imports."""
    if not (folder / "run.json").is_file():
        runs = ", ".join(sorted(path.parent.name for path in folder.glob("*/run.json")))
        remedy = f"It holds {runs}: name one of them" if runs else "Make one with tools/train.py"
        raise UserError(f"{folder} is not a run folder: it has no run.json. {remedy}.")


def _checkpoint(text: str) -> str | int:
    if text in ("best", "latest") or text.isdecimal():
        return int(text) if text.isdecimal() else text
    raise argparse.ArgumentTypeError(f"{text!r} is not a checkpoint; expected best, latest or a step")


def mistake_of(error: BaseException) -> str | None:
    """Return the line that tells a user's mistake, or a path or disk that cannot be used; None for other exceptions."""
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. Check the path, its permissions and the disk."
    return str(error) if isinstance(error, UserError) else None


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main` and end the process: 0 on success, 2 on the user's mistake, 1 on our failure."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by what started this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):  # what its encoding lacks, such as an emoji in cp1252, is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = mistake_of(error)
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun and suite/multi_gpu.py read it
            kind = "UserError" if message else type(error).__name__
            content = {"kind": kind, "message": message or traceback.format_exc(), "timestamp": int(time.time())}
            Path(path).write_text(json.dumps(content), encoding="utf-8")
        if message is None:
            raise
        if (rank := os.environ.get("RANK", "0")) != "0":
            # torchrun ends all processes as soon as one has failed. Usually the first process meets the same mistake
            # and reports it during this sleep; a mistake of this process alone is reported here.
            time.sleep(OTHERS_WAIT_S)
            message = f"process {rank}: {message}"
        if LAUNCHED not in os.environ:
            print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def say(message: str) -> None:
    """Print a line to stderr, above a progress bar if there is one."""
    with suppress(OSError):  # the terminal is closed: the work goes on
        tqdm.write(message, file=sys.stderr)


@cache
def warn(message: str) -> None:
    """Print a warning, each one once. Not by `warnings.warn`, which PYTHONWARNINGS=error turns into an exception."""
    say(f"warning: {message}")


def progress(total: int, unit: str, description: str, initial: int = 0, is_timed: bool = True,
             is_shown: bool = True) -> tqdm:
    """Show progress on stderr: a bar on a terminal; in a notebook, a pipe or a file a line at most every 30 seconds.

    `initial` units, such as "tokens", were done by an earlier start. Without `is_timed`, speed and time left are not
    added: training gives its own, by `set_postfix_str`.
    """
    bar_format = None if is_timed else "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    return (tqdm if sys.stderr.isatty() else _Lines)(
        total=total, unit=unit, desc=description, initial=initial, unit_scale=is_timed, mininterval=0.5,
        bar_format=bar_format, disable=not is_shown)


class _Lines(tqdm):
    """Progress in lines: the first after 30 seconds, then one whenever as long or 1 % of the time so far has passed."""

    def __init__(self, **settings):
        # tqdm does not clear and redraw what is not on stderr; `say` prints the lines.
        super().__init__(**settings | {"mininterval": LINE_EVERY_S}, delay=LINE_EVERY_S, miniters=1, leave=False,
                         file=io.StringIO())

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print a line; tqdm calls this with a message only at the end, to remove a bar."""
        if msg is not None:
            return
        f = self.format_dict
        self.mininterval = max(LINE_EVERY_S, 0.01 * f["elapsed"])
        parts = [f"{self.n / max(self.total, 1):.0%} of {self.total:,} {self.unit}"]
        if self.bar_format is None:
            rate = (self.n - self.initial) / f["elapsed"]
            parts += [f"{rate:,.0f} {self.unit}/s", f"{duration((self.total - self.n) / max(rate, 1e-9))} left"]
        say(f"{self.desc}: {', '.join(parts + [self.postfix] * bool(self.postfix))}")


def file_size(size: int) -> str:
    """Return a number of bytes for people: "812 bytes", "3.4 KiB" or "1,907.3 MiB"."""
    if size < 2**10:
        return f"{size} bytes"
    return f"{size / 2**10:.1f} KiB" if size < 2**20 else f"{size / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Return seconds for people: "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
