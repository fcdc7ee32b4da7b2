"""Texts about a run for people: its settings, how it ended, and what to do next."""

import textwrap
from pathlib import Path

from plotarmour.cli import duration
from plotarmour.config import Recipe
from plotarmour.training.ending import Ending, Reason

WIDTH = 100

NEW_SESSION = (" In a new session, attach the output of this one first, and set continue_from to its run folder "
               "{run}.")


def describe_recipe(recipe: Recipe) -> str:
    """Return all settings of a resolved recipe, grouped by subject, in lines of at most 100 characters."""
    groups = {recipe.model: recipe.architecture, "data": vars(recipe.data),
              "training": vars(recipe.training) | {"tokens_per_step": f"at most {recipe.training.tokens_per_step:,}"}}
    return "\n".join(_hanging(name, ", ".join(f"{key} {value}" for key, value in group.items()), 10)
                     for name, group in groups.items())


def describe_ending(ending: Ending, run: Path) -> str:
    """Return how a run ended, in lines for people, and what to do if it is not complete.

    Args:
        ending: of the run.
        run: its folder.
    """
    rows = {run.name: ending.label,
            "trained": f"{ending.step:,} steps, {ending.tokens_seen:,} tokens, {duration(ending.elapsed_s)} over all "
                       "sessions",
            "best": ending.best,
            "waited": f"{ending.input_wait_s:.1f} s for batches, in the last session"}
    if ending.peak_memory_mib:
        rows["memory"] = (f"{ending.peak_memory_mib / 1024:.2f} GiB at most, in micro-batches of "
                          f"{ending.micro_batch_size} rows")
    if ending.skipped_steps or ending.scaler_overflows:
        rows["no update"] = (f"in {ending.skipped_steps:,} steps that were not finite, and in "
                             f"{ending.scaler_overflows:,} that overflowed float16")
    if not ending.is_done:
        rows["next"] = ending.advice("This cell, run again,")
        if ending.reason != Reason.NON_FINITE:
            rows["next"] += NEW_SESSION.format(run=run.name)
    width = max(map(len, rows))
    return "\n".join(_hanging(key, value, width + 2) for key, value in rows.items())


def _hanging(head: str, text: str, indent: int) -> str:
    """Return a row of two columns, of which the second is wrapped."""
    return textwrap.fill(text, WIDTH, initial_indent=f"{head:<{indent}}", subsequent_indent=" " * indent,
                         break_long_words=False, break_on_hyphens=False)
