"""N-gram baselines: what counting the training tokens gives without a neural network.

Each order is interpolated with the one below it, by Witten and Bell's method C:

    P(w | h) = (c(h, w) + t(h) · P(w | shorter h)) / (c(h) + t(h))

h is the history (no token, one or two tokens), c counts, and t(h) is the number of different tokens seen after h. Below
unigrams stands the uniform distribution, 1 / V. A history that never occurs gives P(w | shorter h). So every token has
a probability above 0, and nats are finite on any text.

Stories are independent: before each stands the end-of-text id twice, in counting as in scoring.

Source: Witten & Bell 1991.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from plotarmour.evaluation.scoring import story_tokens

BLOCK = 2**22  # training tokens counted at once
SCORED = 2**22  # tokens scored at once; each such block reads the training file once per order
ORDERS = ("unigram", "bigram", "trigram")


def evaluate_baselines(train_data, data) -> dict[str, pd.DataFrame]:
    """Score every story under the n-gram baselines of the training tokens.

    Args:
        train_data: `TokenFile` to count.
        data: `TokenFile` to score, of the same tokenizer.

    Returns:
        By name (uniform, unigram, bigram, trigram): a row per story with story, tokens, bytes, nats.
    """
    columns = {"story": np.arange(data.n_stories), "tokens": story_tokens(data),
               "bytes": data.story_bytes.astype(np.int64)}
    return {name: pd.DataFrame(columns | {"nats": nats}) for name, nats in story_nats(train_data, data).items()}


def story_nats(train_data, data) -> dict[str, np.ndarray]:
    """Compute the nats of every story, its closing end-of-text included, under each baseline.

    Args:
        train_data, data: as for `evaluate_baselines`.

    Returns:
        By name: float64 (n_stories,).
    """
    offsets = np.append(data.offsets, data.n_tokens).astype(np.int64)  # the last one ends the last story
    blocks, first = [], 0
    while first < data.n_stories:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + SCORED, side="right")) - 1)
        [tokens] = _trigrams(data, offsets[first], offsets[last], offsets[last] - offsets[first])
        probabilities = token_probabilities(train_data, *tokens)
        starts = offsets[first:last] - offsets[first]
        blocks.append({name: np.add.reduceat(-np.log(p), starts) for name, p in probabilities.items()})
        first = last
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def token_probabilities(train_data, before: np.ndarray, history: np.ndarray, words: np.ndarray,
                        ) -> dict[str, np.ndarray]:
    """Compute P(word | before, history) under each baseline.

    Counts are held for the given histories only. Memory grows with the number of different training n-grams that begin
    with one of them (16 bytes each, about three times that while they are merged), not with the training file.

    Args:
        train_data: `TokenFile` to count.
        before: int64 (n,), the token before the history.
        history: int64 (n,), the token before the word.
        words: int64 (n,).

    Returns:
        By name: float64 (n,).
    """
    V = train_data.header["vocab_size"]
    p = np.full(len(words), 1 / V)
    result = {"uniform": p}
    for order, name in enumerate(ORDERS):
        histories, j = np.unique(_history_keys(order, before, history, V), return_inverse=True)
        keys, counts = _count(train_data, order, histories)
        totals = np.bincount(keys // V, weights=counts, minlength=len(histories))[j]
        types = np.bincount(keys // V, minlength=len(histories))[j]
        at, occurs = _find(keys, j * V + words)
        seen = np.where(occurs, counts[at] if len(counts) else 0, 0)
        p = np.where(totals > 0, (seen + types * p) / np.maximum(totals + types, 1), p)
        result[name] = p
    return result


def _count(data, order: int, histories: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens that follow some histories.

    Args:
        data: `TokenFile` to count.
        order: length of a history in tokens, 0 to 2.
        histories: sorted int64 (J,), of `_history_keys`.

    Returns:
        Sorted int64 keys j · V + w (token w after history j), and their counts, int64.
    """
    V = data.header["vocab_size"]
    keys, counts = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for before, history, words in _trigrams(data, 0, data.n_tokens, BLOCK):
        ngrams, n = np.unique(_history_keys(order, before, history, V) * V + words, return_counts=True)
        j, wanted = _find(histories, ngrams // V)
        keys.append((j * V + ngrams % V)[wanted])
        counts.append(n[wanted])
        if sum(map(len, keys)) > 2 * len(keys[0]) + BLOCK:  # so each key is merged a few times only
            keys, counts = ([merged] for merged in _merge(keys, counts))
    return _merge(keys, counts)


def _merge(keys: list[np.ndarray], counts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Add the counts of equal keys. Returns the sorted distinct keys and their counts, int64."""
    distinct, place = np.unique(np.concatenate(keys), return_inverse=True)
    return distinct, np.bincount(place, weights=np.concatenate(counts), minlength=len(distinct)).astype(np.int64)


def _history_keys(order: int, before: np.ndarray, history: np.ndarray, vocab_size: int) -> np.ndarray:
    """One int64 per history of 0, 1 or 2 tokens."""
    return (np.zeros_like(history), history, before * vocab_size + history)[order]


def _trigrams(data, start: int, stop: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of (token before the history, history, token), int64, from the start of a story on."""
    end = data.header["end_of_text_id"]
    before, history = end, end
    for at in range(start, stop, size):
        words = np.asarray(data.tokens[at:min(stop, at + size)], dtype=np.int64)
        histories = np.append(history, words[:-1])
        befores = np.append(before, histories[:-1])
        befores[histories == end] = end  # not the last token of another story
        yield befores, histories, words
        before, history = histories[-1], words[-1]


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each wanted key its place among the sorted ones, and whether it is there."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted
