#!/usr/bin/env python3
"""Turn text into token files, or look at one."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from plotarmour.errors import HelpFormatter, UserError, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="With --split X.train.bin, X.val.bin and X.test.bin are written; bpe:N learns from the train part only.")
    parser.add_argument("text", nargs="*", type=Path, help="UTF-8 text files")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bpe:N (N entries), bytes, a folder with a "
                        "tokenizer.json, a run folder, or a token file whose tokenizer to use")
    parser.add_argument("--out", type=Path, help="token file to write, X.bin")
    parser.add_argument("--split", help="shares of train:val:test by story, e.g. 90:5:5 (default: no split)")
    parser.add_argument("--stories", default="endoftext", help="what makes a story: endoftext, line or file")
    parser.add_argument("--exclude", nargs="+", type=Path, default=[], metavar="TEXT",
                        help="leave out stories that also stand in these texts (near-copies count)")
    parser.add_argument("--workers", type=int, default=0, help="threads for tokenizing; 0: one per core")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("--info", type=Path, metavar="X.bin", help="print the header and the first story")
    parser.add_argument("--verify", type=Path, metavar="X.bin", help="read the whole file and compare its hash")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.workers:
        os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # before the tokenizer library starts its threads
    from plotarmour.text.pretokenize import pre_tokenize
    from plotarmour.text.tokenfile import TokenFile

    if args.info or args.verify:
        data = TokenFile.open(args.info or args.verify)
        if args.verify:
            data.verify()
            print(f"{args.verify}: whole ({data.n_tokens:,} tokens, {data.n_stories:,} stories)")
            return
        print(json.dumps(data.header, indent=2, ensure_ascii=False))
        lengths = np.diff(np.append(data.offsets, data.n_tokens).astype(np.int64))
        print("tokens per story: " + ", ".join(f"{name} {value:,.0f}" for name, value in zip(
            ("shortest", "median", "longest"), np.percentile(lengths, (0, 50, 100)), strict=True)))
        print(f"first story: {data.tokenizer().decode(data.story(0)[:200])}")
        return
    if not args.text or not args.out:
        raise UserError("expected text files and --out X.bin (or --info X.bin, --verify X.bin); see --help.")
    for path in pre_tokenize(args.text, args.tokenizer, args.out, args.split, args.stories, args.exclude, args.force):
        data = TokenFile.open(path)
        extra = "".join(f", {data.header[key]:,} {word}" for key, word in (
            ("n_empty_dropped", "empty dropped"), ("n_excluded", "excluded")) if data.header[key])
        print(f"{path}: {data.n_tokens:,} tokens, {data.n_stories:,} stories ({path.stat().st_size / 2**20:.1f} MiB)"
              f"{extra}")


if __name__ == "__main__":
    run_command(main)
