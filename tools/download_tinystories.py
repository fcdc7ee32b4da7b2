#!/usr/bin/env python3
"""Download the official TinyStories texts from the Hugging Face Hub."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, next_command, run_command
from plotarmour.files import sha256_of

DATASET = "roneneldan/TinyStories"
FILES = {("v2", "train"): "TinyStoriesV2-GPT4-train.txt", ("v2", "val"): "TinyStoriesV2-GPT4-valid.txt",
         ("v1", "train"): "TinyStories-train.txt", ("v1", "val"): "TinyStories-valid.txt"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="Sizes: v2 train 2.2 GB, v2 val 22 MB; v1 train 1.9 GB, v1 val 19 MB. GPT-4 alone wrote v2; GPT-3.5 "
               "and GPT-4 wrote v1. A dropped connection is resumed. The environment variable HF_ENDPOINT names a "
               "mirror of the Hub.")
    parser.add_argument("--version", choices=("v2", "v1"), default="v2", help="which TinyStories")
    parser.add_argument("--part", choices=("train", "val", "both"), default="val",
                        help="val is enough for recipe laptop; train is a hundred times as large")
    parser.add_argument("--out", type=as_path, default=Path("data"), metavar="FOLDER", help="folder for the texts")
    add_common(parser, "force")
    return parser


def download(name: str, folder: Path, force: bool) -> tuple[Path, bool]:
    """Download one file of the dataset, unless it exists.

    Returns:
        Its path, and whether it was downloaded now.

    Raises:
        UserError: the Hub cannot be reached, or does not have the file.
    """
    path = folder / name
    if path.exists() and not force:
        return path, False
    from huggingface_hub import constants, hf_hub_download

    try:
        hf_hub_download(DATASET, name, repo_type="dataset", local_dir=folder, force_download=force)
    except Exception as error:  # the library's exceptions come from the HTTP client, which differs between its versions
        if isinstance(error, OSError) and error.errno:
            raise  # the disk, not the network: run_command prints one line
        page = f"https://huggingface.co/datasets/{DATASET}"
        raise UserError(f"{name} cannot be downloaded from {constants.ENDPOINT}: {_cause(error)}. Check the network, "
                        f"set HF_ENDPOINT to a mirror of the Hub, or put the file of {page} at {path}.") from None
    return path, True


def _cause(error: BaseException) -> str:
    """Return the first line of the innermost exception."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def main() -> None:
    args = build_parser().parse_args()
    parts = ("train", "val") if args.part == "both" else (args.part,)
    texts = []
    for part in parts:
        path, downloaded = download(FILES[args.version, part], args.out, args.force)
        existed = "" if downloaded else " (existed already; --force downloads it again)"
        print(f"{path}: {path.stat().st_size:,} bytes, SHA-256 {sha256_of(path)}{existed}", flush=True)
        texts.append(path)
    # A hash of each story decides its part: copies across the official files never stand in two parts.
    options = (["--tokenizer", "bpe:4096", "--split", "90:5:5"] if args.part == "val" else
               ["--tokenizer", "gpt2", "--split", "98:1:1"])
    print(next_command("pre_tokenize", *texts, *options, "--out", texts[0].with_suffix(".bin")))


if __name__ == "__main__":
    run_command(main)
