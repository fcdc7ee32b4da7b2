"""How sure a comparison is: intervals over stories and seeds, and how many stories each side wins.

Stories differ far more from each other than two models do on one story, so everything is paired by story: a draw of
the bootstrap takes the same stories for both sides. One rule holds in every draw as it does in the tables: add nats,
count tokens, divide once.

Which question an interval answers depends on what could have come out otherwise:

    `compare_stories`  other test stories: speaks of two checkpoints
    `compare_seeds`    other test stories and other seeds: speaks of two recipes
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.random import SFC64
from scipy import stats

from plotarmour.cli import UserError

SHARE = 0.95  # of the cases in which an interval is to hold the true value
CHUNK = 2**16  # stories drawn at once, all draws together; more leave a processor's cache


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What separates side a from side b. Below 0, or below 1 for ratios, a is better.

    Attributes:
        difference: loss_a - loss_b, in nats per token.
        ratio: nats of a / nats of b over the same stories: also the ratio of losses and of bits per byte.
        n_stories: that both sides were scored on.
        n_seeds_a: runs of side a. 1: the interval speaks of this one checkpoint, not of its recipe.
        n_seeds_b: likewise.
        paired_seeds: seed i of a and seed i of b share their noise (such as the order of the data).
    """

    difference: Interval
    ratio: Interval
    n_stories: int
    n_seeds_a: int = 1
    n_seeds_b: int = 1
    paired_seeds: bool = False

    @property
    def perplexity_ratio(self) -> Interval:
        """Perplexity of a / perplexity of b: exp of the difference, and of its ends."""
        d = self.difference
        return Interval(math.exp(d.value), math.exp(d.low), math.exp(d.high))


@dataclass(frozen=True)
class SignTest:
    """How many stories each side has fewer nats on, and how likely so uneven a count is between equals."""

    a_better: int
    b_better: int
    ties: int
    p_value: float


def compare_stories(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, draws: int = 10_000,
                    seed: int = 0) -> Difference:
    """Compare two checkpoints on the same stories, by a bootstrap over stories.

    Each draw takes n stories of the n, with replacement, the same ones for both sides; the interval holds the middle
    95 % of the draws.

    Args:
        tokens: (n,), of each story, the closing one included.
        nats_a: (n,), of each story under a.
        nats_b: (n,), likewise under b.
        draws: of the bootstrap.
        seed: of the draws. The same one gives the same stories in every version of NumPy.

    Returns:
        (Σ nats_a - Σ nats_b) / Σ tokens and Σ nats_a / Σ nats_b over all stories, with 95 % intervals.

    Raises:
        UserError: fewer than 2 stories.
        ValueError: shapes that differ, tokens below 1, nats that are not finite.

    Example:
        Two stories of 10 and 30 tokens cost a 20 and 60 nats, b 30 and 70: the difference is (80 - 100) / 40 = -0.5
        nats per token, the ratio 0.8. A draw takes one of them twice or both: -1, -1/3 or -0.5.

    Source: Efron & Tibshirani 1993, chapter 13 (percentile interval); Koehn 2004 (paired, over test items).
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 1)
    t, a, b = tokens.sum(), nats_a.sum(), nats_b.sum()
    sums = _resampled_sums(np.stack((tokens, nats_a, nats_b), axis=1), draws, seed)
    return Difference(_interval((a - b) / t, (sums[:, 1] - sums[:, 2]) / sums[:, 0]),
                      _interval(a / b, sums[:, 1] / sums[:, 2]), len(tokens))


def compare_seeds(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, paired: bool = False,
                  draws: int = 10_000, seed: int = 0) -> Difference:
    """Compare two recipes, each trained with some seeds, on the same stories.

    In one sentence: the half-width of the bootstrap over stories (of the seeds' mean nats) and that of Student's t
    over seeds are added in quadrature.

    What seeds differ by on single stories is in the bootstrap already; by it the seeds' variance is lessened.

    Why seeds are not resampled, too: three seeds resampled show 2/3 of their variance, and a percentile knows nothing
    of how badly three values tell a variance. With three seeds and 351 stories, where seeds matter most, resampling
    held the true difference in 79 % of 1,000 cases, with deviations spread by √(S / (S - 1)) in 85 %, this in 96 %.
    However much seeds matter, paired or not, this held it in 96 to 97 % with three seeds, in 95 % with five.

    Args:
        tokens: (n,), of each story, the closing one included.
        nats_a: (S_a, n), of each seed and story under a.
        nats_b: (S_b, n), likewise under b.
        paired: seed i of a and seed i of b share their noise; needs S_a = S_b. The t then has S - 1 degrees of
            freedom, else Welch's, between the smaller S - 1 and S_a + S_b - 2.
        draws: of the bootstrap over stories.
        seed: of the draws.

    Returns:
        Loss of a minus loss of b and Σ nats_a / Σ nats_b, over all seeds and stories, with 95 % intervals. A side with
        one seed adds nothing for seeds; with one on each side the result is that of `compare_stories`.

    Raises:
        UserError: fewer than 2 stories.
        ValueError: shapes that differ, tokens below 1, nats that are not finite, pairs of unequal numbers of seeds.

    Example:
        Seeds with a difference of -0.3, -0.2 and -0.1 paired: standard error 0.1 / √3, t 4.30, half-width 0.248.
        Stories that vary by ±0.1 make it √(0.248² + 0.1²) = 0.268.

    Source: Zou & Donner 2008 (the interval of a sum from those of its parts); Welch 1947. Measured by
    `benchmarks/bootstrap_coverage.py`.
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 2)
    if paired and len(nats_a) != len(nats_b):
        raise ValueError(f"{len(nats_a)} seeds of a and {len(nats_b)} of b cannot be paired; expected as many of each")
    stories = compare_stories(tokens, nats_a.mean(axis=0), nats_b.mean(axis=0), draws, seed)
    total, mean_a, mean_b = tokens.sum(), nats_a.sum(axis=1).mean(), nats_b.sum(axis=1).mean()
    of_difference = _seeds_half_width(tokens, nats_a / total, nats_b / total, paired)
    # To first order a ratio is off by as much of itself as its two sides are of theirs.
    of_ratio = stories.ratio.value * _seeds_half_width(tokens, nats_a / mean_a, nats_b / mean_b, paired)
    return Difference(_widened(stories.difference, of_difference), _widened(stories.ratio, of_ratio), len(tokens),
                      len(nats_a), len(nats_b), paired)


def sign_test(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray) -> SignTest:
    """Test whether each side wins half of the stories, whatever their lengths and however large the gains.

    Args:
        tokens, nats_a, nats_b: as for `compare_stories`; fewer nats win a story.

    Returns:
        Counts, and the two-sided exact binomial p-value: of all outcomes of fair coins for the stories that are not
        tied, the share that is at least as uneven.

    Raises:
        UserError, ValueError: as `compare_stories`.

    Example:
        a wins 1 of 5 stories, b 4: p = 2 · (1 + 5) / 2⁵ = 0.375.
    """
    _, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 1)
    a, b = int((nats_a < nats_b).sum()), int((nats_b < nats_a).sum())
    p_value = float(stats.binomtest(a, a + b).pvalue) if a + b else 1.0
    return SignTest(a, b, len(nats_a) - a - b, p_value)


