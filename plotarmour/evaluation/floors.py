"""What one gets without a neural network: uniform, unigram and interpolated bigram models of the training tokens.

A trained model that does not beat the bigram floor has learned nothing about stories. All floors give every token of
the vocabulary some probability, so their nats are finite on any text.
"""

import math
from dataclasses import dataclass

import numpy as np

BLOCK = 2**22


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
    """

    vocab_size: int
    unigram: np.ndarray
    pairs: np.ndarray
    pair_counts: np.ndarray
    history_counts: np.ndarray
    history_types: np.ndarray

    def story_nats(self, ids: np.ndarray, end_of_text_id: int) -> dict[str, float]:
        """Return the nats of one story, closing end-of-text included, under each floor."""
        words = np.append(ids, end_of_text_id).astype(np.int64)
        histories = np.append(end_of_text_id, ids).astype(np.int64)
        return {"uniform": len(words) * math.log(self.vocab_size),
                "unigram": float(-np.log(self.unigram[words]).sum()),
                "bigram": float(-np.log(self.bigram(histories, words)).sum())}

    def bigram(self, histories: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Witten-Bell: P(w|h) = (c(h,w) + t(h)·P(w)) / (c(h) + t(h)), t(h) = different tokens seen after h."""
        keys = histories * self.vocab_size + words
        at = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        counts = np.where(self.pairs[at] == keys, self.pair_counts[at], 0)
        total, types = self.history_counts[histories], self.history_types[histories]
        seen = (counts + types * self.unigram[words]) / np.maximum(total + types, 1)
        return np.where(total > 0, seen, self.unigram[words])


def count_floors(data) -> Floors:
    """Count the tokens of a training file, one block after the other.

    Args:
        data: a `TokenFile`: stories one after the other, each closed by end-of-text; the first pair begins there.

    Source: Witten & Bell 1991, method C; the same interpolation takes unigrams to 1 / V.
    """
    V, end = data.header["vocab_size"], data.header["end_of_text_id"]
    counts = np.zeros(V, dtype=np.int64)
    pairs, pair_counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    before = end
    for start in range(0, data.n_tokens, BLOCK):
        words = np.asarray(data.tokens[start:start + BLOCK], dtype=np.int64)
        counts += np.bincount(words, minlength=V)
        keys, n = np.unique(np.append(before, words[:-1]) * V + words, return_counts=True)
        joined, place = np.unique(np.concatenate((pairs, keys)), return_inverse=True)
        pair_counts = np.bincount(place, weights=np.concatenate((pair_counts, n)), minlength=len(joined))
        pairs, pair_counts, before = joined, pair_counts.astype(np.int64), words[-1]
    total, types = counts.sum(), np.count_nonzero(counts)
    histories = pairs // V
    return Floors(V, (counts + types / V) / (total + types), pairs, pair_counts,
                  np.bincount(histories, weights=pair_counts, minlength=V).astype(np.int64),
                  np.bincount(histories, minlength=V))
