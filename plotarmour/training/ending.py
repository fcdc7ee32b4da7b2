"""How a run ended: the reason, the numbers at its end, and what to do next.

Only this module reads and writes `DONE.json` (the run is complete) and `STOPPED.json` (it can continue).
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path

from plotarmour.evaluation.metrics import perplexity
from plotarmour.files import write_json

FILES = ("DONE.json", "STOPPED.json")
UNTRAINED = " (before any training: no later evaluation was better)"


class Reason(StrEnum):
    """Why a run ended, as `reason` in DONE.json and STOPPED.json."""

    MAX_STEPS = "max_steps"
    SCHEDULE_MINUTES = "schedule_minutes"
    EARLY_STOPPING = "early stopping"
    TIME_BUDGET = "time budget"
    SIGINT = "signal SIGINT"
    SIGTERM = "signal SIGTERM"
    SIGNAL_ELSEWHERE = "signal to another process"
    NON_FINITE = "non-finite"
    LOST_PROCESS = "lost a process"


CONTINUES = "{again} continues from the checkpoint of step {last_checkpoint:,}."
DONE = {  # reasons that complete a run, with the setting that decided; all other reasons leave a run to be continued
    Reason.MAX_STEPS: "max_steps", Reason.SCHEDULE_MINUTES: "schedule_minutes", Reason.EARLY_STOPPING: "patience"}
# Per reason: a label, the exit code of tools/train.py, and advice.
MEANINGS = {
    Reason.MAX_STEPS: ("done: all steps taken", 0, ""),
    Reason.SCHEDULE_MINUTES: ("done: the minutes of the schedule are over", 0, ""),
    Reason.EARLY_STOPPING: ("done: the validation loss had stopped improving", 0, ""),
    Reason.TIME_BUDGET: ("stopped: the time of this session is over", 0, CONTINUES),
    Reason.SIGINT: ("stopped by signal SIGINT", 130, CONTINUES),
    Reason.SIGTERM: ("stopped by signal SIGTERM", 130, CONTINUES),
    Reason.SIGNAL_ELSEWHERE: ("stopped by a signal to another process", 130, CONTINUES),
    Reason.NON_FINITE: (
        "stopped: loss or gradients not finite", 1,
        "The loss or the gradients were not finite in ten steps in a row; none of these steps changed the weights. The "
        "last good checkpoint is that of step {last_checkpoint:,}. Training on from there is likely to fail in the "
        "same way: start a new run in another folder, with a lower learning_rate."),
    Reason.LOST_PROCESS: (
        "stopped: another process of this run has died", 1,
        "Its output, if there is any, says why. " + CONTINUES),
}


@dataclass(frozen=True)
class Ending:
    """The content of DONE.json or STOPPED.json.

    Attributes:
        reason: why the run ended.
        step: attempted updates, over all sessions.
        tokens_seen: training tokens, over all sessions.
        elapsed_s: seconds of training, over all sessions.
        train_loss: nats per token since the row of log.csv before the last.
        val_loss: nats per token of the last evaluation.
        best_step, best_val_loss: of the evaluation with the lowest loss.
        skipped_steps: steps without an update because a value was not finite.
        scaler_overflows: steps without an update because float16 overflowed.
        peak_memory_mib: of the last session.
        last_checkpoint: step of the latest checkpoint.
        micro_batch_size: rows per forward pass at the end.
        input_wait_s: seconds that the last session waited for batches.
    """

    reason: Reason
    step: int
    tokens_seen: int
    elapsed_s: float
    train_loss: float | None
    val_loss: float | None
    best_step: int
    best_val_loss: float
    skipped_steps: int
    scaler_overflows: int
    peak_memory_mib: float | None
    last_checkpoint: int
    micro_batch_size: int
    input_wait_s: float

    @classmethod
    def read(cls, folder: Path) -> "Ending | None":
        """Return how the run in a folder ended; None while it trains, and where the file is damaged.

        A notebook of one's own in a grid may write its reason and fewer numbers: the others are None.
        """
        for name in FILES:
            try:
                values = json.loads((folder / name).read_text(encoding="utf-8"))
                return cls(**{field.name: values.get(field.name) for field in fields(cls)}
                           | {"reason": Reason(values["reason"])})
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
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
        return MEANINGS[self.reason][0]

    @property
    def exit_code(self) -> int:
        return MEANINGS[self.reason][1]

    @property
    def best(self) -> str:
        """The best evaluation, for people."""
        if not math.isfinite(self.best_val_loss):
            return "never evaluated"
        return (f"validation loss {self.best_val_loss:.4f} (perplexity {perplexity(self.best_val_loss):,.2f}) at step "
                f"{self.best_step:,}{UNTRAINED if self.best_step == 0 < self.step else ''}")

    def advice(self, again: str = "The same command") -> str:
        """Say what to do next; empty for a complete run.

        Args:
            again: what continues the run, such as a command or a notebook's cell; it begins a sentence.
        """
        return MEANINGS[self.reason][2].format(again=again, last_checkpoint=self.last_checkpoint)


def is_complete(folder: Path) -> bool:
    """Return whether the run in a folder is complete."""
    ending = Ending.read(folder)
    return ending is not None and ending.is_done


def forget_ending(folder: Path) -> None:
    """Remove DONE.json and STOPPED.json from a run folder, because the run continues."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def ending_stamp(folder: Path) -> tuple[tuple[int, int], ...]:
    """Return inode and time of the files that say how a run ended; it changes whenever one is written."""
    stats = [(folder / name).stat() for name in FILES if (folder / name).exists()]
    return tuple((stat.st_ino, stat.st_mtime_ns) for stat in stats)
