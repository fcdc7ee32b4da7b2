#!/usr/bin/env python3
"""Compare runs on the same stories: verdict with intervals, totals, baselines, figures, a report."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, add_common, as_path, refuse_existing, require_run, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("runs", nargs="+", type=as_path, metavar="RUN", help="run folders, all of one tokenizer; runs "
                        "that differ only in their seed are put together")
    parser.add_argument("--data", type=as_path, required=True, help="token file to score, best the test part")
    parser.add_argument("--out", type=as_path, required=True, help="folder for the CSVs and figures")
    parser.add_argument("--train", type=as_path, help="training token file: adds baselines, and checks that stories "
                        "are held out and do not overlap with it")
    parser.add_argument("--facts", type=as_path, help=".facts.jsonl of the built-in corpus")
    parser.add_argument("--stride", type=int, help="tokens scored per sliding window in stories longer than the "
                        "context (default: half a context)")
    parser.add_argument("--title", help="of the figure (default: the names of token file and checkpoint)")
    parser.add_argument("--unfinished", action="store_true", help="compare runs that have not ended, too, labelled")
    add_common(parser, "device", "checkpoint", "force")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    for run in args.runs:
        require_run(run)
    refuse_existing(args.out / "totals.csv", args.force)
    from plotarmour.report.compare import compare_runs  # heavy: --help does without

    compare_runs(args.runs, args.data, args.out, args.train, args.facts, args.stride, args.title, args.checkpoint,
                 args.device, args.unfinished)
    print((args.out / "summary.txt").read_text(encoding="utf-8"))
    print(f"report.html, totals, per-story rows and figures in {args.out}")


if __name__ == "__main__":
    run_command(main)
