"""Stories that stand in two token files: a validation set that was trained on measures memory, not skill.

Every story gets a 64-bit key from its ids alone, read once, block by block:

    key(story) = mix( sum over its tokens t_0 .. t_n of  mix(t_i + 1) * BASE**i ),  modulo 2**64

Equal ids give equal keys. Equal keys are compared id by id, so that the answer is exact.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK = 2**18  # tokens at a time: what is computed of them stays in a core's cache
BASE = 0x9E3779B97F4A7C15  # any odd number: it has an inverse modulo 2**64
WORD = 2**64


@dataclass(frozen=True)
class Overlap:
    """Stories of one token file that stand, id by id, in another.

    Attributes:
        n_stories: how many.
        first: index of the first of them; None where there is none.
        first_in_other: where that one stands in the other file.
    """

    n_stories: int
    first: int | None
    first_in_other: int | None


def overlapping_stories(train: object, val: object) -> Overlap:
    """Count the stories of `val` that stand identically in `train`.

    Args:
        train, val: `TokenFile` or `TokensInMemory`, of one tokenizer. Both are read once, in blocks, about 500 million
            tokens in a second where they are in memory already; a few words of 8 bytes per story are held.

    Returns:
        How many stories of `val`, and the first.

    Example:
        train has the stories 5 6 7 and 8 9, val has 8 9 and 5 6: one story of val, its story 0, train's story 1.
    """
    keys = story_keys(val)
    others = story_keys(train)
    candidates = np.flatnonzero(np.isin(others, keys))  # in train; few
    candidates = candidates[np.argsort(others[candidates], kind="stable")]
    sorted_keys = others[candidates]
    begins, ends = (np.searchsorted(sorted_keys, keys, side) for side in ("left", "right"))
    count, first = 0, (None, None)
    for i in np.flatnonzero(begins < ends):
        # The first candidate is the one, unless different ids have met in one key.
        found = next((int(j) for j in candidates[begins[i]:ends[i]] if np.array_equal(train.story(j), val.story(i))),
                     None)
        if found is not None:
            first = first if count else (int(i), found)
            count += 1
    return Overlap(count, *first)


def disjoint_by_construction(one: dict, other: dict) -> bool:
    """Whether two headers name different parts of one split of the same text: a story is in one part only."""
    def origin(header: dict) -> tuple:
        return ([source["sha256"] for source in header["source"]], header.get("split"), header.get("stories"),
                header["tokenizer"]["sha256"])

    parts = (one.get("part"), other.get("part"))
    return bool(one.get("split")) and origin(one) == origin(other) and None not in parts and parts[0] != parts[1]


def story_keys(data: object) -> np.ndarray:
    """Return a 64-bit key of every story's ids.

    Args:
        data: `TokenFile` or `TokensInMemory`.

    Returns:
        uint64 (n_stories,). Equal for equal ids; for different ones in 2**-64 of cases.
    """
    table = mix(np.arange(1, data.header["vocab_size"] + 1, dtype=np.uint64))
    offsets, n_tokens = np.asarray(data.offsets).astype(np.int64), data.n_tokens
    keys = np.zeros(len(offsets), dtype=np.uint64)
    for begin in range(0, n_tokens, BLOCK):
        tokens = np.asarray(data.tokens[begin:begin + BLOCK])
        first = int(np.searchsorted(offsets, begin, "right")) - 1  # its tokens may have begun in an earlier block
        end = int(np.searchsorted(offsets, begin + len(tokens), "left"))
        starts = np.maximum(offsets[first:end] - begin, 0)
        sums = span_sums(table[tokens], starts)
        sums[:1] *= np.uint64(pow(BASE, int(begin + starts[0] - offsets[first]), WORD))
        keys[first:end] += sums
    return mix(keys)


def mix(words: np.ndarray) -> np.ndarray:
    """Scatter 64-bit words, one to one; uint64, any shape.

    Source: the finaliser of MurmurHash3 (Austin Appleby, public domain).
    """
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        words = (words ^ (words >> np.uint64(33))) * np.uint64(factor)
    return words ^ (words >> np.uint64(33))


def span_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum value · BASE**place over each span of an array, modulo 2**64; places count from a span's begin.

    Args:
        values: uint64 (n,).
        starts: int (m,), ascending: where spans begin; each ends where the next begins.

    Returns:
        uint64 (m,).
    """
    # Powers count from the array's begin; the inverse moves each span's first value to BASE**0.
    sums = np.add.reduceat(values * _powers(BASE, len(values)), starts)
    return sums * _powers(pow(BASE, -1, WORD), len(values))[starts]


@lru_cache(maxsize=4)
def _powers(base: int, n: int) -> np.ndarray:
    """uint64 (n,): base**i modulo 2**64."""
    factors = np.full(n, base, dtype=np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)
