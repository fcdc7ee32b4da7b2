import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from benchmarks import bootstrap_coverage
from plotarmour.cli import UserError
from plotarmour.evaluation.statistics import compare_losses, sign_test, win_share_by_length


def drawn_stories(n=60, seeds=None, spread=0.0, shared=0.0):
    """Tokens and nats of two sides that differ by 0.2 nats per token; seeds shift all stories, some of it shared."""
    rng = np.random.default_rng(5)
    tokens = rng.integers(20, 400, n)
    hard = rng.normal(2.5, 0.4, n)
    of_both = rng.normal(0, 1, (seeds or 1, 1))
    sides = []
    for loss in (0.0, 0.2):
        of_side = shared * of_both + math.sqrt(1 - shared**2) * rng.normal(0, 1, (seeds or 1, 1))
        sides.append(tokens * (hard + loss + 0.05 * rng.normal(0, 1, (seeds or 1, n)) + spread * of_side))
    return (tokens, *sides) if seeds else (tokens, sides[0][0], sides[1][0])


def test_two_stories_by_hand():
    """Guards: means of stories' losses in place of sums divided once; a draw that does not pair the stories.

    10 and 30 tokens, a 20 and 60, b 30 and 70 nats: (80 - 100) / 40 = -0.5 and 80 / 100 = 0.8. Draws: the first twice
    (a quarter of them) -1 and 2/3, the second twice -1/3 and 6/7, both -0.5 and 0.8.
    """
    found = compare_losses([10, 30], [20.0, 60.0], [30.0, 70.0])
    assert list(found.difference) == pytest.approx([-0.5, -1.0, -1 / 3])
    assert list(found.ratio) == pytest.approx([0.8, 2 / 3, 6 / 7])
    assert list(found.perplexity_ratio) == pytest.approx([math.exp(-0.5), math.exp(-1), math.exp(-1 / 3)])


def test_a_constant_advantage_has_no_uncertainty():
    """Guards: stories drawn anew for the second side, which would add the difference between stories."""
    tokens, a, _ = drawn_stories()
    found = compare_losses(tokens, a, a + 0.25 * tokens)
    assert list(found.difference) == pytest.approx([-0.25] * 3)
    assert found.ratio.low < found.ratio.value < found.ratio.high < 1  # a share of nats, not of tokens


def test_the_interval_is_that_of_the_ratios_standard_error():
    """Guards: draws of too few stories, or quantiles of another share. 1.96 standard errors, by the residuals."""
    tokens, a, b = drawn_stories(800)
    found = compare_losses(tokens, a, b)
    error = math.sqrt((((a - b) - found.difference.value * tokens)**2).sum()) / tokens.sum()
    assert list(found.difference) == pytest.approx([found.difference.value, found.difference.value - 1.96 * error,
                                                    found.difference.value + 1.96 * error], abs=0.08 * error)


@pytest.mark.parametrize("seeds", [None, 3])
def test_swapping_the_sides_flips_the_sign(seeds):
    """Guards: sides that are not treated alike, such as stories drawn for one side only."""
    tokens, a, b = drawn_stories(seeds=seeds, spread=0.02)
    one, other = compare_losses(tokens, a, b), compare_losses(tokens, b, a)
    d, r = other.difference, other.ratio
    assert list(one.difference) == pytest.approx([-d.value, -d.high, -d.low])
    assert one.ratio.value == pytest.approx(1 / r.value)
    assert [one.ratio.low, one.ratio.high] == pytest.approx([1 / r.high, 1 / r.low], abs=1e-3)


def test_the_same_seed_gives_the_same_numbers():
    """Guards: draws that hang on a global state, or change with NumPy: the first draw of seed 7 is pinned.

    Stories 3, 0, 0 and 2 of four: a sum of powers of ten, 1 + 1 + 100 + 1000.
    """
    tokens, a, b = drawn_stories()
    assert compare_losses(tokens, a, b, seed=3) == compare_losses(tokens, a, b, seed=3)
    assert compare_losses(tokens, a, b, seed=3) != compare_losses(tokens, a, b, seed=4)
    powers = 10.0 ** np.arange(4)  # a draw's sum shows how often it took each story
    found = compare_losses(np.full(4, 1), powers, np.full(4, 1.0), draws=1, seed=7)
    assert 4 * (found.difference.low + 1) == pytest.approx(1102)


def test_chunks_of_draws_are_as_good_as_all_at_once(monkeypatch):
    """Guards: draws of a chunk that lean on the number of chunks; memory that grows with draws times stories."""
    tokens, a, b = drawn_stories(60)
    whole = compare_losses(tokens, a, b, draws=500)
    monkeypatch.setattr("plotarmour.evaluation.statistics.CHUNK", 600)
    assert list(compare_losses(tokens, a, b, draws=500).ratio) == pytest.approx(list(whole.ratio), rel=1e-12)
    tracemalloc.start()
    monkeypatch.undo()
    compare_losses(*drawn_stories(20_000), draws=500)  # 10 million stories drawn
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()


def test_one_seed_on_each_side_speaks_of_checkpoints():
    """Guards: a recipe's interval claimed for one seed."""
    tokens, a, b = drawn_stories()
    assert compare_losses(tokens, a[None], b[None], paired=True) == compare_losses(tokens, a, b)


def test_seeds_by_hand():
    """Guards: variance of seeds over S instead of S - 1, a normal quantile for three values, halves of an interval
    that are added without squares.

    Differences of -0.3, -0.2, -0.1 on stories of one kind: t of 2 degrees of freedom times 0.1 / √3 is 0.248. Unpaired,
    a between -0.1 and 0.1 and b all alike: the same, as b has no part in Welch's degrees of freedom.
    """
    tokens = np.array([10, 20, 30])
    b = np.tile(3.0 * tokens, (3, 1))
    a = b + np.array([[-0.3], [-0.2], [-0.1]]) * tokens
    half = 4.302653 * 0.1 / math.sqrt(3)
    for paired in (True, False):
        found = compare_losses(tokens, a, b, paired)
        assert list(found.difference) == pytest.approx([-0.2, -0.2 - half, -0.2 + half])
        assert list(found.ratio) == pytest.approx([2.8 / 3, (2.8 - half) / 3, (2.8 + half) / 3])
    stories = compare_losses(tokens, a.mean(0) + [1, -1, 0], b[0])
    both = compare_losses(tokens, a + [1, -1, 0], b, paired=True)
    assert both.difference.high - both.difference.value == pytest.approx(
        math.hypot(half, stories.difference.high - stories.difference.value))


def test_what_seeds_differ_by_on_single_stories_is_counted_once():
    """Guards: noise of (seed, story) counted with the stories and once more with the seeds.

    Without a shift of whole seeds the interval is hardly wider than that of stories; counted twice, it would be 1.9
    times as wide.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 400, 400)
    a, b = (tokens * rng.normal(loss, 0.3, (3, 400)) for loss in (2.5, 2.7))
    stories = compare_losses(tokens, a.mean(0), b.mean(0)).difference
    widths = []
    for i in range(20):
        a, b = (tokens * rng.normal(loss, 0.3, (3, 400)) for loss in (2.5, 2.7))
        found = compare_losses(tokens, a, b, draws=500).difference
        widths.append((found.high - found.low) / (stories.high - stories.low))
    assert 0.9 < np.mean(widths) < 1.4


def test_pairs_of_seeds_are_narrower_where_they_share_their_noise():
    """Guards: seeds paired in name only."""
    tokens, a, b = drawn_stories(seeds=5, spread=0.1, shared=0.95)
    paired, unpaired = (compare_losses(tokens, a, b, paired=p).difference for p in (True, False))
    assert paired.value == unpaired.value
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)
    with pytest.raises(ValueError, match="5 seeds of a and 4 of b cannot be paired"):
        compare_losses(tokens, a, b[:4], paired=True)


def test_a_side_with_one_seed_is_taken_as_it_is():
    """Guards: a variance of one value, nan; and an interval that forgets the other side's seeds."""
    tokens, a, b = drawn_stories(seeds=4, spread=0.1)
    one, none = compare_losses(tokens, a, b[:1]), compare_losses(tokens, a[:1], b[:1])
    assert one.difference.high - one.difference.low > 2 * (none.difference.high - none.difference.low)


@pytest.mark.parametrize(("case", "low"), [(("stories", 1), 0.90), (("seeds", 3, 0.0), 0.90), (("seeds", 3, 2.0), 0.90),
                                           (("seeds", 3, 8.0, True), 0.90)])
def test_95_of_100_intervals_hold_the_true_value(case, low):
    """Guards: intervals that are too narrow, as those of three resampled seeds are (79 %), or that hold everything.

    300 cases: an interval of 95 % falls below 270 of them, 4 standard errors of 1.26 points under, once in 8,000; the
    seeds' may be as much as 97.5 %, of which 300 of 300 would be one in 2,000.
    """
    found = list(bootstrap_coverage.differences(bootstrap_coverage.Case(*case), 351, 300, 400, seed=1))
    for share in bootstrap_coverage.coverage(found):
        assert low <= share < 1


def test_resampled_seeds_hold_too_little():
    """Guards: a benchmark in which every method looks right."""
    case = bootstrap_coverage.Case("resampled", 3, 8.0)
    found = list(bootstrap_coverage.differences(case, 100, 200, 300, seed=1))
    assert bootstrap_coverage.coverage(found)[0] < 0.88


def test_the_sign_test_by_hand():
    """Guards: one side of the distribution only, ties as wins, p above 1.

    1 of 5: 2 · (1 + 5) / 32. 2 of 4 is the most even: 1. A tie does not count.
    """
    found = sign_test(np.ones(6), [1, 2, 2, 2, 2, 5.0], [2, 1, 1, 1, 1, 5.0])
    assert found == {"a_better": 1, "b_better": 4, "ties": 1, "sign_p": pytest.approx(0.375)}
    assert sign_test(np.ones(4), [1, 2, 1, 2], [2, 1, 2, 1])["sign_p"] == 1.0
    assert sign_test(np.ones(4), np.ones(4), np.ones(4))["sign_p"] == 1.0
    assert sign_test(np.ones(3), np.zeros(3), np.ones(3))["sign_p"] == pytest.approx(0.25)


@pytest.mark.parametrize(("n", "wins"), [(351, 150), (2000, 1100), (3001, 1499)])
def test_the_sign_test_is_exact(n, wins):
    """Guards: an approximation that is off where it matters, in the tail. Against whole numbers."""
    exact = 2 * Fraction(sum(math.comb(n, k) for k in range(min(wins, n - wins) + 1)), 2**n)
    found = sign_test(np.ones(n), np.arange(n) >= wins, np.full(n, 0.5))
    assert found["a_better"] == wins and found["sign_p"] == pytest.approx(float(exact), rel=1e-6)


def test_the_sign_test_takes_a_million_stories():
    """Guards: 2 to the power of a million. 501,000 of them: 2 standard errors, 4.56 % by the normal distribution."""
    n = 10**6
    assert sign_test(np.ones(n), np.arange(n) >= 501_000, np.full(n, 0.5))["sign_p"] == pytest.approx(0.0456, abs=1e-4)
    assert sign_test(np.ones(n), np.zeros(n), np.ones(n))["sign_p"] == 0.0


def test_wins_by_length():
    """Guards: bins of equal width that hold few stories; an interval that leaves 0 to 1.

    Forty stories in two bins: a wins the ten with even numbers of the twenty short ones, Wilson 0.299 to 0.701, and all
    long ones, 0.839 to 1.
    """
    tokens = np.r_[np.arange(100, 120), np.arange(20)[::-1] + 1]
    nats_a = np.where((tokens > 50) | (tokens % 2 == 0), 1.0, 2.0)
    found = win_share_by_length(tokens, nats_a, np.full(40, 1.5))
    assert found[["min_tokens", "max_tokens", "stories", "a_better"]].values.tolist() == [[1, 20, 20, 10],
                                                                                         [100, 119, 20, 20]]
    assert found[["share", "low", "high"]].values.tolist() == [pytest.approx([0.5, 0.2993, 0.7007], abs=1e-4),
                                                              pytest.approx([1.0, 0.8389, 1.0], abs=1e-4)]
    few = win_share_by_length(tokens[:3], nats_a[:3], np.full(3, 1.0))
    assert few["stories"].tolist() == [3] and few["a_better"].sum() == 0  # ties are no wins


@pytest.mark.parametrize("compare", [compare_losses, sign_test, win_share_by_length])
def test_what_cannot_be_compared_is_refused(compare):
    """Guards: broadcasting that compares every story with the first; an interval of one story; nan that spreads."""
    with pytest.raises(UserError, match="1 stories give no interval; expected at least 2"):
        compare([3], [1.0], [2.0])
    for a, b, complaint in (([1.0], [1.0, 2.0], r"nats_a \(1, 1\); expected \(n,\) and \(seeds, n\)"),
                            ([1.0, 2.0], np.zeros((0, 2)), r"nats_b \(0, 2\); expected \(n,\)"),
                            ([1.0, 2.0], [1.0, math.nan], "nats_b holds nan")):
        with pytest.raises(ValueError, match=complaint):
            compare([3, 4], a, b)
