"""Arms of a comparison: runs that differ only in their seed are one arm, and arms are compared in pairs."""

import dataclasses
import json
import math
import os.path
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from plotarmour.cli import UserError
from plotarmour.config import training_settings
from plotarmour.evaluation.statistics import compare_seeds, sign_test

# Budgets in which two arms can match: label, column of the budget, largest relative difference that counts as equal.
MATCHINGS = (("core parameters", "params_non_embedding", 0.05), ("parameters in all", "params", 0.05),
             ("training tokens", "train_tokens", 0.02), ("FLOPs per token", "flops_per_token", 0.05),
             ("training FLOPs", "train_flops", 0.05), ("time", "train_s", 0.10))


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed.

    Attributes:
        name: common part of the runs' names.
        model: kind of model.
        runs: names of the runs, ordered by seed.
        seeds: seeds of the runs.
    """

    name: str
    model: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]


def group_runs(runs: list) -> list[Arm]:
    """Group runs into arms, in the order of the first run of each arm.

    Args:
        runs: objects with `name`, `config` and `info`, such as `plotarmour.run.Run`, with different names.

    Raises:
        UserError: two runs with the same settings and the same seed.

    Example:
        Runs bdh_seed-1, gpt2_seed-1, bdh_seed-2 become the arms bdh (seeds 1, 2) and gpt2 (seed 1).
    """
    groups: dict[str, list] = {}
    for run in runs:
        training = {key: getattr(run.config.training, key) for key in training_settings("arm")}
        key = json.dumps([run.config.model, run.config.architecture, training, run.info["train"]["payload_sha256"]],
                         sort_keys=True)
        groups.setdefault(key, []).append(run)
    arms = []
    for group in groups.values():
        group.sort(key=lambda run: run.config.training.seed)
        for one, other in zip(group, group[1:], strict=False):
            if one.config.training.seed == other.config.training.seed:
                raise UserError(f"{one.name} and {other.name} have the same settings and the same seed "
                                f"({one.config.training.seed}); expected different seeds. Name only one of them.")
        arms.append(Arm(_common_name([run.name for run in group]), group[0].config.model,
                        tuple(run.name for run in group), tuple(run.config.training.seed for run in group)))
    names = [arm.name for arm in arms]
    return [arm if names.count(arm.name) == 1 else dataclasses.replace(arm, name=arm.runs[0]) for arm in arms]


def pairs_of(arms: list[Arm], reference: str) -> list[tuple[Arm, Arm]]:
    """Return the pairs to compare: each arm of the reference kind with each arm of another kind.

    Args:
        arms: arms of the comparison.
        reference: kind of model. If no arm or every arm is of this kind, the first arm is compared with all others.
    """
    first = [arm for arm in arms if arm.model == reference]
    others = [arm for arm in arms if arm.model != reference]
    return [(a, b) for a in first for b in others] if first and others else [(arms[0], b) for b in arms[1:]]


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
        - difference (loss of a - loss of b, nats per token), perplexity_ratio, bits_per_byte_ratio (a / b), each with
          its interval in _low and _high.
        - a_better, b_better, ties, sign_p: sign test over stories.
        - COLUMN_ratio (a / b) for each budget, and matched: the labels of those that are equal.
    """
    rows = []
    for a, b in pairs:
        several_seeds = (len(a.runs) > 1) + (len(b.runs) > 1)
        rows.append({"a": a.name, "b": b.name, "is_arms": True,
                     "speaks_of": ("checkpoints", "a recipe and a checkpoint", "recipes")[several_seeds]}
                    | _losses(a.runs, b.runs, scores, same_order and a.seeds == b.seeds)
                    | _budgets(a.runs, b.runs, budgets))
        same_seed = [(run, b.runs[b.seeds.index(seed)]) for run, seed in zip(a.runs, a.seeds, strict=True)
                     if seed in b.seeds]
        for one, other in same_seed if several_seeds else []:
            rows.append({"a": one, "b": other, "is_arms": False, "speaks_of": "checkpoints"}
                        | _losses([one], [other], scores, False) | _budgets([one], [other], budgets))
    return pd.DataFrame(rows)


def _losses(runs_a, runs_b, scores: dict[str, pd.DataFrame], paired: bool) -> dict:
    """Return the columns of a pair that come from nats."""
    tokens = scores[runs_a[0]]["tokens"].to_numpy()
    a, b = (np.stack([scores[run]["nats"].to_numpy() for run in runs]) for runs in (runs_a, runs_b))
    result = compare_seeds(tokens, a, b, paired=paired)
    signs = sign_test(tokens, a.mean(axis=0), b.mean(axis=0))
    row = {"seeds_a": len(a), "seeds_b": len(b), "stories": len(tokens)}
    for name, interval in (("difference", result.difference), ("perplexity_ratio", result.perplexity_ratio),
                           ("bits_per_byte_ratio", result.ratio)):
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row | {"a_better": signs.a_better, "b_better": signs.b_better, "ties": signs.ties, "sign_p": signs.p_value}


def _budgets(runs_a, runs_b, budgets: dict[str, dict]) -> dict:
    """Return the columns of a pair that come from budgets: ratios of means, NaN if one is unknown."""
    ratios = {}
    for _, column, _ in MATCHINGS:
        a, b = (np.mean([np.nan if budgets[run].get(column) is None else float(budgets[run][column]) for run in runs])
                for runs in (runs_a, runs_b))
        ratios[column] = float(a / b) if b else math.nan
    if len({budgets[run].get("hardware") for run in (*runs_a, *runs_b)}) > 1:
        ratios["train_s"] = math.nan  # seconds on different machines cannot be compared
    equal = [label for label, column, tolerance in MATCHINGS if abs(ratios[column] - 1) <= tolerance]
    return {f"{column}_ratio": ratio for column, ratio in ratios.items()} | {"matched": ", ".join(equal)}


def _common_name(names: list[str]) -> str:
    """Return the common prefix of names, without a trailing seed."""
    common = os.path.commonprefix(names)
    if len(names) > 1:
        common = re.sub(r"[-_. ](seed|s)?[-_. =]?\d*$", "", common) or common
    return common or names[0]
