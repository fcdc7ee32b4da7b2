"""Near copies of texts: word 5-grams, MinHash signatures, and bands of them that put likely pairs side by side.

A text is the set of its shingles: every five words in a row of its normal form (lower case, no punctuation). Two texts
are as similar as their sets, by Jaccard: shared shingles over all shingles of both. MinHash makes a signature of 200
numbers, each equal in two texts with a probability of just that similarity; texts that agree in all numbers of one of
its bands are compared. With b bands of r numbers a pair of similarity s is found with probability

    1 - (1 - s**r)**b        at s = 0.8 with 25 bands of 8:  0.990;  at 0.9:  1.000;  at 0.5:  0.093

Languages that put no space between words have no words here: their texts are found only where a whole clause is equal.

Source: Broder (1997), On the resemblance and containment of documents; Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3; word 5-grams and 0.8 as in Lee et al. (2022), Deduplicating training data makes language models
better, arXiv 2107.06499.
"""

from collections.abc import Iterator

import numpy as np

from plotarmour.data.overlap import mix, span_sums

WORDS = 5
SIGNATURE = 200
SEED = 42
NEIGHBOURS = 6  # in a bucket: all pairs of up to 8 texts, and no quadratic cost for a million of one template
HOW_TO_INSTALL = "pip install 'rensa>=0.5,<0.6'"


def can_sign() -> bool:
    """Whether the optional library that computes signatures is installed, and works on this machine."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        return False
    return True


def banding(threshold: float) -> tuple[int, int]:
    """Return (bands, rows): the longest rows that still find 98 of 100 pairs at the threshold.

    Example:
        >>> banding(0.8)
        (25, 8)
    """
    rows = max(r for r in range(1, SIGNATURE + 1) if 1 - (1 - threshold**r) ** (SIGNATURE // r) >= 0.98)
    return SIGNATURE // rows, rows


def shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash every five words in a row of some texts; a shorter text is one shingle.

    Args:
        texts: normalised: words with single spaces between them, none empty.

    Returns:
        uint64 (n,), the texts' shingles one after another, and uint64 (len(texts) + 1,), where each text begins.
    """
    raw = np.frombuffer(("\n".join(texts) + "\n").encode(), dtype=np.uint8)
    ends = np.flatnonzero((raw == ord(" ")) | (raw == ord("\n")))
    starts = np.append(0, ends[:-1] + 1)
    values = mix(raw.astype(np.uint64))
    values[ends] = 0  # what stands between two words belongs to neither
    words = mix(span_sums(values, starts))
    counts = np.diff(np.flatnonzero(raw[ends] == ord("\n")), prepend=-1)  # words of each text
    begins = np.cumsum(counts) - counts
    places, text_ends = np.arange(len(words)), np.repeat(begins + counts, counts)
    hashes = np.zeros(len(words), dtype=np.uint64)
    following = np.append(words, np.zeros(WORDS, dtype=np.uint64))
    for k in range(WORDS):
        hashes = mix(hashes + np.where(places + k < text_ends, following[k:k + len(words)], np.uint64(0)))
    sizes = np.maximum(counts - WORDS + 1, 1)
    whole = places < np.repeat(begins + sizes, counts)  # those that begin too near the end are no shingle
    return hashes[whole], np.append(0, np.cumsum(sizes)).astype(np.uint64)


def shingle_sets(texts: list[str]) -> list[np.ndarray]:
    """Return the sorted distinct shingles of each text."""
    hashes, offsets = shingles(texts)
    return [np.unique(part) for part in np.split(hashes, offsets[1:-1].astype(np.int64))]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two `shingle_sets`: shared over all.

    Example:
        >>> jaccard(np.array([1, 2, 3]), np.array([2, 3, 4]))
        0.5
    """
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def signatures(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """MinHash signatures of texts' shingles: uint32 (len(offsets) - 1, 200), the same at every start.

    Source: rensa's R-MinHash. Measured on 4,000 pairs of TinyStories: bias 0.0001, error 0.020 (of independent
    permutations: 0.027), 2 microseconds a story and 19 to copy its signature; datasketch's MinHash takes 128.
    """
    from rensa import RMinHash

    made = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, SIGNATURE, SEED)
    return np.array(made.to_rows(), dtype=np.uint32)


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Fold each band of signatures into one key: uint64 (bands, n)."""
    grouped = signature[:, :bands * rows].reshape(len(signature), bands, rows)
    keys = np.zeros((len(signature), bands), dtype=np.uint64)
    for row in range(rows):
        keys = mix(keys + grouped[:, :, row] + np.uint64(1))
    return np.ascontiguousarray(keys.T)


def candidate_pairs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of texts that share a key, in passes: each with its bucket's first, then with its neighbours.

    Args:
        keys: uint64 (n,), of one band.

    Yields:
        Two int arrays, the lower index first. A bucket of up to eight texts gives all pairs; a larger one those with
        its first and between texts that stand up to six places apart.

    Example:
        Keys 5 9 5 5 give (0, 2), (0, 3), then (2, 3).
    """
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    places = np.arange(len(keys))
    new = np.append(True, sorted_keys[1:] != sorted_keys[:-1])[:len(keys)]
    first = np.maximum.accumulate(np.where(new, places, 0))
    yield order[first[~new]], order[places[~new]]
    for distance in range(1, NEIGHBOURS + 1):
        left = places[:-distance][first[distance:] < places[:-distance]]  # the same bucket, and not its first
        yield order[left], order[left + distance]
