"""How fast a run goes and when it will end: for log.csv, the progress line, and a forecast after five timed steps."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from plotarmour.cli import duration
from plotarmour.config import TrainingConfig

TIMED_STEPS = 5  # before the forecast
SAMPLES = 11  # at most in a run: at ten powers of two, and at its end
SAMPLE_S = 0.01  # seconds that a sample takes at least
SAMPLES_SHARE = 0.01  # largest share of a run's time that samples may take


class Pace:
    """The time that a run takes: so far, per step, evaluation and checkpoint, and until its end.

    This session may take `minutes` (0: no limit); earlier sessions took `before_s`. `took_s` has the seconds of the
    last "evaluation" and the last "save", and of all "samples" so far; `timing` changes it.
    """

    def __init__(self, config: TrainingConfig, minutes: float, before_s: float, took_s: dict[str, float]):
        self.config, self.minutes, self.before_s, self.took_s = config, minutes, before_s, took_s
        self.start = time.perf_counter()
        self._recent: deque[tuple[float, int]] = deque([(self.start, 0)], maxlen=50)
        self.forget()

    def forget(self) -> None:
        """Start the mean time of a step anew, because the steps are different from now on."""
        self.steps, self._steps_s, self._tokens = -1, 0.0, 0  # the first step sets things up, and does not count

    @property
    def session_s(self) -> float:
        """Seconds of this session."""
        return time.perf_counter() - self.start

    @property
    def elapsed_s(self) -> float:
        """Seconds over all sessions."""
        return self.before_s + self.session_s

    @property
    def step_s(self) -> float:
        """Mean seconds of a step in this session; 0 before the second one."""
        return self._steps_s / self.steps if self.steps > 0 else 0.0

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Time an "evaluation", a "save" or one of the "samples"."""
        begun = time.perf_counter()
        yield
        before_s = self.took_s.get(what, 0.0) if what == "samples" else 0.0
        self.took_s[what] = before_s + time.perf_counter() - begun

    def count(self, n_tokens: int, seconds: float) -> None:
        """Count a step, with the seconds it took without evaluation and checkpoint."""
        self._recent.append((time.perf_counter(), n_tokens))
        self.steps += 1
        if self.steps:
            self._steps_s, self._tokens = self._steps_s + seconds, self._tokens + n_tokens

    def rate(self) -> float | None:
        """Return tokens per second over the last 50 steps, evaluations and checkpoints included."""
        span = self._recent[-1][0] - self._recent[0][0]
        return sum(n for _, n in list(self._recent)[1:]) / span if span > 0 else None

    def left_s(self, step: int) -> float:
        """Return the seconds until the schedule ends, evaluations and checkpoints included."""
        t, (evaluations, saves) = self.config, coming(step, self.config)
        left = ((t.max_steps - step) * self.step_s + evaluations * self.took_s["evaluation"]
                + saves * self.took_s["save"])
        if t.schedule_minutes:
            left = min(left, max(0.0, 60 * t.schedule_minutes - self.elapsed_s))
        return left

    def is_sample_due(self, step: int, is_end: bool) -> bool:
        """Return whether to sample after this step: at the last ten powers of two and the end, where it costs little.

        Half of the 1 % of the run's time that samples may take is free at once, the rest as it passes.

        Example (max_steps = 2,200):
            at 4, 8, ..., 2,048 and 2,200, in a run of 110 s if a sample takes 0.05 s.
        """
        at_power = step & (step - 1) == 0 and step * 2**(SAMPLES - 1) > self.config.max_steps
        elapsed_s = self.elapsed_s
        total_s, took_s = elapsed_s + self.left_s(step), self.took_s.get("samples", 0.0)
        return (at_power or is_end) and SAMPLES * SAMPLE_S <= SAMPLES_SHARE * total_s and (
            took_s <= SAMPLES_SHARE * (elapsed_s + total_s) / 2)

    def session_left_s(self, step: int) -> float:
        """Return the seconds until the schedule or this session ends, whichever comes first."""
        limit = 60 * self.minutes - self.session_s if self.minutes else math.inf
        return min(self.left_s(step), max(0.0, limit))

    def forecast(self, step: int) -> str:
        """Return what the rest of the run consists of and when it ends, in one line."""
        t, left, (evaluations, saves) = self.config, self.left_s(step), coming(step, self.config)
        line = (f"{duration(left)} to go, until {clock_time(left)}"
                f"{', or until early stopping' if t.patience else ''}: {t.max_steps - step:,} steps of "
                f"{self.step_s:.2g} s, {evaluations:,} evaluations of {self.took_s['evaluation']:.2g} s, up to "
                f"{saves:,} checkpoints of {self.took_s['save']:.2g} s; "
                f"{self._tokens / max(self._steps_s, 1e-9):,.0f} tokens/s")
        if t.schedule_minutes:
            line += f"; the schedule ends after {t.schedule_minutes:g} minutes in all"
        if self.minutes and left > 60 * self.minutes - self.session_s:
            line += f"; this session stops after {self.minutes:,.0f} minutes, the next one continues"
        return line


def coming(step: int, t: TrainingConfig) -> tuple[int, int]:
    """Return how many evaluations and, at most, checkpoints lie ahead: each evaluation may be the best so far.

    Example (max_steps = 10, eval_interval = 4, checkpoint_interval = 3, step = 0):
        evaluations at 4, 8, 10; checkpoints there and at 3, 6, 9.
    """
    def multiples(n: int) -> int:  # after this step; the last step counts as one
        return -(-t.max_steps // n) - step // n if step < t.max_steps else 0

    both = math.lcm(t.eval_interval, t.checkpoint_interval)
    evaluations = multiples(t.eval_interval)
    return evaluations, evaluations + multiples(t.checkpoint_interval) - multiples(both)


def clock_time(in_s: float) -> str:
    """Return the local clock time in so many seconds, with the day where it is another one."""
    now, then = time.localtime(), time.localtime(time.time() + in_s)
    return time.strftime("%H:%M:%S" if in_s < 3600 else "%H:%M" if now.tm_yday == then.tm_yday else "%a %H:%M", then)


def unused_hardware(device: torch.device, processes: int, can_grow: bool) -> str:
    """Name the GPUs and the GPU memory that are not used, and the setting that would use them; "" for none.

    A micro-batch may hold more rows if it `can_grow`; each of the `processes` that train together has a GPU.
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
