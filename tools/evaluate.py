#!/usr/bin/env python3
"""Score every story of a token file under one run: a row per story, and totals."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", type=Path, required=True, help="token file made with the run's tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSVs and figures")
    parser.add_argument("--train", type=Path, help="training token file: adds baselines, and checks that stories are "
                        "held out")
    parser.add_argument("--facts", type=Path, help=".facts.jsonl of the built-in corpus")
    parser.add_argument("--stride", type=int, help="tokens scored per sliding window in stories longer than the "
                        "context (default: half a context)")
    parser.add_argument("--checkpoint", default="best", choices=("best", "latest"), help="by validation loss, or last")
    parser.add_argument("--unfinished", action="store_true", help="score a run that has not ended, labelled")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from plotarmour.report.compare import compare_runs  # heavy: --help does without
    from plotarmour.report.verdict import for_people

    table = compare_runs([args.run], args.data, args.out, args.train, args.facts, args.stride, which=args.checkpoint,
                         device=args.device, unfinished=args.unfinished)
    print(for_people(table).to_string(index=False))
    print(f"per-story rows and totals.csv in {args.out}")


if __name__ == "__main__":
    run_command(main)
