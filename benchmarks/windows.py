#!/usr/bin/env python3
"""Windows of training: how fast one is found by its number, the memory that takes, and what a mask of stories costs.

Stories have lengths like those of TinyStories, drawn anew; no text is needed. A million random windows go from their
number to story and place and back. The order is read step by step, as training reads it, on one core. A training step
with a mask and one without take turns on the same batch; the ratio is the median over turns.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training_loop import write_rows  # noqa: E402

from plotarmour.cli import run_command  # noqa: E402
from plotarmour.config import load_recipe  # noqa: E402
from plotarmour.data.batches import BY_PLACE, Windows  # noqa: E402
from plotarmour.loss import summed_nats  # noqa: E402

ROWS, T, MILLION = 32, 256, 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=2_000_000, help="(default: 2,000,000)")
    parser.add_argument("--turns", type=int, default=20, help="steps with and without a mask (default: 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference", help="(default: results/reference)")
    args = parser.parse_args()
    lengths = np.random.default_rng(0).lognormal(5.2, 0.45, args.stories).astype(np.int64).clip(5, 2000)
    data = SimpleNamespace(offsets=(np.cumsum(lengths) - lengths).astype(np.uint64), n_tokens=int(lengths.sum()),
                           n_stories=len(lengths), path="drawn")
    write_rows([read(Windows(data, T, kind, 0, ROWS)) for kind in ("packed", *BY_PLACE)], args.out / "windows.csv")
    torch.set_num_threads(1)
    rows = [masked(model, args.turns) for model in ("bdh", "gpt2", "gpt2_rope", "lstm")]
    write_rows(rows, args.out / "mask_stories.csv")


def read(windows: Windows) -> dict:
    """Measure one kind of windows."""
    tracemalloc.start()
    windows.rows_of(0)
    row = {"kind": windows.kind, "windows": windows.per_epoch, "padding_share": f"{windows.padding_share:.4f}",
           "held_bytes_per_story": f"{tracemalloc.get_traced_memory()[0] / windows.data.n_stories:.2f}"}
    tracemalloc.stop()
    begun = time.perf_counter()
    n = sum(len(windows.rows_of(step)) for step in range(5000))
    row["read_per_s"] = f"{n / (time.perf_counter() - begun):.0f}"
    if windows.kind in BY_PLACE:
        numbers = np.random.default_rng(1).integers(windows.per_epoch, size=MILLION)
        begun = time.perf_counter()
        story, place = windows.story_and_place(numbers)
        back = windows.firsts[story].astype(np.int64) + place
        row["found_per_s"] = f"{MILLION / (time.perf_counter() - begun):.0f}"
        assert (back == numbers).all() and (place >= 0).all()
    print(row, flush=True)
    return row


def masked(kind: str, turns: int) -> dict:
    """Measure forward and backward of recipe laptop's model with and without a mask, stories of 90 tokens."""
    model, seconds = load_recipe("laptop", kind).build_model(4096).train(), {None: [], 0: []}
    inputs, targets = torch.randint(1, 4096, (2, 4, T), generator=torch.Generator().manual_seed(0))
    inputs[:, 20::90] = 0
    for turn in range(turns + 2):
        for model.story_start in (None, 0) if turn % 2 else (0, None):
            begun = time.perf_counter()
            summed_nats(model.features(inputs)[0], model.unembedding, targets).backward()
            model.zero_grad(set_to_none=True)
            seconds[model.story_start].append(time.perf_counter() - begun)
    without, with_mask = (times[2:] for times in seconds.values())
    row = {"model": kind, "step_ms": f"{1e3 * statistics.median(without):.0f}", "masked_of_unmasked":
           f"{statistics.median(b / a for a, b in zip(without, with_mask, strict=True)):.3f}"}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    run_command(main)
