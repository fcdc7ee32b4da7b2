"""Arms of a comparison: runs that differ only in their seed are one arm, and arms are compared in pairs."""

import itertools
import json
import math
import os.path
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from plotarmour.cli import UserError
from plotarmour.config import training_settings
from plotarmour.evaluation.statistics import compare_losses, sign_test

# Budgets in which two arms can match: label, column of the budget, largest relative difference that counts as equal.
MATCHINGS = (("core parameters", "core_params", 0.05), ("parameters in all", "params", 0.05),
             ("training tokens", "train_tokens", 0.02), ("FLOPs per token", "flops_per_token", 0.05),
             ("training FLOPs", "train_flops", 0.05), ("time", "train_s", 0.10))


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed."""

    name: str  # common part of the runs' names
    model: str  # kind
    runs: tuple[str, ...]  # names, ordered by seed
    seeds: tuple[int, ...]


def group_runs(infos: dict[str, dict]) -> list[Arm]:
    """Group runs into arms, in the order of the first run of each arm.

    Args:
        infos: by run name, the content of run.json.

    Raises:
        UserError: two runs with the same settings and the same seed.

    Example:
        Runs bdh_seed-1, gpt2_seed-1, bdh_seed-2 become the arms bdh (seeds 1, 2) and gpt2 (seed 1).
    """
    groups: dict[str, dict[int, str]] = {}  # by settings: the name of the run with each seed
    for name, info in infos.items():
        recipe = info["recipe"]
        training, seed = {key: recipe["training"][key] for key in training_settings("arm")}, recipe["training"]["seed"]
        group = groups.setdefault(json.dumps([recipe["model"], recipe["architecture"], training,
                                              info["train"]["payload_sha256"]], sort_keys=True), {})
        if seed in group:
            raise UserError(f"{group[seed]} and {name} have the same settings and the same seed ({seed}); expected "
                            "different seeds. Name only one of them.")
        group[seed] = name
    arms = []
    for group in groups.values():
        seeds, names = zip(*sorted(group.items()), strict=True)
        arms.append(Arm(_common_name(names), infos[names[0]]["recipe"]["model"], names, seeds))
    names = [arm.name for arm in arms]
    return [arm if names.count(arm.name) == 1 else replace(arm, name=arm.runs[0]) for arm in arms]


def pairs_of(arms: list[Arm], reference: str, losses: dict[str, float]) -> list[tuple[Arm, Arm]]:
    """Return the pairs to compare: each arm of the reference kind with each arm of another kind, the strongest first.

    Args:
        arms: arms of the comparison.
        reference: kind of model. If no arm or every arm is of this kind, the first arm is compared with all others.
        losses: by run name, the best validation loss, which says how strong an arm is.
    """
    first = [arm for arm in arms if arm.model == reference]
    others = [arm for arm in arms if arm.model != reference]
    if not (first and others):
        first, others = arms[:1], arms[1:]
    others = sorted(others, key=lambda arm: sum(losses[run] for run in arm.runs) / len(arm.runs))
    return [(a, b) for a in first for b in others]


def ladder_of(pairs: list[tuple[Arm, Arm]], by_arm: pd.DataFrame, kinds: Sequence[str]) -> list[tuple[Arm, Arm]]:
    """Return the arms of a sequence of kinds, each with the one before it.

    Args:
        pairs: of `pairs_of`.
        by_arm: name, loss and train_tokens of each arm. Only arms with the reference's training tokens count, and of
            each kind the one with the lowest loss.
        kinds: kinds of model, each one step from the kind before it.

    Returns:
        Pairs (arm, the arm before it); none for fewer than three arms.
    """
    arms = {arm.name: arm for pair in pairs for arm in pair}
    known = by_arm[by_arm["name"].isin(arms)].dropna(subset=["train_tokens"]).set_index("name")
    if not pairs or pairs[0][0].name not in known.index:
        return []
    tolerance = next(tolerance for _, column, tolerance in MATCHINGS if column == "train_tokens")
    is_level = (known["train_tokens"].astype(float) / known.at[pairs[0][0].name, "train_tokens"] - 1).abs() <= tolerance
    best = {arms[name].model: arms[name] for name in known[is_level].sort_values("loss", ascending=False).index}
    steps = [best[kind] for kind in kinds if kind in best]
    return [(arm, before) for before, arm in itertools.pairwise(steps)] if len(steps) > 2 else []


def compare_arms(pairs: list[tuple[Arm, Arm]], scores: dict[str, pd.DataFrame], budgets: dict[str, dict],
                 same_order: bool) -> pd.DataFrame:
    """Compare pairs of arms with 95 % intervals, and below each pair its runs of equal seed.

    Args:
        pairs: pairs of arms.
        scores: by run name, a row per story with tokens and nats.
        budgets: by run name, the columns of `MATCHINGS`, and hardware.
        same_order: whether runs of one seed were trained on the same tokens in the same order.

    Returns:
        A row per pair:
        - a, b: names; is_arms: whether they are arms or runs.
        - speaks_of: what the interval covers: "recipes" (other seeds and stories), "checkpoints" (other stories), or
          "a recipe and a checkpoint" (one of the arms has one seed).
        - seeds_a, seeds_b, stories: numbers of seeds and stories.
        - loss_difference (a - b, nats per token), perplexity_ratio, bits_per_byte_ratio (a / b), each with
          its interval in _low and _high.
        - a_better, b_better, ties, sign_p: sign test over stories.
        - COLUMN_ratio (a / b) for each budget, and matched: the labels of those that are equal.
    """
    rows = []
    for a, b in pairs:
        shared_seeds = [seed for seed in a.seeds if seed in b.seeds] if len(a.runs) > 1 or len(b.runs) > 1 else []
        for one, other in [(a, b), *((_run_of(a, seed), _run_of(b, seed)) for seed in shared_seeds)]:
            several_seeds = (len(one.runs) > 1) + (len(other.runs) > 1)
            tokens, *nats = nats_of(one, other, scores)
            result = compare_losses(tokens, *nats, paired=same_order and one.seeds == other.seeds)
            row = {"a": one.name, "b": other.name, "is_arms": one is a,
                   "speaks_of": ("checkpoints", "a recipe and a checkpoint", "recipes")[several_seeds],
                   "seeds_a": len(one.runs), "seeds_b": len(other.runs), "stories": len(tokens)}
            for name, interval in (("loss_difference", result.difference),
                                   ("perplexity_ratio", result.perplexity_ratio),
                                   ("bits_per_byte_ratio", result.ratio)):
                row |= zip((name, f"{name}_low", f"{name}_high"), interval, strict=True)
            rows.append(row | sign_test(tokens, *nats) | _budget_ratios(one, other, budgets))
    return pd.DataFrame(rows)


def nats_of(a: Arm, b: Arm, scores: dict[str, pd.DataFrame]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens (n,) of the stories and the nats (S, n) of both arms' runs, for `evaluation.statistics`."""
    sides = (np.stack([scores[run]["nats"].to_numpy() for run in arm.runs]) for arm in (a, b))
    return scores[a.runs[0]]["tokens"].to_numpy(), *sides


