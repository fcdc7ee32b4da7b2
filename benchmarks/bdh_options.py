#!/usr/bin/env python3
"""What each option of BDH brings: the test loss of every run of a grid, less that of BDH and of the modern transformer.

The runs are those of plotarmour/recipes/bdh_options.csv or bdh_plus.csv; notebook 07 compares its own small runs in
the same way. `bdh` and `modern` have the same tokens as every run without a budget in its name; `modern-time` and the
other runs with `-time` have as many steps as take the time of `bdh` (benchmarks/same_time.py).
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.cli import run_command  # noqa: E402
from plotarmour.data.token_file import TokenFile  # noqa: E402
from plotarmour.evaluation.arms import compare_arms, group_runs  # noqa: E402
from plotarmour.evaluation.metrics import totals  # noqa: E402
from plotarmour.evaluation.scoring import evaluate_run  # noqa: E402
from plotarmour.resume import read_info  # noqa: E402
from plotarmour.run import load_run  # noqa: E402
from plotarmour.suite.steps import find_prepared  # noqa: E402
from plotarmour.training.ending import Ending  # noqa: E402

REFERENCE = ROOT / "results" / "reference"
BASES = ("bdh", "modern-time")  # arms that the others are compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder of the grid, with its token files")
    parser.add_argument("--out", type=Path, default=REFERENCE / "bdh_options.csv",
                        help="(default: results/reference/bdh_options.csv)")
    args = parser.parse_args()
    runs = sorted(path.parent for path in args.results.glob("*/DONE.json"))
    table = compared(runs, TokenFile.open(find_prepared(args.results)["test"]))
    overrides = pd.read_csv(args.results / "summary.csv").set_index("run")["overrides"]
    table.insert(1, "overrides", [overrides[run] for run in table.pop("first_run")])
    table.to_csv(args.out, index=False, float_format="%.6g", lineterminator="\n")
    print(readable(table).to_string(index=False))


def compared(runs: list[Path], test: TokenFile) -> pd.DataFrame:
    """Score test stories under runs.

    Args:
        runs: run folders; those that differ in nothing but their seed are one arm.
        test: token file of the test stories.

    Returns:
        A row per arm, best first: arm, first_run, model, seeds, steps, train_tokens, val_loss (of the checkpoints that
        are scored), loss, perplexity, bits_per_byte, and for each of `BASES` that is there: less_NAME, the loss less
        that of this arm (nats per token), with its 95 % interval over stories, and seeds where there are several.
    """
    infos, folders = {run.name: read_info(run) for run in runs}, {run.name: run for run in runs}
    scores = {run.name: evaluate_run(load_run(run), test)[0] for run in runs}
    arms, rows = {arm.name: arm for arm in group_runs(infos)}, []
    for name, arm in arms.items():
        endings, first = [Ending.read(folders[run]) for run in arm.runs], scores[arm.runs[0]]
        nats = sum(scores[run]["nats"].sum() for run in arm.runs) / len(arm.runs)
        row = {"arm": name, "first_run": arm.runs[0], "model": arm.model, "seeds": len(arm.runs),
               "steps": endings[0].step, "train_tokens": endings[0].tokens_seen,
               "val_loss": sum(ending.best_val_loss for ending in endings) / len(endings),
               **totals(nats, int(first["tokens"].sum()), int(first["bytes"].sum()))}
        for base in BASES:
            if base in arms and base != name:
                pair = compare_arms([(arm, arms[base])], scores, {run: {} for run in scores}, same_order=True).iloc[0]
                row |= {f"less_{base}{end}": pair[f"loss_difference{end}"] for end in ("", "_low", "_high")}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True)


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of `compared` for people."""
    shown = table[["arm", "seeds", "steps"]].assign(val_loss=table["val_loss"].round(3), loss=table["loss"].round(3))
    for base in BASES:
        if f"less_{base}" in table:
            shown[f"less_{base}"] = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if mean == mean else ""
                                     for mean, low, high in zip(*(table[f"less_{base}{end}"]
                                                                  for end in ("", "_low", "_high")), strict=True)]
    return shown


if __name__ == "__main__":
    run_command(main)
