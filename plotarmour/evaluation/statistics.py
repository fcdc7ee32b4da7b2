"""Statistics of a comparison: intervals over stories and seeds, and the number of stories that each side wins.

Stories differ far more from each other than two models differ on one story. So all tests are paired by story: each
bootstrap draw takes the same stories for both sides. The metrics' rule holds in each draw: add nats, count tokens,
divide once. Every function takes `tokens`, (n,), of each story with its closing end-of-text, and `nats_a` and `nats_b`,
(S, n) each: the nats of each seed and story under side a and side b. (n,) stands for one seed. Fewer than 2 stories
raise `UserError`; shapes that do not match, and nats that are not finite, raise `ValueError`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.random import SFC64
from scipy import stats

from plotarmour.cli import UserError

CONFIDENCE = 0.95  # share of cases in which an interval should contain the true value
CHUNK = 2**16  # stories drawn at once, over all draws of a chunk; more do not fit a processor's cache


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference between side a and side b. Below 0, or below 1 for ratios, a is better."""

    difference: Interval  # loss_a - loss_b, in nats per token
    ratio: Interval  # nats of a / nats of b over the same stories; also the ratio of losses and of bits per byte

    @property
    def perplexity_ratio(self) -> Interval:
        """Perplexity of a / perplexity of b: exp of the difference and of the ends of its interval."""
        return Interval(*map(math.exp, self.difference))


