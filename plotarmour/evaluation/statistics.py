"""Statistics of a comparison: intervals over stories and seeds, and the number of stories that each side wins.

Stories differ far more from each other than two models differ on one story. So all tests are paired by story: each
bootstrap draw takes the same stories for both sides. The metrics' rule holds in each draw: add nats, count tokens,
divide once.

    `compare_stories`  the interval covers other test stories: it is about two checkpoints
    `compare_seeds`    the interval covers other test stories and other seeds: it is about two recipes
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.random import SFC64
from scipy import stats

from plotarmour.cli import UserError

CONFIDENCE = 0.95  # share of cases in which an interval should contain the true value
CHUNK = 2**16  # stories drawn at once, over all draws of a chunk; more do not fit a processor's cache


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference between side a and side b. Below 0, or below 1 for ratios, a is better.

    Attributes:
        difference: loss_a - loss_b, in nats per token.
        ratio: nats of a / nats of b over the same stories; also the ratio of losses and of bits per byte.
    """

    difference: Interval
    ratio: Interval

    @property
    def perplexity_ratio(self) -> Interval:
        """Perplexity of a / perplexity of b: exp of the difference and of the ends of its interval."""
        d = self.difference
        return Interval(math.exp(d.value), math.exp(d.low), math.exp(d.high))


@dataclass(frozen=True)
class SignTest:
    """Number of stories on which each side has fewer nats, and the p-value if both sides were equally good."""

    a_better: int
    b_better: int
    ties: int
    p_value: float


def compare_stories(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, draws: int = 10_000,
                    seed: int = 0) -> Difference:
    """Compare two checkpoints on the same stories, by a bootstrap over stories.

    Each draw takes n of the n stories with replacement, the same ones for both sides. The interval is the central 95 %
    of the draws.

    Args:
        tokens: (n,), tokens of each story, including its closing end-of-text.
        nats_a: (n,), nats of each story under a.
        nats_b: (n,), nats of each story under b.
        draws: number of bootstrap draws.
        seed: seed of the draws; the same seed gives the same draws in every version of NumPy.

    Returns:
        (Σ nats_a - Σ nats_b) / Σ tokens and Σ nats_a / Σ nats_b over all stories, with 95 % intervals.

    Raises:
        UserError: fewer than 2 stories.
        ValueError: different shapes, tokens below 1, nats that are not finite.

    Example:
        Two stories have 10 and 30 tokens, 20 and 60 nats under a, and 30 and 70 under b. The difference is
        (80 - 100) / 40 = -0.5 nats per token, the ratio 0.8. A draw takes one story twice or both: -1, -1/3 or -0.5.

    Source: Efron & Tibshirani 1993, chapter 13 (percentile interval); Koehn 2004 (paired over test items).
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 1)
    t, a, b = tokens.sum(), nats_a.sum(), nats_b.sum()
    sums = _resampled_sums(np.stack((tokens, nats_a, nats_b), axis=1), draws, seed)
    return Difference(_interval((a - b) / t, (sums[:, 1] - sums[:, 2]) / sums[:, 0]),
                      _interval(a / b, sums[:, 1] / sums[:, 2]))


def compare_seeds(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, paired: bool = False,
                  draws: int = 10_000, seed: int = 0) -> Difference:
    """Compare two recipes, each trained with one or more seeds, on the same stories.

    The half-width of the interval is the square root of the sum of two squares: the half-width of the bootstrap over
    stories, applied to the mean nats of the seeds, and the half-width of Student's t over seeds. The variance over
    seeds is reduced by the part that comes from single stories, because the bootstrap contains it already.

    Resampling the seeds as well would give intervals that are too narrow: three resampled seeds show 2/3 of their
    variance. In 1,000 simulated cases with three seeds and 351 stories, with a large effect of the seeds, resampling
    contained the true difference in 79 %, resampling with deviations scaled by √(S / (S - 1)) in 85 %, and this method
    in 96 %. For any effect of the seeds, paired or not, it was 96 to 97 % with three seeds, and 95 % with five.

    Args:
        tokens: (n,), tokens of each story, including its closing end-of-text.
        nats_a: (S_a, n), nats of each seed and story under a.
        nats_b: (S_b, n), nats of each seed and story under b.
        paired: whether seed i of a and seed i of b share noise, such as the order of the data; needs S_a = S_b. The
            degrees of freedom of t are then S - 1, otherwise Welch's.
        draws: number of bootstrap draws.
        seed: seed of the draws.

    Returns:
        Loss of a minus loss of b and Σ nats_a / Σ nats_b, over all seeds and stories, with 95 % intervals. A side with
        one seed adds no variance over seeds; with one seed on each side the result is that of `compare_stories`.

    Raises:
        UserError: fewer than 2 stories.
        ValueError: different shapes, tokens below 1, nats that are not finite, pairs of different numbers of seeds.

    Example:
        Three paired seeds have differences of -0.3, -0.2 and -0.1: standard error 0.1 / √3, t = 4.30, half-width 0.248.
        With a half-width of 0.1 over stories, the result is √(0.248² + 0.1²) = 0.268.

    Source: Zou & Donner 2008 (interval of a sum from intervals of its terms); Welch 1947. Measured by
    `benchmarks/bootstrap_coverage.py`.
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 2)
    if paired and len(nats_a) != len(nats_b):
        raise ValueError(f"{len(nats_a)} seeds of a and {len(nats_b)} of b cannot be paired; expected equal numbers")
    stories = compare_stories(tokens, nats_a.mean(axis=0), nats_b.mean(axis=0), draws, seed)
    total, mean_a, mean_b = tokens.sum(), nats_a.sum(axis=1).mean(), nats_b.sum(axis=1).mean()
    of_difference = _seeds_half_width(tokens, nats_a / total, nats_b / total, paired)
    # To first order, the relative error of a ratio is the difference of the relative errors of its two sides.
    of_ratio = stories.ratio.value * _seeds_half_width(tokens, nats_a / mean_a, nats_b / mean_b, paired)
    return Difference(_widened(stories.difference, of_difference), _widened(stories.ratio, of_ratio))


