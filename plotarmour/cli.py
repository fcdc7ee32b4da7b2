"""Command lines: options that several tools share, exit codes, and the user's mistakes in one line each."""

import argparse
import errno
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY_S = 30.0  # seconds between two lines of progress outside a terminal
OTHERS_WAIT_S = 10.0  # seconds before a process of torchrun other than the first reports its error and ends
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
    if "device" in names:
        parser.add_argument("--device", default=None if "set" in names else "auto", metavar="auto|cpu|cuda",
                            help="where to compute" + ("; without it, the recipe's" if "set" in names else ""))
    if "checkpoint" in names:
        parser.add_argument("--checkpoint", default="best", type=_checkpoint, metavar="best|latest|STEP",
                            help="checkpoint of a run: best by validation loss, latest, or a step that was kept")
    if "force" in names:
        parser.add_argument("--force", action="store_true", help="replace results that exist")
    if "set" in names:
        parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides",
                            help="override a setting of the recipe; may be repeated")


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return "key=value" for each --set, and for --device where it is given."""
    return [*args.overrides, *([f"device={args.device}"] if args.device is not None else [])]


def refuse_existing(path: Path, force: bool) -> None:
    """Raise `UserError` if a result exists and the user has not said --force."""
    if path.exists() and not force:
        raise UserError(f"{path} exists already; expected a new --out. Use another --out, or --force to replace it.")


def _checkpoint(text: str) -> str | int:
    if text in ("best", "latest"):
        return text
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a checkpoint; expected best, latest or a step")


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main` and end the process: 0 on success, 2 on the user's mistake, 1 on our failure."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without the line of code
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = _message_for_user(error)
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


def outwait_others() -> None:
    """Wait before this process of torchrun ends because another one is lost, so that the other one can report why.

    torchrun ends this wait as soon as it notices that the other process has failed or was killed.
    """
    time.sleep(OTHERS_WAIT_S + 5.0)


def _message_for_user(error: Exception) -> str | None:
    """Return the message of a `UserError`, or of the operating system about a file or a full disk."""
    if isinstance(error, OSError) and (error.filename or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. Check the path, its permissions and the disk."
    return str(error) if isinstance(error, UserError) else None


def say(message: str) -> None:
    """Print a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def progress(total: int, unit: str, description: str, initial: int = 0, is_timed: bool = True,
             is_shown: bool = True) -> "tqdm | ProgressLines":
    """Show progress on stderr: a bar on a terminal; in a notebook, a pipe or a file a line at most every 30 seconds.

    Args:
        total: of the work, in units.
        unit: plural, such as "tokens".
        description: names the work.
        initial: units done by an earlier start.
        is_timed: whether speed and time left are added; training gives its own, by `set_postfix_str`.
        is_shown: False shows nothing.

    Returns:
        A context manager with `update(n)` and `set_postfix_str(text)`.
    """
    if is_shown and not sys.stderr.isatty():
        return ProgressLines(total, unit, description, initial, is_timed)
    from tqdm import tqdm

    bar_format = None if is_timed else "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    return tqdm(total=total, unit=unit, desc=description, initial=initial, unit_scale=is_timed, mininterval=0.5,
                bar_format=bar_format, disable=not is_shown)


class ProgressLines:
    """Progress in lines. It has the two methods of tqdm, and takes the arguments, that `progress` describes."""

    def __init__(self, total: int, unit: str, description: str, initial: int, is_timed: bool):
        self.total, self.unit, self.description, self.initial = total, unit, description, initial
        self.is_timed, self.n, self.postfix = is_timed, initial, ""
        self.begun = self.shown_at = time.monotonic()

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        """Set what the next line ends with."""
        self.postfix = text

    def update(self, n: int = 1) -> None:
        """Count units; print a line if the last one is older than 30 seconds and 1 % of the time so far."""
        self.n, now = self.n + n, time.monotonic()
        if now - self.shown_at < max(LINE_EVERY_S, 0.01 * (now - self.begun)):
            return
        self.shown_at, parts = now, [f"{self.n / max(self.total, 1):.0%} of {self.total:,} {self.unit}"]
        if self.is_timed:
            rate = (self.n - self.initial) / (now - self.begun)
            parts += [f"{rate:,.0f} {self.unit}/s", f"{duration((self.total - self.n) / max(rate, 1e-9))} left"]
        say(f"{self.description}: {', '.join(parts + [self.postfix] * bool(self.postfix))}")


def duration(seconds: float) -> str:
    """Return seconds for people: "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
