#!/usr/bin/env python3
"""Find copies of stories within token files and across them: exact, normalised and near."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, refuse_existing, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="exact: the same ids. normalised: the same but for case, punctuation and spacing. near: word 5-grams "
               "with a Jaccard similarity of at least the threshold; a copy of a copy belongs to the group.")
    parser.add_argument("files", nargs="+", type=as_path, metavar="X.bin",
                        help="token files of one tokenizer, train first")
    parser.add_argument("--out", type=as_path, metavar="X.csv",
                        help="table of example pairs; X.counts.csv beside it gets the counts (default: only print)")
    parser.add_argument("--threshold", type=float, default=0.8, help="least similarity of near copies, 0.7 to 1")
    parser.add_argument("--no-near", action="store_true", help="find only exact and normalised copies")
    parser.add_argument("--examples", type=int, default=20, metavar="N", help="at most N pairs per kind and two files")
    add_common(parser, "force")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.out and args.out.suffix != ".csv":
        raise UserError(f"--out {args.out} does not end in .csv; expected a table's name, such as duplicates.csv.")
    if args.out:
        refuse_existing(args.out, args.force)
    from plotarmour.data.duplicates import find_duplicates
    from plotarmour.data.token_file import TokenFile

    if len({path.resolve() for path in args.files}) < len(args.files):
        raise UserError("a token file is named twice, so all of its stories would be copies; expected each file once. "
                        "Leave one out.")
    files = {path: TokenFile.open(path) for path in args.files}
    parts = [data.header.get("part", "all") for data in files.values()]
    if "all" in parts or len(set(parts)) < len(parts):  # not the parts of one split: their file names tell them apart
        parts = [path.name.removesuffix(".bin") for path in files]
    if len(set(parts)) < len(parts):
        parts = [str(path) for path in files]
    result = find_duplicates(dict(zip(parts, files.values(), strict=True)), args.out, args.threshold, not args.no_near,
                             args.examples)
    print(result.table())
    print("rows with copies, and copies in the first file; \"surplus\" counts all but one of each group")
    if args.out:
        print(f"{args.out}: {len(result.examples):,} examples; counts in {args.out.with_suffix('.counts.csv')}")


if __name__ == "__main__":
    run_command(main)
