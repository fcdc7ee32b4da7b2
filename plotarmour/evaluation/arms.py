"""Arms of a comparison: runs that differ in nothing but their seed, and what two arms have in common."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from plotarmour.cli import UserError
from plotarmour.config import training_settings
from plotarmour.evaluation.statistics import Difference, compare_seeds, sign_test

UNBOUNDED = " unbounded"  # behind the name of a run that was scored with all of each story as context
# What arms can be matched by: words for people, the budget's column, how far apart still counts as the same.
MATCHINGS = (("core parameters", "params_non_embedding", 0.05), ("parameters in all", "params", 0.05),
             ("training tokens", "train_tokens", 0.02), ("FLOPs per token", "flops_per_token", 0.05),
             ("training FLOPs", "train_flops", 0.05), ("time", "train_s", 0.10))


@dataclass(frozen=True)
class Arm:
    """Runs of one recipe.

    Attributes:
        name: what their names begin with.
        model: their kind.
        runs: their names, by seed.
        seeds: of the runs.
    """

    name: str
    model: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]


def group_runs(runs: list) -> list[Arm]:
    """Put runs that differ only in their seed into arms, in the order of their first runs.

    Args:
        runs: with name, config and info, like `plotarmour.run.Run`; names differ.

    Raises:
        UserError: two runs that do not even differ in their seed.

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
                raise UserError(f"{one.name} and {other.name} are the same run (seed {one.config.training.seed}); name "
                                "it once, or train it with other seeds.")
        arms.append(Arm(_common_name([run.name for run in group]), group[0].config.model,
                        tuple(run.name for run in group), tuple(run.config.training.seed for run in group)))
    names = [arm.name for arm in arms]
    return [arm if names.count(arm.name) == 1 else dataclasses.replace(arm, name=arm.runs[0]) for arm in arms]


def pairs_of(arms: list[Arm], reference: str) -> list[tuple[Arm, Arm]]:
    """Return the pairs to compare: every arm of the reference kind with every other arm.

    Args:
        arms: of the comparison.
        reference: a kind of model. Where no arm, or every arm, is of that kind, the first arm is the reference.
    """
    first = [arm for arm in arms if arm.model == reference]
    others = [arm for arm in arms if arm.model != reference]
    return [(a, b) for a in first for b in others] if first and others else [(arms[0], b) for b in arms[1:]]


def compare_arms(pairs: list[tuple[Arm, Arm]], scores: dict[str, pd.DataFrame], budgets: dict[str, dict],
                 same_order: bool) -> pd.DataFrame:
    """Compare arms with 95 % intervals, and their runs seed by seed.

    Args:
        pairs: of `pairs_of`.
        scores: by run name, the stories' rows.
        budgets: by run name: the columns of `MATCHINGS`, and hardware.
        same_order: whether runs of one seed have read the same tokens in the same order.

    Returns:
        A row per pair of arms, and below it a row per pair of their runs of one seed: a, b, is_arms (the former),
        speaks_of ("recipes": other seeds and stories; "checkpoints": other stories alone; "a recipe and a checkpoint":
        one side has one seed), seeds_a, seeds_b (how many), difference of losses in nats per token, perplexity_ratio
        and bits_per_byte_ratio with _low and _high, stories that a and b foresee better, ties, sign_p (sign test over
        stories), and for every matching the ratio a / b of the budgets and `matched`, those that are the same.
    """
    rows = []
    for a, b in pairs:
        several = (len(a.runs) > 1) + (len(b.runs) > 1)
        rows.append({"a": a.name, "b": b.name, "is_arms": True,
                     "speaks_of": ("checkpoints", "a recipe and a checkpoint", "recipes")[several]}
                    | _compared(a.runs, b.runs, scores, same_order and a.seeds == b.seeds)
                    | _matched(a.runs, b.runs, budgets))
        couples = [(run, b.runs[b.seeds.index(seed)]) for run, seed in zip(a.runs, a.seeds, strict=True)
                   if seed in b.seeds]
        for one, other in couples if several else []:
            rows.append({"a": one, "b": other, "is_arms": False, "speaks_of": "checkpoints"}
                        | _compared([one], [other], scores, False) | _matched([one], [other], budgets))
    return pd.DataFrame(rows)


def _compared(runs_a, runs_b, scores: dict[str, pd.DataFrame], paired: bool) -> dict:
    tokens = scores[runs_a[0]]["tokens"].to_numpy()
    a, b = (np.stack([scores[run]["nats"].to_numpy() for run in runs]) for runs in (runs_a, runs_b))
    found: Difference = compare_seeds(tokens, a, b, paired=paired)
    signs = sign_test(tokens, a.mean(axis=0), b.mean(axis=0))
    row = {"seeds_a": len(a), "seeds_b": len(b), "stories": len(tokens)}
    for name, interval in (("difference", found.difference), ("perplexity_ratio", found.perplexity_ratio),
                           ("bits_per_byte_ratio", found.ratio)):
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row | {"a_better": signs.a_better, "b_better": signs.b_better, "ties": signs.ties, "sign_p": signs.p_value}


def _matched(runs_a, runs_b, budgets: dict[str, dict]) -> dict:
    """Ratios of mean budgets, NaN where one is not known, and what is the same."""
    ratios = {}
    for _, column, _ in MATCHINGS:
        a, b = (np.mean([np.nan if budgets[run].get(column) is None else float(budgets[run][column]) for run in runs])
                for runs in (runs_a, runs_b))
        ratios[column] = float(a / b) if b else math.nan
    if len({budgets[run].get("hardware") for run in (*runs_a, *runs_b)}) > 1:
        ratios["train_s"] = math.nan  # seconds of different machines say nothing of each other
    same = [words for words, column, tolerance in MATCHINGS if abs(ratios[column] - 1) <= tolerance]
    return {f"{column}_ratio": ratio for column, ratio in ratios.items()} | {"matched": ", ".join(same)}


def _common_name(names: list[str]) -> str:
    """What names have in common, without a trailing seed."""
    common = names[0]
    while not all(name.startswith(common) for name in names):
        common = common[:-1]
    if len(names) > 1:
        common = re.sub(r"[-_. ](seed|s)?[-_. =]?\d*$", "", common) or common
    return common or names[0]
