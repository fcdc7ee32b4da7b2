"""Copies among the stories of token files, within a part and across parts (leaks): exact, normalised, near.

Three kinds, each wider than the one before; a kind's groups hold those of the kinds before it:

    exact        the same ids, and so the same text
    normalised   the same text but for case, punctuation and spacing (`plotarmour.data.stories.normalise`)
    near         at least `threshold` of their word 5-grams in common (`plotarmour.data.shingles`), compared exactly:
                 MinHash only proposes pairs. A copy of a copy belongs to the group, so that two members can be less
                 alike than the threshold.

Two tables come of it. Counts are complete, one row per kind, part and other part:

    kind, part, other_part   where other_part is part: copies within it. "all parts": over all together
    stories                  of the part
    copies                   within a part: stories too many (stories minus groups);
                             across: stories of `part` that have a copy in `other_part`
    share                    copies / stories

Examples are pairs, at most `examples` per kind and two parts; the kind is the narrowest that holds:

    kind, part_a, story_a, part_b, story_b   story is the index in the part's token file
    similarity                               Jaccard of the word 5-grams, 1 for exact and normalised copies
    group_stories                            stories of the whole group, of this kind
    text_a, text_b                           the first 100 characters
"""

import array
import csv
import io
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plotarmour.cli import UserError
from plotarmour.data.corpus import Corpus
from plotarmour.data.overlap import story_keys
from plotarmour.data.shingles import (
    HOW_TO_INSTALL,
    band_keys,
    banding,
    can_sign,
    candidate_pairs,
    jaccard,
    shingle_sets,
    shingles,
    signatures,
)
from plotarmour.data.stories import normalise
from plotarmour.data.token_file import TokenFile
from plotarmour.files import write_text

KINDS = ("exact", "normalised", "near")
BATCH_PAIRS = 256  # stories of a batch of pairs are in memory at once, also where they are books
ALL = ("all parts", "all parts")
SHOWN = 100  # characters of an example


@dataclass(frozen=True)
class Duplicates:
    """Copies that were found; the columns of both tables are described in the module.

    Attributes:
        counts: rows, complete.
        examples: rows, a few of each kind.
        near: whether near copies were looked for.
    """

    counts: list[dict]
    examples: list[dict]
    near: bool

    def table(self) -> str:
        """Return the counts for people: where there are copies, and always what stands in the first part (train)."""
        lines = [f"{'kind':<12}{'stories':>12}{'copies':>12}{'share':>9}  where"]
        parts = list(dict.fromkeys(row["part"] for row in self.counts if (row["part"], row["other_part"]) != ALL))
        for row in self.counts:
            in_train = row["other_part"] == parts[0] and (row["part"] != parts[0] or len(parts) == 1)
            if not row["copies"] and not in_train:
                continue
            where = (f"surplus in {row['part']}" if row["part"] == row["other_part"] else
                     f"{row['part']} also in {row['other_part']}")
            lines.append(f"{row['kind']:<12}{row['stories']:>12,}{row['copies']:>12,}{row['share']:>9.2%}  {where}")
        return "\n".join(lines)


