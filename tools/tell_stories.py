#!/usr/bin/env python3
"""Write stories of the built-in corpus: a text, and beside it the exact nats and facts of every story."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, file_size, refuse_existing, run_command
from plotarmour.data.tales import TOKENS_PER_STORY, events_for_tokens


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", type=as_path, required=True, help="text file; X.txt gets X.facts.jsonl beside it")
    parser.add_argument("--count", type=int, default=20_000, help="how many stories")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus: same seed, same stories")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--events", default="2:4", help="least:most events per story; a story has about "
                        f"{TOKENS_PER_STORY} + 14 x events tokens (BPE-1,024)")
    length.add_argument("--tokens", type=int, help="instead of --events: tokens per story, about; 60 to 10,000")
    add_common(parser, "force")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        low, high = (int(n) for n in args.events.split(":"))
        if not 0 <= low <= high:
            raise ValueError
    except ValueError:
        raise UserError(f"--events {args.events!r} is not a range; expected least:most, e.g. 2:4.") from None
    if args.tokens is not None:
        if args.tokens < 60:
            raise UserError(f"--tokens {args.tokens} is too short for a story; expected at least 60.")
        low = high = events_for_tokens(args.tokens)
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed} must be in [0, 2**32).")
    refuse_existing(args.out, args.force)
    from plotarmour.suite.steps import tell_corpus  # imports torch, which --help does not need

    text, facts = tell_corpus(args.out, args.count, args.seed, (low, high))
    print(f"{text}: {args.count:,} stories ({file_size(text.stat().st_size)}); facts in {facts}")


if __name__ == "__main__":
    run_command(main)
