"""Prefetch: a thread reads the batches of the next steps while the model computes."""

import queue
import threading
import time

from torch import Tensor

from plotarmour.data.batches import Windows

AHEAD = 2  # steps; a second one because reading a step sometimes takes longer than computing one


class Batches:
    """The micro-batches of consecutive steps, read by a thread that stays `AHEAD` steps ahead.

    Args:
        windows: of the token file.
        first, last: steps [first, last) to read.
        micro_batch_size: rows per micro-batch.
        share: (rank, processes): which part of each step's rows to read; (0, 1) is all of them.
        pinned: whether to use pinned memory, from which a GPU copies without waiting.

    Attributes:
        wait_s: seconds that `of` has waited for the thread; near zero where reading keeps up.
    """

    def __init__(self, windows: Windows, first: int, last: int, micro_batch_size: int, share: tuple[int, int] = (0, 1),
                 pinned: bool = False):
        self.windows, self.micro_batch_size, self.share, self.pinned = windows, micro_batch_size, share, pinned
        self.wait_s = 0.0
        self._ready: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(first, last), name="batches", daemon=True)
        self._thread.start()

    def of(self, step: int) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        """Return the batches of a step; steps must be asked for in order.

        Returns:
            The number of targets in the whole step, and the micro-batches of this share: int64 (inputs, targets), each
            (B, T).

        Raises:
            Exception: what the thread raised, for example for a damaged token file.
        """
        begun = time.perf_counter()
        result = self._ready.get()
        self.wait_s += time.perf_counter() - begun
        if isinstance(result, BaseException):
            raise result
        read, n_tokens, micro_batches = result
        assert read == step, f"step {read} was read, step {step} was asked for"
        return n_tokens, micro_batches

    def close(self) -> None:
        """Stop reading, and drop the steps that were read ahead."""
        self._closed.set()
        while self._thread.is_alive():  # it may be waiting for room in the queue
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                pass
        self._thread.join()

    def _read(self, first: int, last: int) -> None:
        try:
            for step in range(first, last):
                rows = self.windows.rows_of(step)
                rank, processes = self.share
                share = rows[rank * len(rows) // processes:(rank + 1) * len(rows) // processes]
                micro_batches = [self.windows.micro_batch(share[i:i + self.micro_batch_size])
                                 for i in range(0, len(share), self.micro_batch_size)]
                if self.pinned:
                    micro_batches = [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in micro_batches]
                self._ready.put((step, sum(end - begin for begin, end in rows), micro_batches))
                if self._closed.is_set():
                    return
        except BaseException as error:  # `of` raises it in the main thread
            self._ready.put(error)
