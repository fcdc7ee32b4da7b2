#!/usr/bin/env python3
"""Tell stories of the built-in corpus: text, and beside it the exact nats and facts of every story."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.errors import UserError, run_command
from plotarmour.suite.steps import tell_corpus


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="text file; X.txt gets X.facts.jsonl beside it")
    parser.add_argument("--count", type=int, default=20_000, help="how many stories")
    parser.add_argument("--seed", type=int, default=0, help="of the corpus: same seed, same stories")
    parser.add_argument("--events", default="2:4", help="least:most events per story; a story has about 62 + 14 x "
                        "events tokens (BPE-1,024), so 0:0 tells short ones and 700:720 some of 10,000 tokens")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        low, high = (int(n) for n in args.events.split(":"))
        if not 0 <= low <= high:
            raise ValueError
    except ValueError:
        raise UserError(f"--events {args.events!r} is not a range; expected least:most, e.g. 2:4.") from None
    text, facts = tell_corpus(args.out, args.count, args.seed, (low, high))
    print(f"{text}: {args.count:,} stories ({text.stat().st_size / 2**20:.1f} MiB); facts in {facts}")


if __name__ == "__main__":
    run_command(main)
