"""Token files to batches: the order of training data is a pure function of (seed, step).

`windows` cuts the tokens into rows. The inputs of a row begin one token before its targets (before the first story
stands the end-of-text id), so every target has its predecessor as input: shifted by exactly one, once.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from plotarmour.data.token_file import Tokens, check_largest_id
from plotarmour.data.windows import CUTS, Row
from plotarmour.loss import IGNORE


def n_targets(row: Row) -> int:
    """Return the number of targets in a row. (0, 4, 9, 11): 6."""
    return sum(row[1::2]) - sum(row[::2])


class Windows:
    """The rows of a token file that each step reads, cut as the kind says (one of `CUTS`), and their tokens."""

    def __init__(self, data: Tokens, context_length: int, kind: str, seed: int, rows_per_step: int):
        self.data, self.rows_per_step = data, rows_per_step
        self.cut = CUTS[kind](data, context_length, kind, seed)

    def epoch_of(self, step: int) -> float:
        """Epochs read before `step` begins."""
        epoch, place, n = self.cut.epoch_of(step * self.rows_per_step)
        return epoch + place / n

    def rows_of(self, step: int) -> list[Row]:
        """Return the rows that `step` reads: a pure function of (seed, step)."""
        rows, place = [], step * self.rows_per_step
        while n_left := self.rows_per_step - len(rows):  # a step may end one epoch and begin the next
            epoch, first, _ = self.cut.epoch_of(place + len(rows))
            rows += self.cut.rows(epoch, first, n_left)
        return rows

    def first_rows(self, n_tokens: int) -> list[Row]:
        """Return the first rows in the order of the file until they hold `n_tokens` targets, for evaluation."""
        rows, cuts = [], iter(self.cut.in_order())
        while n_tokens > 0 and (row := next(cuts, None)):
            rows.append(row)
            n_tokens -= n_targets(row)
        return rows

    def order_sha256(self) -> str:
        """Hash the tokens and the order in which the first epoch reads them; the same rule orders later epochs.

        Returns:
            SHA-256, hexadecimal, of `payload_sha256` followed by begin and end of every row in the order of reading,
            little-endian int64; for kinds whose order is computed, by kind, context_length, seed and the first rows.
            Runs with the same hash see the same tokens in the same order.
        """
        cut, digest = self.cut, hashlib.sha256(self.data.header["payload_sha256"].encode())
        if cut.kind in ("stream", "stories"):
            for first in range(0, cut.per_epoch, 4096):  # not all rows at once, for large files
                digest.update(np.array(cut.rows(0, first, 4096), dtype="<i8"))
        else:
            digest.update(repr((cut.kind, cut.context_length, cut.seed, cut.rows(0, 0, 1024))).encode())
        return digest.hexdigest()

    def micro_batch(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Read rows as (inputs, targets), each int64 (B, T); padding is end-of-text and `IGNORE`.

        T is the longest row; with padding on the left it is context_length, so that a row is the same in any batch.

        Raises:
            UserError: an id outside the vocabulary: the file is damaged.
        """
        end_of_text, on_left = self.data.header["end_of_text_id"], self.cut.kind == "left_pad"
        T = self.cut.context_length if on_left else max(map(n_targets, rows))
        inputs = np.full((len(rows), T), end_of_text, dtype=np.int64)
        targets = np.full((len(rows), T), IGNORE, dtype=np.int64)
        for row, pieces in enumerate(rows):
            at = T - n_targets(pieces) if on_left else 0
            for begin, end in zip(pieces[::2], pieces[1::2], strict=True):
                first, until = 0 if begin else 1, at + end - begin
                targets[row, at:until] = self.data.tokens[begin:end]
                # Nothing stands before the first story: its input stays end-of-text.
                inputs[row, at + first:until] = self.data.tokens[begin + first - 1:end - 1]
                at = until
        # Checked here, in a prefetch thread: a check on the GPU would make the CPU wait.
        check_largest_id(self.data, max(int(inputs.max()), int(targets.max())))
        return torch.from_numpy(inputs), torch.from_numpy(targets)
