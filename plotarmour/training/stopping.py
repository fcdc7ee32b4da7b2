"""Stopping well: signals and time budgets end a session after a whole step, with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
import time

from plotarmour.config import AUTO, Auto
from plotarmour.machine import host

# Kaggle ends sessions after 9 to 12 hours; these leave time for what comes after training.
KAGGLE_MINUTES = {"Interactive": 510.0, "Batch": 660.0}


_asked_by_threads: list[str] = []


def ask_to_stop(name: str) -> None:
    """Ask what trains in this process, now or later, to stop as by a signal of this name; for other threads."""
    _asked_by_threads.append(name)


class StopRequest(contextlib.AbstractContextManager):
    """SIGINT and SIGTERM ask the loop to finish its step and save; a second one stops at once.

    Attributes:
        asked: name of the first signal, or None.
    """

    def __init__(self):
        self.signal: str | None = None
        self.before: dict = {}

    @property
    def asked(self) -> str | None:
        return self.signal or next(iter(_asked_by_threads), None)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # nobody else can
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
        if sys.stderr is not None and sys.stderr.isatty():  # os.write: print may be what was interrupted
            os.write(sys.stderr.fileno(), b"\nfinishing the step, then saving; once more stops at once\n")


def session_minutes(max_minutes: float | Auto) -> float:
    """Return how many minutes this session may train from now on; 0 for no limit.

    Args:
        max_minutes: of the recipe. "auto" is no limit except on Kaggle, where it counts from the start of the process:
            a session's clock runs while text is prepared, too.
    """
    if max_minutes != AUTO:
        return max_minutes
    if host() != "kaggle":
        return 0.0
    limit = KAGGLE_MINUTES.get(os.environ.get("KAGGLE_KERNEL_RUN_TYPE", ""), min(KAGGLE_MINUTES.values()))
    import psutil

    this = psutil.Process()
    # A notebook's kernel may be restarted, and a command may be started late: what started them is older.
    began = min(process.create_time() for process in (this, *this.parents()))
    return max(1.0, limit - (time.time() - began) / 60)
