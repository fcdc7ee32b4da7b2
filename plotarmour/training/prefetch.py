"""Prefetch: a thread reads the batches of the next steps while the model computes."""

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from plotarmour.data.batches import Windows, n_targets
from plotarmour.training.distributed import ALONE, Ranks

AHEAD = 3  # steps; more than one because reading a step sometimes takes longer than computing one


class Batches:
    """The micro-batches of steps [first, last), read by a thread that stays `AHEAD` steps ahead.

    Each of several processes reads its own part of every step's rows; a GPU copies from pinned memory without waiting.
    """

    def __init__(self, windows: Windows, first: int, last: int, micro_batch_size: int, ranks: Ranks = ALONE,
                 pinned: bool = False):
        self.windows, self.last, self.micro_batch_size = windows, last, micro_batch_size
        self.ranks, self.pinned = ranks, pinned
        self._thread = ThreadPoolExecutor(1, "batches")
        self._reading: dict[int, Future] = {}
        for step in range(first, first + AHEAD):
            self._start(step)

    def of(self, step: int) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        """Return the batches of a step; steps must be asked for in order. An error of the thread is raised here.

        Returns:
            The number of targets in the whole step, and the micro-batches of this share: int64 (inputs, targets), each
            (B, T).
        """
        batches = self._reading.pop(step).result()
        self._start(step + AHEAD)
        return batches

    def close(self) -> None:
        """Stop reading, and drop the steps that were read ahead."""
        self._thread.shutdown(cancel_futures=True)
        self._reading.clear()

    def _start(self, step: int) -> None:
        if step < self.last:
            self._reading[step] = self._thread.submit(self._read, step)

    def _read(self, step: int) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        rows, size = self.windows.rows_of(step), self.micro_batch_size
        begin, end = (rank * len(rows) // self.ranks.size for rank in (self.ranks.rank, self.ranks.rank + 1))
        share = rows[begin:end]
        batches = [self.windows.micro_batch(share[i:i + size]) for i in range(0, len(share), size)]
        if self.pinned:
            batches = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches]
        return sum(map(n_targets, rows)), batches