def win_share_by_length(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, n_bins: int = 6) -> pd.DataFrame:
    """Count the stories that a wins, from the shortest to the longest.

    Args:
        tokens, nats_a, nats_b: as for `compare_stories`; fewer nats win a story, and a tie is no win.
        n_bins: bins of equal numbers of stories (to within one); fewer where there are fewer stories.

    Returns:
        A row per bin: min_tokens, max_tokens, stories, a_better, share (a_better / stories), and low, high, the ends
        of its 95 % interval.

    Raises:
        UserError, ValueError: as `compare_stories`; n_bins below 1.

    Example:
        a wins 5 of 10 stories of a bin: 0.5, from 0.237 to 0.763.

    Source: Wilson 1927, whose interval stays within 0 and 1 and holds for few stories.
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 1)
    rows = []
    for of_bin in np.array_split(np.argsort(tokens, kind="stable"), min(n_bins, len(tokens))):
        n, wins = len(of_bin), int((nats_a[of_bin] < nats_b[of_bin]).sum())
        interval = stats.binomtest(wins, n).proportion_ci(SHARE, method="wilson")
        rows.append([int(tokens[of_bin[0]]), int(tokens[of_bin[-1]]), n, wins, wins / n, interval.low, interval.high])
    return pd.DataFrame(rows, columns=["min_tokens", "max_tokens", "stories", "a_better", "share", "low", "high"])


def _checked(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, dims: int) -> tuple[np.ndarray, ...]:
    """As float64, of fitting shapes, with numbers that can be compared."""
    tokens, nats_a, nats_b = (np.asarray(x, dtype=np.float64) for x in (tokens, nats_a, nats_b))
    for name, nats in (("nats_a", nats_a), ("nats_b", nats_b)):
        if tokens.ndim != 1 or nats.ndim != dims or nats.shape[-1] != len(tokens) or not len(nats):
            expected = "(n,)" if dims == 1 else "(seeds, n)"
            raise ValueError(f"tokens {tokens.shape} and {name} {nats.shape}; expected (n,) and {expected}")
        if not np.isfinite(nats).all():
            raise ValueError(f"{name} holds {nats[~np.isfinite(nats)][0]}; expected finite nats")
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} stories tell nothing about others; expected at least 2: use a larger test "
                        "file.")
    if tokens.min() < 1:
        raise ValueError(f"tokens holds {tokens.min():g}; expected at least 1 for every story")
    return tokens, nats_a, nats_b


def _resampled_sums(columns: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Sums of each of the (n, k) columns over n rows drawn with replacement, (draws, k)."""
    n, raw = len(columns), SFC64(seed)  # raw words: what NumPy makes of them may change, they do not
    rows_at_once, sums = max(1, CHUNK // n), []
    for first in range(0, draws, rows_at_once):
        rows = min(rows_at_once, draws - first)
        words = raw.random_raw((rows * n + 1) // 2).view(np.uint32)[:rows * n]
        drawn = ((words.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)).astype(np.int64).reshape(rows, n)
        drawn += n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)  # how often each draw took each row
        sums.append(times.astype(np.float64) @ columns)
    return np.concatenate(sums)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, ((1 - SHARE) / 2, (1 + SHARE) / 2))
    return Interval(float(value), float(low), float(high))


def _seeds_half_width(tokens: np.ndarray, a: np.ndarray, b: np.ndarray, paired: bool) -> float:
    """Half of the 95 % interval of Σ a - Σ b, (S, n) each, over other seeds; a side with one is taken as it is."""
    samples = [x for x in ([a - b] if paired else [a, b]) if len(x) > 1]
    squares = np.array([x.sum(axis=1).var(ddof=1) / len(x) for x in samples])  # squared standard errors
    if not squares.any():
        return 0.0
    freedom = squares.sum()**2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, samples, strict=True))
    scatter = 0.0
    for x in samples:
        deviations = x - x.mean(axis=0)
        even = deviations.sum(axis=1, keepdims=True) * tokens / tokens.sum()  # each token of a seed off by as much
        scatter += ((deviations - even)**2).sum() / (len(x) - 1) / len(x)
    return stats.t.ppf((1 + SHARE) / 2, freedom) * math.sqrt(max(0.0, squares.sum() - scatter))


def _widened(interval: Interval, half_width: float) -> Interval:
    below, above = interval.value - interval.low, interval.high - interval.value
    return Interval(interval.value, interval.value - math.hypot(below, half_width),
                    interval.value + math.hypot(above, half_width))
