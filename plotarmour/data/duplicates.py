"""Copies among the stories of token files: exact, normalised and near; within a part and across parts (leaks).

A validation set that was trained on measures memory, not skill. Each kind includes the one before:

    exact        the same ids, and so the same text
    normalised   the same text except for case, punctuation and spacing (`plotarmour.data.stories.normalise`)
    near         Jaccard similarity of the word 5-grams (shared ones over all of both) of at least `threshold`

Exact and normalised copies are found by 64-bit BLAKE2b keys: of two million stories, two different ones share a key in
one of ten million token files. Near copies: MinHash signatures (the library rensa) in bands of an LSH index propose
pairs, and these are compared exactly. With b bands of r numbers a pair of similarity s is proposed with probability

    1 - (1 - s**r)**b        at s = 0.8 with 25 bands of 8:  0.990;  at 0.9:  1.000;  at 0.5:  0.093

A copy of a copy belongs to the group, so two members can be less similar than the threshold. In languages without
spaces a "word" is a clause: near copies are found only where whole clauses are equal.

Source: Broder (1997), On the resemblance and containment of documents; Leskovec, Rajaraman, Ullman, Mining of Massive
Datasets, chapter 3; word 5-grams and 0.8 as in Lee et al. (2022), arXiv 2107.06499.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from heapq import nsmallest
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError, progress
from plotarmour.data.stories import normalise
from plotarmour.data.token_file import TokenFile
from plotarmour.files import write_text

WORDS = 5
SIGNATURE = 200  # numbers of a MinHash signature, at most
SEED = 42
BATCH_TOKENS = 2**19  # about as many are decoded at a time
MOST_COMPARED = 50  # candidates per story: no quadratic cost where many stories follow one template
ALL = "all parts"
EXAMPLE_COLUMNS = ("kind", "part_a", "story_a", "part_b", "story_b", "similarity", "group_stories", "text_a", "text_b")


@dataclass(frozen=True)
class Overlap:
    """How many stories of one token file another holds with the same ids; the first one's index in both, or None."""

    n_stories: int
    first: int | None
    first_in_other: int | None


def overlapping_stories(train: object, val: object) -> Overlap:
    """Count the stories of `val` that `train` holds with the same ids.

    Args:
        train, val: `TokenFile` or `TokensInMemory`, of one tokenizer. Each is read once; 8 bytes per story are held.

    Example:
        train has the stories 5 6 7 and 8 9, val has 8 9 and 5 6: one story of val, its story 0, train's story 1.
    """
    train_keys, val_keys = story_keys(train), story_keys(val)
    shared = np.flatnonzero(np.isin(val_keys, train_keys))
    if not len(shared):
        return Overlap(0, None, None)
    return Overlap(len(shared), int(shared[0]), int(np.flatnonzero(train_keys == val_keys[shared[0]])[0]))


def disjoint_by_construction(one: dict, other: dict) -> bool:
    """Return whether two headers name different parts of one split of the same text: a story is in one part only."""
    def origin(header: dict) -> tuple:
        return ([source["sha256"] for source in header["source"]], header.get("split"), header.get("stories"),
                header["tokenizer"]["sha256"])

    parts = (one.get("part"), other.get("part"))
    return bool(one.get("split")) and origin(one) == origin(other) and None not in parts and parts[0] != parts[1]


def story_keys(data: object) -> np.ndarray:
    """Return a 64-bit key of each story's ids.

    Args:
        data: `TokenFile` or `TokensInMemory`; ids of any integer type.

    Returns:
        uint64 (n_stories,): equal for equal ids.
    """
    tokens, bounds = np.asarray(data.tokens), np.append(data.offsets, data.n_tokens).astype(np.int64).tolist()
    return np.array([_key(tokens[begin:end].astype("<u4")) for begin, end in zip(bounds, bounds[1:], strict=False)],
                    dtype=np.uint64)


