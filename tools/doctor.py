#!/usr/bin/env python3
"""Say what this machine is and which dtype will be used, with reasons; with --recipe, what memory training needs."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, overrides_of, run_command
from plotarmour.config import load_recipe, recipe_names
from plotarmour.models import KINDS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    plan = parser.add_argument_group("memory plan", "by arithmetic: nothing is built or allocated")
    plan.add_argument("--recipe", help=f"one of {', '.join(recipe_names())}, or a TOML file")
    plan.add_argument("--model", help=f"one of {', '.join(KINDS)}; without it all")
    add_common(plan, "set", "device")
    plan.add_argument("--vocab-size", type=int, metavar="V", help="entries of the tokenizer (default: the recipe's)")
    plan.add_argument("--memory-gib", type=float, metavar="G",
                      help="plan for a device of G GiB; without it this GPU's memory, or the RAM available now")
    plan.add_argument("--dtype", help="auto, float32, float16 or bfloat16; without it the recipe's")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.recipe is None:
        given = [f"--{name.replace('_', '-')}" for name in ("model", "vocab_size", "memory_gib", "device", "dtype")
                 if getattr(args, name) is not None] + ["--set"] * bool(args.overrides)
        if given:
            raise UserError(f"{', '.join(given)} without a recipe; expected --recipe NAME beside it.")
        from plotarmour.machine import report

        print(report())
        return
    overrides = overrides_of(args) + ([f"dtype={args.dtype}"] if args.dtype is not None else [])
    models = [args.model] if args.model else KINDS
    recipes = [load_recipe(args.recipe, model, overrides) for model in models]
    from plotarmour.data.tokenizer import vocab_size_of
    from plotarmour.memory import describe_memory

    for recipe in recipes:
        size = vocab_size_of(recipe.data.tokenizer) if args.vocab_size is None else args.vocab_size
        print(describe_memory(recipe, size, args.memory_gib), end="\n\n" if recipe is not recipes[-1] else "\n")


if __name__ == "__main__":
    run_command(main)
