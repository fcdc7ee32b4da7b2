#!/usr/bin/env python3
"""Continue a prompt with a trained run, or with a blend of two."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, require_run, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=as_path, help="run folder")
    parser.add_argument("--prompt", default="Once upon a time", help="how the story begins")
    parser.add_argument("--blend", type=as_path, metavar="RUN2", help="second run folder; at every token, the "
                        "probabilities of both are blended")
    parser.add_argument("--logic", type=float, default=50, metavar="PERCENT", help="share of the first run in the "
                        "blend, 0 to 100")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="at most so many tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token each time")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k most probable tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the most probable tokens that together "
                        "reach this probability; 1: from all")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="factor, at least 1, on the "
                        "log-probability of tokens that the continuation has already")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same story")
    parser.add_argument("--slide-to", type=int, help="number of tokens that GPT-2 reads again when its positions "
                        "are used up; 0 stops there (default: half its context)")
    add_common(parser, "device", "checkpoint")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if not 0 <= args.logic <= 100:
        raise UserError(f"--logic {args.logic:g} must be between 0 and 100.")
    for folder in filter(None, (args.run, args.blend)):
        require_run(folder)
    from plotarmour.run import load_run

    run, other = (folder and load_run(folder, args.checkpoint, args.device) for folder in (args.run, args.blend))
    print(run.generate(args.prompt, other, args.logic / 100, max_new_tokens=args.max_new_tokens,
                       temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                       repetition_penalty=args.repetition_penalty, seed=args.seed, slide_to=args.slide_to))


if __name__ == "__main__":
    run_command(main)
