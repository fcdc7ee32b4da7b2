"""Token files to batches: the order of training data is a pure function of (seed, step).

The tokens are cut into windows. Each window is read once per epoch, in an order that is shuffled again every epoch.
The inputs of a window begin one token before its targets (before the first story stands the end-of-text id), so every
target has its predecessor as input: shifted by exactly one, once.

Two ways to cut:
    "stream"   windows of context_length tokens, wherever they fall; the first begins elsewhere in every epoch
    "stories"  windows that begin where a story begins and hold as many whole stories as fit; the rest is padding
               that adds no loss. Stories longer than a window are cut. Models train on what they are scored on:
               a story from its first token.
"""

import hashlib
import warnings
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from plotarmour.cli import UserError
from plotarmour.data.chunks import Reading, read_stories
from plotarmour.data.readers import Source, check_text
from plotarmour.data.token_file import TokenFile, check_largest_id
from plotarmour.data.tokenizer import Tokenizer
from plotarmour.loss import IGNORE

STORIES_AT_ONCE = 1000  # for a tokenizer


class Tokens(Protocol):
    """The tokens of some stories, as training and scoring read them: a `TokenFile` or `TokensInMemory`.

    Attributes:
        path: for messages.
        header: of a token file; `end_of_text_id`, `vocab_size`, `payload_sha256` and others.
        tokens: unsigned integers (n_tokens,): each story's ids, then one end-of-text id.
        offsets: uint64 (n_stories,), token index where each story begins.
        story_bytes: uint32 (n_stories,), UTF-8 bytes of each story.
    """

    path: Path
    header: dict
    tokens: np.ndarray
    offsets: np.ndarray
    story_bytes: np.ndarray

    @property
    def n_tokens(self) -> int: ...

    @property
    def n_stories(self) -> int: ...

    def story(self, i: int) -> np.ndarray: ...

    def tokenizer(self) -> Tokenizer: ...


def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0..n-1, int64 (n,).

    Raw Philox words and a stable sort give the same in every NumPy version; NumPy's own permutations may change.
    """
    bits = Philox(key=np.array([seed, epoch], dtype=np.uint64))
    return np.argsort(bits.random_raw(n), kind="stable")


@dataclass(eq=False)
class Windows:
    """The windows of a token file and the order in which a seed reads them.

    Args:
        data: the tokens.
        context_length: targets per window, at most.
        kind: "stream" or "stories".
        seed: of the order.
        rows_per_step: of the recipe.

    Raises:
        UserError: a text shorter than one window.
    """

    data: Tokens
    context_length: int
    kind: str
    seed: int
    rows_per_step: int
    _shuffled: tuple[int, np.ndarray] = field(init=False, default=(-1, None))  # epoch, and its order

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
        ends = [*self.data.offsets[1:].tolist(), self.data.n_tokens]  # bisect is faster than NumPy for one number
        cuts, begin, story, T = [], 0, 0, self.context_length  # story: the first that ends behind `begin`
        while begin < self.data.n_tokens:
            following = bisect_right(ends, begin + T, story, min(story + T, len(ends)))
            end = ends[following - 1] if following > story else begin + T
            cuts.append((begin, end))
            begin, story = end, following
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
        """Hash the tokens and the order in which the first epoch reads them; the same rule orders later epochs.

        Returns:
            SHA-256, hexadecimal, of `payload_sha256` followed by begin and end of every window in the order of
            reading, little-endian int64. Runs with the same hash see the same tokens in the same order.
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
        """Read rows as (inputs, targets), each int64 (B, T), T the longest row; padding is end-of-text and `IGNORE`.

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
        # Checked here, in a prefetch thread: a check on the GPU would make the CPU wait.
        check_largest_id(self.data, max(int(inputs.max()), int(targets.max())))
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def first_rows(self, n_tokens: int) -> list[tuple[int, int]]:
        """Return the first windows in the order of the file until they hold `n_tokens` targets, for evaluation."""
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
        word = int(Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=1 << 64).random_raw())
        return word % (self._last_phase + 1)

    def _order(self, epoch: int) -> np.ndarray:
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, shuffled(self.per_epoch, self.seed, epoch)
        return self._shuffled[1]


class TokensInMemory:
    """A text that is tokenized at every start and held in memory: slow, for training without a token file.

    Args:
        path: of the text.
        tokenizer: for the ids.
        stories: what makes a story: "endoftext", "line" or "file".

    Raises:
        UserError: no text, or one without a story.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, stories: str = "endoftext"):
        warnings.warn(f"{path} is not a token file: it is tokenized in memory at every start. Make a token file once "
                      f"with: python tools/pre_tokenize.py {path} --tokenizer {tokenizer.kind} --out {path.stem}.bin",
                      stacklevel=2)
        check_text(path)
        source, rows, sizes = Source.of(path), [], []
        texts = read_stories(source, Reading(stories, in_pieces=tokenizer.takes_pieces))
        while batch := list(islice(texts, STORIES_AT_ONCE)):
            rows += [np.array([*ids, tokenizer.end_of_text_id], np.uint32) for ids in tokenizer.encode_batch(batch)]
            sizes += [len(story.encode()) for story in batch]
        if not rows:
            raise UserError(f"{path} holds no story; expected at least one.")
        self.path, self._tokenizer = path, tokenizer
        self.tokens = np.concatenate(rows)
        self.offsets = np.cumsum([0, *map(len, rows[:-1])]).astype(np.uint64)
        self.story_bytes = np.array(sizes, dtype=np.uint32)
        sha256 = source.sha256()
        self.header = {"n_tokens": len(self.tokens), "n_stories": len(rows),
                       "source": [{**source.fingerprint(), "sha256": sha256}],
                       "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
                       "vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id,
                       "payload_sha256": sha256, "stories": stories}

    n_tokens, n_stories, story = TokenFile.n_tokens, TokenFile.n_stories, TokenFile.story

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer
