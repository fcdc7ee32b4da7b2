#!/usr/bin/env python3
"""Fetch the official texts of TinyStories; a download that was cut goes on where it was."""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, run_command

HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
FILES = {("v2", "train"): "TinyStoriesV2-GPT4-train.txt", ("v2", "valid"): "TinyStoriesV2-GPT4-valid.txt",
         ("v1", "train"): "TinyStories-train.txt", ("v1", "valid"): "TinyStories-valid.txt"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="Sizes: v2 train 2.2 GB, v2 valid 22 MB; v1 train 1.9 GB, v1 valid 19 MB. GPT-4 alone wrote v2, GPT-3.5 "
               "and GPT-4 wrote v1.")
    parser.add_argument("--version", choices=("v2", "v1"), default="v2", help="which TinyStories")
    parser.add_argument("--part", choices=("train", "valid", "both"), default="valid",
                        help="valid is enough for recipe laptop; train is a hundred times as much")
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="FOLDER", help="where to put the texts")
    parser.add_argument("--base-url", default=HUB, metavar="URL", help="where to fetch them: the hub or a mirror")
    parser.add_argument("--force", action="store_true", help="fetch again what is there already")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from plotarmour.crawl.downloads import download

    parts = ("train", "valid") if args.part == "both" else (args.part,)
    texts = []
    for part in parts:
        name = FILES[args.version, part]
        done = download(f"{args.base_url.rstrip('/')}/{name}", args.out / name, args.force)
        print(f"{done.path}: {done.n_bytes:,} bytes, SHA-256 {done.sha256}{'' if done.fetched else ' (was there)'}",
              flush=True)
        texts.append(done.path.as_posix())
    # a hash of each story decides its part, so that copies across the official files never stand in two parts
    how = (["--tokenizer", "bpe:4096", "--split", "90:5:5"] if args.part == "valid" else
           ["--tokenizer", "gpt2", "--split", "98:1:1"])
    tool = Path(sys.argv[0]).with_name("pre_tokenize.py").as_posix()  # as it was typed: it works from the same folder
    print("next: " + shlex.join(["python", tool, *texts, *how, "--out", Path(texts[0]).with_suffix(".bin").as_posix()]))


if __name__ == "__main__":
    run_command(main)
