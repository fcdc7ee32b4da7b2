#!/usr/bin/env python3
"""Turn token ids of other programs (nanoGPT's and llm.c's .bin files) into a token file."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, add_common, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="End-of-text separates stories, as in nanoGPT's and llm.c's files; a file without any is one story.")
    parser.add_argument("ids", type=Path, help="file of token ids, little-endian")
    parser.add_argument("--tokenizer", required=True, help="the one that made the ids: gpt2, a folder with a "
                        "tokenizer.json, a run folder or a token file")
    parser.add_argument("--out", type=Path, required=True, help="token file to write, X.bin")
    parser.add_argument("--dtype", help="of bare ids: uint16 (nanoGPT), uint32, int32 or int64; llm.c has it in "
                        "its header")
    parser.add_argument("--format", default="auto", help="raw (bare ids), llm.c, or auto: llm.c if the "
                        "file begins with its magic")
    parser.add_argument("--end-of-text", type=int, metavar="ID", help="id between documents (default: the "
                        "tokenizer's; llm.c separates Llama 3's documents by 128000)")
    add_common(parser, "force")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from plotarmour.data.import_bin import import_bin

    result = import_bin(args.ids, args.tokenizer, args.out, args.dtype, args.format, args.end_of_text, args.force)
    empty = f", {result.n_empty_dropped:,} empty dropped" if result.n_empty_dropped else ""
    print(f"{result.path}: {result.n_tokens:,} tokens, {result.n_stories:,} stories "
          f"({result.path.stat().st_size / 2**20:.1f} MiB) from {result.format} {result.dtype} ids{empty}")
    print(f"first story: {result.first_story}")


if __name__ == "__main__":
    run_command(main)
