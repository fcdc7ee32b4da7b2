import math
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from in_memory import data, draw_stories

from plotarmour.evaluation.ngrams import counted_tokens, evaluate_baselines, probabilities
from plotarmour.evaluation.scoring import STORY_COLUMNS


def story_nats(train, test):
    """Nats of every story under every baseline."""
    return {name: frame["nats"].to_numpy() for name, frame in evaluate_baselines(train, test).items()}


def one(train, name, before, history, word):
    """P of one token under one baseline."""
    return float(probabilities(train, *(np.array([i]) for i in (before, history, word)))[name][0])


def some_text(seed, vocab_size=50):
    """40 stories in which pairs and triples come again."""
    rng = np.random.default_rng(seed)
    return data(*(np.minimum(rng.geometric(0.2, n), vocab_size - 2).tolist() for n in rng.integers(1, 60, 40)),
                vocab_size=vocab_size)


def test_unigrams_and_bigrams_by_hand():
    """Guards: baselines that are no probabilities, or counted across story borders the wrong way.

    Train on one story "1 2 1", vocabulary 0..3, 0 ends: tokens 1 2 1 0, N = 4, three types. Unigram of 1:
    (2 + 3/4) / (4 + 3). Bigrams 0→1, 1→2, 2→1, 1→0: P(2|1) = (1 + 2·P(2)) / (2 + 2), P(2) = (1 + 3/4) / 7 = 1/4.
    """
    train = data([1, 2, 1], vocab_size=4)
    assert [one(train, "unigram", 0, 0, w) for w in range(4)] == pytest.approx([0.25, 2.75 / 7, 0.25, 0.75 / 7])
    assert one(train, "bigram", 0, 1, 2) == pytest.approx((1 + 2 * 0.25) / 4)
    assert one(train, "bigram", 0, 3, 2) == pytest.approx(0.25)  # history never seen


def test_trigrams_by_hand():
    """Guards: the last token of one story as history of the next, another start in scoring than in counting.

    Train on "1 2" and "1 3", 0 ends: tokens 1 2 0 1 3 0; P(0) = P(1) = (2 + 4/4) / (6 + 4), P(2) = P(3) = 0.2.
    After (0, 0) twice 1: (2 + 1·P(1|0)) / 3 with P(1|0) = (2 + 1·0.3) / 3. After (0, 1) 2 or 3: P(2|0,1) =
    (1 + 2·0.35) / 4 with P(2|1) = (1 + 2·0.2) / 4 = 0.35. After (1, 2) 0: (1 + 1·0.65) / 2. Never seen: (2, 0), and
    (3, 3), for which stands P(0|3) = (1 + 1·0.3) / 2.
    """
    train = data([1, 2], [1, 3], vocab_size=4)
    assert one(train, "trigram", 0, 0, 1) == pytest.approx((2 + 2.3 / 3) / 3)
    assert one(train, "trigram", 0, 1, 2) == pytest.approx(0.425)
    assert one(train, "trigram", 2, 0, 1) == pytest.approx(2.3 / 3)
    assert one(train, "trigram", 3, 3, 0) == pytest.approx(0.65)
    nats = story_nats(train, data([3], [1, 2], vocab_size=4))["trigram"]
    assert nats[1] == pytest.approx(-math.log((2 + 2.3 / 3) / 3 * 0.425 * 0.825))


def test_every_baseline_sums_to_one_and_is_never_zero():
    """Guards: probability that is lost where histories were seen seldom, or never; infinite nats on another text."""
    train, V = some_text(1), 50
    before = np.repeat([0, 1, 2, 7, 48, 49], V * V)  # 49 never occurs
    history, words = np.tile(np.repeat(np.arange(V), V), 6), np.tile(np.arange(V), 6 * V)
    for p in probabilities(train, before, history, words).values():
        assert p.reshape(-1, V).sum(axis=1) == pytest.approx(1) and p.min() > 0
    for nats in story_nats(train, data(*draw_stories(200, 1, 30))).values():
        assert np.isfinite(nats).all() and len(nats) == 3


def test_probabilities_are_those_of_dictionaries():
    """Guards: sorted keys that run into each other, counts that are dropped when blocks are merged."""
    train, test = some_text(2), some_text(3)
    counts = [defaultdict(Counter) for _ in range(3)]
    for i in range(train.n_stories):
        ids = [0, 0, *train.story(i).tolist(), 0]
        for at in range(2, len(ids)):
            for order in range(3):
                counts[order][tuple(ids[at - order:at])][ids[at]] += 1

    def p(history, word):
        """Witten-Bell, written as in the paper."""
        after = counts[len(history)][history]
        below = p(history[1:], word) if history else 1 / 50
        return (after[word] + len(after) * below) / (after.total() + len(after)) if after else below

    for name, order in (("unigram", 0), ("bigram", 1), ("trigram", 2)):
        expected = []
        for i in range(test.n_stories):
            ids = [0, 0, *test.story(i).tolist(), 0]
            expected.append(-sum(math.log(p(tuple(ids[at - order:at]), ids[at])) for at in range(2, len(ids))))
        np.testing.assert_allclose(story_nats(train, test)[name], expected, rtol=1e-12)


def test_a_story_costs_the_same_alone_and_among_others(monkeypatch):
    """Guards: stories that see the one before, sums that are cut at the wrong token, blocks of scoring that matter."""
    train, text = some_text(1), some_text(3)
    whole = story_nats(train, text)
    for i in (0, 1, 20, 39):
        alone = story_nats(train, data(text.story(i).tolist()))
        assert {name: nats[i] for name, nats in whole.items()} == pytest.approx({k: v[0] for k, v in alone.items()})
    monkeypatch.setattr("plotarmour.evaluation.ngrams.SCORED", 50)  # less than some stories
    for name, nats in story_nats(train, text).items():
        np.testing.assert_allclose(nats, whole[name], rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_baselines_do_not_depend_on_the_block_size(monkeypatch, size):
    """Guards: a pair or a triple lost between two blocks of counting; types of a history counted once per block."""
    train, test = data(*draw_stories(40, 3, 77, 12, 1, 1)), data(*draw_stories(40, 5, 12))
    whole = story_nats(train, test)
    monkeypatch.setattr("plotarmour.evaluation.ngrams.BLOCK", size)
    for name, nats in story_nats(train, test).items():
        np.testing.assert_array_equal(nats, whole[name])


def test_memory_does_not_grow_with_the_training_file(monkeypatch):
    """Guards: all trigrams of a training file held for a test file of one story."""
    monkeypatch.setattr("plotarmour.evaluation.ngrams.BLOCK", 2**13)
    test, peaks = some_text(3, 2000), []
    for n in (20_000, 200_000):
        train = data(np.random.default_rng(n).integers(1, 60, n).tolist(), vocab_size=2000)  # 59² pairs, 59³ triples
        tracemalloc.start()
        story_nats(train, test)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def test_rows_of_the_baselines_are_those_of_runs():
    """Guards: a baseline that is missing from the table; tokens without the closing one; bytes of other stories."""
    train, test = data([1, 2, 1], vocab_size=4), data([1, 3], [2], vocab_size=4)
    result = evaluate_baselines(train, test)
    assert list(result) == ["uniform", "unigram", "bigram", "trigram"]
    for frame in result.values():
        assert list(frame.columns) == STORY_COLUMNS
        assert frame[["story", "tokens", "bytes"]].values.tolist() == [[0, 3, 4], [1, 2, 2]]
        assert (frame.dtypes == ["int64", "int64", "int64", "float64"]).all()
    assert result["uniform"]["nats"].tolist() == pytest.approx([3 * math.log(4), 2 * math.log(4)])


def test_baselines_count_only_the_first_tokens_of_a_large_training_file(monkeypatch):
    """Guards: n-grams of 500 million training tokens, which fill a laptop's memory."""
    stories, test = draw_stories(40, 30, 77), data(*draw_stories(41, 5))
    monkeypatch.setattr("plotarmour.evaluation.ngrams.MAX_COUNTED", 41)
    cut = data(*stories)
    assert counted_tokens(cut) == 41 and counted_tokens(test) == 41 and counted_tokens(data([1, 2])) == 3
    for name, nats in story_nats(cut, test).items():
        np.testing.assert_array_equal(nats, story_nats(data(stories[0]), test)[name])
