"""Token files to batches: the order of training data is a pure function of (seed, step).

The tokens are cut into windows. Each window is read once per epoch, in an order that is shuffled again every epoch.
The inputs of a window begin one token before its targets (before the first story stands the end-of-text id), so every
target has its predecessor as input: shifted by exactly one, once.

Ways to cut:
    "stream"         windows of context_length tokens, wherever they fall; the first begins elsewhere in every epoch
    "stories"        windows that begin where a story begins and hold as many whole stories as fit; the rest is padding
                     that adds no loss. Stories longer than a window are cut. Models train on what they are scored on:
                     a story from its first token.
    "packed"         whole stories that fill a window together, others in every epoch: `BUFFER` shuffled stories at a
                     time, the longest first, each into the window with the least room that it fits into (best-fit
                     decreasing)
    "left_pad"       for each token of a story the window that ends with it, padded on the left
    "slide_through"  for each token of a story the window that begins with it, which ends with the story at the latest
    "full"           as slide_through, but only windows without padding; a shorter story is one window

The last three give each story windows of its own, found by binary search in `firsts`. Their order and that of "packed"
is computed, not stored, so that memory does not grow with the number of windows.
"""

import hashlib
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from plotarmour.cli import UserError
from plotarmour.data.token_file import check_largest_id
from plotarmour.data.tokenizer import Tokenizer
from plotarmour.loss import IGNORE

BY_PLACE = ("left_pad", "slide_through", "full")
BUFFER = 4096  # stories that are packed together
Row = tuple[int, ...]  # begin and end, in targets, of each piece of the token file that it holds, one after the other


class Tokens(Protocol):
    """The tokens of some stories, as training and scoring read them: `TokenFile` or `TokensInMemory`."""

    path: Path  # for messages
    header: dict  # of a token file: `end_of_text_id`, `vocab_size`, `payload_sha256` and others
    tokens: np.ndarray  # unsigned integers (n_tokens,): each story's ids, then one end-of-text id
    offsets: np.ndarray  # uint64 (n_stories,), token index where each story begins
    story_bytes: np.ndarray  # uint32 (n_stories,), UTF-8 bytes of each story
    n_tokens: int
    n_stories: int

    def story(self, i: int) -> np.ndarray: ...

    def tokenizer(self) -> Tokenizer: ...


@lru_cache(maxsize=1)
def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 (n,), which no version of NumPy changes: raw words and a stable sort."""
    bits = Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(bits.random_raw(n), kind="stable")


def permuted(numbers: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return where a permutation of 0..n-1 takes some of these numbers, int64, without computing the others.

    It is a Feistel network: a number is a row and a column of a table of n or a few more places, and a hash of each is
    added to the other in turn. Numbers beyond n - 1 go through it again.
    """
    height = math.isqrt(n - 1) + 1
    width = -(-n // height)
    keys = Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=2 << 64).random_raw(6)
    places = numbers.astype(np.uint64)
    beyond = np.ones(len(places), dtype=bool)
    while beyond.any():
        (row, column), size, other = np.divmod(places[beyond], width), height, width
        for key in keys:
            mixed = (column + key) * 0x9E3779B97F4A7C15
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 >> 32
            row, column, size, other = column, (row + mixed) % size, other, size
        places[beyond] = row * width + column  # after an even number of turns both stand where they stood
        beyond = places >= n
    return places.astype(np.int64)


