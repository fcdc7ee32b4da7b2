#!/usr/bin/env python3
"""Turn token ids of other programs (nanoGPT's and llm.c's .bin files, .pt tensors) into a token file."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, add_common, as_path, file_size, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="End-of-text separates stories, as in nanoGPT's and llm.c's files; a file without any is one story.")
    parser.add_argument("ids", type=as_path, help="file of token ids, little-endian, or a .pt file of one "
                        "tensor, of which no code is run")
    parser.add_argument("--tokenizer", required=True, help="the one that made the ids: gpt2, a folder with a "
                        "tokenizer.json, a run folder or a token file")
    parser.add_argument("--out", type=as_path, required=True, help="token file to write, X.bin")
    parser.add_argument("--dtype", choices=("uint16", "uint32", "int32", "int64"), help="of bare ids (nanoGPT: "
                        "uint16); llm.c and .pt files have it in them")
    parser.add_argument("--format", choices=("auto", "raw", "llm.c", "pt"), default="auto", help="raw: bare ids; pt: "
                        "a tensor; auto: pt by the name, llm.c if the file begins with its magic, else raw")
    parser.add_argument("--end-of-text", type=int, metavar="ID", help="id between documents (default: the "
                        "tokenizer's; llm.c separates Llama 3's documents by 128000)")
    add_common(parser, "force")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from contrib.import_bin import import_bin

    data = import_bin(args.ids, args.tokenizer, args.out, args.dtype, args.format, args.end_of_text, args.force)
    print(f"{args.out}: {data.n_tokens:,} tokens, {data.n_stories:,} stories "
          f"({file_size(args.out.stat().st_size)}), {data.header['n_empty_dropped']:,} empty stories dropped")
    print(f"first story: {data.tokenizer().decode(data.story(0)[:200])}")


if __name__ == "__main__":
    run_command(main)
