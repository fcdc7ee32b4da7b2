#!/usr/bin/env python3
"""Turn text into token files, or inspect one. A stopped command continues when it is given again."""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, file_size, run_command
from plotarmour.data.pipeline import BACKENDS
from plotarmour.data.pretokenize import BPE_BYTES, pre_tokenize
from plotarmour.data.token_file import TokenFile, story_bounds, unknown_words

BARS = 40  # characters


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="With --split X.train.bin, X.val.bin and X.test.bin are written; bpe:N and words:N "
               "learn from the train part only, bpe:N:all and words:N:all from all of the text. "
               "Existing files of the same text and the same settings are kept.")
    parser.add_argument("text", nargs="*", type=as_path, help="files or patterns, read in this order: UTF-8 text or "
                        ".jsonl, each also .gz; .parquet; - for plain text from standard input")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bpe:N (N entries), words:N (N words), bytes, "
                        "a folder with a tokenizer.json, a run folder, or a token file whose tokenizer to use")
    parser.add_argument("--out", type=as_path, help="token file to write, X.bin")
    parser.add_argument("--split", help="shares of train:val:test by story, e.g. 90:5:5 (default: no split)")
    parser.add_argument("--stories", default="endoftext", help="what makes a story in plain text: endoftext, line, "
                        "paragraph (between blank lines) or file; a row of .jsonl or .parquet always is one")
    parser.add_argument("--strip-prefix", action="store_true", help="with --stories line: leave out what comes "
                        "before the first tab of each line, such as Genesis 1:1")
    parser.add_argument("--text-column", default="text", help="column that holds the text, in .jsonl and .parquet")
    parser.add_argument("--exclude", nargs="+", type=as_path, default=[], metavar="TEXT",
                        help="leave out stories that also stand in these texts, compared without case, punctuation and "
                        "spacing")
    parser.add_argument("--errors", default="strict", help="bytes that are not UTF-8: strict refuses the text, "
                        "replace puts U+FFFD in their place and counts them")
    parser.add_argument("--bpe-bytes", type=int, default=BPE_BYTES, metavar="BYTES",
                        help="text that bpe:N and words:N learn from, at most: a sample spread over the train part")
    parser.add_argument("--backend", default="auto", help=f"encoder: {', '.join(BACKENDS)}; the ids are the same")
    parser.add_argument("--workers", type=int, default=0, help="threads that encode; 0: one per core")
    add_common(parser, "force")
    parser.add_argument("--info", type=as_path, metavar="X.bin", help="print sizes, first story, lengths and header")
    parser.add_argument("--verify", nargs="?", const=True, metavar="X.bin",
                        help="read the whole file and compare its hashes; without a name and with texts: read existing "
                        "files and the texts whole before the files are kept")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.workers < 0:
        raise UserError(f"--workers {args.workers} is negative; expected 1 or more, or 0 for one per core.")
    if args.workers:
        for variable in ("RAYON_NUM_THREADS", "FASTOKENS_BPE_THREADS"):  # before a library starts its threads
            os.environ[variable] = str(args.workers)
    if args.info or isinstance(args.verify, str):
        if isinstance(args.verify, str):
            verify(TokenFile.open(args.verify))
        elif args.verify:
            verify(TokenFile.open(args.info))
        if args.info:
            show(TokenFile.open(args.info))
        return
    if not args.text or not args.out:
        missing = "--out is missing; expected --out X.bin" if args.text else "no text is named; expected text files"
        raise UserError(f"{missing}. Add it, or look at a token file with --info X.bin or --verify X.bin.")
    if args.strip_prefix and args.stories != "line":
        raise UserError(f"--strip-prefix and --stories {args.stories} do not fit; expected --stories line, "
                        "whose prefixes end with a tab.")
    stories = "line_without_prefix" if args.strip_prefix else args.stories
    paths = pre_tokenize(args.text, args.tokenizer, args.out, args.split, stories, args.exclude, args.force,
                        verify=bool(args.verify), errors=args.errors, text_column=args.text_column,
                        bpe_bytes=args.bpe_bytes, backend=args.backend)
    for path in paths:
        data = TokenFile.open(path)
        print(f"{path}: {data.n_tokens:,} tokens, {data.n_stories:,} stories ({file_size(path.stat().st_size)})")
    extra = [f"{data.header[key]:,} {word}" for key, word in (
        ("n_empty_dropped", "empty stories dropped"), ("n_excluded", "stories excluded"),
        ("n_replaced", "characters replaced by U+FFFD")) if data.header.get(key)]
    if extra:
        print(f"of the whole text: {', '.join(extra)}")


def verify(data: TokenFile) -> None:
    """Read a token file whole and print that it is not damaged."""
    data.verify()
    print(f"{data.path}: whole ({data.n_tokens:,} tokens, {data.n_stories:,} stories)")


def show(data: TokenFile) -> None:
    """Print what a token file holds, its first story, lengths and header."""
    header, size, n_bytes = data.header, data.path.stat().st_size, int(data.story_bytes.sum(dtype=np.int64))
    print(f"{data.path}: {size:,} bytes; {data.n_stories:,} stories, {data.n_tokens:,} tokens, {n_bytes:,} UTF-8 "
          f"bytes; {n_bytes / data.n_tokens:.2f} bytes per token")
    texts = ", ".join(f"{source['name']} ({source['bytes']:,} bytes)" for source in header["source"])
    print(f"text: {texts}; a story by {header.get('stories')}; part {header.get('part')}, split {header.get('split')}")
    kind = header["tokenizer"]["kind"]
    print(f"tokenizer: {kind}, {header['vocab_size']:,} entries"
          f"{', learned from all of the text, held-out stories too' if kind.endswith(':all') else ''}")
    if sentence := unknown_words(data):
        print(sentence)
    print(f"\nfirst story: {data.tokenizer().decode(data.story(0)[:200])}")
    show_lengths(data)
    print(f"\nheader: {json.dumps(header, indent=2, ensure_ascii=False)}")


def show_lengths(data: TokenFile) -> None:
    """Print how long the stories of a token file are."""
    lengths = np.diff(story_bounds(data)) - 1
    marks = np.percentile(lengths, (0, 5, 25, 50, 75, 95, 100))
    print("\ntokens per story: " + ", ".join(f"{name} {value:,.0f}" for name, value in zip(
        ("shortest", "5 %", "25 %", "median", "75 %", "95 %", "longest"), marks, strict=True)))
    edges = 2 ** np.arange(0, int(lengths.max()).bit_length() + 1)
    counts, _ = np.histogram(lengths, [0, *edges.tolist()])
    for low, high, n in zip([0, *edges.tolist()], edges.tolist(), counts, strict=False):
        if n:
            print(f"{low:>9,} to {high - 1:>9,} {'#' * max(1, round(BARS * n / counts.max())):<{BARS}} {n:,}")


if __name__ == "__main__":
    run_command(main)
