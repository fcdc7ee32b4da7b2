"""Token files to batches: the order of training data is a pure function of (seed, step).

A stream of tokens is cut into windows; each is read once per epoch, in an order shuffled anew every epoch. Inputs
begin one token before the targets (the first story's with the end-of-text id), so every target token has its
predecessor as input: shifted by exactly one, once.

Two ways to cut:
    "stream"   windows of context_length tokens, wherever they fall; the phase of the cut is shifted every epoch
    "stories"  windows that begin where a story begins and hold as many whole stories as fit; the rest is padding
               that costs nothing. Stories longer than a window are cut. Models learn what they are scored on:
               a story from its first token.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from plotarmour.cli import UserError
from plotarmour.data.token_file import check_largest_id

IGNORE = -100  # as in plotarmour.loss; text and loss do not know each other
WINDOWS = ("stream", "stories")


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of 0..n-1, int64 (n,), from raw Philox words and a stable sort: the same in every NumPy version."""
    bits = Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(bits.random_raw(n), kind="stable")


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a token file and the order in which a seed reads them.

    Args:
        data: a `TokenFile` or `TokensInMemory`.
        context_length: targets per window at most.
        kind: "stream" or "stories".
        seed: of the order.
        rows_per_step: of the recipe.

    Raises:
        UserError: a text shorter than one window.
    """

    data: object
    context_length: int
    kind: str
    seed: int
    rows_per_step: int

    def __post_init__(self):
        n = self.data.n_tokens
        if self.kind == "stream" and n < self.context_length:
            raise UserError(f"{self.data.path} holds {n:,} tokens, fewer than one context of {self.context_length:,}; "
                            f"use more text, or --set context_length={max(1, n // 2)} or less.")

    @cached_property
    def _last_phase(self) -> int:
        return min(self.context_length - 1, self.data.n_tokens - self.context_length)

    @cached_property
    def _cuts(self) -> np.ndarray:
        """int64 (n, 2): begin and end of each window in targets, for kind "stories"."""
        ends = np.append(self.data.offsets[1:], self.data.n_tokens).astype(np.int64)
        cuts, begin, T = [], 0, self.context_length
        while begin < self.data.n_tokens:
            last = int(np.searchsorted(ends, begin + T, side="right")) - 1
            end = int(ends[last]) if last >= 0 and ends[last] > begin else begin + T
            cuts.append((begin, min(end, self.data.n_tokens)))
            begin = cuts[-1][1]
        return np.array(cuts, dtype=np.int64)

    @cached_property
    def per_epoch(self) -> int:
        """Windows in one epoch."""
        if self.kind == "stories":
            return len(self._cuts)
        return (self.data.n_tokens - self._last_phase) // self.context_length

    def epoch_of(self, step: int) -> float:
        """Epochs read before `step` begins."""
        return step * self.rows_per_step / self.per_epoch

    def rows_of(self, step: int) -> list[tuple[int, int]]:
        """[begin, end) in targets of the rows that `step` reads: a pure function of (seed, step)."""
        rows = []
        for place in range(step * self.rows_per_step, (step + 1) * self.rows_per_step):
            epoch, i = divmod(place, self.per_epoch)
            rows.append(self._window(int(self._order(epoch)[i]), epoch))
        return rows

    def order_sha256(self) -> str:
        """Hash the tokens and the order in which the first epoch reads them; later epochs follow by the same rule.

        Returns:
            SHA-256, hex, of the text's payload_sha256 and then of begin and end of every window as it is read,
            little-endian int64. Runs with the same one see the same tokens in the same order.
        """
        order = self._order(0)
        if self.kind == "stories":
            windows = self._cuts[order]
        else:
            begins = self._phase(0) + order * self.context_length
            windows = np.stack((begins, begins + self.context_length), axis=1)
        hashed = hashlib.sha256(self.data.header["payload_sha256"].encode())
        hashed.update(windows.astype("<i8").tobytes())
        return hashed.hexdigest()

    def micro_batch(self, rows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Read rows as int64 (inputs, targets), each (B, T), T the longest row; padding is end-of-text and `IGNORE`.

        Raises:
            UserError: an id outside the vocabulary: the file is damaged.
        """
        end_of_text, T = self.data.header["end_of_text_id"], max(end - begin for begin, end in rows)
        inputs = np.full((len(rows), T), end_of_text, dtype=np.int64)
        targets = np.full((len(rows), T), IGNORE, dtype=np.int64)
        for row, (begin, end) in enumerate(rows):
            targets[row, :end - begin] = self.data.tokens[begin:end]
            first = 0 if begin else 1  # nothing stands before the first story: its input stays end-of-text
            inputs[row, first:end - begin] = self.data.tokens[begin + first - 1:end - 1]
        # Here, where ids lie in RAM, read by a thread of its own: a GPU that is asked for them makes the CPU wait.
        check_largest_id(self.data, max(int(inputs.max()), int(targets.max())))
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def first_rows(self, n_tokens: int) -> list[tuple[int, int]]:
        """The first windows of the file, in its order, until they hold `n_tokens` targets: for evaluation."""
        rows, count = [], 0
        for i in range(self.per_epoch):
            rows.append(tuple(self._cuts[i]) if self.kind == "stories" else
                        (i * self.context_length, (i + 1) * self.context_length))
            count += rows[-1][1] - rows[-1][0]
            if count >= n_tokens:
                break
        return rows

    def _window(self, i: int, epoch: int) -> tuple[int, int]:
        if self.kind == "stories":
            return int(self._cuts[i, 0]), int(self._cuts[i, 1])
        begin = self._phase(epoch) + i * self.context_length
        return begin, begin + self.context_length

    def _phase(self, epoch: int) -> int:
        """Where the first window of an epoch begins, for kind "stream"."""
        known = self.__dict__.setdefault("_phases", {})
        if epoch not in known:
            known.clear()
            word = int(Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=1 << 64).random_raw())
            known[epoch] = word % (self._last_phase + 1)
        return known[epoch]

    def _order(self, epoch: int) -> np.ndarray:
        known = self.__dict__.setdefault("_orders", {})
        if epoch not in known:
            known.clear()
            known[epoch] = shuffled(self.per_epoch, self.seed, epoch)
        return known[epoch]
