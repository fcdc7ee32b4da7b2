#!/usr/bin/env python3
"""How many steps of one model take as long as a step of another: what "for the same time" means in a grid.

Seconds of whole runs follow the machine's other work, and a schedule that ends by the clock gives other weights every
time. So the time of a step is measured here once, in turn, and a run "for the same time" has as many steps as that
allows: anybody can repeat it to the bit.

Every arm trains its own model (forward, loss, backward, clipping, AdamW) on a fixed batch of the recipe's shape. After
every block of the first arm the others take as many steps, in changing order; the ratio is the median over blocks of
the arm's time to the mean of the first arm's blocks before and after it. On a GPU give `device=cuda` in every arm.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from training_loop import ROOT, Plain, write_rows

from plotarmour.cli import run_command
from plotarmour.config import load_recipe
from plotarmour.data.token_file import TokenFile
from plotarmour.suite.steps import prepare

ARMS = ["bdh", "gpt2", "gpt2;n_layer=5;n_embd=184"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="laptop", help="(default: laptop)")
    parser.add_argument("--text", type=Path, help="for recipe laptop, such as 5 MB of TinyStories")
    parser.add_argument("--arm", action="append", metavar="model;key=value;...",
                        help=f"may be repeated; the first one is the measure (default: {' '.join(ARMS)})")
    parser.add_argument("--blocks", type=int, default=25, help="(default: 25)")
    parser.add_argument("--steps", type=int, default=12, help="per block (default: 12)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "same_time.csv")
    args = parser.parse_args()
    arms = args.arm or ARMS
    recipes = [load_recipe(args.recipe, arm.split(";")[0], arm.split(";")[1:]) for arm in arms]
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(recipes[0], Path(folder), None if recipes[0].data.corpus_stories else args.text)
        data = TokenFile.open(files["train"])
        loops = [Plain(_of_one_length(recipe), data, "summed_nats") for recipe in recipes]
        for each in loops:
            each.steps(args.steps)
        first, others = [loops[0].steps(args.steps)], [[] for _ in loops[1:]]
        for block in range(args.blocks):
            order = list(range(1, len(loops)))
            for i in order if block % 2 else order[::-1]:
                others[i - 1].append(loops[i].steps(args.steps))
            first.append(loops[0].steps(args.steps))
    around = [(before + after) / 2 for before, after in zip(first, first[1:], strict=False)]
    rows = []
    for arm, recipe, seconds in zip(arms, recipes, [around, *others], strict=True):
        ratio = statistics.median(own / base for own, base in zip(seconds, around, strict=True))
        ms = 1e3 * statistics.median(seconds) * recipe.training.tokens_per_step
        rows.append({"arm": arm, "step_ms": f"{ms:.1f}", "ratio": f"{ratio:.4f}", "steps_per_step": f"{1 / ratio:.4f}"})
        print(f"{arm}: a step takes {ratio:.3f} times the first arm's ({ms:.1f} ms here): {1 / ratio:.3f} times its "
              "steps in the same time", flush=True)
    write_rows(rows, args.out)


def _of_one_length(recipe):
    """The recipe with rows of one length, so that every batch has the shape of the fixed one."""
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, windows="stream"))


if __name__ == "__main__":
    run_command(main)
