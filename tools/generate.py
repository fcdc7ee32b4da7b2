#!/usr/bin/env python3
"""Continue a prompt with a trained run."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, add_common, require_run, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--prompt", default="Once upon a time", help="how the story begins")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="at most so many tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token each time")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k most probable tokens; 0: from all")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the most probable tokens that together "
                        "reach this probability; 1: from all")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same story")
    parser.add_argument("--slide-to", type=int, help="number of tokens that GPT-2 reads again when its positions "
                        "are used up; 0 stops there (default: half its context)")
    add_common(parser, "device", "checkpoint")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    require_run(args.run)
    from plotarmour.evaluation.generation import generate
    from plotarmour.run import load_run

    run = load_run(args.run, args.checkpoint, args.device)
    prompt = run.tokenizer.encode(args.prompt)
    new = generate(run.model, prompt, run.tokenizer.end_of_text_id, run.machine, args.max_new_tokens, args.temperature,
                   args.top_k, args.top_p, args.seed, args.slide_to)
    print(run.tokenizer.decode([*prompt, *new]))


if __name__ == "__main__":
    run_command(main)
