#!/usr/bin/env python3
"""Train one model on token files; goes on where an earlier start of the same run stopped."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.config import MODELS, load_recipe, recipe_names
from plotarmour.errors import HelpFormatter, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--model", required=True, help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--train", type=Path, required=True, help="token file to learn from (or a text, slowly)")
    parser.add_argument("--val", type=Path, required=True, help="token file that choices rest on")
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides",
                        help="override a setting of the recipe; may be repeated")
    parser.add_argument("--resume", default="auto", help="auto, never (refuse an existing run) or must")
    parser.add_argument("--from-step", type=int, help="go back to a kept checkpoint of this step")
    parser.add_argument("--tokenizer", help="only where --train and --val are texts: gpt2, bytes, a folder, or a token "
                        "file whose tokenizer to use")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    recipe = load_recipe(args.recipe, args.model, args.overrides)
    from plotarmour.runs import train_run

    final = train_run(recipe, args.train, args.val, args.out, args.resume, args.from_step, args.tokenizer)
    print(f"{args.out}: {final['reason']} at step {final['step']:,} after {final['tokens_seen']:,} tokens and "
          f"{final['elapsed_s']:,.0f} s; best validation loss {final['best_val_loss']:.4f} at step "
          f"{final['best_step']:,}")
    if not (args.out / "DONE.json").exists():
        print("not finished: the same command goes on from here")
        if final["reason"].startswith("signal"):
            sys.exit(130)


if __name__ == "__main__":
    run_command(main)
