import csv
import sys

import numpy as np
import pytest

from plotarmour.cli import UserError
from plotarmour.data import duplicates
from plotarmour.data.duplicates import COUNT_COLUMNS, EXAMPLE_COLUMNS, find_duplicates
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import TokenFile

WORDS = np.array([f"word{i}" for i in range(3000)])


def tale(seed, words=60):
    """A tale that is like no other."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture
def make(tmp_path):
    """Make token files of lists of stories."""
    def made(**parts):
        files = {}
        for name, stories in parts.items():
            text = tmp_path / f"{name}.txt"
            text.write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
            files[name] = TokenFile.open(*pre_tokenize([text], "bytes", tmp_path / f"{name}.bin", force=True))
        return files

    return made


def copies(found, kind):
    return {(row["part"], row["other_part"]): row["copies"] for row in found.counts if row["kind"] == kind}


@pytest.fixture
def planted(make):
    """Train and test with one story of each kind of copy within and across, among others."""
    near = [tale(i).replace(tale(i).split()[30], "changed") for i in range(10)]
    assert all(a != tale(i) for i, a in enumerate(near))
    train = [*map(tale, range(10)), tale(0), tale(0), tale(1).upper() + "!", near[2], "Hi!", "!!!", "one two"]
    test = [tale(100), tale(3), tale(4) + ".", near[5], "Hi", "???", "one  three", tale(101)]
    return make(train=train, test=test)


def test_planted_copies_are_counted_by_kind_within_and_across(planted, tmp_path):
    """Guards: copies missed or counted twice; short stories and such without a word taken for copies."""
    pytest.importorskip("rensa")
    found = find_duplicates(planted, tmp_path / "out" / "d.csv")
    every = [("all parts", "all parts"), ("train", "train"), ("train", "test"), ("test", "test"), ("test", "train")]
    assert copies(found, "exact") == dict(zip(every, (3, 2, 1, 0, 1), strict=True))
    assert copies(found, "normalised") == dict(zip(every, (6, 3, 3, 0, 3), strict=True))
    assert copies(found, "near") == dict(zip(every, (8, 4, 4, 0, 4), strict=True))
    kinds = [(row["kind"], row["part_a"], row["story_a"], row["part_b"], row["story_b"]) for row in found.examples]
    assert kinds == [("exact", "train", 0, "train", 10), ("exact", "train", 0, "train", 11),
                     ("exact", "train", 3, "test", 1), ("normalised", "train", 1, "train", 12),
                     ("normalised", "train", 4, "test", 2), ("normalised", "train", 14, "test", 4),
                     ("near", "train", 2, "train", 13), ("near", "train", 5, "test", 3)]
    assert [row["group_stories"] for row in found.examples[:3]] == [3, 3, 2]
    # One of 60 words is another: 56 shingles of each, 5 of them differ, so 51 of 61 are shared.
    assert {row["similarity"] for row in found.examples[6:]} == {round(51 / 61, 4)}


def test_tables_are_written_whole_and_nothing_else_stays(planted, tmp_path):
    """Guards: temporary files left beside the tables; columns that drift from their description."""
    pytest.importorskip("rensa")
    out = tmp_path / "out" / "d.csv"
    found = find_duplicates(planted, out, examples=1)
    assert sorted(path.name for path in out.parent.iterdir()) == ["d.counts.csv", "d.csv"]
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == EXAMPLE_COLUMNS and len(rows) == len(found.examples)
    assert max(sum(r["kind"] == "exact" and r["part_b"] == part for r in rows) for part in ("train", "test")) == 1
    with out.with_suffix(".counts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COUNT_COLUMNS and [int(row["copies"]) for row in rows][:3] == [3, 2, 1]
    assert "test also in train" in found.table()


def test_the_result_is_the_same_at_every_start(planted):
    """Guards: Python's random string hashes, or a random seed, in the signatures."""
    pytest.importorskip("rensa")
    assert find_duplicates(planted) == find_duplicates(planted)


