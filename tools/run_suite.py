#!/usr/bin/env python3
"""Run the whole suite headless: pretokenize, train BDH and GPT-2, compare. Everything lands in one results folder."""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.config import recipe_names
from plotarmour.errors import HelpFormatter, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recipe", default="tiny", help=f"one of {', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--text", type=Path, help="UTF-8 text to learn from (recipe tiny brings its own)")
    parser.add_argument("--extra-text", type=Path, help="a second test set; stories that also stand in --text are "
                        "excluded and counted")
    parser.add_argument("--out", type=Path, help="results folder (default: results/RECIPE)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides",
                        help="override a setting of the recipe for both models; may be repeated")
    parser.add_argument("--gpus", type=int, default=1, metavar="N",
                        help="GPUs of this machine that train each model together")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from plotarmour.suite.batch import run_suite
    from plotarmour.suite.steps import results_folder

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the notebook that runs is ended too
    out = args.out or results_folder(args.recipe)
    run_suite(args.recipe, out, args.text, args.extra_text, args.overrides, args.gpus)
    print((out / "comparison" / "summary.txt").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_command(main)