def find_duplicates(files: dict[str, TokenFile], out: Path | None = None, threshold: float = 0.8, near: bool = True,
                    examples: int = 20) -> Duplicates:
    """Find copies of stories within token files and across them.

    Holds about 150 bytes per story in memory, and 8 per story and band (25 of them) in temporary files beside `out`:
    2.1 million stories of 820 bytes took 3 minutes on two cores, 390 MiB and 420 MB of disk.

    Args:
        files: by the name of their part, of one tokenizer. Name train first: examples then lead there.
        out: X.csv gets the examples, X.counts.csv the counts.
        threshold: least Jaccard similarity of near copies, 0.7 to 1.
        near: look for near copies; needs the optional library, without which a warning says so.
        examples: at most so many per kind and two parts.

    Raises:
        UserError: another threshold, a negative number of examples, or tokenizers that differ.
    """
    if not 0.7 <= threshold <= 1:
        raise UserError(f"--threshold {threshold} is too low or too high; expected 0.7 to 1.")
    if examples < 0:
        raise UserError(f"--examples {examples} is negative; expected 0 or more.")
    corpus = Corpus(files)
    if near and not can_sign():
        warnings.warn(f"near copies are not looked for: their library is missing. Install it with: {HOW_TO_INSTALL}",
                      stacklevel=2)
        near = False
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    exact = exact_groups(corpus)
    singles = np.flatnonzero(exact == np.arange(corpus.n))
    with tempfile.TemporaryDirectory(dir=None if out is None else out.parent, prefix=".duplicates.") as folder:
        bands, rows = banding(threshold) if near else (0, 0)
        normal, wordless = _normalised_groups(corpus, singles, Path(folder), bands, rows)
        groups = {"exact": exact, "normalised": normal[exact]}
        pairs = {"exact": _pairs(exact), "normalised": _pairs(normal)}
        similar: list[tuple[int, int, float]] = []
        if near:
            # Of normalised copies only the first is compared, of stories without a word none.
            own = np.flatnonzero((normal[singles] == singles) & ~wordless)
            joined = _near_groups(corpus, singles, own, Path(folder), bands, threshold, examples, similar)
            groups["near"] = joined[groups["normalised"]]
    found = Duplicates(_counts(corpus, groups), _examples(corpus, groups, pairs, similar, examples), near)
    if out is not None:
        write_text(out, _to_csv(found.examples, EXAMPLE_COLUMNS))
        write_text(out.with_suffix(".counts.csv"), _to_csv(found.counts, COUNT_COLUMNS))
    return found


EXAMPLE_COLUMNS = ("kind", "part_a", "story_a", "part_b", "story_b", "similarity", "group_stories", "text_a", "text_b")
COUNT_COLUMNS = ("kind", "part", "other_part", "stories", "copies", "share")


def exact_groups(corpus: Corpus) -> np.ndarray:
    """Return for every story the first story with the same ids, int64 (n,)."""
    keys = np.concatenate([story_keys(data) for data in corpus.files])
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    groups, firsts = np.arange(corpus.n), []
    for place in np.flatnonzero(same):
        if place == 0 or not same[place - 1]:
            firsts = [order[place]]  # more than one only where different ids have met in one key
        i = order[place + 1]
        found = next((first for first in firsts if np.array_equal(corpus.ids(first), corpus.ids(i))), None)
        if found is None:
            firsts.append(i)
        else:
            groups[i] = found
    return groups


def _normalised_groups(corpus: Corpus, singles: np.ndarray, folder: Path, bands: int,
                       rows: int) -> tuple[np.ndarray, np.ndarray]:
    """For every story of `singles` the first with the same normal form, and whether it is empty.

    The text is read only here: the band keys of all stories go to files on the way, one for each band.
    """
    keys, wordless = array.array("Q"), bytearray()
    files = [(folder / f"{band}").open("wb") for band in range(bands)]
    try:
        with tqdm(total=len(singles), unit="story", unit_scale=True, desc="read stories", mininterval=0.5) as bar:
            for batch in corpus.batches(singles):
                texts = [normalise(text) for text in corpus.texts(batch)]
                keys.extend(int.from_bytes(sha256(text.encode()).digest()[:8], "little") for text in texts)
                wordless.extend(not text for text in texts)
                if bands:
                    for file, row in zip(files, band_keys(signatures(*shingles(texts)), bands, rows), strict=True):
                        file.write(row.tobytes())
                bar.update(len(batch))
    finally:
        for file in files:
            file.close()
    _, first, inverse = np.unique(np.frombuffer(keys, dtype=np.uint64), return_index=True, return_inverse=True)
    empty = np.frombuffer(wordless, dtype=bool)
    groups = np.arange(corpus.n)
    groups[singles] = np.where(empty, singles, singles[first[inverse]])  # "!!!" and "..." are no copies
    return groups, empty


