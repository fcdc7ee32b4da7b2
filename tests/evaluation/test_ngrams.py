import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from in_memory import data, draw_stories

from plotarmour.evaluation.ngrams import count_floors, evaluate_floors
from plotarmour.evaluation.scoring import STORY_COLUMNS
from plotarmour.evaluation.tally import Tally


def one(p, *ids):
    """P of one token, given histories and token."""
    return float(p(*(np.array([i]) for i in ids))[0])


def some_text(seed, vocab_size=50):
    """40 stories in which pairs and triples come again."""
    rng = np.random.default_rng(seed)
    return data(*(np.minimum(rng.geometric(0.2, n), vocab_size - 2).tolist() for n in rng.integers(1, 60, 40)),
                vocab_size=vocab_size)


def test_unigrams_and_bigrams_by_hand():
    """Guards: floors that are no probabilities, or counted across story borders the wrong way.

    Train on one story "1 2 1", vocabulary 0..3, 0 ends: tokens 1 2 1 0, N = 4, three types. Unigram of 1:
    (2 + 3/4) / (4 + 3). Bigrams 0→1, 1→2, 2→1, 1→0: P(2|1) = (1 + 2·P(2)) / (2 + 2), P(2) = (1 + 3/4) / 7 = 1/4.
    """
    floors = count_floors(data([1, 2, 1], vocab_size=4))
    assert floors.unigram.tolist() == pytest.approx([0.25, 2.75 / 7, 0.25, 0.75 / 7])
    assert one(floors.bigram, 1, 2) == pytest.approx((1 + 2 * 0.25) / 4)
    assert one(floors.bigram, 3, 2) == pytest.approx(0.25)  # history never seen


def test_trigrams_by_hand():
    """Guards: the last token of one story as history of the next, another start in scoring than in counting.

    Train on "1 2" and "1 3", 0 ends: tokens 1 2 0 1 3 0; P(0) = P(1) = (2 + 4/4) / (6 + 4), P(2) = P(3) = 0.2.
    After (0, 0) twice 1: (2 + 1·P(1|0)) / 3 with P(1|0) = (2 + 1·0.3) / 3. After (0, 1) 2 or 3: P(2|0,1) =
    (1 + 2·0.35) / 4 with P(2|1) = (1 + 2·0.2) / 4 = 0.35. After (1, 2) 0: (1 + 1·0.65) / 2. Never seen: (2, 0), and
    (3, 3), for which stands P(0|3) = (1 + 1·0.3) / 2.
    """
    train = data([1, 2], [1, 3], vocab_size=4)
    floors = count_floors(train)
    assert floors.trigrams.histories.tolist() == [0, 1, 4 + 2, 4 + 3]
    assert one(floors.trigram, 0, 0, 1) == pytest.approx((2 + 2.3 / 3) / 3)
    assert one(floors.trigram, 0, 1, 2) == pytest.approx(0.425)
    assert one(floors.trigram, 2, 0, 1) == pytest.approx(2.3 / 3)
    assert one(floors.trigram, 3, 3, 0) == pytest.approx(0.65)
    found = floors.story_nats(data([3], [1, 2], vocab_size=4))["trigram"]
    assert found[1] == pytest.approx(-math.log((2 + 2.3 / 3) / 3 * 0.425 * 0.825))


def test_every_floor_sums_to_one_and_is_never_zero():
    """Guards: probability that is lost where histories were seen seldom, or never; infinite nats on another text."""
    floors = count_floors(some_text(1))
    words = np.arange(50)
    assert floors.unigram.sum() == pytest.approx(1) and floors.unigram.min() > 0
    for history in range(50):
        of_history = floors.bigram(np.full(50, history), words)
        assert of_history.sum() == pytest.approx(1) and of_history.min() > 0
        for before in (0, 1, 2, 7, 48, 49):  # 49 never comes
            p = floors.trigram(np.full(50, before), np.full(50, history), words)
            assert p.sum() == pytest.approx(1) and p.min() > 0
    for nats in floors.story_nats(data(*draw_stories(200, 1, 30))).values():
        assert np.isfinite(nats).all() and len(nats) == 3


