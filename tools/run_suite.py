#!/usr/bin/env python3
"""Run the whole suite headless: pretokenize, train BDH and GPT-2, compare. Everything lands in one results folder.

With --grid, a training run for each row of a CSV instead, and summary.csv with a row for each. The same command goes
on: runs that are done are skipped, stopped ones continue, failed ones are tried again.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, run_command
from plotarmour.config import recipe_names


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recipe", default="tiny", help=f"one of {', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--text", type=Path, help="UTF-8 text to learn from (recipe tiny brings its own)")
    parser.add_argument("--extra-text", type=Path, help="a second test set; stories that also stand in --text are "
                        "excluded and counted")
    parser.add_argument("--out", type=Path, help="results folder (default: results/RECIPE, or results/GRID without "
                        "its .csv)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides",
                        help="override a setting of the recipe for both models, or all rows; may be repeated")
    parser.add_argument("--gpus", type=int, default=1, metavar="N",
                        help="GPUs of this machine that train each model together")
    parser.add_argument("--grid", type=Path, metavar="CSV", help="a row is a run, a column a parameter of the notebook "
                        "(model, overrides, ...); a column run names the run folders")
    parser.add_argument("--notebook", type=Path, help="what a row of the grid runs (default: notebooks/02_train.ipynb)")
    parser.add_argument("--at-once", type=int, default=1, metavar="N",
                        help="rows at a time: each on a GPU of its own, or on its share of the CPU cores")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    ends = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # no SIGHUP on Windows
    for number in ends:  # all end like Ctrl-C: the notebook that runs is ended too
        if signal.getsignal(number) != signal.SIG_IGN:  # which nohup sets
            signal.signal(number, signal.default_int_handler)
    if args.grid is not None:
        run_rows(args)
        return
    from plotarmour.suite.batch import run_suite
    from plotarmour.suite.steps import results_folder

    if args.notebook is not None or args.at_once != 1:
        raise UserError("--notebook and --at-once are for the rows of a grid; expected --grid CSV beside them.")
    out = args.out or results_folder(args.recipe)
    run_suite(args.recipe, out, args.text, args.extra_text, args.overrides, args.gpus)
    print((out / "comparison" / "summary.txt").read_text(encoding="utf-8"))


def run_rows(args: argparse.Namespace) -> None:
    from plotarmour.suite.grid_runs import run_grid, tell_failures
    from plotarmour.suite.notebooks import ROOT
    from plotarmour.suite.steps import results_folder

    out = args.out or results_folder(str(args.grid))
    states = run_grid(args.grid, args.notebook or ROOT / "notebooks" / "02_train.ipynb", args.recipe, out, args.text,
                      args.extra_text, args.overrides, args.gpus, args.at_once)
    print(f"{len(states)} runs: {out / 'summary.csv'}")
    failures = tell_failures(states)
    if failures:
        print("\n".join(failures), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