def _key(content: bytes | np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


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
        near: whether near copies were searched.
    """

    counts: list[dict]
    examples: list[dict]
    near: bool

    def table(self) -> str:
        """Return the rows of `counts` with copies, and always those about copies in the first part, as text."""
        lines = [f"{'kind':<12}{'stories':>12}{'copies':>12}{'share':>9}  where"]
        first = next(row["part"] for row in self.counts if row["part"] != ALL)
        for row in self.counts:
            part, other = row["part"], row["other_part"]
            where = f"surplus in {part}" if part == other else f"{part} also in {other}"
            if row["copies"] or other == first:
                lines.append(f"{row['kind']:<12}{row['stories']:>12,}{row['copies']:>12,}{row['share']:>9.2%}  {where}")
        return "\n".join(lines)


def find_duplicates(files: dict[str, TokenFile], out: Path | None = None, threshold: float = 0.8, near: bool = True,
                    examples: int = 20) -> Duplicates:
    """Find copies of stories within token files and across them.

    Memory holds 2.2 kB per story for near copies (rensa's index), else 0.2 kB.

    Args:
        files: by the name of their part, of one tokenizer. Name train first: examples then lead there.
        out: X.csv gets the examples, X.counts.csv the counts.
        threshold: least Jaccard similarity of near copies, 0.7 to 1.
        near: search near copies; without rensa a warning says how to install it.
        examples: maximum number per kind and two parts.

    Raises:
        UserError: the threshold is out of range, or the tokenizers differ.
    """
    if not 0.7 <= threshold <= 1:
        raise UserError(f"--threshold {threshold} is too low or too high; expected 0.7 to 1.")
    corpus = Corpus(files)
    if near:
        try:
            import rensa  # noqa: F401
        except ImportError:
            warnings.warn("near copies are not searched: rensa is not installed. Install it with: pip install "
                          "'rensa>=0.5,<0.6'", stacklevel=2)
            near = False
    _, first, inverse = np.unique(np.concatenate([story_keys(data) for data in corpus.files]), return_index=True,
                                  return_inverse=True)
    exact = first[inverse]  # for each story the first one with the same ids
    normalised, joined, similar = _compare_texts(corpus, np.sort(first), threshold if near else None, examples)
    groups = {"exact": exact, "normalised": normalised[exact]}
    if near:
        groups["near"] = joined[groups["normalised"]]
    result = Duplicates(_counts(corpus, groups), _examples(corpus, groups, normalised, similar, examples), near)
    if out is not None:
        import pandas as pd

        for path, rows, columns in ((out, result.examples, EXAMPLE_COLUMNS),
                                    (out.with_suffix(".counts.csv"), result.counts, None)):
            write_text(path, pd.DataFrame(rows, columns=columns).to_csv(index=False, lineterminator="\n"))
    return result


class Corpus:
    """The stories of several token files, numbered consecutively.

    Attributes:
        n: number of stories.
        files, parts: token files and their names.
        sizes: stories of each file.
        part_of: int16 (n,), index into `parts`.
        place: int64 (n,), index of the story in its file.

    Raises:
        UserError: the files have different tokenizers.
    """

    def __init__(self, files: dict[str, TokenFile]):
        if len({data.header["tokenizer"]["sha256"] for data in files.values()}) > 1:
            raise UserError(f"{', '.join(files)} have different tokenizers; expected one. Make them again with "
                            "--tokenizer of the first.")
        self.files, self.parts = list(files.values()), list(files)
        self.sizes = np.array([data.n_stories for data in self.files])
        self.n = int(self.sizes.sum())
        self.part_of = np.repeat(np.arange(len(self.files), dtype=np.int16), self.sizes)
        self.place = np.concatenate([np.arange(size) for size in self.sizes])
        self.tokenizer = self.files[0].tokenizer()
        self.lengths = np.concatenate([np.diff(data.offsets.astype(np.int64), append=data.n_tokens)
                                       for data in self.files])

    def texts(self, stories: np.ndarray) -> list[str]:
        """Return the texts of some stories."""
        return self.tokenizer.decode_batch([self.files[self.part_of[i]].story(int(self.place[i])) for i in stories])

    def batches(self, stories: np.ndarray) -> Iterator[np.ndarray]:
        """Cut story numbers into batches of about `BATCH_TOKENS` tokens."""
        yield from np.split(stories, np.flatnonzero(np.diff(np.cumsum(self.lengths[stories]) // BATCH_TOKENS)) + 1)


def banding(threshold: float) -> tuple[int, int]:
    """Return (bands, rows): the longest rows with which 98 of 100 pairs at the threshold are proposed.

    Example:
        >>> banding(0.8)
        (25, 8)
    """
    rows = max(r for r in range(1, SIGNATURE + 1) if 1 - (1 - threshold**r) ** (SIGNATURE // r) >= 0.98)
    return SIGNATURE // rows, rows


def shingles(text: str) -> set[str]:
    """Return every five words in a row of a normalised text; a shorter text is one shingle."""
    words = text.split(" ")
    return {" ".join(words[i:i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def jaccard(one: set, other: set) -> float:
    """Return the Jaccard similarity of two sets, shared elements over all: {1, 2, 3} and {2, 3, 4} give 0.5."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def _compare_texts(corpus: Corpus, singles: np.ndarray, threshold: float | None, examples: int
                   ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, float]]]:
    """Read each text once and find its normalised group, its near group, and examples of near copies.

    Args:
        singles: numbers of the stories to read, ascending: the first one of each exact group.
        threshold: least similarity of near copies; None searches none.

    Returns:
        For each story the number of the first story of its normalised and of its near group (int64 (n,) each; itself if
        it has no copy or is not in `singles`), and (story, story, similarity).
    """
    normalised, parents = np.arange(corpus.n), np.arange(corpus.n)
    first_of: dict[int, int] = {}
    similar, n_similar, indexed = [], Counter(), []  # indexed: story number of each key of the LSH index
    if threshold:
        from rensa import RMinHash, RMinHashLSH

        bands, rows = banding(threshold)
        index = RMinHashLSH(threshold, bands * rows, bands)

    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i] = parents[parents[i]]
        return i

    @lru_cache(maxsize=4096)
    def set_of(i: int) -> set[str]:
        return shingles(normalise(*corpus.texts([i])))

    def join(i: int, own: set[str], candidates: list[int]) -> None:
        """Join the group of story `i` with those of the candidates that are similar enough."""
        for j in (indexed[key] for key in nsmallest(MOST_COMPARED, candidates)):
            if j >= i:
                break
            if root(i) == root(j) or (similarity := jaccard(own, set_of(j))) < threshold:
                continue
            low, high = sorted((root(i), root(j)))
            parents[high] = low
            where = (corpus.part_of[j], corpus.part_of[i])
            n_similar[where] += 1
            if n_similar[where] <= examples:
                similar.append((j, i, similarity))

    with progress(len(singles), "stories", "compare stories") as bar:
        for batch in corpus.batches(singles):
            new, sets = [], []
            for i, text in zip(batch.tolist(), map(normalise, corpus.texts(batch)), strict=True):
                if not text:  # "!!!" and "..." are no copies
                    continue
                normalised[i] = first_of.setdefault(_key(text.encode()), i)
                if threshold and normalised[i] == i:
                    new.append(i)
                    sets.append(shingles(text))
            if new:
                signatures = RMinHash.from_token_sets(sets, bands * rows, SEED)
                index.insert_many(signatures, len(indexed))
                indexed += new
                for i, own, signature in zip(new, sets, signatures, strict=True):
                    join(i, own, index.query(signature))
            bar.update(len(batch))
    return normalised, np.array([root(i) for i in range(corpus.n)]) if threshold else parents, sorted(similar)