def test_counts_are_those_of_a_dictionary():
    """Guards: sorted keys that run into each other, counts that are dropped when runs are merged."""
    text = some_text(2)
    trigrams, expected = count_floors(text).trigrams, Counter()
    for i in range(text.n_stories):
        ids = [0, 0, *text.story(i).tolist(), 0]
        expected.update(zip(ids, ids[1:], ids[2:], strict=False))
    histories = trigrams.histories[trigrams.keys // 50]
    found = zip((histories // 50).tolist(), (histories % 50).tolist(), (trigrams.keys % 50).tolist(), strict=True)
    assert dict(zip(found, trigrams.counts.tolist(), strict=True)) == expected
    after = Counter((g, h) for g, h, _ in expected)
    assert trigrams.history_types.tolist() == [after[k // 50, k % 50] for k in trigrams.histories.tolist()]
    assert trigrams.history_counts.sum() == text.n_tokens


def test_a_story_costs_the_same_alone_and_among_others(monkeypatch):
    """Guards: stories that see the one before, sums that are cut at the wrong token, blocks of scoring that matter."""
    floors, text = count_floors(some_text(1)), some_text(3)
    whole = floors.story_nats(text)
    for i in (0, 1, 20, 39):
        alone = floors.story_nats(data(text.story(i).tolist()))
        assert {name: nats[i] for name, nats in whole.items()} == pytest.approx({k: v[0] for k, v in alone.items()})
    monkeypatch.setattr("plotarmour.evaluation.ngrams.SCORED", 50)  # less than some stories
    for name, nats in floors.story_nats(text).items():
        np.testing.assert_allclose(nats, whole[name], rtol=1e-12)


def test_floors_do_not_depend_on_the_block_size(monkeypatch):
    """Guards: a pair or a triple lost between two blocks of counting."""
    stories = data(*draw_stories(40, 3, 77, 12, 1, 1))
    whole = count_floors(stories)
    for size in (1, 2, 7):
        monkeypatch.setattr("plotarmour.evaluation.ngrams.BLOCK", size)
        parts = count_floors(stories)
        for name in ("unigram", "pairs", "pair_counts", "history_counts", "history_types"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
        for name in ("histories", "history_counts", "history_types", "keys", "counts"):
            np.testing.assert_array_equal(getattr(whole.trigrams, name), getattr(parts.trigrams, name))


def test_trigrams_counted_for_one_text_score_it_alike_and_no_other():
    """Guards: counts left out that the text needs; another text scored as if nothing of it had been seen."""
    train, test = some_text(1), some_text(3)
    floors = count_floors(train, test)
    np.testing.assert_array_equal(floors.story_nats(test)["trigram"], count_floors(train).story_nats(test)["trigram"])
    assert len(floors.trigrams.keys) < len(count_floors(train).trigrams.keys)
    with pytest.raises(ValueError, match="these floors are for another text"):
        floors.story_nats(some_text(4))
    floors = count_floors(train, data([1, 2]))  # histories (0, 0), (0, 1) and (1, 2), after which comes 0
    with pytest.raises(ValueError, match="these floors are for another text"):
        one(floors.trigram, 0, 2, 0)


@pytest.mark.parametrize("most", [400, 150, 40])
def test_passes_by_hash_of_history_change_nothing(monkeypatch, most):
    """Guards: histories counted in two passes or in none, types of a history cut in two, too much held at once."""
    train, test = some_text(1), some_text(3)
    whole, held = count_floors(train, test).trigrams, []
    monkeypatch.setattr("plotarmour.evaluation.ngrams.BLOCK", 16)
    monkeypatch.setattr("plotarmour.evaluation.ngrams.MOST_TRIGRAMS", most)
    keep = Tally.keep
    monkeypatch.setattr(Tally, "keep", lambda self, kept: (held.append(len(self)), keep(self, kept)))
    parts = count_floors(train, test).trigrams
    for name in ("histories", "history_counts", "history_types", "keys", "counts"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))
    assert len(held) >= {400: 0, 150: 2, 40: 8}[most] and max(held, default=0) <= most + 16


def test_memory_does_not_grow_with_the_training_file(monkeypatch):
    """Guards: all trigrams of a training file held for a test file of one story."""
    monkeypatch.setattr("plotarmour.evaluation.ngrams.BLOCK", 2**13)
    test, peaks = some_text(3, 2000), []
    for n in (20_000, 200_000):
        train = data(np.random.default_rng(n).integers(1, 60, n).tolist(), vocab_size=2000)  # 59² pairs, 59³ triples
        tracemalloc.start()
        count_floors(train, test)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_rows_of_the_floors_are_those_of_runs():
    """Guards: a floor that is missing from the table; tokens without the closing one; bytes of other stories."""
    found = evaluate_floors(data([1, 2, 1], vocab_size=4), data([1, 3], [2], vocab_size=4))
    assert list(found) == ["uniform", "unigram", "bigram", "trigram"]
    for frame in found.values():
        assert list(frame.columns) == STORY_COLUMNS
        assert frame[["story", "tokens", "bytes"]].values.tolist() == [[0, 3, 4], [1, 2, 2]]
        assert (frame.dtypes == ["int64", "int64", "int64", "float64"]).all()
    assert found["trigram"]["nats"].tolist() == pytest.approx(
        count_floors(data([1, 2, 1], vocab_size=4)).story_nats(data([1, 3], [2], vocab_size=4))["trigram"].tolist())
    assert found["uniform"]["nats"].tolist() == pytest.approx([3 * math.log(4), 2 * math.log(4)])


def test_a_tally_counts():
    """Guards: runs merged in the wrong order, an empty one that fails. 7 7 3, then 3 5, then nothing."""
    tally = Tally()
    assert [x.tolist() for x in tally.merged()] == [[], []]
    for keys in ([7, 7, 3], [3, 5], [], []):
        tally.add(*np.unique(np.array(keys, dtype=np.int64), return_counts=True))
    assert [x.tolist() for x in tally.merged()] == [[3, 5, 7], [2, 1, 2]]
    tally.keep(np.array([True, False, True]))
    assert len(tally) == 2 and [x.tolist() for x in tally.merged()] == [[3, 7], [2, 2]]
