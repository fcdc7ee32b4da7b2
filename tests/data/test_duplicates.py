import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from in_memory import data

from plotarmour.cli import UserError
from plotarmour.data import duplicates
from plotarmour.data.duplicates import (
    EXAMPLE_COLUMNS,
    SEED,
    _banding,
    _jaccard,
    _shingles,
    _story_keys,
    find_duplicates,
    overlapping_stories,
)
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.stories import normalise
from plotarmour.data.token_file import TokenFile

WORDS = np.array(["word" + "".join(chr(ord("a") + int(digit)) for digit in str(i)) for i in range(3000)])


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
    assert [int(row["copies"]) for row in rows][:3] == [3, 2, 1]
    assert "test also in train" in found.table()


def test_the_result_is_the_same_at_every_start(planted):
    """Guards: Python's random string hashes, or a random seed, in the signatures."""
    pytest.importorskip("rensa")
    assert find_duplicates(planted) == find_duplicates(planted)


def test_without_the_library_exact_and_normalised_copies_are_still_found(planted, monkeypatch):
    """Guards: an optional library that the rest depends on; a red warning in a notebook that is right."""
    monkeypatch.setitem(sys.modules, "rensa", None)  # importing it fails
    found = find_duplicates(planted)
    assert found.table().splitlines()[-1].startswith("near copies were not searched: they need pip install 'rensa")
    assert {row["kind"] for row in found.counts} == {"exact", "normalised"}
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
    compared, plain = [], duplicates._jaccard
    monkeypatch.setattr(duplicates, "_jaccard", lambda a, b: compared.append(1) or plain(a, b))
    template = tale(0, 100)
    files = make(train=["The end."] * 10_000 + [f"{template} {i}" for i in range(2_000)])
    found = find_duplicates(files)
    assert copies(found, "exact") == {("train", "train"): 9_999}
    assert copies(found, "near") == {("train", "train"): 9_999 + 1_999}
    assert len(compared) < 2 * 2_000


def test_a_copy_of_a_copy_belongs_to_the_group(make):
    """Guards: a near copy that is missed because it is like a copy, and not like the first story of the group."""
    pytest.importorskip("rensa")
    words = tale(0, 200).split()
    chain = [" ".join(f"new{i}" if k < 12 * step else word for k, (i, word) in enumerate(enumerate(words)))
             for step in range(4)]
    assert _jaccard(_shingles(chain[0]), _shingles(chain[1])) > 0.85 > 0.75 > _jaccard(
        _shingles(chain[0]), _shingles(chain[3]))
    assert copies(find_duplicates(make(train=chain[::-1])), "near") == {("train", "train"): 3}


def test_the_known_copies_of_real_texts_are_found(shared, tmp_path):
    """Guards: a test set that was trained on. Two TinyStories files share eight stories."""
    folder = shared / "data" / "tinystories"
    files = {name: TokenFile.open(*pre_tokenize([folder / f"stories_{name}.txt"], "bytes", tmp_path / f"{name}.bin"))
             for name in "ab"}
    found = find_duplicates(files, near=False)
    assert copies(found, "normalised") == {("all parts", "all parts"): 8, ("a", "a"): 0, ("a", "b"): 8, ("b", "b"): 0,
                                           ("b", "a"): 8}
    assert sum(row["part_a"] == "a" and row["part_b"] == "b" for row in found.examples) == 8


def test_a_table_has_a_path_that_is_text(make, tmp_path):
    """Guards: AttributeError for a path that is text."""
    find_duplicates(make(train=["a story"]), str(tmp_path / "copies.csv"), near=False)
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["copies.counts.csv", "copies.csv"]


def test_wrong_thresholds_and_mixed_tokenizers_are_refused(make, tmp_path):
    """Guards: a threshold at which the bands propose next to nothing; ids of two vocabularies compared."""
    files = make(train=["a story", "another story of more words"])
    with pytest.raises(UserError, match="expected 0.7 to 1"):
        find_duplicates(files, threshold=0.3)
    [other] = pre_tokenize([tmp_path / "train.txt"], "bpe:258", tmp_path / "other.bin")
    with pytest.raises(UserError, match="different tokenizers"):
        find_duplicates(files | {"other": TokenFile.open(other)})


@pytest.fixture(scope="module")
def pairs():
    """Pairs of texts of 40 to 200 words, from nearly equal to little alike."""
    random, made = np.random.default_rng(5), []
    for _ in range(600):
        words = [f"w{i}" for i in random.integers(0, 2000, random.integers(40, 200))]
        copy = list(words)
        for place in random.integers(0, len(words), max(1, int(len(words) * random.uniform(0, 0.15)))):
            copy[place] = f"new{random.integers(10**6)}"
        made.append((" ".join(words), " ".join(copy)))
    return made


def test_shingles_are_every_five_words_in_a_row():
    """Guards: a last shingle that is missing; short texts without one."""
    assert _shingles("a b c d e f") == {"a b c d e", "b c d e f"}
    assert _shingles("a b c d e") == {"a b c d e"} and _shingles("a b") == {"a b"}
    assert _jaccard({1, 2, 3}, {2, 3, 4}) == 0.5


