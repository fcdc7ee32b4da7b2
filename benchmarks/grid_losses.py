#!/usr/bin/env python3
"""The test loss of every run of a grid, with intervals: runs that differ only in their seed are one row.

Of each kind and size of model, the row that was best on validation among those with as many steps is marked `chosen`:
several learning rates are compared that way, and the test stories choose nothing. The tables of results/reference that
docs/results.md and docs/bdh-recipes.md show come from here.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.cli import UserError, run_command  # noqa: E402
from plotarmour.config import restored  # noqa: E402
from plotarmour.data.token_file import TokenFile  # noqa: E402
from plotarmour.evaluation.arms import Arm, compare_arms, group_runs  # noqa: E402
from plotarmour.evaluation.metrics import totals  # noqa: E402
from plotarmour.evaluation.scoring import evaluate_run  # noqa: E402
from plotarmour.report.compare import write_csv  # noqa: E402
from plotarmour.resume import read_info  # noqa: E402
from plotarmour.run import load_run  # noqa: E402
from plotarmour.suite.steps import find_prepared  # noqa: E402
from plotarmour.training.ending import Ending  # noqa: E402
from plotarmour.training.log import read_log  # noqa: E402

REFERENCE = ROOT / "results" / "reference"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the grid, with its token files")
    parser.add_argument("--grid", type=Path, required=True, help="the grid's CSV; rows that have no run are left out")
    parser.add_argument("--base", action="append", default=[], metavar="ROW",
                        help="a row that all others are compared with; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="CSV")
    parser.add_argument("--curves", type=Path, help="CSV for the validation loss during training")
    args = parser.parse_args()
    grid = pd.read_csv(args.grid).set_index("run")["overrides"]
    runs = [args.results / run for run in grid.index if (args.results / run / "DONE.json").exists()]
    table = compared(runs, TokenFile.open(find_prepared(args.results)["test"]), args.base)
    table.insert(1, "overrides", [grid[run] for run in table.pop("first_run")])
    write_csv(table, args.out)
    if args.curves:
        write_csv(curves(runs), args.curves)
    print(readable(table).to_string(index=False))


def compared(runs: list[Path], test: TokenFile, bases: list[str]) -> pd.DataFrame:
    """Score test stories under runs.

    Args:
        runs: run folders; those that differ in nothing but their seed are one arm.
        test: token file of the test stories.
        bases: names of arms that all others are compared with, without a seed at their ends.

    Returns:
        A row per arm, best first: arm, first_run, model, seeds, steps, train_tokens, train_flops, core_params, params,
        val_loss (best of the first seed, nats per token), chosen (no arm of this kind, size and number of steps has
        a lower one), loss, perplexity, bits_per_byte, hardware (of all its runs), and for each base less_MODEL: the
        loss less that of the base (nats per token), with its 95 % interval over stories, and over the seeds of a side
        that has several.

    Raises:
        UserError: a base that is no arm.
    """
    infos, folders = {run.name: read_info(run) for run in runs}, {run.name: run for run in runs}
    scores = {run.name: evaluate_run(load_run(run), test)[0] for run in runs}
    arms = _by_name(group_runs(infos))
    if missing := [base for base in bases if base not in arms]:
        raise UserError(f"no row {', '.join(missing)}; expected one of {', '.join(arms)}.")
    rows = []
    for name, arm in arms.items():
        row = _row(name, arm, infos, [Ending.read(folders[run]) for run in arm.runs], scores)
        for base in bases:
            if name != base:
                pair = compare_arms([(arm, arms[base])], scores, {run: {} for run in scores}, same_order=True).iloc[0]
                row |= {f"less_{arms[base].model}{end}": pair[f"loss_difference{end}"] for end in ("", "_low", "_high")}
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("loss", ignore_index=True)
    lowest = table.groupby(["model", "params", "steps"])["val_loss"].transform("min")
    table.insert(table.columns.get_loc("val_loss") + 1, "chosen", table["val_loss"] == lowest)
    return table


def _by_name(arms: list[Arm]) -> dict[str, Arm]:
    """Return arms by their names, without a seed at the end unless two arms would then have the same name."""
    short = [arm.name.rpartition("_seed-")[0] or arm.name for arm in arms]
    return {name if short.count(name) == 1 else arm.name: arm for name, arm in zip(short, arms, strict=True)}


def _row(name: str, arm: Arm, infos: dict[str, dict], endings: list[Ending], scores: dict[str, pd.DataFrame]) -> dict:
    first, info = scores[arm.runs[0]], infos[arm.runs[0]]
    recipe, nats = restored(info["recipe"]), sum(scores[run]["nats"].sum() for run in arm.runs) / len(arm.runs)
    shape = recipe.model_config(info["vocab_size"])
    flops = shape.training_flops_per_token(recipe.training.context_length)
    return {"arm": name, "first_run": arm.runs[0], "model": arm.model, "seeds": len(arm.runs),
            "steps": endings[0].step, "train_tokens": endings[0].tokens_seen,
            "train_flops": endings[0].tokens_seen * flops, "core_params": info["core_params"],
            "params": info["params"], "val_loss": endings[0].best_val_loss,
            **totals(nats, int(first["tokens"].sum()), int(first["bytes"].sum())),
            "hardware": "; ".join(sorted({infos[run]["hardware"] for run in arm.runs}))}


def curves(runs: list[Path]) -> pd.DataFrame:
    """Return the evaluations of each arm's first run: arm, step, of_steps (1 at the end), tokens_seen, val_loss."""
    tables, infos, folders = [], {run.name: read_info(run) for run in runs}, {run.name: run for run in runs}
    for name, arm in _by_name(group_runs(infos)).items():
        log = read_log(folders[arm.runs[0]] / "log.csv")
        log = log.loc[log["val_loss"].notna() & (log["step"] > 0), ["step", "tokens_seen", "val_loss"]]
        log.insert(1, "of_steps", log["step"] / log["step"].max())
        tables.append(log.assign(arm=name))
    return pd.concat(tables)[["arm", "step", "of_steps", "tokens_seen", "val_loss"]]


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of `compared` for people."""
    shown = table[["arm", "seeds", "steps"]].assign(val_loss=table["val_loss"].round(3), loss=table["loss"].round(3))
    for base in (column for column in table if column.startswith("less_") and f"{column}_low" in table):
        shown[base] = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if mean == mean else "" for mean, low, high in
                       zip(*(table[f"{base}{end}"] for end in ("", "_low", "_high")), strict=True)]
    return shown


if __name__ == "__main__":
    run_command(main)
