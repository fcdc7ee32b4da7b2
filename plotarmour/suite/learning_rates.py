"""Which learning rate of a grid is best on validation, for each architecture, and whether the grid was wide enough."""

import math
from pathlib import Path

import pandas as pd

from plotarmour.config import Recipe, training_settings
from plotarmour.report.compare import write_csv
from plotarmour.training.ending import Ending, Reason

ENOUGH = 3  # learning rates: with two, each is at an edge
COLUMNS = ["model", "learning_rate", "best_val_loss", "chosen", "at_edge", "settings"]


def write_rates(runs: list[tuple[Recipe, Ending]], out: Path) -> None:
    """Compare runs that differ only in their learning rate: print which one is best, and write learning_rates.csv.

    `runs` are those of a grid that are complete or have diverged. Only where at least three rates were tried, the table
    has a row for each run, rates ascending: best_val_loss in nats per token (none where the loss was not finite, which
    shows that the rate is too high), chosen, at_edge (smallest or largest tried), and settings, in what runs of this
    model differ besides.
    """
    (out / "learning_rates.csv").unlink(missing_ok=True)  # of an earlier grid
    table = _compare(runs)
    if len(table):
        write_csv(table, out / "learning_rates.csv")
        print(_describe(table))


def _compare(runs: list[tuple[Recipe, Ending]]) -> pd.DataFrame:
    """Return the table of `write_rates`."""
    if not runs:
        return pd.DataFrame(columns=COLUMNS)
    identity = [name for name in training_settings("identity") if name != "learning_rate"]
    settings = [vars(recipe.data) | {name: getattr(recipe.training, name) for name in identity} | recipe.architecture
                for recipe, _ in runs]
    table = pd.DataFrame([(recipe.model, recipe.training.learning_rate,
                           math.nan if ending.reason == Reason.NON_FINITE else ending.best_val_loss)
                          for recipe, ending in runs], columns=COLUMNS[:3]).astype({"best_val_loss": float})
    differs = pd.DataFrame(settings, dtype=object).groupby(table["model"]).nunique(dropna=False) > 1
    table["settings"] = [", ".join(f"{name}={value}" for name, value in own.items() if differs.at[model, name])
                         for model, own in zip(table["model"], settings, strict=True)]
    groups = table.groupby(["model", "settings"], sort=False)
    rates, losses = groups["learning_rate"], groups["best_val_loss"]
    table["chosen"] = table["best_val_loss"] == losses.transform("min")
    table["at_edge"] = table["learning_rate"].eq(rates.transform("min")) | table["learning_rate"].eq(
        rates.transform("max"))
    table = table.assign(group=groups.ngroup())[rates.transform("nunique") >= ENOUGH]
    return table.sort_values(["group", "learning_rate"], ignore_index=True)[COLUMNS]


def _describe(table: pd.DataFrame) -> str:
    """Return which learning rate is best, a line for each choice."""
    lines = []
    for (model, settings), group in table.groupby(["model", "settings"], sort=False):
        low, high = group["learning_rate"].min(), group["learning_rate"].max()
        for best in group[group["chosen"]].itertuples():
            line = (f"{model}{' with ' * bool(settings)}{settings}: of {len(group)} learning rates from {low:g} to "
                    f"{high:g}, {best.learning_rate:g} is best on validation, with a loss of {best.best_val_loss:.4f}.")
            if best.at_edge:
                side, further = ("smallest", "smaller") if best.learning_rate == low else ("largest", "larger")
                line += f" It is the {side} one tried: the best may be {further} still. Add {further} ones to the grid."
            lines.append(line)
    return "\n".join(lines)
