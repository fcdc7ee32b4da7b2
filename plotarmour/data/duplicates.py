"""Copies among the stories of token files: exact, normalised and near; within a part and across parts (leaks).

A validation set that was trained on measures memory, not skill. Each kind includes the one before:

    exact        the same ids, and so the same text
    normalised   the same text except for case, punctuation and spacing (`plotarmour.data.stories.normalise`)
    near         Jaccard similarity of the word 5-grams (shared ones over all of both) of at least `threshold`

Exact and normalised copies are found by Python's 64-bit hashes: of two million stories, two different ones share a hash
in one of ten million token files. Near copies: MinHash signatures (the library rensa) in bands of an LSH index propose
pairs, and these are compared exactly. With b bands of r numbers a pair of similarity s is proposed with probability

    1 - (1 - s**r)**b        at s = 0.8 with 25 bands of 8:  0.990;  at 0.9:  1.000;  at 0.5:  0.093

A copy of a copy belongs to the group, so two members can be less similar than the threshold. In languages without
spaces a "word" is a clause: near copies are found only where whole clauses are equal.

Source: Broder (1997), On the resemblance and containment of documents; Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3; word 5-grams and 0.8 as in Lee et al. (2022), arXiv 2107.06499.
"""

import importlib.util
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest
from itertools import chain, product

import numpy as np

from plotarmour.cli import AnyPath, UserError, as_path, progress
from plotarmour.data.stories import normalise
from plotarmour.data.token_file import TokenFile, Tokens, story_bounds
from plotarmour.files import write_text

WORDS = 5
SIGNATURE = 200  # numbers of a MinHash signature, at most
SEED = 42
BATCH_TOKENS = 2**19  # about as many are decoded at a time
LEAST_NGRAM = 13  # tokens of the shortest piece that `long_overlaps` looks for
BLOCK = 2**19  # training tokens whose n-grams are hashed at once; larger blocks leave the CPU's caches
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, without a pattern in its bits
MOST_COMPARED = 50  # candidates per story: no quadratic cost where many stories follow one template
ALL = "all parts"
EXAMPLE_COLUMNS = ("kind", "part_a", "story_a", "part_b", "story_b", "similarity", "group_stories", "text_a", "text_b")


def overlapping_stories(train: Tokens, val: Tokens) -> np.ndarray:
    """Return which stories of `val` have the same ids as a story of `train`, and no unknown words that may differ.

    Args:
        train, val: of one tokenizer. Each is read once; 8 bytes per story are held.

    Returns:
        int64 (n, 2): index of each such story in `val`, and of a story of `train` with its ids.

    Example:
        train has the stories 5 6 7 and 8 9, val has 8 9 and 5 6: [[0, 1]], as story 0 of val is story 1 of train.
    """
    train_keys, first = np.unique(_story_keys(train), return_index=True)
    val_keys = _story_keys(val)
    shared, tokenizer = np.flatnonzero(np.isin(val_keys, train_keys)), val.tokenizer()
    if tokenizer and tokenizer.drops_unknown:
        shared = np.array([i for i in shared if tokenizer.unknown_id not in val.story(i)], np.int64)
    return np.column_stack([shared, first[np.searchsorted(train_keys, val_keys[shared])]])