def n_targets(row: Row) -> int:
    """Return the number of targets in a row. (0, 4, 9, 11): 6."""
    return sum(row[1::2]) - sum(row[::2])


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a token file and the order in which a seed reads them.

    Raises:
        UserError: a text shorter than one window, or no story as long as a window whose kind needs one.
    """

    data: Tokens
    context_length: int  # largest number of targets in a window
    kind: str  # as above
    seed: int
    rows_per_step: int

    def __post_init__(self):
        n = self.data.n_tokens
        if self.kind == "stream" and n < self.context_length:
            raise UserError(f"{self.data.path} holds {n:,} tokens, fewer than one context of {self.context_length:,}; "
                            f"use more text, or --set context_length={max(1, n // 2)} or less.")

    @cached_property
    def _cuts(self) -> np.ndarray:
        """int64 (n, 2): begin and end of each window in targets, for kind "stories"."""
        ends = [*self.data.offsets[1:].tolist(), self.data.n_tokens]  # bisect is faster than NumPy for one number
        cuts, begin, story, T = [], 0, 0, self.context_length  # story: the first that ends behind `begin`
        while begin < self.data.n_tokens:
            following = bisect_right(ends, begin + T, story, min(story + T, len(ends)))
            end = ends[following - 1] if following > story else begin + T
            cuts.append((begin, end))
            begin, story = end, following
        return np.array(cuts, dtype=np.int64)

    @cached_property
    def firsts(self) -> np.ndarray:
        """uint64 (n_stories,): number of each story's first window, for kinds `BY_PLACE`.

        Window `firsts[story] + place` is that of the story's token `place`: the one that ends (left_pad) or begins
        (slide_through, full) with it.
        """
        if (longest := int(self._lengths().max())) < self.context_length:
            raise UserError(f"the longest story of {self.data.path} has {longest:,} tokens, fewer than one context of "
                            f"{self.context_length:,}, so that every window of windows={self.kind} would be padded; "
                            f"--set context_length={longest} or less, or windows=packed.")
        if self.kind != "full":
            return self.data.offsets
        n_windows = np.maximum(self._lengths() - (self.context_length - 1), 1)
        return (np.cumsum(n_windows) - n_windows).astype(np.uint64)

    def story_and_place(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the story of windows `i`, int64, and the place in it, for kinds `BY_PLACE`: `firsts` turned round."""
        story = np.searchsorted(self.firsts, i.astype(np.uint64), side="right") - 1  # other dtypes would copy `firsts`
        return story, i - self.firsts[story].astype(np.int64)

    @cached_property
    def per_epoch(self) -> int:
        """Windows in the first epoch, and in every other one unless the kind is "packed"."""
        if self.kind == "stories":
            return len(self._cuts)
        if self.kind == "packed":
            return self._ends(0)[-1]
        if self.kind == "full":
            return int(self.firsts[-1]) + max(int(self._lengths()[-1]) - (self.context_length - 1), 1)
        if self.kind in BY_PLACE:
            return self.data.n_tokens
        return (self.data.n_tokens - self._last_phase) // self.context_length

    @property
    def padding_share(self) -> float:
        """Share of padding in the first epoch: places / (rows · context_length), of places without a target."""
        T, n = self.context_length, self.data.n_tokens
        if self.kind == "stream":
            return 0.0
        if self.kind in BY_PLACE:
            lengths = self._lengths()
            short = np.minimum(lengths, T)  # in the one window of a short story, or in those that are padded
            n = int(((short if self.kind == "full" else short * (short + 1) // 2) + (lengths - short) * T).sum())
        return 1 - n / (self.per_epoch * T)

    def epoch_of(self, step: int) -> float:
        """Epochs read before `step` begins."""
        epoch, i = self._epoch(step * self.rows_per_step)
        return epoch + i / (self._ends(epoch)[-1] if self.kind == "packed" else self.per_epoch)

    def rows_of(self, step: int) -> list[Row]:
        """Return the rows that `step` reads: a pure function of (seed, step)."""
        rows, place = [], step * self.rows_per_step
        while n_left := self.rows_per_step - len(rows):  # a step may end one epoch and begin the next
            rows += self._rows(*self._epoch(place + len(rows)), n_left)
        return rows

    def first_rows(self, n_tokens: int) -> list[Row]:
        """Return the first rows in the order of the file until they hold `n_tokens` targets, for evaluation.

        They are windows of the kind; of "stories" for "packed"; for kinds `BY_PLACE` each story is cut into rows once.
        """
        T, data = self.context_length, self.data
        if self.kind in BY_PLACE:
            cuts = ((begin, min(begin + T, end)) for story in range(data.n_stories) for start, end in
                    [map(int, self._bounds(np.array(story)))] for begin in range(start, end, T))
        else:
            whole = replace(self, kind="stories") if self.kind == "packed" else self
            cuts = (tuple(map(int, whole._window(i, 0))) for i in range(whole.per_epoch))
        rows = []
        while n_tokens > 0 and (row := next(cuts, None)):
            rows.append(row)
            n_tokens -= n_targets(row)
        return rows

    def order_sha256(self) -> str:
        """Hash the tokens and the order in which the first epoch reads them; the same rule orders later epochs.

        Returns:
            SHA-256, hexadecimal, of `payload_sha256` followed by begin and end of every window in the order of
            reading, little-endian int64; for kinds whose order is computed, by kind, context_length, seed and the first
            rows. Runs with the same hash see the same tokens in the same order.
        """
        if self.kind in ("stream", "stories"):
            windows = self._window(_shuffled(self.per_epoch, self.seed, 0), self._phase(0))
            order = np.stack(windows, axis=1).astype("<i8").tobytes()
        else:
            order = repr((self.kind, self.context_length, self.seed, self._rows(0, 0, 1024))).encode()
        return hashlib.sha256(self.data.header["payload_sha256"].encode() + order).hexdigest()

    def micro_batch(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Read rows as (inputs, targets), each int64 (B, T); padding is end-of-text and `IGNORE`.

        T is the longest row; with padding on the left it is context_length, so that a row is the same in any batch.

        Raises:
            UserError: an id outside the vocabulary: the file is damaged.
        """
        end_of_text, on_left = self.data.header["end_of_text_id"], self.kind == "left_pad"
        T = self.context_length if on_left else max(map(n_targets, rows))
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

    def _epoch(self, place: int) -> tuple[int, int]:
        """Return the epoch of a window by its place in the order of all epochs, and its place in that epoch."""
        if self.kind != "packed":
            return divmod(place, self.per_epoch)
        epoch = 0
        while place >= (n := self._ends(epoch)[-1]):
            epoch, place = epoch + 1, place - n
        return epoch, place

    def _rows(self, epoch: int, first: int, n: int) -> list[Row]:
        """Return rows `first`, `first` + 1, ... of an epoch: at most `n`, and at least one."""
        if self.kind == "packed":
            buffer = bisect_right(ends := self._ends(epoch), first)
            return self._packed(epoch, buffer)[first - (ends[buffer - 1] if buffer else 0):][:n]
        if self.kind in BY_PLACE:
            i = permuted(np.arange(first, min(first + n, self.per_epoch)), self.per_epoch, self.seed, epoch)
        else:
            i = _shuffled(self.per_epoch, self.seed, epoch)[first:first + n]
        begins, ends = self._window(i, self._phase(epoch))
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    def _window(self, i: int | np.ndarray, phase: int) -> tuple[int, int] | tuple[np.ndarray, np.ndarray]:
        """Return begin and end in targets of window `i`, or of several, in an epoch that begins at `phase`."""
        if self.kind == "stories":
            return self._cuts[i, 0], self._cuts[i, 1]
        if self.kind == "stream":
            begin = phase + i * self.context_length
            return begin, begin + self.context_length
        story, place = self.story_and_place(i)
        start, end = self._bounds(story)
        token = start + place
        if self.kind == "left_pad":
            return np.maximum(start, token + 1 - self.context_length), token + 1
        return token, np.minimum(token + self.context_length, end)

    def _bounds(self, story: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and end of some stories in targets, int64."""
        offsets, last = self.data.offsets, self.data.n_stories - 1
        ends = np.where(story == last, self.data.n_tokens, offsets[np.minimum(story + 1, last)].astype(np.int64))
        return offsets[story].astype(np.int64), ends

    def _lengths(self) -> np.ndarray:
        """Return the number of tokens of each story, with its end-of-text; int64 (n_stories,)."""
        return np.diff(self.data.offsets.astype(np.int64), append=self.data.n_tokens)

    @cached_property
    def _packed(self) -> Callable[[int, int], list[Row]]:
        """`_pack`, whose latest results are kept."""
        return lru_cache(maxsize=2)(self._pack)

    @cached_property
    def _ends(self) -> Callable[[int], list[int]]:
        """Function of an epoch: number of rows up to the end of each of its buffers; kind "packed"."""
        buffers = range(-(-self.data.n_stories // BUFFER))
        return lru_cache(None)(lambda epoch: list(accumulate(len(self._packed(epoch, buffer)) for buffer in buffers)))

    def _pack(self, epoch: int, buffer: int) -> list[Row]:
        """Return the rows of one buffer of an epoch's shuffled stories, in the order of reading; kind "packed"."""
        T, n = self.context_length, self.data.n_stories
        stories = permuted(np.arange(buffer * BUFFER, min((buffer + 1) * BUFFER, n)), n, self.seed, epoch)
        # A story longer than a window is cut. Pieces from within a story come first, each into a row of its own: before
        # them nothing may stand that is not of their story.
        pieces = [(begin == start, begin, min(begin + T, end)) for start, end in zip(*map(np.ndarray.tolist,
                  self._bounds(stories)), strict=True) for begin in range(start, end, T)]
        pieces.sort(key=lambda piece: (piece[0], piece[1] - piece[2]))
        rows, with_room, rooms = [], defaultdict(list), 0  # bit r of `rooms`: there is a row with room for r targets
        for is_start, begin, end in pieces:
            enough, room, row = rooms >> (end - begin), T, []
            if is_start and enough:
                room = end - begin + (enough & -enough).bit_length() - 1
                row = with_room[room].pop()
                rooms ^= (not with_room[room]) << room
            else:
                rows.append(row)
            row += begin, end
            if room := room - (end - begin):
                with_room[room].append(row)
                rooms |= 1 << room
        return [tuple(rows[i]) for i in permuted(np.arange(len(rows)), len(rows), self.seed, epoch)]

    @property
    def _last_phase(self) -> int:
        return min(self.context_length - 1, self.data.n_tokens - self.context_length)

    def _phase(self, epoch: int) -> int:
        """Return where the first window of an epoch begins."""
        if self.kind != "stream":
            return 0
        word = int(Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=1 << 64).random_raw())
        return word % (self._last_phase + 1)
