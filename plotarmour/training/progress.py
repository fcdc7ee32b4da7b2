"""When a run will be done: said after five timed steps, and again where it turns out otherwise."""

import math
import time
from collections.abc import Callable

import torch

from plotarmour.config import TrainingConfig
from plotarmour.training.pace import Pace

TIMED_STEPS = 5
OFF_BY, OFF_BY_S = 0.1, 30.0  # of the whole session, and in seconds: so much, and it is said anew
QUIET_S = 60.0  # between two lines


class Forecast:
    """What is left of a run, in seconds, and the lines that say so.

    Args:
        config: of the run.
        pace: that the loop keeps.
        minutes: that this session may take; 0 for no limit.
    """

    def __init__(self, config: TrainingConfig, pace: Pace, minutes: float):
        self.config, self.pace, self.minutes = config, pace, minutes
        self.said_at: float | None = None
        self.said_end = 0.0

    def left_s(self, step: int) -> float:
        """Seconds until the schedule ends, at this session's pace, evaluations and checkpoints included."""
        t, took = self.config, self.pace.took
        evaluations, saves = coming(step, t)
        left = ((t.max_steps - step) * self.pace.step_s + evaluations * took["evaluation_s"] + saves * took["save_s"])
        if t.schedule_minutes:
            left = min(left, max(0.0, 60 * t.schedule_minutes - self.pace.elapsed_s))
        return left

    def session_left_s(self, step: int) -> float:
        """The same, but no more than the session's limit leaves."""
        limit = 60 * self.minutes - self.pace.session_s if self.minutes else float("inf")
        return min(self.left_s(step), max(0.0, limit))

    def ends(self, step: int) -> str:
        """The clock time at which this session ends, for a progress bar; empty before there is a pace."""
        return clock_time(self.session_left_s(step)) if self.pace.steps else ""

    def line(self, step: int, waited: float, memory: Callable[[], str], hint: Callable[[], str]) -> str | None:
        """Return what is to be said now, if anything.

        Args:
            step: reached.
            waited: share of the session spent waiting for batches.
            memory: tells the peak memory and its share, for people; asked once, since that takes a while.
            hint: tells what would use the machine better, or nothing.
        """
        if self.pace.steps < TIMED_STEPS:
            return None
        left, now = self.left_s(step), self.pace.session_s
        if self.said_at is None:
            line = self._first(step, left, waited, memory(), hint())
        elif now - self.said_at < QUIET_S or abs(now + left - self.said_end) < max(OFF_BY * (now + left), OFF_BY_S):
            return None
        else:
            line = (f"now expected to take {duration(left)} more, until {clock_time(left)}, instead of "
                    f"{duration(max(0.0, self.said_end - now))}: a step takes {self.pace.step_s:.2g} s")
        self.said_at, self.said_end = now, now + left
        return line

    def _first(self, step: int, left: float, waited: float, memory: str, hint: str) -> str:
        t, took = self.config, self.pace.took
        evaluations, saves = coming(step, t)
        rate = self.pace.tokens_per_step / max(self.pace.step_s, 1e-9)
        line = (f"{duration(left)} to go, until {clock_time(left)}"
                f"{', or until early stopping' if t.patience else ''}: {t.max_steps - step:,} steps of "
                f"{self.pace.step_s:.2g} s, {evaluations:,} evaluations of {took['evaluation_s']:.2g} s, "
                f"{'up to ' * (saves > (t.max_steps - step) // t.checkpoint_interval)}{saves:,} checkpoints of "
                f"{took['save_s']:.2g} s; {rate:,.0f} tokens/s; {memory}; {waited:.1%} of the time waiting for "
                "batches")
        if t.schedule_minutes:
            line += f"; the schedule ends after {t.schedule_minutes:g} minutes in all"
        if self.minutes and left > 60 * self.minutes - self.pace.session_s:
            line += f"; this session stops after {self.minutes:,.0f} minutes, the next one goes on"
        return line + (f"; {hint}" if hint else "")


def coming(step: int, t: TrainingConfig) -> tuple[int, int]:
    """Return how many evaluations and, at most, checkpoints lie ahead: each evaluation may be the best so far.

    Example (max_steps = 10, eval_interval = 4, checkpoint_interval = 3, step = 0):
        evaluations at 4, 8, 10; checkpoints there and at 3, 6, 9.
    """
    def multiples(n: int) -> int:
        return t.max_steps // n - step // n

    every, save, both = t.eval_interval, t.checkpoint_interval, math.lcm(t.eval_interval, t.checkpoint_interval)
    last = step < t.max_steps
    evaluations = multiples(every) + (last and t.max_steps % every > 0)
    saves = multiples(every) + multiples(save) - multiples(both)
    return evaluations, saves + (last and t.max_steps % every > 0 and t.max_steps % save > 0)


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "12 min" or "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock_time(in_s: float) -> str:
    """The local clock time in so many seconds, with the day where it is another one."""
    now, then = time.time(), time.time() + in_s
    same_day = time.localtime(now).tm_yday == time.localtime(then).tm_yday
    return time.strftime("%H:%M:%S" if in_s < 3600 else "%H:%M" if same_day else "%a %H:%M", time.localtime(then))


def unused_hardware(device: torch.device, processes: int, can_grow: bool) -> str:
    """Name what of this machine's GPUs is idle, and the setting that would use it; "" where nothing is.

    Args:
        device: that computes.
        processes: that train together, one per GPU.
        can_grow: whether a micro-batch may hold more rows.
    """
    if device.type != "cuda":
        return ""
    advice, idle = [], torch.cuda.device_count() - processes
    if idle > 0:
        advice.append(f"{idle} more GPU{'s are' if idle > 1 else ' is'} idle: gpus = {processes + idle} in notebook "
                      f"02, or torchrun --standalone --nproc-per-node {processes + idle} tools/train.py")
    share = torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory
    if can_grow and share < 0.5:
        advice.append(f"{1 - share:.0%} of the GPU's memory is free: micro_batch_size=auto takes more rows at once")
    return "; ".join(advice)