def long_overlaps(train: Tokens, val: Tokens) -> np.ndarray:
    """Return which stories of `val` have half of their tokens, in one piece, in one story of `train`.

    A story that differs from a training story in one token is among them. The piece is an n-gram of at least
    `LEAST_NGRAM` tokens; n is half of the story's tokens, rounded down to four significant bits (8/9 of it or more).
    Shorter stories have no such n-gram.

    Args:
        train, val: of one tokenizer. `train` is read once, in blocks; about 40 bytes per token of `val` are held.

    Returns:
        int64 (n,): indices of these stories in `val`.

    Example:
        val has a story of 40 tokens. Its n-grams have 20 tokens. A story of train that shares 20 tokens in a row with
        it makes it one of the result, one that shares its first and its last 19 does not.

    Source: 13 tokens as in appendix C of Brown et al. (2020), arXiv 2005.14165. A share of the story instead of a fixed
    n, because stories of one author or grammar begin alike.
    """
    bounds = story_bounds(val)
    lengths = np.diff(bounds) - 1  # without end-of-text
    half = np.maximum(lengths // 2, LEAST_NGRAM)
    bits = np.frexp(half)[1] - 4
    sizes, overlaps, wanted = half >> bits << bits, np.zeros(val.n_stories, dtype=bool), {}
    sizes[lengths < LEAST_NGRAM] = 0
    for n, hashes in _ngram_hashes(val.tokens, np.unique(sizes[sizes > 0])):
        stories = np.flatnonzero(sizes == n)
        counts = lengths[stories] - n + 1  # n-grams of each story
        owners = np.repeat(stories, counts)
        places = np.arange(len(owners)) + np.repeat(bounds[stories] - np.cumsum(counts) + counts, counts)
        keys, key_of = np.unique(hashes[places], return_inverse=True)
        is_likely = np.zeros(2**22, dtype=bool)  # by the first 22 bits of a hash; few n-grams of train pass
        is_likely[keys >> np.uint64(42)] = True
        wanted[n] = owners, key_of, keys, is_likely, np.zeros(len(keys), dtype=bool)
    with progress(train.n_tokens, "tokens", "search overlaps") as bar:
        for begin in range(0, train.n_tokens, BLOCK):
            tokens = train.tokens[begin:begin + BLOCK + max(wanted, default=1) - 1]
            for n, hashes in _ngram_hashes(tokens, list(wanted)):
                *_, keys, is_likely, occurs = wanted[n]
                hashes = hashes[is_likely[hashes >> np.uint64(42)]]
                places = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
                occurs[places[keys[places] == hashes]] = True
            bar.update(min(BLOCK, train.n_tokens - begin))
    for owners, key_of, _, _, occurs in wanted.values():
        overlaps[owners[occurs[key_of]]] = True
    return np.flatnonzero(overlaps)


def _ngram_hashes(tokens: np.ndarray, sizes: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each of some ascending sizes n, and a hash of every n-gram, uint64 (len(tokens) - n + 1,)."""
    hashes, width = (np.asarray(tokens).astype(np.uint64) + np.uint64(1)) * MIX, 1
    hashes = (hashes ^ hashes >> np.uint64(32)) * MIX
    for n in map(int, sizes):
        while 2 * width <= n:  # a polynomial: that of 2w tokens comes from those of its halves
            hashes, width = hashes[:-width] * np.uint64(pow(int(MIX), width, 2**64)) + hashes[width:], 2 * width
        last = hashes[n - width:]
        yield n, hashes[:len(last)] * MIX + last  # two pieces that overlap, or twice the same


def _story_keys(data: Tokens) -> np.ndarray:
    """Return a 64-bit hash of each story's ids, equal in this process for equal ids of any integer type."""
    tokens, bounds = np.asarray(data.tokens), story_bounds(data).tolist()
    return np.array([hash(tokens[begin:end].astype("<u4").tobytes())
                     for begin, end in zip(bounds, bounds[1:], strict=False)], dtype=np.int64)


@dataclass(frozen=True)
class Duplicates:
    """Copies among the stories of token files.

    Attributes:
        counts: one row per kind, part and other part. `other_part` is `part`: copies within it, `copies` = stories
            minus groups; another part: `copies` = stories of `part` that have a copy in `other_part`; "all parts": over
            all together. `stories` of the part; `share` = copies / stories.
        examples: pairs, a few per kind and two parts; the kind is the narrowest that holds. `story_a` and `story_b` are
            indices in the token files, `similarity` is Jaccard's (1 for exact and normalised copies), `group_stories`
            counts the group of this kind, `text_a` and `text_b` are the first 100 characters.
    """

    counts: list[dict]
    examples: list[dict]
    note: str = ""  # what was not searched, and why

    def table(self) -> str:
        """Return the rows of `counts` with copies, and always those about copies in the first part, as text."""
        lines = [f"{'kind':<12}{'stories':>12}{'copies':>12}{'share':>9}  where"]
        first = next(row["part"] for row in self.counts if row["part"] != ALL)
        for row in self.counts:
            part, other = row["part"], row["other_part"]
            where = f"surplus in {part}" if part == other else f"{part} also in {other}"
            if row["copies"] or other == first:
                lines.append(f"{row['kind']:<12}{row['stories']:>12,}{row['copies']:>12,}{row['share']:>9.2%}  {where}")
        return "\n".join(lines + [self.note] * bool(self.note))


def find_duplicates(files: dict[str, TokenFile], out: AnyPath | None = None, threshold: float = 0.8, near: bool = True,
                    examples: int = 20) -> Duplicates:
    """Find copies of stories within token files and across them.

    Memory holds 2.2 kB per story for near copies (rensa's index), else 0.2 kB.

    Args:
        files: by the name of their part, of one tokenizer. Name train first: examples then lead there.
        out: X.csv gets the examples, X.counts.csv the counts.
        threshold: least Jaccard similarity of near copies, 0.7 to 1.
        near: search near copies; without rensa the table says how to install it.
        examples: maximum number per kind and two parts.

    Raises:
        UserError: the threshold is out of range, or the tokenizers differ.
    """
    if not 0.7 <= threshold <= 1:
        raise UserError(f"--threshold {threshold} is too low or too high; expected 0.7 to 1.")
    corpus, note = _Corpus(files), ""
    if near and importlib.util.find_spec("rensa") is None:
        near, note = False, "near copies were not searched: they need pip install 'rensa>=0.5,<0.6'"
    _, first, inverse = np.unique(np.concatenate([_story_keys(data) for data in corpus.files]), return_index=True,
                                  return_inverse=True)
    exact = first[inverse]  # for each story the first one with the same ids
    normalised, joined, similar = _compare_texts(corpus, np.sort(first), threshold if near else None)
    groups = {"exact": exact, "normalised": normalised[exact]}
    if near:
        groups["near"] = joined[groups["normalised"]]
    result = Duplicates(_counts(corpus, groups), _examples(corpus, groups, normalised, similar, examples), note)
    if out is not None:
        import pandas as pd

        out = as_path(out)
        for path, rows, columns in ((out, result.examples, EXAMPLE_COLUMNS),
                                    (out.with_suffix(".counts.csv"), result.counts, None)):
            write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))
    return result