def _near_groups(corpus: Corpus, singles: np.ndarray, own: np.ndarray, folder: Path, bands: int, threshold: float,
                 examples: int, similar: list[tuple[int, int, float]]) -> np.ndarray:
    """For every story the first of its near group; adds example pairs to `similar`."""
    parents = np.arange(corpus.n)
    kept = Counter()
    for band in tqdm(range(bands), unit="band", desc="compare", mininterval=0.5):
        keys = np.fromfile(folder / f"{band}", dtype=np.uint64)[own]
        for left, right in candidate_pairs(keys):
            left, right = singles[own[left]], singles[own[right]]
            open_ = parents[left] != parents[right]  # pairs of one group already need no look
            left, right = left[open_], right[open_]
            for begin in range(0, len(left), BATCH_PAIRS):
                _join(corpus, parents, left[begin:begin + BATCH_PAIRS], right[begin:begin + BATCH_PAIRS], threshold,
                      examples, kept, similar)
            if len(left):
                while (parents[parents] != parents).any():
                    parents[:] = parents[parents]
    return parents


def _join(corpus: Corpus, parents: np.ndarray, left: np.ndarray, right: np.ndarray, threshold: float, examples: int,
          kept: Counter, similar: list[tuple[int, int, float]]) -> None:
    """Compare pairs exactly, and join the groups of those that are similar enough."""
    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    stories = np.unique(np.append(left, right))
    texts = [normalise(text) for text in corpus.texts(stories)]
    sets = dict(zip(stories.tolist(), shingle_sets(texts), strict=True))
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        similarity = jaccard(sets[a], sets[b])
        if similarity >= threshold:
            first, second = sorted((root(a), root(b)))
            parents[second] = first
            where = (corpus.part_of[a], corpus.part_of[b])
            kept[where] += 1
            if kept[where] <= examples:
                similar.append((a, b, similarity))


def _pairs(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first story of a group with each other one."""
    copies = np.flatnonzero(groups != np.arange(len(groups)))
    return groups[copies], copies


def _counts(corpus: Corpus, groups: dict[str, np.ndarray]) -> list[dict]:
    rows = []

    def row(kind: str, part: str, other: str, stories: int, copies: int) -> None:
        rows.append({"kind": kind, "part": part, "other_part": other, "stories": int(stories), "copies": int(copies),
                     "share": round(int(copies) / int(stories), 6)})

    for kind, labels in groups.items():
        present = np.zeros((len(corpus.parts), corpus.n), dtype=bool)  # which groups have a story in a part
        present[corpus.part_of, labels] = True
        if len(corpus.parts) > 1:
            row(kind, *ALL, corpus.n, corpus.n - present.any(axis=0).sum())
        for p, part in enumerate(corpus.parts):
            row(kind, part, part, corpus.sizes[p], corpus.sizes[p] - present[p].sum())
            for q, other in enumerate(corpus.parts):
                if q != p:
                    row(kind, part, other, corpus.sizes[p], present[q][labels[corpus.part_of == p]].sum())
    return rows


def _examples(corpus: Corpus, groups: dict[str, np.ndarray], pairs: dict[str, tuple[np.ndarray, np.ndarray]],
              similar: list[tuple[int, int, float]], examples: int) -> list[dict]:
    chosen = []
    for kind, (left, right) in pairs.items():
        for p, q in combinations_with_replacement(range(len(corpus.parts)), 2):
            here = np.flatnonzero((corpus.part_of[left] == p) & (corpus.part_of[right] == q))[:examples]
            chosen += [(kind, int(left[i]), int(right[i]), 1.0) for i in here]
    chosen += [("near", *pair) for pair in sorted(similar)]
    sizes = {kind: np.bincount(labels, minlength=corpus.n) for kind, labels in groups.items()}
    rows = []
    for kind, a, b, similarity in chosen:
        (part_a, story_a), (part_b, story_b) = corpus.place(a), corpus.place(b)
        text_a, text_b = (" ".join(text.split())[:SHOWN] for text in corpus.texts(np.array([a, b])))
        values = (kind, corpus.parts[part_a], story_a, corpus.parts[part_b], story_b, round(similarity, 4),
                  int(sizes[kind][groups[kind][a]]), text_a, text_b)
        rows.append(dict(zip(EXAMPLE_COLUMNS, values, strict=True)))
    return rows


def _to_csv(rows: list[dict], columns: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