def test_the_bands_propose_the_share_of_pairs_that_the_module_states(pairs):
    """Guards: a library whose signatures are biased, or whose index misses more pairs than stated (0.990 at 0.8)."""
    rensa = pytest.importorskip("rensa")
    assert _banding(0.8) == (25, 8) and 1 - (1 - 0.8**8) ** 25 == pytest.approx(0.990, abs=5e-4)
    assert 1 - (1 - 0.5**8) ** 25 == pytest.approx(0.093, abs=5e-4)
    for threshold in (0.7, 0.75, 0.9, 1.0):
        bands, rows = _banding(threshold)
        assert bands * rows <= duplicates.SIGNATURE and 1 - (1 - threshold**rows) ** bands >= 0.98
    exact = np.array([_jaccard(_shingles(a), _shingles(b)) for a, b in pairs])
    one, other = (rensa.RMinHash.from_token_sets([_shingles(pair[side]) for pair in pairs], 200, SEED)
                  for side in (0, 1))
    error = np.array([a.jaccard(b) for a, b in zip(one, other, strict=True)]) - exact
    assert abs(error.mean()) < 0.005 and np.sqrt((error**2).mean()) < 0.035  # sqrt(s (1 - s) / 200) is at most 0.035
    index = rensa.RMinHashLSH(0.8, 200, 25)
    index.insert_many(one)
    met = np.array([i in found for i, found in enumerate(index.query_all(other))])
    assert (exact >= 0.8).sum() > 80 and met[exact >= 0.8].mean() > 0.98
    assert (exact < 0.5).sum() > 50 and met[exact < 0.5].mean() < 0.1


def test_near_copies_are_those_that_comparing_all_pairs_finds(pairs, make):
    """Guards: an index that is asked for the wrong stories; a batch whose stories never meet."""
    pytest.importorskip("rensa")
    texts = [text for pair in pairs for text in pair]
    sets = [_shingles(normalise(text)) for text in texts]
    exact = sum(_jaccard(sets[i], sets[i + 1]) >= 0.8 for i in range(0, len(sets), 2))
    [found] = copies(find_duplicates(make(train=texts)), "near").values()
    assert 0.97 * exact <= found <= exact and exact > 80


def test_a_shared_story_is_found_and_a_beginning_is_not():
    """Guards: an overlap by chance of prefixes, or one that is missed. The docstring's integers."""
    train = data([5, 6, 7], [8, 9])
    assert overlapping_stories(train, data([8, 9], [5, 6])).tolist() == [[0, 1]]
    assert overlapping_stories(train, data([6, 5, 7], [5, 6, 7], [1], [5, 6, 7])).tolist() == [[1, 0], [3, 0]]
    assert overlapping_stories(train, data([6, 5, 7], [5, 6])).tolist() == []
    assert overlapping_stories(data([1], [1], [8, 9]), data([8, 9])).tolist() == [[0, 2]]


def test_stories_that_may_differ_in_unknown_words_are_not_the_same():
    """Guards: training refused because two verses name different people, both unknown. Id 0 stands for them."""
    val = data([0, 4], [5, 4], end=2)
    val.tokenizer = lambda: SimpleNamespace(drops_unknown=True, unknown_id=0)
    assert overlapping_stories(val, val).tolist() == [[1, 1]]


def test_the_overlap_is_that_of_comparing_all_stories_for_any_integer_type():
    """Guards: a text tokenized in memory (uint32) that is compared with a token file (uint16) and never overlaps."""
    random = np.random.default_rng(0)
    stories = [random.integers(1, 3, random.integers(1, 12)).tolist() for _ in range(300)]
    train, val = data(*stories[:200]), data(*stories[200:], dtype=np.uint32)
    known = {tuple(ids) for ids in stories[:200]}
    assert len(set(_story_keys(train).tolist())) == len(known)
    assert len(overlapping_stories(train, val)) == sum(tuple(ids) in known for ids in stories[200:]) > 0


def test_a_story_with_half_of_its_tokens_in_one_training_story_overlaps(monkeypatch):
    """Guards: test stories that differ from training stories in one token, and count as held out.

    Of a story of 40 tokens, a piece of 20 counts, and one of 19 does not; nor do two pieces of 19, or pieces of two
    training stories.
    """
    monkeypatch.setattr(duplicates, "BLOCK", 50)  # pieces that begin in one block and end in the next
    ids = np.arange(1000, 3000).reshape(50, 40)
    train = data(*ids[:40])
    changed, twice = ids[7].copy(), ids[8].copy()
    changed[20], twice[[19, 20]] = 5, (5, 6)
    halves = np.concatenate([ids[11, :19], [5, 6], ids[12, :19]])
    found = duplicates.long_overlaps(train, data(changed, ids[45], twice, halves, ids[20, :13], ids[20, :12]))
    assert found.tolist() == [0, 4]
    assert duplicates.long_overlaps(train, data(changed, dtype=np.uint32)).tolist() == [0]
    assert duplicates.long_overlaps(data(ids[0, :3]), data(ids[0])).tolist() == []


def test_long_overlaps_are_those_of_comparing_all_pieces():
    """Guards: a hash that two n-grams share, or that depends on where a piece begins."""
    random = np.random.default_rng(0)
    pieces = random.integers(1, 6, (30, 11))
    stories = [np.concatenate(pieces[random.integers(0, 30, random.integers(1, 8))])[random.integers(0, 5):]
               for _ in range(300)]
    text = [" ".join(map(str, story)) + " " for story in stories]

    def overlaps(story):
        n = max(13, len(story) // 2)
        n -= n % 2 ** max(0, n.bit_length() - 4)
        parts = ["".join(f"{i} " for i in story[k:k + n]) for k in range(len(story) - n + 1)]
        return any(part in other for part in parts for other in text[:200])

    expected = [i for i, story in enumerate(stories[200:]) if overlaps(story)]
    assert 10 < len(expected) < 90
    assert duplicates.long_overlaps(data(*stories[:200]), data(*stories[200:])).tolist() == expected
