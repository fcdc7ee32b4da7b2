"""Which learning rate of a grid is best on validation, for each architecture, and whether the grid was wide enough."""

import json
import math
from pathlib import Path

import pandas as pd

from plotarmour.config import Recipe, training_settings
from plotarmour.report.compare import write_csv
from plotarmour.training.ending import Ending, Reason

ENOUGH = 3  # learning rates: with two, each is at an edge


def compare_rates(runs: list[tuple[Recipe, Ending]]) -> pd.DataFrame:
    """Compare runs that differ only in their learning rate.

    A run that stopped because its loss was not finite counts as tried: it shows which rate is too high.

    Args:
        runs: resolved recipe and ending of each run of a grid that is complete or has diverged.

    Returns:
        A row per run, rates ascending, where at least three rates were tried: model, learning_rate, best_val_loss
        (nats per token; NaN where there was none), chosen, at_edge (smallest or largest tried), and settings: in what
        a group of runs differs from the model's other groups.
    """
    identity = set(training_settings("identity")) - {"learning_rate"}
    groups: dict[str, list[tuple[Recipe, Ending]]] = {}
    for recipe, ending in runs:
        settings = {key: value for key, value in vars(recipe.training).items() if key in identity}
        settings |= {"model": recipe.model, **vars(recipe.data), **recipe.architecture}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append((recipe, ending))
    tables = {}
    for settings, group in groups.items():
        table = pd.DataFrame([{
            "model": recipe.model, "learning_rate": recipe.training.learning_rate,
            "best_val_loss": math.nan if ending.reason == Reason.NON_FINITE else ending.best_val_loss,
        } for recipe, ending in group]).astype({"best_val_loss": float}).sort_values("learning_rate")
        rates, losses = table["learning_rate"], table["best_val_loss"]
        if rates.nunique() >= ENOUGH:
            tables[settings] = table.assign(chosen=losses == losses.min(),
                                            at_edge=rates.isin([rates.min(), rates.max()]))
    settings = pd.DataFrame(map(json.loads, tables), index=list(tables), dtype=object)
    for key, table in tables.items():
        siblings = settings[settings["model"] == settings.at[key, "model"]]
        table["settings"] = ", ".join(f"{name}={siblings.at[key, name]}" for name in siblings
                                      if siblings[name].nunique(dropna=False) > 1)
    return pd.concat(tables.values(), ignore_index=True) if tables else pd.DataFrame()


def describe_rates(table: pd.DataFrame) -> str:
    """Describe the table of `compare_rates`, a line for each choice."""
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


def write_rates(runs: list[tuple[Recipe, Ending]], out: Path) -> str:
    """Write learning_rates.csv where rates can be compared, and return its description; "" where they cannot."""
    table = compare_rates(runs)
    if table.empty:
        (out / "learning_rates.csv").unlink(missing_ok=True)  # of an earlier grid
        return ""
    write_csv(table, out / "learning_rates.csv")
    return describe_rates(table)