def _counts(corpus: Corpus, groups: dict[str, np.ndarray]) -> list[dict]:
    """Return the rows of `Duplicates.counts`."""
    rows = []

    def add(kind: str, part: str, other: str, stories: int, copies: int) -> None:
        rows.append({"kind": kind, "part": part, "other_part": other, "stories": int(stories), "copies": int(copies),
                     "share": round(int(copies) / int(stories), 6)})

    for kind, labels in groups.items():
        present = np.zeros((len(corpus.parts), corpus.n), dtype=bool)  # which parts have a story of a group
        present[corpus.part_of, labels] = True
        if len(corpus.parts) > 1:
            add(kind, ALL, ALL, corpus.n, corpus.n - present.any(axis=0).sum())
        for p, part in enumerate(corpus.parts):
            add(kind, part, part, corpus.sizes[p], corpus.sizes[p] - present[p].sum())
            for q, other in enumerate(corpus.parts):
                if q != p:
                    add(kind, part, other, corpus.sizes[p], present[q][labels[corpus.part_of == p]].sum())
    return rows


def _examples(corpus: Corpus, groups: dict[str, np.ndarray], normalised: np.ndarray,
              similar: list[tuple[int, int, float]], examples: int) -> list[dict]:
    """Return the rows of `Duplicates.examples`: the first story of a group with others of it."""
    pairs = []
    for kind, labels in (("exact", groups["exact"]), ("normalised", normalised)):
        copies = np.flatnonzero(labels != np.arange(corpus.n))
        for p, q in combinations_with_replacement(range(len(corpus.parts)), 2):
            here = copies[(corpus.part_of[labels[copies]] == p) & (corpus.part_of[copies] == q)][:examples]
            pairs += [(kind, int(labels[i]), int(i), 1.0) for i in here]
    pairs += [("near", *pair) for pair in similar]
    sizes = {kind: np.bincount(labels, minlength=corpus.n) for kind, labels in groups.items()}
    rows = []
    for kind, a, b, similarity in pairs:
        text_a, text_b = (" ".join(text.split())[:100] for text in corpus.texts([a, b]))
        values = (kind, corpus.parts[corpus.part_of[a]], int(corpus.place[a]), corpus.parts[corpus.part_of[b]],
                  int(corpus.place[b]), round(similarity, 4), int(sizes[kind][groups[kind][a]]), text_a, text_b)
        rows.append(dict(zip(EXAMPLE_COLUMNS, values, strict=True)))
    return rows
