"""Stopping well: signals and time budgets end a session after a whole step, with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
import time

from plotarmour.config import AUTO
from plotarmour.machine import host
from plotarmour.training.ending import Reason

# Kaggle ends sessions after 9 hours (interactive) or 12 (batch); the rest is for what comes after training.
KAGGLE_MINUTES = {"Interactive": 510.0, "Batch": 660.0}

_asked_by_thread = threading.Event()


def ask_to_stop() -> None:
    """Ask the training in this process, now or later, to stop as after SIGINT; for threads, which get no signals."""
    _asked_by_thread.set()


class StopRequest(contextlib.AbstractContextManager):
    """Turns SIGINT and SIGTERM into a request to finish the step and save; a second signal stops at once.

    The request ends with the context: the next one begins without it.
    """

    def __init__(self):
        self._reason: Reason | None = None
        self._handlers: dict = {}

    @property
    def asked(self) -> Reason | None:
        """The signal, or None."""
        return self._reason or (Reason.SIGINT if _asked_by_thread.is_set() else None)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            self._handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._reason = self.asked
        _asked_by_thread.clear()

    def _handle(self, number: int, frame) -> None:
        if self._reason:
            raise KeyboardInterrupt
        self._reason = Reason(f"signal {signal.Signals(number).name}")
        if sys.stderr is not None and sys.stderr.isatty():  # os.write: the signal may have interrupted a print
            os.write(sys.stderr.fileno(), b"\nfinishing the step, then saving; once more stops at once\n")


def session_minutes(max_minutes: float | str) -> float:
    """Return how many minutes this session may train from now on; 0 for no limit.

    Args:
        max_minutes: of the recipe. AUTO is no limit except on Kaggle, where the session's clock also runs while text
            is prepared.
    """
    if max_minutes != AUTO:
        return max_minutes
    if host() != "kaggle":
        return 0.0
    limit = KAGGLE_MINUTES.get(os.environ.get("KAGGLE_KERNEL_RUN_TYPE", ""), min(KAGGLE_MINUTES.values()))
    import psutil

    process = psutil.Process()
    # The oldest ancestor, because a notebook's kernel may have been restarted and a command started late.
    began = min(ancestor.create_time() for ancestor in (process, *process.parents()))
    return max(1.0, limit - (time.time() - began) / 60)
