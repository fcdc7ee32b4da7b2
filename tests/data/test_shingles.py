import numpy as np
import pytest

from plotarmour.data import shingles as module
from plotarmour.data.shingles import band_keys, banding, candidate_pairs, jaccard, shingle_sets, shingles, signatures


def plain_jaccard(one, other):
    """The definition, with Python's own sets of tuples."""
    a, b = ({tuple(words[i:i + 5]) for i in range(max(1, len(words) - 4))} for words in (one.split(), other.split()))
    return len(a & b) / len(a | b)


def edited(words, random, most=0.15):
    copy = list(words)
    for place in random.integers(0, len(words), max(1, int(len(words) * random.uniform(0, most)))):
        copy[place] = f"new{random.integers(10**6)}"
    return copy


@pytest.fixture(scope="module")
def pairs():
    """Pairs of texts of 40 to 200 words, from nearly equal to little alike."""
    random = np.random.default_rng(5)
    made = [[f"w{i}" for i in random.integers(0, 2000, random.integers(40, 200))] for _ in range(600)]
    return [(" ".join(words), " ".join(edited(words, random))) for words in made]


def test_shingles_are_those_of_the_definition(pairs):
    """Guards: shingles across the edge of a text, a last one that is missing, hashes that mix up the words' order."""
    for one, other in pairs[:60]:
        assert jaccard(*shingle_sets([one, other])) == pytest.approx(plain_jaccard(one, other))
    texts = ["a b c d e f", "f e d c b a", "ab c d e f", "a", "a b", "b a", "a b c d e", "été à la mer bleue"]
    sets = shingle_sets(texts)
    assert list(map(len, sets)) == [2, 2, 1, 1, 1, 1, 1, 1]
    assert len(np.unique(np.concatenate(sets))) == 9  # "a b c d e" is in two of them
    hashes, offsets = shingles(texts)
    assert len(hashes) == 10 and offsets.tolist() == [0, 2, 4, 5, 6, 7, 8, 9, 10]


def test_a_text_is_hashed_alike_wherever_it_stands():
    """Guards: hashes that depend on the neighbours in a batch."""
    alone = shingle_sets(["the cat sat on the mat", "one"])
    among = shingle_sets(["x y", "the cat sat on the mat", "z " * 500 + "z", "one", "q"])
    assert alone[0].tolist() == among[1].tolist() and alone[1].tolist() == among[3].tolist()


def test_signatures_estimate_jaccard_and_bands_find_the_pairs(pairs):
    """Guards: a library whose signatures are biased, or whose bands miss more pairs than stated (0.990 at 0.8)."""
    pytest.importorskip("rensa")
    exact = np.array([plain_jaccard(*pair) for pair in pairs])
    one, other = (signatures(*shingles([pair[side] for pair in pairs])) for side in (0, 1))
    error = (one == other).mean(axis=1) - exact
    assert abs(error.mean()) < 0.005 and np.sqrt((error**2).mean()) < 0.035  # sqrt(s (1 - s) / 200) is at most 0.035
    met = (band_keys(one, 25, 8) == band_keys(other, 25, 8)).any(axis=0)
    assert (exact >= 0.8).sum() > 100 and met[exact >= 0.8].mean() > 0.98
    assert (exact < 0.5).sum() > 50 and met[exact < 0.5].mean() < 0.1
    assert np.array_equal(one, signatures(*shingles([pair[0] for pair in pairs])))  # no random seed of a start


def test_the_bands_are_those_that_the_module_states():
    """Guards: a recall in the documentation that the bands do not have."""
    assert banding(0.8) == (25, 8)
    assert 1 - (1 - 0.8**8) ** 25 == pytest.approx(0.990, abs=5e-4)
    assert 1 - (1 - 0.5**8) ** 25 == pytest.approx(0.093, abs=5e-4)
    for threshold in (0.7, 0.75, 0.9, 1.0):
        bands, rows = banding(threshold)
        assert bands * rows <= module.SIGNATURE and 1 - (1 - threshold**rows) ** bands >= 0.98


def all_pairs(keys):
    return [(int(a), int(b)) for left, right in candidate_pairs(np.array(keys, dtype=np.uint64))
            for a, b in zip(left, right, strict=True)]


def test_texts_of_one_bucket_are_paired_once():
    """Guards: pairs that are missed, named twice, or cross two buckets."""
    assert all_pairs([5, 9, 5, 5]) == [(0, 2), (0, 3), (2, 3)]
    assert all_pairs([]) == all_pairs([1]) == all_pairs([1, 2, 3]) == []
    keys = np.random.default_rng(0).integers(0, 20, 200)
    keys = [k for i, k in enumerate(keys) if list(keys[:i]).count(k) < 8]  # buckets of at most eight
    found = all_pairs(keys)
    expected = {(a, b) for b in range(len(keys)) for a in range(b) if keys[a] == keys[b]}
    assert len(found) == len(set(found)) and set(found) == expected


def test_a_bucket_of_a_hundred_thousand_is_not_paired_with_itself():
    """Guards: quadratic time for a template that fills a corpus."""
    counts = [len(left) for left, _ in candidate_pairs(np.zeros(100_000, dtype=np.uint64))]
    assert counts[0] == 99_999 and sum(counts) < 7 * 100_000
