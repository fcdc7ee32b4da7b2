"""Which learning rate of a grid is best on validation, for each architecture; and whether the grid was wide enough."""

import json
import math
from pathlib import Path

from plotarmour.config import training_settings
from plotarmour.suite.grid_state import State, read_ending, write_table

ENOUGH = 3  # rates: of two, both lie at an edge


def compare_rates(states: list[State]) -> list[dict[str, object]]:
    """Compare runs that differ in nothing but their learning rate.

    A run that was given up because its loss was not finite counts as tried: it shows where too high begins.

    Args:
        states: of the rows of a grid.

    Returns:
        A row per run, rates ascending, where at least three rates were tried: model, learning_rate, best_val_loss
        (nats per token; None where there was none), chosen, at_edge (smallest or largest tried), and settings: by what
        a group of runs differs from the model's other groups.
    """
    groups: dict[str, list] = {}
    for state in states:
        ending = read_ending(state.job, "DONE.json") or read_ending(state.job, "STOPPED.json")
        if state.job.recipe is None or ending is None:
            continue
        if state.status in ("done", "skipped") or ending["reason"] == "non-finite":
            said = _all_but_the_rate(state)
            loss = ending.get("best_val_loss")
            loss = loss if ending["reason"] != "non-finite" and loss is not None and math.isfinite(loss) else None
            groups.setdefault(json.dumps(said, sort_keys=True), []).append(
                (state.job.recipe.training.learning_rate, loss, said))
    tried = [sorted(runs, key=lambda run: run[0]) for runs in groups.values() if len({r[0] for r in runs}) >= ENOUGH]
    rows = []
    for runs in tried:
        finite = [run for run in runs if run[1] is not None]
        best = min(finite, key=lambda run: run[1]) if finite else None
        rows += [{"model": said["model"], "learning_rate": rate, "best_val_loss": loss,
                  "chosen": best is not None and rate == best[0] and loss == best[1],
                  "at_edge": rate in (runs[0][0], runs[-1][0]),
                  "settings": _told_apart(said, [group[0][2] for group in tried])} for rate, loss, said in runs]
    return rows


def tell_rates(rows: list[dict[str, object]]) -> str:
    """Put the rows of `compare_rates` into words, a line for each choice."""
    lines = []
    for row in rows:
        if not row["chosen"]:
            continue
        group = [r["learning_rate"] for r in rows if (r["model"], r["settings"]) == (row["model"], row["settings"])]
        name = f"{row['model']}{' with ' if row['settings'] else ''}{row['settings']}"
        line = (f"{name}: of {len(group)} learning rates from {min(group):g} to {max(group):g}, "
                f"{row['learning_rate']:g} is best on validation, with a loss of {row['best_val_loss']:.4f}.")
        if row["at_edge"]:
            side = "smallest" if row["learning_rate"] == min(group) else "largest"
            further = "smaller" if side == "smallest" else "larger"
            line += f" It is the {side} one tried: the best may be {further} still. Add {further} ones to the grid."
        lines.append(line)
    return "\n".join(lines)


def write_rates(states: list[State], out: Path) -> str:
    """Write learning_rates.csv where there is something to compare; return it in words, "" where there is not."""
    rows = compare_rates(states)
    if rows:
        write_table(rows, out / "learning_rates.csv")
    else:
        (out / "learning_rates.csv").unlink(missing_ok=True)  # of an earlier grid
    return tell_rates(rows)


def _all_but_the_rate(state: State) -> dict[str, object]:
    """Everything by which two runs may differ, flat, but for learning rate, place and bookkeeping."""
    recipe, settings = state.job.recipe, set(training_settings("identity")) - {"learning_rate"}
    return {"model": recipe.model, **vars(recipe.data), **recipe.architecture,
            **{key: value for key, value in vars(recipe.training).items() if key in settings}}


def _told_apart(said: dict, groups: list[dict]) -> str:
    """By what a group differs from the others of its model."""
    others = [group for group in groups if group["model"] == said["model"]]
    return ", ".join(f"{key}={value}" for key, value in said.items() if any(o.get(key) != value for o in others))
