"""N-gram baselines: the loss of counting training tokens, without a neural network.

Each order is interpolated with the order below by Witten and Bell's method C (1991):

    P(w | h) = (c(h, w) + t(h) · P(w | shorter h)) / (c(h) + t(h))

h is the history (0, 1 or 2 tokens), c counts occurrences, and t(h) is the number of different tokens after h. The order
below unigrams is the uniform distribution, 1 / V. A history that does not occur gives P(w | shorter h). So each token
has a probability above 0, and nats are finite for any text.

Stories are independent: both counting and scoring put the end-of-text id twice before each story.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from plotarmour.data.token_file import Tokens, story_blocks
from plotarmour.evaluation.scoring import story_tokens

MAX_COUNTED = 50_000_000  # training tokens; more are not counted, which bounds memory to about 2 GiB
BLOCK = 2**22  # training tokens counted at once
SCORED = 2**22  # tokens scored at once; each such block reads the training tokens once per order
ORDERS = ("unigram", "bigram", "trigram")


def counted_tokens(train_data: Tokens) -> int:
    """Return the number of training tokens that the baselines count: the first `MAX_COUNTED` of the file."""
    return min(train_data.n_tokens, MAX_COUNTED)


def evaluate_baselines(train_data: Tokens, data: Tokens) -> dict[str, pd.DataFrame]:
    """Score every story, including its closing end-of-text token, under the n-gram baselines of the training tokens.

    Args:
        train_data: stories to count; of a large file, the first `MAX_COUNTED` tokens.
        data: stories to score, of the same tokenizer.

    Returns:
        By name (uniform, unigram, bigram, trigram): a row per story with story, tokens, bytes, nats.
    """
    blocks = []
    for bounds in story_blocks(data, SCORED):
        [trigrams] = _trigrams(data, bounds[0], bounds[-1], bounds[-1] - bounds[0])
        blocks.append({name: np.add.reduceat(-np.log(p), bounds[:-1] - bounds[0])
                       for name, p in probabilities(train_data, *trigrams).items()})
    stories = pd.DataFrame({"story": np.arange(data.n_stories), "tokens": story_tokens(data),
                            "bytes": data.story_bytes.astype(np.int64)})
    return {name: stories.assign(nats=np.concatenate([block[name] for block in blocks])) for name in blocks[0]}


def probabilities(train_data: Tokens, before: np.ndarray, history: np.ndarray, words: np.ndarray,
                   ) -> dict[str, np.ndarray]:
    """Return P(word | before, history) under each baseline, float64 (n,), for int64 (n,) of each token.

    Only n-grams that begin with one of the given histories are kept: 16 bytes per different n-gram, and about three
    times as much while counts are merged.
    """
    V = train_data.header["vocab_size"]
    p = np.full(len(words), 1 / V)
    result = {"uniform": p}
    for order, name in enumerate(ORDERS):
        histories, j = np.unique(_history_keys(order, before, history, V), return_inverse=True)
        keys, counts = _count(train_data, order, histories)
        totals = np.bincount(keys // V, weights=counts, minlength=len(histories))[j]
        types = np.bincount(keys // V, minlength=len(histories))[j]
        index, occurs = _find(keys, j * V + words)
        count = np.where(occurs, counts[index] if len(counts) else 0, 0)
        p = np.where(totals > 0, (count + types * p) / np.maximum(totals + types, 1), p)
        result[name] = p
    return result


def _count(data: Tokens, order: int, histories: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the tokens that follow some sorted histories, which have `order` tokens each.

    Returns sorted int64 keys j · V + w (token w after history j), and their counts, int64.
    """
    V = data.header["vocab_size"]
    keys, counts = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for before, history, words in _trigrams(data, 0, counted_tokens(data), BLOCK):
        ngrams, n = np.unique(_history_keys(order, before, history, V) * V + words, return_counts=True)
        j, known = _find(histories, ngrams // V)
        keys.append((j * V + ngrams % V)[known])
        counts.append(n[known])
        if sum(map(len, keys)) > 2 * len(keys[0]) + BLOCK:  # each key is then merged a few times only
            keys, counts = ([merged] for merged in _merge(keys, counts))
    return _merge(keys, counts)


def _merge(keys: list[np.ndarray], counts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Add the counts of equal keys, and return the sorted different keys and their counts, int64."""
    different, index = np.unique(np.concatenate(keys), return_inverse=True)
    return different, np.bincount(index, weights=np.concatenate(counts), minlength=len(different)).astype(np.int64)


def _history_keys(order: int, before: np.ndarray, history: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return one int64 per history of 0, 1 or 2 tokens."""
    return (np.zeros_like(history), history, before * vocab_size + history)[order]


def _trigrams(data: Tokens, start: int, stop: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield blocks of (token before the history, history, token), int64; `start` is the start of a story."""
    end_of_text = data.header["end_of_text_id"]
    before = history = end_of_text
    for i in range(start, stop, size):
        words = np.asarray(data.tokens[i:min(stop, i + size)], dtype=np.int64)
        histories = np.append(history, words[:-1])
        second_last = np.append(before, histories[:-1])
        second_last[histories == end_of_text] = end_of_text  # instead of the last token of the story before
        yield second_last, histories, words
        before, history = histories[-1], words[-1]


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each wanted key among the sorted keys, and whether it is one of them."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return index, keys[index] == wanted
