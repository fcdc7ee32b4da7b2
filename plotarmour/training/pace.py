"""How long a run has taken and how fast it goes."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Elapsed seconds, over all sessions of a run, and what a step, an evaluation and a checkpoint take.

    Args:
        before_s: seconds of earlier sessions.
        evaluation_s, save_s: what the last of each took, in an earlier session.
    """

    def __init__(self, before_s: float = 0.0, evaluation_s: float = 0.0, save_s: float = 0.0):
        self.before_s, self.start = before_s, time.perf_counter()
        self.took = {"evaluation_s": evaluation_s, "save_s": save_s}
        self._recent: deque[tuple[float, int]] = deque([(self.start, 0)], maxlen=50)
        self.forget()

    def forget(self) -> None:
        """Begin anew with the time per step, because steps are other ones from now on."""
        self.steps, self._steps_s, self._tokens, self._warm = 0, 0.0, 0, False

    @property
    def session_s(self) -> float:
        return time.perf_counter() - self.start

    @property
    def elapsed_s(self) -> float:
        return self.before_s + self.session_s

    @property
    def step_s(self) -> float:
        """Mean seconds of a step in this session, without the first, which sets things up; 0 before there is one."""
        return self._steps_s / self.steps if self.steps else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens of these steps."""
        return self._tokens / self.steps if self.steps else 0.0

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Time an evaluation ("evaluation_s") or a checkpoint ("save_s")."""
        begun = time.perf_counter()
        yield
        self.took[what] = time.perf_counter() - begun

    def count(self, n_tokens: int, seconds: float) -> None:
        """Note a step, and what it took without evaluation and checkpoint."""
        self._recent.append((time.perf_counter(), n_tokens))
        if self._warm:
            self.steps, self._steps_s, self._tokens = self.steps + 1, self._steps_s + seconds, self._tokens + n_tokens
        self._warm = True

    def rate(self) -> float | None:
        """Tokens per second over the last 50 steps, evaluations and checkpoints included."""
        span = self._recent[-1][0] - self._recent[0][0]
        return sum(n for _, n in list(self._recent)[1:]) / span if span > 0 else None
