"""The user's mistakes: one clear line (found, expected, what to do) and exit code 2."""

import argparse
import errno
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable

# What an operating system says about a path that the user gave; anything else is our own failure.
USER_OS_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENOSPC,
                  errno.ENAMETOOLONG, errno.EEXIST, errno.ELOOP, errno.EDQUOT, errno.EFBIG, errno.EIO}

OTHERS_WAIT_S = 10.0  # seconds before a process of torchrun other than the first reports its error and ends
LAUNCHED = "PLOTARMOUR_LAUNCHED"  # set for processes that suite/multi_gpu.py starts and whose error.json it reads


class UserError(ValueError):
    """A mistake that the user can mend. The message says what was found, what was expected and what to do."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to --help, where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        none = action.default is None or action.default is False or action.default == []  # 0 is a default, too
        return action.help if none else super()._get_help_string(action)


def run_command(main: Callable[[], None]) -> None:
    """Run a command line's `main` and end the process: 0 on success, 2 on the user's mistake, 1 on our failure."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # for people: without our line of code
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_report(str(error)))
    except BrokenPipeError:  # of whoever reads our output, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # a write that fails does not know its file's name
        if error.errno not in USER_OS_ERRORS or (error.filename is None and not disk_full):
            _record(type(error).__name__, traceback.format_exc())
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_report(f"{where}{error.strerror}. Check the path, its permissions and the disk."))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _record(type(error).__name__, traceback.format_exc())
        raise


def _report(message: str) -> int:
    """Report a user's mistake, and return the exit code."""
    rank = os.environ.get("RANK", "0")
    _record("UserError", message)
    if rank != "0":
        # torchrun ends all processes as soon as one has failed. Usually the first process meets the same mistake and
        # reports it during this sleep; a mistake of this process alone is reported here (`outwait_others` waits).
        time.sleep(OTHERS_WAIT_S)
        message = f"process {rank}: {message}"
    if LAUNCHED not in os.environ:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _record(kind: str, message: str) -> None:
    """Write error.json, where torchrun expects it: torchrun reads `message` and `timestamp`, the launcher `kind`."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"kind": kind, "message": message, "timestamp": int(time.time())}, file)


def say(message: str) -> None:
    """Print a line to stderr without tearing a progress bar."""
    from tqdm import tqdm

    tqdm.write(message, file=sys.stderr)


def outwait_others() -> None:
    """In one of torchrun's processes, before it ends because another is lost: let that one say why.

    Torchrun ends this wait as soon as another has failed; one that was killed has nothing to say, and ends it at once.
    """
    time.sleep(OTHERS_WAIT_S + 5.0)
