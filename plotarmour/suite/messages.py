"""A run in words: what it is going to do, how it ended, and what to do next."""

import math
import textwrap
from pathlib import Path

from plotarmour.config import Recipe
from plotarmour.evaluation.metrics import perplexity
from plotarmour.training.progress import duration

WIDTH = 100

ENDED = {"max_steps": "done: all steps taken", "schedule_minutes": "done: the schedule's minutes are over",
         "early stopping": "done: validation had stopped improving",
         "time budget": "stopped: this session's time is over", "non-finite": "stopped: loss or gradients not finite",
         "lost a process": "stopped: another process of this run has died"}
RESUME = ("Run the cell again: it goes on from step {last_checkpoint:,}. In a new session, attach this one's output "
          "first, and set continue_from to its run folder {run}.")
NEXT = {"non-finite": "Ten steps in a row were not finite, and no update was made of them; the checkpoint of step "
                      "{last_checkpoint:,} is the last good one. Going on from there is likely to "
                      "meet the same: start anew in another results folder with a lower learning_rate in overrides.",
        "lost a process": "What it said, if anything, stands above the curves. " + RESUME}

UNTRAINED = ", before any training: not better, or not evaluated, since"


def tell_recipe(recipe: Recipe) -> str:
    """Tell all settings of a resolved recipe, grouped by what they are about, in lines of at most 100 characters."""
    t = vars(recipe.training).copy()
    ends = {key: t.pop(key) for key in ("max_steps", "schedule_minutes", "patience", "max_minutes")}
    log = {key: t.pop(key) for key in ("log_interval", "eval_interval", "eval_tokens", "checkpoint_interval",
                                       "keep_every")}
    batch = {key: t.pop(key) for key in ("rows_per_step", "micro_batch_size", "context_length", "windows", "seed")}
    batch["tokens_per_step"] = f"at most {recipe.training.tokens_per_step:,}"
    machine = {key: t.pop(key) for key in ("device", "dtype")}
    groups = {recipe.model: recipe.architecture, "batch": batch, "ends": ends, "updates": t, "log": log,
              "machine": machine}
    return "\n".join(_hanging(name, ", ".join(f"{key} {value}" for key, value in group.items()), 9)
                     for name, group in groups.items())


def tell_ending(final: dict, run: Path) -> str:
    """Tell how a run ended, in lines for people, and what to do where it is not done.

    Args:
        final: what DONE.json or STOPPED.json holds.
        run: its folder.
    """
    reason, best = final["reason"], final["best_val_loss"]
    untrained = UNTRAINED if final["best_step"] == 0 < final["step"] else ""
    is_done = ENDED.get(reason, "").startswith("done")
    rows = {run.name: ENDED.get(reason, f"stopped by {reason}"),
            "trained": f"{final['step']:,} steps, {final['tokens_seen']:,} tokens, {duration(final['elapsed_s'])} over "
                       "all sessions",
            "best": f"validation loss {best:.4f} (perplexity {perplexity(best):,.2f}) at step "
                    f"{final['best_step']:,}{untrained}" if math.isfinite(best) else "never evaluated"}
    if final.get("input_wait_s") is not None:
        rows["waited"] = f"{final['input_wait_s']:.1f} s for batches, in the last session"
    if final.get("peak_memory_mib"):
        rows["memory"] = (f"{final['peak_memory_mib'] / 1024:.2f} GiB at most, in micro-batches of "
                          f"{final.get('micro_batch_size', '?')} rows")
    if final["skipped_steps"] or final["scaler_overflows"]:
        rows["no update"] = (f"in {final['skipped_steps']:,} steps that were not finite, and in "
                             f"{final['scaler_overflows']:,} that overflowed float16")
    if not is_done:
        rows["next"] = NEXT.get(reason, RESUME).format(run=run.name, **final)
    width = max(map(len, rows))
    return "\n".join(_hanging(key, value, width + 2) for key, value in rows.items())


def _hanging(head: str, text: str, indent: int) -> str:
    """A row of two columns, the second one wrapped."""
    return textwrap.fill(text, WIDTH, initial_indent=f"{head:<{indent}}", subsequent_indent=" " * indent,
                         break_long_words=False, break_on_hyphens=False)
