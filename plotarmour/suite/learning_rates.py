"""Which learning rate of a grid is best on validation, for each architecture, and whether the grid was wide enough."""

import json
import math
from pathlib import Path

import pandas as pd

from plotarmour.config import Recipe, training_settings
from plotarmour.report.compare import write_csv
from plotarmour.training.ending import Ending, Reason

ENOUGH = 3  # learning rates: with two, each is at an edge


def compare_rates(runs: list[tuple[Recipe, Ending]]) -> list[dict[str, object]]:
    """Compare runs that differ only in their learning rate.

    A run that stopped because its loss was not finite counts as tried: it shows which rate is too high.

    Args:
        runs: resolved recipe and ending of each run of a grid that is complete or has diverged.

    Returns:
        A row per run, rates ascending, where at least three rates were tried: model, learning_rate, best_val_loss
        (nats per token; None where there was none), chosen, at_edge (smallest or largest tried), and settings: in what
        a group of runs differs from the model's other groups.
    """
    groups: dict[str, list] = {}
    for recipe, ending in runs:
        diverged, loss = ending.reason == Reason.NON_FINITE, ending.best_val_loss
        settings = _all_but_the_rate(recipe)
        loss = loss if not diverged and loss is not None and math.isfinite(loss) else None
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(
            (recipe.training.learning_rate, loss, settings))
    tried = [sorted(group, key=lambda run: run[0]) for group in groups.values()
             if len({rate for rate, _, _ in group}) >= ENOUGH]
    rows = []
    for group in tried:
        finite = [run for run in group if run[1] is not None]
        best = min(finite, key=lambda run: run[1]) if finite else None
        others = [other[0][2] for other in tried]
        rows += [{"model": settings["model"], "learning_rate": rate, "best_val_loss": loss,
                  "chosen": best is not None and (rate, loss) == best[:2],
                  "at_edge": rate in (group[0][0], group[-1][0]),
                  "settings": _what_differs(settings, others)} for rate, loss, settings in group]
    return rows


def describe_rates(rows: list[dict[str, object]]) -> str:
    """Describe the rows of `compare_rates`, a line for each choice."""
    lines = []
    for row in rows:
        if not row["chosen"]:
            continue
        group = [r["learning_rate"] for r in rows if (r["model"], r["settings"]) == (row["model"], row["settings"])]
        name = f"{row['model']}{' with ' if row['settings'] else ''}{row['settings']}"
        line = (f"{name}: of {len(group)} learning rates from {min(group):g} to {max(group):g}, "
                f"{row['learning_rate']:g} is best on validation, with a loss of {row['best_val_loss']:.4f}.")
        if row["at_edge"]:
            side, further = (("smallest", "smaller") if row["learning_rate"] == min(group) else ("largest", "larger"))
            line += f" It is the {side} one tried: the best may be {further} still. Add {further} ones to the grid."
        lines.append(line)
    return "\n".join(lines)


def write_rates(runs: list[tuple[Recipe, Ending]], out: Path) -> str:
    """Write learning_rates.csv where rates can be compared, and return its description; "" where they cannot."""
    rows = compare_rates(runs)
    if rows:
        write_csv(pd.DataFrame(rows), out / "learning_rates.csv")
    else:
        (out / "learning_rates.csv").unlink(missing_ok=True)  # of an earlier grid
    return describe_rates(rows)


def _all_but_the_rate(recipe: Recipe) -> dict[str, object]:
    """Return everything in which two runs can differ, flat, without the learning rate and what changes no result."""
    settings = set(training_settings("identity")) - {"learning_rate"}
    return {"model": recipe.model, **vars(recipe.data), **recipe.architecture,
            **{key: value for key, value in vars(recipe.training).items() if key in settings}}


def _what_differs(settings: dict, groups: list[dict]) -> str:
    """Return the settings in which a group differs from the other groups of its model."""
    others = [group for group in groups if group["model"] == settings["model"]]
    return ", ".join(f"{key}={value}" for key, value in settings.items()
                     if any(other.get(key) != value for other in others))
