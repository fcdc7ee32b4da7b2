"""Batches read ahead: a thread reads the token file while the model computes."""

import queue
import threading
import time

from torch import Tensor

from plotarmour.data.batches import Windows

AHEAD = 2  # steps; one would do, if reading always took less than computing


class Batches:
    """The micro-batches of one step after the other, read by a thread that stays `AHEAD` steps ahead.

    Args:
        windows: of the token file.
        first, last: steps [first, last) to read.
        micro_batch_size: rows per micro-batch.
        share: (rank, processes): which part of each step's rows to read; (0, 1) is all of them.
        pinned: into memory that a GPU can copy from by itself.

    Attributes:
        wait_s: seconds that `of` has waited for the thread. Near zero where reading keeps up.
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
        """Return the targets of the whole step, and the micro-batches of this share: int64 (inputs, targets), (B, T).

        Steps come in order; asking for another one than the next is our mistake.

        Raises:
            Exception: what reading has met, such as a damaged token file.
        """
        begun = time.perf_counter()
        found = self._ready.get()
        self.wait_s += time.perf_counter() - begun
        if isinstance(found, BaseException):
            raise found
        read, n_tokens, micro_batches = found
        assert read == step, f"step {read} was read, step {step} was asked for"
        return n_tokens, micro_batches

    def close(self) -> None:
        """Stop reading; steps read ahead are forgotten."""
        self._closed.set()
        while self._thread.is_alive():  # it may wait for room
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
        except BaseException as error:  # for the thread that asks; nobody would see it here
            self._ready.put(error)