def compare_losses(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray, paired: bool = False,
                   draws: int = 10_000, seed: int = 0) -> Difference:
    """Compare two checkpoints, or two recipes that were each trained with several seeds, on the same stories.

    With one seed on each side, the interval covers other test stories: it is about two checkpoints. It is the central
    95 % of bootstrap draws, each of n of the n stories with replacement, the same ones for both sides.

    With several seeds, it covers other seeds as well: it is about two recipes. Its half-width is the square root of the
    sum of two squares: the half-width of the bootstrap over stories, applied to the mean nats of the seeds, and the
    half-width of Student's t over seeds. The variance over seeds is reduced by the part that comes from single stories,
    because the bootstrap contains it already. A side with one seed adds no variance over seeds.

    Resampling the seeds as well would give intervals that are too narrow: three resampled seeds show 2/3 of their
    variance. In 1,000 simulated cases with three seeds and 351 stories, with a large effect of the seeds, resampling
    contained the true difference in 79 %, resampling with deviations scaled by √(S / (S - 1)) in 85 %, and this method
    in 96 %. For any effect of the seeds, paired or not, it was 96 to 97 % with three seeds, and 95 % with five.

    Args:
        tokens, nats_a, nats_b: see the module.
        paired: whether seed i of a and seed i of b share noise, such as the order of the data; needs S_a = S_b. The
            degrees of freedom of t are then S - 1, otherwise Welch's.
        draws: number of bootstrap draws.
        seed: seed of the draws; the same seed gives the same draws in every version of NumPy.

    Returns:
        (Σ nats_a - Σ nats_b) / Σ tokens and Σ nats_a / Σ nats_b over all stories (means over seeds), with 95 %
        intervals.

    Example:
        Two stories have 10 and 30 tokens, 20 and 60 nats under a, and 30 and 70 under b. The difference is
        (80 - 100) / 40 = -0.5 nats per token, the ratio 0.8. A draw takes one story twice or both: -1, -1/3 or -0.5.
        Three paired seeds have differences of -0.3, -0.2 and -0.1: standard error 0.1 / √3, t = 4.30, half-width 0.248.
        With a half-width of 0.1 over stories, the result is √(0.248² + 0.1²) = 0.268.

    Source: Efron & Tibshirani 1993, chapter 13 (percentile interval); Koehn 2004 (paired over test items); Zou & Donner
    2008 (interval of a sum from intervals of its terms); Welch 1947. Measured by `benchmarks/bootstrap_coverage.py`.
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b)
    if paired and len(nats_a) != len(nats_b):
        raise ValueError(f"{len(nats_a)} seeds of a and {len(nats_b)} of b cannot be paired; expected equal numbers")
    a, b = nats_a.mean(axis=0), nats_b.mean(axis=0)
    total, sum_a, sum_b = tokens.sum(), a.sum(), b.sum()
    sums = _resampled_sums(np.stack((tokens, a, b), axis=1), draws, seed)
    ratio = sum_a / sum_b
    of_difference = _seeds_half_width(tokens, nats_a / total, nats_b / total, paired)
    # To first order, the relative error of a ratio is the difference of the relative errors of its two sides.
    mean_a, mean_b = nats_a.sum(axis=1).mean(), nats_b.sum(axis=1).mean()
    of_ratio = float(ratio) * _seeds_half_width(tokens, nats_a / mean_a, nats_b / mean_b, paired)
    return Difference(_interval((sum_a - sum_b) / total, (sums[:, 1] - sums[:, 2]) / sums[:, 0], of_difference),
                      _interval(ratio, sums[:, 1] / sums[:, 2], of_ratio))


def sign_test(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray) -> dict[str, float]:
    """Test whether each side wins half of the stories, independently of their lengths and of the size of the gains.

    Args:
        tokens, nats_a, nats_b: see the module. The side with fewer nats wins a story, by means over seeds.

    Returns:
        a_better, b_better, ties: numbers of stories. sign_p: the two-sided exact binomial p-value without ties, the
        probability that fair coins give a result at least as uneven.

    Example:
        a wins 1 of 5 stories, b wins 4: p = 2 · (1 + 5) / 2⁵ = 0.375.
    """
    _, nats_a, nats_b = _checked(tokens, nats_a, nats_b)
    difference = nats_a.mean(axis=0) - nats_b.mean(axis=0)
    a, b = int((difference < 0).sum()), int((difference > 0).sum())
    p_value = float(stats.binomtest(a, a + b).pvalue) if a + b else 1.0
    return {"a_better": a, "b_better": b, "ties": len(difference) - a - b, "sign_p": p_value}


def win_share_by_length(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray) -> pd.DataFrame:
    """Return the share of stories that a wins, by length of story.

    Args:
        tokens, nats_a, nats_b: see the module. The side with fewer nats wins a story; a tie is not a win.

    Returns:
        A row per bin: min_tokens, max_tokens, stories, a_better, share (a_better / stories), and low, high, the ends
        of the share's 95 % interval. There are 1 to 6 bins, one per 20 stories, with equal numbers of stories (±1).

    Example:
        a wins 10 of 20 stories of a bin: 0.5, from 0.299 to 0.701.

    Source: Wilson 1927; this interval stays within 0 and 1 and works for few stories.
    """
    tokens, nats_a, nats_b = _checked(tokens, nats_a, nats_b)
    n_bins = min(6, max(1, len(tokens) // 20))
    a_wins, rows = nats_a.mean(axis=0) < nats_b.mean(axis=0), []
    for stories in np.array_split(np.argsort(tokens, kind="stable"), n_bins):
        n, wins = len(stories), int(a_wins[stories].sum())
        interval = stats.binomtest(wins, n).proportion_ci(CONFIDENCE, method="wilson")
        rows.append([int(tokens[stories[0]]), int(tokens[stories[-1]]), n, wins, wins / n, interval.low, interval.high])
    return pd.DataFrame(rows, columns=["min_tokens", "max_tokens", "stories", "a_better", "share", "low", "high"])


def _checked(tokens: np.ndarray, nats_a: np.ndarray, nats_b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens (n,) and nats (S, n) as float64, and raise for what cannot be compared."""
    tokens, *sides = (np.asarray(x, dtype=np.float64) for x in (tokens, nats_a, nats_b))
    sides = [np.atleast_2d(nats) for nats in sides]
    for name, nats in zip(("nats_a", "nats_b"), sides, strict=True):
        if tokens.ndim != 1 or nats.ndim != 2 or nats.shape[1] != len(tokens) or not len(nats):
            raise ValueError(f"tokens {tokens.shape} and {name} {nats.shape}; expected (n,) and (seeds, n)")
        if not np.isfinite(nats).all():
            raise ValueError(f"{name} holds {nats[~np.isfinite(nats)][0]}; expected finite nats")
    if len(tokens) < 2:
        raise UserError(f"{len(tokens)} stories give no interval; expected at least 2. Use a larger test file.")
    return tokens, *sides


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


def _interval(value: float, drawn: np.ndarray, of_seeds: float) -> Interval:
    """Return a value with the central 95 % of draws over stories, widened by a half-width over seeds."""
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    value = float(value)
    return Interval(value, value - math.hypot(value - low, of_seeds), value + math.hypot(high - value, of_seeds))


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
