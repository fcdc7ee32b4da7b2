"""Windows: the six ways to cut a token file into rows of training, and the order in which an epoch reads the rows.

Each row is read once per epoch, in an order that is shuffled again every epoch: a pure function of seed and epoch. It
is computed, not stored, for "packed" and for the kinds `BY_PLACE`, so that memory does not grow with the rows.
"""

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from numpy.random import Philox

from plotarmour.cli import UserError
from plotarmour.data.token_file import Tokens, story_bounds

BY_PLACE = ("left_pad", "slide_through", "full")
BUFFER = 4096  # stories that are packed together
Row = tuple[int, ...]  # begin and end, in targets, of each piece of the token file that it holds, one after the other


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


class Cut:
    """A way to cut: `per_epoch` rows in the first epoch; `rows(epoch, first, n)` are the next, at most n, as read."""

    def __init__(self, data: Tokens, context_length: int, kind: str, seed: int):
        self.data, self.context_length, self.kind, self.seed = data, context_length, kind, seed
        self._n_targets = data.n_tokens  # in the rows of an epoch

    @property
    def padding_share(self) -> float:
        """Share of padding in an epoch: places without a target / (rows · context_length)."""
        return 1 - self._n_targets / (self.per_epoch * self.context_length)

    def epoch_of(self, place: int) -> tuple[int, int, int]:
        """Return the epoch of a row by its place in the order of all epochs, its place there, and the rows there."""
        return *divmod(place, self.per_epoch), self.per_epoch

    def in_order(self) -> Iterable[Row]:
        """Return rows in the order of the file, for evaluation: those of the kind, or each story once."""
        return (piece[1:] for piece in self._pieces(np.arange(self.data.n_stories)))

    def _pieces(self, stories: np.ndarray) -> Iterable[tuple[bool, int, int]]:
        """Cut stories so that each piece fits into a row: whether its story begins there, begin and end in targets."""
        bounds, T = zip(*map(np.ndarray.tolist, self._bounds(stories)), strict=True), self.context_length
        return ((at == begin, at, min(at + T, end)) for begin, end in bounds for at in range(begin, end, T))

    def _bounds(self, story: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and end of some stories in targets, int64."""
        offsets, last = self.data.offsets, self.data.n_stories - 1
        ends = np.where(story == last, self.data.n_tokens, offsets[np.minimum(story + 1, last)].astype(np.int64))
        return offsets[story].astype(np.int64), ends


class Stream(Cut):
    """Kind "stream": rows of context_length tokens, wherever they fall; the first begins elsewhere in every epoch."""

    def __init__(self, data: Tokens, context_length: int, *rest):
        super().__init__(data, context_length, *rest)
        if (n := data.n_tokens) < context_length:
            raise UserError(f"{data.path} holds {n:,} tokens, fewer than one context of {context_length:,}; "
                            f"use more text, or --set context_length={max(1, n // 2)} or less.")
        self._last_phase = min(context_length - 1, n - context_length)
        self.per_epoch = (n - self._last_phase) // context_length
        self._n_targets = self.per_epoch * context_length

    def rows(self, epoch: int, first: int, n: int) -> list[Row]:
        word = int(Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=1 << 64).random_raw())
        begins = self.context_length * _shuffled(self.per_epoch, self.seed, epoch)[first:first + n]
        return [(at, at + self.context_length) for at in (begins + word % (self._last_phase + 1)).tolist()]

    def in_order(self) -> Iterable[Row]:
        return ((at, at + self.context_length) for at in range(0, self._n_targets, self.context_length))


class Stories(Cut):
    """Kind "stories": a row begins where a story begins and holds as many whole stories as fit, then padding.

    Models train on what they are scored on: a story from its first token. Stories longer than a row are cut.
    """

    @cached_property
    def cuts(self) -> np.ndarray:
        """int64 (n, 2): begin and end of each row in targets."""
        ends = story_bounds(self.data)[1:].tolist()  # bisect is faster than NumPy for one number
        cuts, begin, story, T = [], 0, 0, self.context_length  # story: the first that ends behind `begin`
        while begin < self.data.n_tokens:
            following = bisect_right(ends, begin + T, story, min(story + T, len(ends)))
            end = ends[following - 1] if following > story else begin + T
            cuts.append((begin, end))
            begin, story = end, following
        return np.array(cuts, dtype=np.int64)

    @property
    def per_epoch(self) -> int:
        return len(self.cuts)

    def rows(self, epoch: int, first: int, n: int) -> list[Row]:
        return [*map(tuple, self.cuts[_shuffled(self.per_epoch, self.seed, epoch)[first:first + n]].tolist())]

    def in_order(self) -> Iterable[Row]:
        return map(tuple, self.cuts.tolist())


class Packed(Stories):
    """Kind "packed": whole stories that fill a row together, others in every epoch; evaluation reads "stories".

    Of `BUFFER` shuffled stories, the longest first, each goes into the row with the least room for it (best-fit).
    """

    def __init__(self, *fields):
        super().__init__(*fields)
        self.ends, self._pack = lru_cache(None)(self._ends), lru_cache(maxsize=2)(self._pack)  # keep their results

    @property
    def per_epoch(self) -> int:
        return self.ends(0)[-1]

    def epoch_of(self, place: int) -> tuple[int, int, int]:
        epoch = 0
        while place >= (n := self.ends(epoch)[-1]):
            epoch, place = epoch + 1, place - n
        return epoch, place, n

    def rows(self, epoch: int, first: int, n: int) -> list[Row]:
        buffer = bisect_right(ends := self.ends(epoch), first)
        return self._pack(epoch, buffer)[first - (ends[buffer - 1] if buffer else 0):][:n]

    def _ends(self, epoch: int) -> list[int]:
        """Return the number of rows up to the end of each buffer of an epoch."""
        buffers = range(-(-self.data.n_stories // BUFFER))
        return list(accumulate(len(self._pack(epoch, buffer)) for buffer in buffers))

    def _pack(self, epoch: int, buffer: int) -> list[Row]:
        """Return the rows of one buffer of an epoch's shuffled stories, in the order of reading."""
        T, n = self.context_length, self.data.n_stories
        stories = permuted(np.arange(buffer * BUFFER, min((buffer + 1) * BUFFER, n)), n, self.seed, epoch)
        # Pieces from within a long story come first, each into a row of its own: before them nothing may stand that is
        # not of their story.
        pieces = sorted(self._pieces(stories), key=lambda piece: (piece[0], piece[1] - piece[2]))
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


class ByPlace(Cut):
    """Kinds of which row number `firsts[story] + place` is that of the token `place` of a story.

    It ends with that token, padded on the left ("left_pad"), or begins with it and ends with the story at the latest
    ("slide_through"); "full" has only the latter's rows without padding, and one for a story that is shorter.
    """

    def __init__(self, *fields):
        super().__init__(*fields)
        self.per_epoch, lengths = int(self._per_story().sum()), np.diff(story_bounds(self.data))
        short = np.minimum(lengths, self.context_length)  # in the padded rows of each story
        padded = short if self.kind == "full" else short * (short + 1) // 2
        self._n_targets = int((padded + (lengths - short) * self.context_length).sum())

    @cached_property
    def firsts(self) -> np.ndarray:
        """uint64 (n_stories,): number of each story's first row."""
        if (longest := int(np.diff(story_bounds(self.data)).max())) < self.context_length:
            raise UserError(f"the longest story of {self.data.path} has {longest:,} tokens, fewer than one context of "
                            f"{self.context_length:,}, so that every window of windows={self.kind} would be padded; "
                            f"--set context_length={longest} or less, or windows=packed.")
        n = self._per_story()
        return (np.cumsum(n) - n).astype(np.uint64) if self.kind == "full" else self.data.offsets

    def story_and_place(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the story of rows `i`, int64, and the place in it: `firsts` turned round."""
        story = np.searchsorted(self.firsts, i.astype(np.uint64), side="right") - 1  # other dtypes would copy `firsts`
        return story, i - self.firsts[story].astype(np.int64)

    def rows(self, epoch: int, first: int, n: int) -> list[Row]:
        i = permuted(np.arange(first, min(first + n, self.per_epoch)), self.per_epoch, self.seed, epoch)
        story, place = self.story_and_place(i)
        begins, ends = self._bounds(story)
        tokens, T = begins + place, self.context_length
        if self.kind == "left_pad":
            begins, ends = np.maximum(begins, tokens + 1 - T), tokens + 1
        else:
            begins, ends = tokens, np.minimum(tokens + T, ends)
        return list(zip(begins.tolist(), ends.tolist(), strict=True))

    def _per_story(self) -> np.ndarray:
        """Return the number of rows of each story."""
        lengths = np.diff(story_bounds(self.data))
        return np.maximum(lengths - (self.context_length - 1), 1) if self.kind == "full" else lengths


CUTS = {"stream": Stream, "stories": Stories, "packed": Packed, **dict.fromkeys(BY_PLACE, ByPlace)}