def sign_test(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray) -> SignTest:
    """Test whether each side wins half of the stories, independently of their lengths and of the size of the gains.

    Args:
        tokens, nats_a, nats_b: see `compare_stories`. The side with fewer nats wins a story.

    Returns:
        Number of wins and ties, and the two-sided exact binomial p-value without ties: the probability that fair coins
        give a result at least as uneven.

    Raises:
        UserError, ValueError: see `compare_stories`.

    Example:
        a wins 1 of 5 stories, b wins 4: p = 2 · (1 + 5) / 2⁵ = 0.375.
    """
    _, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 1)
    a, b = int((nats_a < nats_b).sum()), int((nats_b < nats_a).sum())
    p_value = float(stats.binomtest(a, a + b).pvalue) if a + b else 1.0
    return SignTest(a, b, len(nats_a) - a - b, p_value)


def win_share_by_length(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, n_bins: int = 6) -> pd.DataFrame:
    """Return the share of stories that a wins, by length of story.

    Args:
        tokens, nats_a, nats_b: see `compare_stories`. The side with fewer nats wins a story; a tie is not a win.
        n_bins: number of bins with equal numbers of stories (±1), at most one per story.

    Returns:
        A row per bin: min_tokens, max_tokens, stories, a_better, share (a_better / stories), and low, high, the ends
        of the share's 95 % interval.

    Raises:
        UserError, ValueError: see `compare_stories`; n_bins below 1.

    Example:
        a wins 5 of 10 stories of a bin: 0.5, from 0.237 to 0.763.

    Source: Wilson 1927; this interval stays within 0 and 1 and works for few stories.
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b, 1)
    rows = []
    for stories in np.array_split(np.argsort(tokens, kind="stable"), min(n_bins, len(tokens))):
        n, wins = len(stories), int((nats_a[stories] < nats_b[stories]).sum())
        interval = stats.binomtest(wins, n).proportion_ci(CONFIDENCE, method="wilson")
        rows.append([int(tokens[stories[0]]), int(tokens[stories[-1]]), n, wins, wins / n, interval.low, interval.high])
    return pd.DataFrame(rows, columns=["min_tokens", "max_tokens", "stories", "a_better", "share", "low", "high"])


def _checked(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, dims: int) -> tuple[np.ndarray, ...]:
    """Return the arguments as float64, and raise for shapes and values that cannot be compared."""
    tokens, nats_a, nats_b = (np.asarray(x, dtype=np.float64) for x in (tokens, nats_a, nats_b))
    for name, nats in (("nats_a", nats_a), ("nats_b", nats_b)):
        if tokens.ndim != 1 or nats.ndim != dims or nats.shape[-1] != len(tokens) or not len(nats):
            expected = "(n,)" if dims == 1 else "(seeds, n)"
            raise ValueError(f"tokens {tokens.shape} and {name} {nats.shape}; expected (n,) and {expected}")
        if not np.isfinite(nats).all():
            raise ValueError(f"{name} holds {nats[~np.isfinite(nats)][0]}; expected finite nats")
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} stories give no interval; expected at least 2. Use a larger test file.")
    if tokens.min() < 1:
        raise ValueError(f"tokens holds {tokens.min():g}; expected at least 1 for every story")
    return tokens, nats_a, nats_b


def _resampled_sums(columns: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Return the sums (draws, k) of the (n, k) columns over n rows drawn with replacement."""
    n, raw = len(columns), SFC64(seed)  # raw words, because NumPy's distributions may change between versions
    rows_at_once, sums = max(1, CHUNK // n), []
    for first in range(0, draws, rows_at_once):
        rows = min(rows_at_once, draws - first)
        words = raw.random_raw((rows * n + 1) // 2).view(np.uint32)[:rows * n]
        drawn = ((words.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)).astype(np.int64).reshape(rows, n)
        drawn += n * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)  # of each row in each draw
        sums.append(counts.astype(np.float64) @ columns)
    return np.concatenate(sums)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return Interval(float(value), float(low), float(high))


def _seeds_half_width(tokens: np.ndarray, a: np.ndarray, b: np.ndarray, paired: bool) -> float:
    """Return the half-width of the 95 % interval over seeds of Σ a - Σ b, (S, n) each; one seed adds no variance."""
    samples = [x for x in ([a - b] if paired else [a, b]) if len(x) > 1]
    squares = np.array([x.sum(axis=1).var(ddof=1) / len(x) for x in samples])  # squared standard errors
    if not squares.any():
        return 0.0
    freedom = squares.sum()**2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, samples, strict=True))
    of_stories = 0.0  # the part of the variance that comes from single stories
    for x in samples:
        deviations = x - x.mean(axis=0)
        uniform = deviations.sum(axis=1, keepdims=True) * tokens / tokens.sum()  # the same deviation for each token
        of_stories += ((deviations - uniform)**2).sum() / (len(x) - 1) / len(x)
    return stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(max(0.0, squares.sum() - of_stories))


def _widened(interval: Interval, half_width: float) -> Interval:
    below, above = interval.value - interval.low, interval.high - interval.value
    return Interval(interval.value, interval.value - math.hypot(below, half_width),
                    interval.value + math.hypot(above, half_width))