def _run_of(arm: Arm, seed: int) -> Arm:
    """Return the run of an arm with this seed, as an arm."""
    name = arm.runs[arm.seeds.index(seed)]
    return Arm(name, arm.model, (name,), (seed,))


def _budget_ratios(a: Arm, b: Arm, budgets: dict[str, dict]) -> dict:
    """Return the columns of a pair that come from budgets: ratios of means, NaN if one is unknown."""
    ratios = {}
    for _, column, _ in MATCHINGS:
        of_a, of_b = (np.array([budgets[run].get(column) for run in arm.runs], dtype=float).mean() for arm in (a, b))
        ratios[column] = float(of_a / of_b) if of_b else math.nan
    if len({budgets[run].get("hardware") for run in (*a.runs, *b.runs)}) > 1:
        ratios["train_s"] = math.nan  # seconds on different machines cannot be compared
    equal = [label for label, column, tolerance in MATCHINGS if abs(ratios[column] - 1) <= tolerance]
    return {f"{column}_ratio": ratio for column, ratio in ratios.items()} | {"matched": ", ".join(equal)}


def _common_name(names: tuple[str, ...]) -> str:
    """Return the common prefix of names, without a trailing seed."""
    common = os.path.commonprefix(names)
    without_seed = re.sub(r"[-_. ](seed|s)?[-_. =]?\d*$", "", common) if len(names) > 1 else common
    return without_seed or common or names[0]