def test_without_the_library_exact_and_normalised_copies_are_still_found(planted, monkeypatch):
    """Guards: an optional library that the rest depends on."""
    monkeypatch.setitem(sys.modules, "rensa", None)  # importing it fails
    with pytest.warns(UserWarning, match="Install it with: pip install 'rensa"):
        found = find_duplicates(planted)
    assert not found.near and {row["kind"] for row in found.counts} == {"exact", "normalised"}
    assert copies(found, "normalised")["test", "train"] == 3


def test_stories_below_the_threshold_are_not_reported(make):
    """Guards: candidates of the signatures reported without being compared."""
    pytest.importorskip("rensa")
    stories = [tale(i) for i in range(200)]
    # Every twentieth word is another: pairs share 41 of 71 shingles, and every fourth pair meets in a band.
    others = [" ".join(f"{w}x" if n % 20 == i % 10 + 5 else w for n, w in enumerate(s.split()))
              for i, s in enumerate(stories)]
    assert copies(find_duplicates(make(train=stories, test=others)), "near")["test", "train"] == 0


def test_many_copies_of_one_story_and_of_one_template_take_linear_time(make, monkeypatch):
    """Guards: all pairs of a group: 12,000 stories have 72 million."""
    pytest.importorskip("rensa")
    compared, read, jaccard, shingle_sets = [], [], duplicates.jaccard, duplicates.shingle_sets
    monkeypatch.setattr(duplicates, "jaccard", lambda a, b: compared.append(1) or jaccard(a, b))
    monkeypatch.setattr(duplicates, "shingle_sets", lambda texts: read.extend(texts) or shingle_sets(texts))
    template = tale(0, 100)
    files = make(train=["The end."] * 10_000 + [f"{template} {i}" for i in range(2_000)])
    found = find_duplicates(files)
    assert copies(found, "exact") == {("train", "train"): 9_999}
    assert copies(found, "near") == {("train", "train"): 9_999 + 1_999}
    assert len(compared) < 2 * 2_000 and len(read) < 2 * 2_000


def test_different_stories_with_one_key_are_no_copies(make, monkeypatch):
    """Guards: two hashes that meet, reported as a copy; a copy hidden behind such a story."""
    files = make(train=["a", "b", "a", "c", "b"])
    monkeypatch.setattr(duplicates, "story_keys", lambda data: np.zeros(data.n_stories, dtype=np.uint64))
    assert duplicates.exact_groups(duplicates.Corpus(files)).tolist() == [0, 1, 0, 3, 1]


def test_the_known_copies_of_real_texts_are_found(shared, tmp_path):
    """Guards: a test set that was trained on. Two TinyStories files share eight stories."""
    folder = shared / "data" / "tinystories"
    files = {name: TokenFile.open(*pre_tokenize([folder / f"stories_{name}.txt"], "bytes", tmp_path / f"{name}.bin"))
             for name in "ab"}
    found = find_duplicates(files, near=False)
    assert copies(found, "normalised") == {("all parts", "all parts"): 8, ("a", "a"): 0, ("a", "b"): 8, ("b", "b"): 0,
                                           ("b", "a"): 8}
    assert sum(row["part_a"] == "a" and row["part_b"] == "b" for row in found.examples) == 8


def test_wrong_thresholds_and_mixed_tokenizers_are_refused(make, tmp_path):
    """Guards: a threshold at which the bands find next to nothing; ids of two vocabularies compared."""
    files = make(train=["a story", "another story of more words"])
    with pytest.raises(UserError, match="expected 0.7 to 1"):
        find_duplicates(files, threshold=0.3)
    with pytest.raises(UserError, match="expected 0 or more"):
        find_duplicates(files, examples=-1)
    [other] = pre_tokenize([tmp_path / "train.txt"], "bpe:258", tmp_path / "other.bin")
    with pytest.raises(UserError, match="different tokenizers"):
        find_duplicates(files | {"other": TokenFile.open(other)})