class _Corpus:
    """The stories of several token files of one tokenizer, numbered consecutively."""

    def __init__(self, files: dict[str, TokenFile]):
        if len({data.header["tokenizer"]["sha256"] for data in files.values()}) > 1:
            raise UserError(f"{', '.join(files)} have different tokenizers; expected one. Make them again with "
                            "--tokenizer of the first.")
        self.files, self.parts, sizes = list(files.values()), list(files), [data.n_stories for data in files.values()]
        self.n, self.tokenizer = sum(sizes), self.files[0].tokenizer()
        self.part_of = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)  # of each story, index into `parts`
        self.place = np.concatenate([np.arange(size) for size in sizes])  # of each story in its file
        self.lengths = np.concatenate([np.diff(story_bounds(data)) for data in self.files])

    def texts(self, stories: np.ndarray) -> list[str]:
        """Return the texts of some stories."""
        return self.tokenizer.decode_batch([self.files[self.part_of[i]].story(int(self.place[i])) for i in stories])

    def batches(self, stories: np.ndarray) -> list[np.ndarray]:
        """Cut story numbers into batches of about `BATCH_TOKENS` tokens."""
        return np.split(stories, np.flatnonzero(np.diff(np.cumsum(self.lengths[stories]) // BATCH_TOKENS)) + 1)


def _banding(threshold: float) -> tuple[int, int]:
    """Return (bands, rows): the longest rows with which 98 of 100 pairs at the threshold are proposed."""
    rows = max(r for r in range(1, SIGNATURE + 1) if 1 - (1 - threshold**r) ** (SIGNATURE // r) >= 0.98)
    return SIGNATURE // rows, rows


def _shingles(text: str) -> set[str]:
    """Return every five words in a row of a normalised text; a shorter text is one shingle."""
    words = text.split(" ")
    return {" ".join(words[i:i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def _jaccard(one: set, other: set) -> float:
    """Return the Jaccard similarity of two sets, shared elements over all: {1, 2, 3} and {2, 3, 4} give 0.5."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def _compare_texts(corpus: _Corpus, singles: np.ndarray, threshold: float | None
                   ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, float]]]:
    """Return for each story the first of its normalised and of its near group, and near pairs; read only `singles`."""
    from scipy.cluster.hierarchy import DisjointSet

    normalised, joined, groups = np.arange(corpus.n), np.arange(corpus.n), DisjointSet()
    first_of, similar, indexed = {}, [], []  # indexed: story number of each key of the LSH index
    if threshold:
        from rensa import RMinHash, RMinHashLSH

        bands, rows = _banding(threshold)
        index = RMinHashLSH(threshold, bands * rows, bands)

    @lru_cache(maxsize=4096)
    def set_of(i: int) -> set[str]:
        return _shingles(normalise(*corpus.texts([i])))

    def join(i: int, own: set[str], candidates: list[int]) -> None:
        """Join the group of story `i` with those of the candidates that are similar enough."""
        for j in (indexed[key] for key in nsmallest(MOST_COMPARED, candidates)):
            if j >= i:
                break
            groups.add(i)
            groups.add(j)
            if not groups.connected(i, j) and (similarity := _jaccard(own, set_of(j))) >= threshold:
                groups.merge(i, j)
                similar.append((j, i, similarity))

    with progress(len(singles), "stories", "compare stories") as bar:
        for batch in corpus.batches(singles):
            sets = {}  # by story
            for i, text in zip(batch.tolist(), map(normalise, corpus.texts(batch)), strict=True):
                normalised[i] = first_of.setdefault(hash(text), i)
                if threshold and normalised[i] == i:
                    sets[i] = _shingles(text)
            if sets:
                signatures = RMinHash.from_token_sets(list(sets.values()), bands * rows, SEED)
                index.insert_many(signatures, len(indexed))
                indexed += sets
                for i, signature in zip(sets, signatures, strict=True):
                    join(i, sets[i], index.query(signature))
            bar.update(len(batch))
    for group in groups.subsets():
        joined[list(group)] = min(group)
    return normalised, joined, similar


def _counts(corpus: _Corpus, groups: dict[str, np.ndarray]) -> list[dict]:
    """Return the rows of `Duplicates.counts`."""
    rows = []
    for kind, labels in groups.items():
        present = np.zeros((len(corpus.parts), corpus.n), dtype=bool)  # which parts have a story of a group
        present[corpus.part_of, labels] = True
        found = [(ALL, ALL, corpus.n, corpus.n - present.any(axis=0).sum())] if len(corpus.parts) > 1 else []
        for (p, part), (q, other) in product(enumerate(corpus.parts), repeat=2):
            own = labels[corpus.part_of == p]
            found.append((part, other, len(own), len(own) - present[p].sum() if p == q else present[q][own].sum()))
        rows += [{"kind": kind, "part": part, "other_part": other, "stories": stories, "copies": int(copies),
                  "share": round(int(copies) / stories, 6)} for part, other, stories, copies in found]
    return rows


def _examples(corpus: _Corpus, groups: dict[str, np.ndarray], normalised: np.ndarray,
              similar: list[tuple[int, int, float]], examples: int) -> list[dict]:
    """Return the rows of `Duplicates.examples`: the first story of a group with others of it."""
    equal = ((kind, int(labels[i]), i, 1.0) for kind, labels in (("exact", groups["exact"]), ("normalised", normalised))
             for i in np.flatnonzero(labels != np.arange(corpus.n)).tolist())
    sizes = {kind: np.bincount(labels, minlength=corpus.n) for kind, labels in groups.items()}
    n, rows = Counter(), []
    for kind, a, b, similarity in chain(equal, (("near", *pair) for pair in similar)):
        parts = [corpus.parts[corpus.part_of[i]] for i in (a, b)]
        n[kind, *parts] += 1
        if n[kind, *parts] <= examples:
            text_a, text_b = (" ".join(text.split())[:100] for text in corpus.texts([a, b]))
            rows.append(dict(zip(EXAMPLE_COLUMNS, (
                kind, parts[0], int(corpus.place[a]), parts[1], int(corpus.place[b]), round(similarity, 4),
                int(sizes[kind][groups[kind][a]]), text_a, text_b), strict=True)))
    return rows
