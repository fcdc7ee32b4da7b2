#!/usr/bin/env python3
"""How often the 95 % intervals of a comparison hold the true value, on simulated pairs whose truth is known.

351 stories as those of the reference run on TinyStories: lengths lognormal around 190 tokens, losses that differ far
more between stories (0.5 nats per token) than between models on one story (0.09), longer stories cheaper. Seeds shift
the loss of all stories; by how much is stated in units of the difference's standard error over stories. Beside the
method of `compare_losses` stand two that resample seeds: as they are, and with their deviations spread by
√(S / (S - 1)). Two standard errors of a coverage of 95 % in 1,000 cases are 1.4 points.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.evaluation.statistics import Difference, Interval, compare_losses

LOG_LENGTH, LOG_SPREAD = 5.23, 0.31  # of ln(tokens): median 187
LOSS_A, LOSS_B = 2.57, 2.84  # true: Σ nats / Σ tokens of infinitely many stories and seeds
HARDNESS, BY_LENGTH = 0.5, 0.57  # shared by both models: between stories, and per unit of ln(tokens)
OWN, OWN_OF_SEED = 0.065, 0.04  # of each model, and of each seed, on a story of median length
STORY_ERROR = math.sqrt(2) * OWN / math.sqrt(351)  # of the difference over 351 stories, about


@dataclass(frozen=True)
class Case:
    """One row: which method, how many seeds, and how much they matter."""

    method: str
    seeds: int
    seed_spread: float = 0.0  # of one seed's loss, in STORY_ERRORs
    paired: bool = False  # 4/5 of a seed's variance is then shared by both sides


CASES = [Case("stories", 1),
         *(Case("seeds", seeds, spread) for seeds in (3, 5) for spread in (0.0, 0.5, 1.0, 2.0, 8.0)),
         *(Case("seeds", 3, spread, paired=True) for spread in (0.5, 2.0, 8.0)),
         *(Case(method, 3, spread) for method in ("resampled", "resampled, spread") for spread in (0.0, 1.0, 8.0))]


def simulate(case: Case, stories: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw tokens (n,) and nats (seeds, n) of both sides."""
    log_length = rng.normal(LOG_LENGTH, LOG_SPREAD, stories)
    tokens = np.maximum(1, np.round(np.exp(log_length)))
    # Weighted by tokens, ln(tokens) is larger by its variance: so the mean loss per token is the stated one.
    hard = rng.normal(0, HARDNESS, stories) - BY_LENGTH * (log_length - LOG_LENGTH - LOG_SPREAD**2)
    noise = np.sqrt(math.exp(LOG_LENGTH) / tokens)  # short stories vary more
    shared = math.sqrt(0.8 * case.paired)
    of_both = rng.normal(0, 1, (case.seeds, 1))
    sides = []
    for loss in (LOSS_A, LOSS_B):
        shift = shared * of_both + math.sqrt(1 - shared**2) * rng.normal(0, 1, (case.seeds, 1))
        own = OWN * rng.normal(0, 1, stories) + OWN_OF_SEED * rng.normal(0, 1, (case.seeds, stories))
        sides.append(tokens * (loss + hard + noise * own + case.seed_spread * STORY_ERROR * shift))
    return tokens, *sides


def resample_seeds(tokens: np.ndarray, a: np.ndarray, b: np.ndarray, spread: float, draws: int,
                   rng: np.random.Generator) -> Difference:
    """The method that is not ours: seeds, then stories, drawn with replacement; deviations of seeds times `spread`."""
    n, sums = len(tokens), []
    times = rng.multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)
    for side in (a, b):
        each = times @ side.T  # (draws, seeds)
        drawn = np.take_along_axis(each, rng.integers(len(side), size=each.shape), axis=1).mean(axis=1)
        sums.append(each.mean(axis=1) + spread * (drawn - each.mean(axis=1)))
    found = []
    for value in ((sums[0] - sums[1]) / (times @ tokens), sums[0] / sums[1]):
        found.append(Interval(float(value.mean()), *map(float, np.quantile(value, (0.025, 0.975)))))
    return Difference(*found)


def differences(case: Case, stories: int, cases: int, draws: int, seed: int) -> Iterator[Difference]:
    """Simulate and compare, `cases` times."""
    rng = np.random.default_rng(seed)
    for i in range(cases):
        tokens, a, b = simulate(case, stories, rng)
        if case.method in ("stories", "seeds"):
            yield compare_losses(tokens, a, b, case.paired, draws, seed=i)
        else:
            spread = math.sqrt(case.seeds / (case.seeds - 1)) if "spread" in case.method else 1.0
            yield resample_seeds(tokens, a, b, spread, draws, rng)


def coverage(found: list[Difference]) -> tuple[float, float]:
    """Shares of the cases whose interval holds the true difference, and the true ratio."""
    shares = []
    for name, true in (("difference", LOSS_A - LOSS_B), ("ratio", LOSS_A / LOSS_B)):
        intervals = [getattr(d, name) for d in found]
        shares.append(sum(i.low <= true <= i.high for i in intervals) / len(found))
    return tuple(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=351, help="(default: 351)")
    parser.add_argument("--cases", type=int, default=1000, help="simulated pairs per row (default: 1000)")
    parser.add_argument("--draws", type=int, default=2000, help="of each bootstrap (default: 2000)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "bootstrap_coverage.csv")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        found = list(differences(case, args.stories, args.cases, args.draws, seed=351))
        difference, ratio = coverage(found)
        width = np.mean([d.difference.high - d.difference.low for d in found]) / 2
        rows.append({"method": case.method, "seeds": case.seeds, "paired": int(case.paired),
                     "seed_spread": case.seed_spread, "stories": args.stories, "cases": args.cases,
                     "holds_difference": f"{difference:.3f}", "holds_ratio": f"{ratio:.3f}",
                     "half_width": f"{width:.5f}"})
        print(f"{case.method:<18} seeds {case.seeds} {'paired' if case.paired else '      '} seed spread "
              f"{case.seed_spread:3.1f}: holds the difference in {difference:.1%}, the ratio in {ratio:.1%} of cases, "
              f"half-width {width:.4f} nats per token", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.out, index=False, lineterminator="\n")


if __name__ == "__main__":
    main()
