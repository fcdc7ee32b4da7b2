"""What one gets without a neural network: uniform, unigram, bigram and trigram models of the training tokens.

A trained model that does not beat the bigram floor has learned nothing about stories. All floors give every token of
the vocabulary some probability, so their nats are finite on any text.

A token's history is the token before it, for trigrams the two before it. Stories know nothing of each other: before a
story stands the end-of-text id, and before that the same again. The histories of a story's first token are so
(end, end), of its second (end, first), in counting as in scoring.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from plotarmour.evaluation.scoring import story_tokens
from plotarmour.evaluation.tally import Tally

BLOCK = 2**22  # tokens counted at once
SCORED = 2**20  # tokens scored at once
MOST_TRIGRAMS = 2**24  # distinct ones held while counting: 256 MiB, three times that while they are merged


@dataclass(frozen=True)
class Trigrams:
    """Counts of the tokens that follow two others.

    Attributes:
        vocab_size: V.
        histories: sorted int64 (J,) keys g · V + h of pairs (g, h).
        history_counts: int64 (J,), how often each is followed by something.
        history_types: int64 (J,), by how many different tokens.
        keys: sorted int64 keys j · V + w: token w after history j.
        counts: int64, their counts.
        complete: all trigrams of the training tokens are there; else those of one text alone, some with count 0.
    """

    vocab_size: int
    histories: np.ndarray
    history_counts: np.ndarray
    history_types: np.ndarray
    keys: np.ndarray
    counts: np.ndarray
    complete: bool

    def interpolated(self, before: np.ndarray, histories: np.ndarray, words: np.ndarray,
                     backoff: np.ndarray) -> np.ndarray:
        """Witten-Bell: P(w|gh) = (c(g,h,w) + t(gh)·P(w|h)) / (c(gh) + t(gh)); P(w|h) where gh was never seen."""
        j, known = _find(self.histories, before * self.vocab_size + histories)
        at, listed = _find(self.keys, j * self.vocab_size + words)
        listed &= known
        if not self.complete and not listed.all():
            raise ValueError("a trigram that was not counted: these floors are for another text; give it to "
                             "count_floors")
        counts = np.where(listed, self.counts[at], 0)
        total, types = np.where(known, self.history_counts[j], 0), self.history_types[j]
        return np.where(total > 0, (counts + types * backoff) / np.maximum(total + types, 1), backoff)


@dataclass(frozen=True)
class Floors:
    """Counts of the training tokens.

    Attributes:
        vocab_size: V.
        unigram: float64 (V,), probabilities interpolated with 1 / V.
        pairs: sorted int64 keys h · V + w of the pairs that occur.
        pair_counts: int64, their counts.
        history_counts: int64 (V,), how often each h is followed by something.
        history_types: int64 (V,), by how many different tokens.
        trigrams: counts of three.
    """

    vocab_size: int
    unigram: np.ndarray
    pairs: np.ndarray
    pair_counts: np.ndarray
    history_counts: np.ndarray
    history_types: np.ndarray
    trigrams: Trigrams

    def story_nats(self, data) -> dict[str, np.ndarray]:
        """Return the nats of every story, closing end-of-text included, under each floor.

        Args:
            data: a `TokenFile`; the one that the floors were counted for, if they were counted for one.

        Returns:
            uniform, unigram, bigram, trigram: float64 (n_stories,) each.

        Raises:
            ValueError: a text that the trigrams were not counted for.
        """
        offsets = np.append(data.offsets, data.n_tokens).astype(np.int64)  # the last one ends the last story
        nats = {"uniform": [np.diff(offsets) * math.log(self.vocab_size)], "unigram": [], "bigram": [], "trigram": []}
        first, V, end = 0, self.vocab_size, data.header["end_of_text_id"]
        while first < data.n_stories:
            last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + SCORED, side="right")) - 1)
            before, histories, words = next(_with_histories(data, offsets[first], offsets[last], end))
            # Each different trigram is looked up once, in order: sorted, they are found five times as fast.
            keys, place = np.unique((before * V + histories) * V + words, return_inverse=True)
            before, histories, words = keys // V**2, keys // V % V, keys % V
            bigram = self.bigram(histories, words)
            trigram = self.trigrams.interpolated(before, histories, words, bigram)
            for name, p in (("unigram", self.unigram[words]), ("bigram", bigram), ("trigram", trigram)):
                nats[name].append(np.add.reduceat(-np.log(p)[place], offsets[first:last] - offsets[first]))
            first = last
        return {name: np.concatenate(parts) for name, parts in nats.items()}

    def bigram(self, histories: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Witten-Bell: P(w|h) = (c(h,w) + t(h)·P(w)) / (c(h) + t(h)), t(h) = different tokens seen after h."""
        at, listed = _find(self.pairs, histories * self.vocab_size + words)
        counts = np.where(listed, self.pair_counts[at], 0)
        total, types = self.history_counts[histories], self.history_types[histories]
        seen = (counts + types * self.unigram[words]) / np.maximum(total + types, 1)
        return np.where(total > 0, seen, self.unigram[words])

    def trigram(self, before: np.ndarray, histories: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Return P(w|gh), int64 (n,) each to float64 (n,): see `Trigrams.interpolated`."""
        return self.trigrams.interpolated(before, histories, words, self.bigram(histories, words))


def count_floors(data, scored=None) -> Floors:
    """Count the tokens of a training file, one block after the other.

    Args:
        data: a `TokenFile`: stories one after the other, each closed by end-of-text; the first pair begins there.
        scored: a `TokenFile` that is to be scored: then of trigrams only what it needs is kept, and no more than
            MOST_TRIGRAMS are held while counting, however long the training file. Without it, all of them are kept.

    Source: Witten & Bell 1991, method C; the same interpolation takes unigrams to 1 / V.
    """
    V = data.header["vocab_size"]
    counts, tally = np.zeros(V, dtype=np.int64), Tally()
    for _, histories, words in _blocks(data):
        counts += np.bincount(words, minlength=V)
        tally.add(*np.unique(histories * V + words, return_counts=True))
    pairs, pair_counts = tally.merged()
    total, types = counts.sum(), np.count_nonzero(counts)
    histories = pairs // V
    return Floors(V, (counts + types / V) / (total + types), pairs, pair_counts,
                  np.bincount(histories, weights=pair_counts, minlength=V).astype(np.int64),
                  np.bincount(histories, minlength=V), _count_trigrams(data, scored))


def evaluate_floors(train_data, data) -> dict[str, pd.DataFrame]:
    """Score every story under the floors of the training tokens; columns as for runs.

    Returns:
        By name: uniform, unigram, bigram, trigram.
    """
    floors = count_floors(train_data, data)
    facts = {"story": np.arange(data.n_stories), "tokens": story_tokens(data),
             "bytes": data.story_bytes.astype(np.int64)}
    return {name: pd.DataFrame(facts | {"nats": nats}) for name, nats in floors.story_nats(data).items()}


def _count_trigrams(data, scored) -> Trigrams:
    """Count what follows the histories of `scored` (of `data`, without it), in as many passes as memory asks for.

    When more than MOST_TRIGRAMS are held, half of the histories, by hash, are left to a later pass.
    """
    V, tally = data.header["vocab_size"], Tally()
    for before, histories, words in _blocks(data if scored is None else scored):
        tally.add(*np.unique((before * V + histories) * V + words, return_counts=True))
    wanted, _ = tally.merged()
    histories, j = np.unique(wanted // V, return_inverse=True)
    keys = j * V + wanted % V
    counts, totals, types = np.zeros(len(keys), np.int64), np.zeros(len(histories), np.int64), np.zeros_like(histories)
    del tally, wanted, j
    passes = [(1, 0)]  # of so many parts of the histories, which one
    while passes:
        parts, part = passes.pop()
        tally = Tally()
        for before, history, words in _blocks(data):
            here = before * V + history
            if parts > 1:
                mine = _part(here, parts) == part
                here, words = here[mine], words[mine]
            found, n = np.unique(here * V + words, return_counts=True)
            j, known = _find(histories, found // V)
            tally.add((j * V + found % V)[known], n[known])
            while len(tally) > MOST_TRIGRAMS and len(tally.merged()[0]) > MOST_TRIGRAMS and parts < 2**16:
                passes.append((2 * parts, part + parts))
                parts *= 2
                tally.keep(_part(histories[tally.merged()[0] // V], parts) == part)
        found, n = tally.merged()
        totals += np.bincount(found // V, weights=n, minlength=len(histories)).astype(np.int64)
        types += np.bincount(found // V, minlength=len(histories))
        at, listed = _find(keys, found)
        counts[at[listed]] += n[listed]
    return Trigrams(V, histories, totals, types, keys, counts, scored is None)


def _part(histories: np.ndarray, parts: int) -> np.ndarray:
    """Deal histories, int64, to `parts`, a power of two, evenly; part p of n is parts p and p + n of 2 n."""
    mixed = histories.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: the high bits are mixed
    return (mixed >> np.uint64(40)).astype(np.int64) % parts


def _blocks(data) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return _with_histories(data, 0, data.n_tokens, data.header["end_of_text_id"], BLOCK)


def _with_histories(data, start: int, stop: int, end: int, size: int | None = None,
                    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (the token before the history, the history, the token), int64, of tokens from a story's start on."""
    before, history = end, end
    for at in range(start, stop, size or stop - start):
        words = np.asarray(data.tokens[at:min(stop, at + (size or stop))], dtype=np.int64)
        histories = np.append(history, words[:-1])
        befores = np.append(before, histories[:-1])
        befores[histories == end] = end  # not the last token of another story
        yield befores, histories, words
        before, history = histories[-1], words[-1]


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each wanted key its place among the sorted ones, and whether it is there at all."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
