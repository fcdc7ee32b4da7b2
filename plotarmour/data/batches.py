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
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.random import Philox
from torch import Tensor

from plotarmour.cli import UserError, warn
from plotarmour.data.readers import Source, check_text, read_whole
from plotarmour.data.token_file import TokenFile, check_largest_id
from plotarmour.data.tokenizer import Spelling, Tokenizer
from plotarmour.loss import IGNORE


class Tokens(Protocol):
    """The tokens of some stories, as training and scoring read them: a `TokenFile` or `TokensInMemory`."""

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


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a token file and the order in which a seed reads them.

    Raises:
        UserError: a text shorter than one window.
    """

    data: Tokens
    context_length: int  # largest number of targets in a window
    kind: str  # "stream" or "stories"
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
        rows, place, n_left = [], step * self.rows_per_step, self.rows_per_step
        while n_left:  # a step may end one epoch and begin the next
            epoch, i = divmod(place, self.per_epoch)
            begins, ends = self._window(_shuffled(self.per_epoch, self.seed, epoch)[i:i + n_left], self._phase(epoch))
            rows += zip(begins.tolist(), ends.tolist(), strict=True)
            place, n_left = place + len(begins), n_left - len(begins)
        return rows

    def first_rows(self, n_tokens: int) -> list[tuple[int, int]]:
        """Return the first windows in the order of the file until they hold `n_tokens` targets, for evaluation."""
        rows = []
        while n_tokens > 0 and len(rows) < self.per_epoch:
            begin, end = map(int, self._window(len(rows), 0))
            rows.append((begin, end))
            n_tokens -= end - begin
        return rows

    def order_sha256(self) -> str:
        """Hash the tokens and the order in which the first epoch reads them; the same rule orders later epochs.

        Returns:
            SHA-256, hexadecimal, of `payload_sha256` followed by begin and end of every window in the order of
            reading, little-endian int64. Runs with the same hash see the same tokens in the same order.
        """
        windows = self._window(_shuffled(self.per_epoch, self.seed, 0), self._phase(0))
        order = np.stack(windows, axis=1).astype("<i8").tobytes()
        return hashlib.sha256(self.data.header["payload_sha256"].encode() + order).hexdigest()

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

    def _window(self, i: int | np.ndarray, phase: int) -> tuple[int, int] | tuple[np.ndarray, np.ndarray]:
        """Return begin and end in targets of window `i`, or of several, in an epoch that begins at `phase`."""
        if self.kind == "stories":
            return self._cuts[i, 0], self._cuts[i, 1]
        begin = phase + i * self.context_length
        return begin, begin + self.context_length

    @property
    def _last_phase(self) -> int:
        return min(self.context_length - 1, self.data.n_tokens - self.context_length)

    def _phase(self, epoch: int) -> int:
        """Return where the first window of an epoch begins."""
        if self.kind == "stories":
            return 0
        word = int(Philox(key=np.array([self.seed, epoch], dtype=np.uint64), counter=1 << 64).random_raw())
        return word % (self._last_phase + 1)


class TokensInMemory:
    """Stories whose ids are in memory.

    Args:
        stories: ids of each story, unsigned integers, with its end-of-text id.
        header: entries of a token file's header that the user of the stories needs; their numbers are added.
        story_bytes: UTF-8 bytes of each story.
        path, tokenizer: of their text.
    """

    story = TokenFile.story

    def __init__(self, stories: list[np.ndarray], header: dict, story_bytes: list[int], path: Path | None = None,
                 tokenizer: Tokenizer | None = None):
        self.tokens = np.concatenate(stories)
        self.offsets = np.cumsum([0, *map(len, stories[:-1])]).astype(np.uint64)
        self.story_bytes = np.array(story_bytes, dtype=np.uint32)
        self.n_tokens, self.n_stories = len(self.tokens), len(stories)
        self.header = header | {"n_tokens": self.n_tokens, "n_stories": self.n_stories}
        self.path, self._tokenizer = path, tokenizer

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer


def tokenize_in_memory(path: Path, tokenizer: Tokenizer, stories: str = "endoftext") -> TokensInMemory:
    """Tokenize a text into memory: slow, for training without a token file.

    Args:
        path, tokenizer: of the text, and for its ids.
        stories: what makes a story: "endoftext", "line", "paragraph" or "file".

    Raises:
        UserError: no text, or one without a story.
    """
    warn(f"{path} is not a token file: it is tokenized in memory at every start. Make a token file once with: "
         f"python tools/pre_tokenize.py {path} --tokenizer {tokenizer.kind} --out {path.stem}.bin")
    check_text(path)
    source, spelling, rows, sizes = Source.of(path, stories=stories), Spelling(tokenizer), [], []
    for chunk in read_whole(source):
        spelling.check(chunk.texts)
        batch = tokenizer.encode_batch(chunk.texts)
        rows += [np.array([*ids, tokenizer.end_of_text_id], np.uint32) for ids in batch]
        sizes += chunk.sizes
    if not rows:
        raise UserError(f"{path} holds no story; expected at least one.")
    sha256 = source.sha256()
    header = {"source": [{**source.fingerprint(), "sha256": sha256}], "payload_sha256": sha256, "stories": stories,
              "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
              "vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id}
    return TokensInMemory(rows, header, sizes, path, tokenizer)
