#!/usr/bin/env python3
"""Scoring against the plain parallel forward on the same tokens in the same batches.

Plain is what a script would do: pad stories to a batch, `model(inputs)` (for BDH the published formula), logits of the
whole batch, `F.cross_entropy`. Ours is `score_stories`, which also reads the stories, sorts and cuts them and sends
nats back to their stories. Both take the same block of stories in turn; printed is the median of the paired ratios, and
the largest difference of a story's nats.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from training_loop import ROOT, write_rows

from plotarmour.cli import run_command
from plotarmour.config import load_recipe
from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation import scoring
from plotarmour.loss import IGNORE
from plotarmour.machine import find_machine
from plotarmour.suite.steps import prepare


def padded(batch: list[tuple], end_of_text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of scoring's own batches as (inputs, targets), int64 (B, T)."""
    T = max(len(inputs) for _, _, inputs, _, _ in batch)
    inputs, targets = torch.full((len(batch), T), end_of_text), torch.full((len(batch), T), IGNORE)
    for row, (_, first, x, y, _) in enumerate(batch):
        inputs[row, :len(x)], targets[row, first:len(y)] = torch.from_numpy(x), torch.from_numpy(y[first:])
    return inputs, targets


@torch.no_grad()
def plain(model: torch.nn.Module, batches: list[tuple]) -> tuple[float, float]:
    """Return seconds and nats of the plain forward."""
    begun, nats = time.perf_counter(), 0.0
    for inputs, targets in batches:
        logits = model(inputs)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum").item()
    return time.perf_counter() - begun, nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="laptop", help="(default: laptop)")
    parser.add_argument("--text", type=Path, help="for recipe laptop, such as 5 MB of TinyStories")
    parser.add_argument("--stories", type=int, default=60, help="per block (default: 60)")
    parser.add_argument("--blocks", type=int, default=12, help="(default: 12)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "scoring.csv")
    args = parser.parse_args()
    rows, machine = [], find_machine("cpu")
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(args.recipe, "bdh")
        data = TokenFile.open(prepare(recipe, Path(folder), None if recipe.data.corpus_stories else args.text)["train"])
        for name in ("bdh", "gpt2"):
            recipe = load_recipe(args.recipe, name)
            T, model = recipe.training.context_length, recipe.build_model(data.header["vocab_size"]).eval()
            ratios, ours_s, tokens, apart = [], 0.0, 0, 0.0
            for block in range(args.blocks + 1):
                chosen = list(range(block * args.stories, (block + 1) * args.stories))
                ends = [len(data.story(i)) for i in chosen]
                order = [i for _, i in sorted(zip(ends, chosen, strict=True))]
                batches = [padded(batch, data.header["end_of_text_id"]) for batch in
                           scoring._batches(data, order, T, None)]

                def ours(model=model, chosen=chosen, T=T) -> tuple[float, float, int]:
                    begun = time.perf_counter()
                    found = list(scoring.score_stories(model, data, T, machine, stories=chosen, name=None))
                    nats = sum(float(each.sum(dtype=np.float64)) for _, each in found)
                    return time.perf_counter() - begun, nats, sum(len(each) for _, each in found)

                def theirs(model=model, batches=batches, name=name) -> tuple[float, float]:
                    if name == "bdh":
                        model.form = "parallel"
                    try:
                        return plain(model, batches)
                    finally:
                        if name == "bdh":
                            model.form = "tiled"

                if block % 2:
                    (a, nats, n), (b, plain_nats) = ours(), theirs()
                else:
                    (b, plain_nats), (a, nats, n) = theirs(), ours()
                if block:  # the first one warms up
                    ratios.append(b / a)
                    ours_s, tokens, apart = ours_s + a, tokens + n, max(apart, abs(nats / plain_nats - 1))
            ratio = statistics.median(ratios)
            rows.append({"model": name, "ratio": f"{ratio:.3f}", "tokens_per_s": f"{tokens / ours_s:.0f}",
                         "apart": f"{apart:.1e}"})
            print(f"{name}: {ratio:.2f} times the tokens/s of the plain parallel forward ({tokens / ours_s:,.0f} a "
                  f"second here); nats apart by at most {apart:.1e} of themselves", flush=True)
    write_rows(rows, args.out)


if __name__ == "__main__":
    run_command(main)
