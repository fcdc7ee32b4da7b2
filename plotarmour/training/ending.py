"""How a run ends: after a whole step, with a reason, the numbers at its end, and what to do next.

Only this module reads and writes `DONE.json` (the run is complete) and `STOPPED.json` (it can continue).
"""

import json
import math
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path

from plotarmour.evaluation.metrics import perplexity
from plotarmour.files import WRONG_CONTENT, check_types, write_json

FILES = ("DONE.json", "STOPPED.json")

HANGUP = getattr(signal, "SIGHUP", None)  # none on Windows

_asked_by_thread = threading.Event()

CONTINUES = "{again} continues from the checkpoint of step {last_checkpoint:,}."


class Reason(StrEnum):
    """Why a run ended, as in DONE.json and STOPPED.json; with a label, the exit code of tools/train.py, and advice."""

    def __new__(cls, value: str, label: str, exit_code: int = 0, advice: str = "") -> "Reason":
        reason = str.__new__(cls, value)
        reason._value_, reason.label, reason.exit_code, reason.advice = value, label, exit_code, advice
        return reason

    MAX_STEPS = "max_steps", "all steps taken"
    SCHEDULE_MINUTES = "schedule_minutes", "the minutes of the schedule are over"
    EARLY_STOPPING = "early stopping", "the validation loss had stopped improving"
    TIME_BUDGET = "time budget", "stopped: the time of this session is over", 0, CONTINUES
    SIGINT = "signal SIGINT", "stopped by signal SIGINT", 130, CONTINUES
    SIGTERM = "signal SIGTERM", "stopped by signal SIGTERM", 130, CONTINUES
    SIGHUP = "signal SIGHUP", "stopped because its terminal was closed (SIGHUP)", 130, CONTINUES
    SIGNAL_ELSEWHERE = "signal to another process", "stopped by a signal to another process", 130, CONTINUES
    NON_FINITE = (
        "non-finite", "stopped: loss or gradients not finite", 1,
        "The loss or the gradients were not finite in ten steps in a row; none of these steps changed the weights. The "
        "last good checkpoint is that of step {last_checkpoint:,}. Training on from there is likely to fail in the "
        "same way: start a new run in another folder, with a lower learning_rate.")
    LOST_PROCESS = (
        "lost a process", "stopped: another process of this run has died", 1,
        "Its output, if there is any, says why. " + CONTINUES)


DONE = {  # reasons that complete a run, with the setting that decided; all other reasons leave a run to be continued
    Reason.MAX_STEPS: "max_steps", Reason.SCHEDULE_MINUTES: "schedule_minutes", Reason.EARLY_STOPPING: "patience"}


@dataclass(frozen=True)
class Ending:
    """The content of DONE.json or STOPPED.json."""

    reason: Reason
    step: int  # attempted updates, over all sessions
    tokens_seen: int  # training tokens, over all sessions
    elapsed_s: float  # of training, over all sessions
    train_loss: float | None  # nats per token since the row of log.csv before the last
    val_loss: float | None  # nats per token of the last evaluation
    best_step: int  # of the evaluation with the lowest loss
    best_val_loss: float
    skipped_steps: int  # without an update because a value was not finite
    scaler_overflows: int  # steps without an update because float16 overflowed
    peak_memory_mib: float | None  # of the last session
    last_checkpoint: int  # step of the latest checkpoint
    micro_batch_size: int  # rows per forward pass at the end
    input_wait_s: float  # that the last session waited for batches

    @classmethod
    def read(cls, folder: Path) -> "Ending | None":
        """Return how the run in a folder ended; None while it trains, and where the file is damaged.

        A notebook of one's own in a grid may write its reason and fewer numbers: the others are None. In a run folder,
        which has a run.json, all numbers are there.
        """
        is_run = (folder / "run.json").exists()
        types = {field.name: field.type if is_run else field.type | None for field in fields(cls)}
        for name in FILES:
            with suppress(OSError, *WRONG_CONTENT):
                values = json.loads((folder / name).read_text(encoding="utf-8"))
                values["reason"] = Reason(values["reason"])
                check_types(values, types, name)
                return cls(**{name: values.get(name) for name in types})
        return None

    def write(self, folder: Path) -> None:
        """Write DONE.json or STOPPED.json into a run folder."""
        write_json(folder / FILES[not self.is_done], asdict(self))

    @property
    def is_done(self) -> bool:
        """Whether the run is complete."""
        return self.reason in DONE

    @property
    def label(self) -> str:
        """How the run ended, for people."""
        return f"done: {self.reason.label}" if self.is_done else self.reason.label

    @property
    def best(self) -> str:
        """The best evaluation, for people."""
        if not math.isfinite(self.best_val_loss):
            return "never evaluated"
        best = f"validation loss {self.best_val_loss:.4f} (perplexity {perplexity(self.best_val_loss):,.2f}) at step "
        untrained = " (before any training: no later evaluation was better)" if self.best_step == 0 < self.step else ""
        return f"{best}{self.best_step:,}{untrained}"

    def advice(self, again: str = "The same command") -> str:
        """Say what to do next; empty for a complete run.

        Args:
            again: what continues the run, such as a command or a notebook's cell; it begins a sentence.
        """
        return self.reason.advice.format(again=again, last_checkpoint=self.last_checkpoint)


def is_complete(folder: Path) -> bool:
    """Return whether the run in a folder is complete."""
    ending = Ending.read(folder)
    return ending is not None and ending.is_done


def forget_ending(folder: Path) -> None:
    """Remove DONE.json and STOPPED.json from a run folder, because the run continues."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGHUP into a request to finish the step and save; a second signal stops at once.

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
            numbers = [signal.SIGINT, signal.SIGTERM]
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:  # nohup ignores it
                numbers.append(HANGUP)
            self._handlers = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._reason = self.asked
        _asked_by_thread.clear()

    def _handle(self, number: int, frame) -> None:
        if self._reason:
            if number == HANGUP:  # the shell and the system may both send it
                return
            raise KeyboardInterrupt
        self._reason = Reason(f"signal {signal.Signals(number).name}")
        if sys.stderr is not None and sys.stderr.isatty():  # os.write: the signal may have interrupted a print
            with suppress(OSError):  # the terminal is closed
                os.write(sys.stderr.fileno(), b"\nfinishing the step, then saving; once more stops at once\n")


def ask_to_stop() -> None:
    """Ask the training in this process, now or later, to stop as after SIGINT; for threads, which get no signals."""
    _asked_by_thread.set()
