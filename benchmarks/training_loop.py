#!/usr/bin/env python3
"""The training loop against a plain one, as nanoGPT writes it, on one fixed batch.

A plain step is forward, cross entropy, backward, clipping and AdamW. Both train the same model from the same weights in
one process. After every few steps of ours, which is `train_run` itself with its reading, logging and checkpoints, the
plain loop takes as many; a block of ours is compared with the mean of the plain blocks before and after it, and the
ratio is the median over blocks. The plain loop comes twice: with `F.cross_entropy` as there, and with our loss, which
shows the loop alone. Beside the ratios stands what share of our time went into waiting for batches, logging and
checkpoints, each timed where it happens.

Recipe laptop needs a text (--text); tiny tells its own.
"""

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pandas as pd
import torch
import torch.nn.functional as F

from plotarmour import run as runs
from plotarmour.config import Recipe, load_recipe
from plotarmour.data.batches import Windows
from plotarmour.data.token_file import TokenFile
from plotarmour.loss import IGNORE, summed_nats
from plotarmour.machine import find_machine
from plotarmour.suite.steps import prepare
from plotarmour.training import loop
from plotarmour.training.optimizer import make_optimizer

LOSSES = ("cross_entropy", "summed_nats")


class Plain:
    """The plain loop, on the rows of the first step for ever; on a GPU in the recipe's dtype, without a scaler."""

    def __init__(self, recipe: Recipe, data: TokenFile, loss: str):
        t = self.config = recipe.training
        self.machine = find_machine(t.device, t.dtype)
        windows = Windows(data, t.context_length, t.windows, t.seed, t.rows_per_step)
        rows = windows.rows_of(0)
        size = t.micro_batch_size
        batches = [windows.micro_batch(rows[i:i + size]) for i in range(0, len(rows), size)]
        self.n_tokens = [int((targets != IGNORE).sum()) for _, targets in batches]
        self.batches = [[tensor.to(self.machine.device) for tensor in batch] for batch in batches]
        self.model = recipe.build_model(data.header["vocab_size"]).to(self.machine.device).train()
        self.optimizer = make_optimizer(self.model, t)
        self.loss = loss

    def steps(self, count: int) -> float:
        """Take some steps; return seconds per token."""
        begun = time.perf_counter()
        for _ in range(count):
            for (inputs, targets), n_tokens in zip(self.batches, self.n_tokens, strict=True):
                with self.machine.autocast:
                    if self.loss == "cross_entropy":
                        logits = self.model(inputs)
                        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
                    else:
                        features = self.model.features(inputs)[0]
                        loss = summed_nats(features, self.model.unembedding, targets) / n_tokens
                (loss / len(self.batches)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / (count * sum(self.n_tokens))


def measure(recipe: Recipe, files: dict[str, Path], blocks: int, every: int) -> dict[str, float]:
    """Train for `blocks` blocks of `every` steps, plain blocks in between; return ratios and shares."""
    # Rows of one length: the plain loop's batch then has the shape of all others.
    steps = blocks * every
    t = dataclasses.replace(recipe.training, windows="stream", max_steps=steps, warmup_steps=1, log_interval=every,
                            eval_interval=steps, eval_tokens=2_000, patience=0, max_minutes=0.0, device="cpu")
    recipe = dataclasses.replace(recipe, training=t)
    data = TokenFile.open(files["train"])
    plain = {loss: Plain(recipe, data, loss) for loss in LOSSES}
    ours, others, spent = [], {loss: [] for loss in LOSSES}, {"logging": 0.0, "checkpoints": 0.0}
    seen, resumed = 0, [0.0]

    def timed(function, what):
        def call(*args, **keywords):
            begun = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                spent[what] += time.perf_counter() - begun
        return call

    def on_row() -> None:  # ours has just taken a block, and logged it
        nonlocal seen
        now = time.perf_counter()
        if seen:
            ours.append(now - resumed[0])
        seen += 1
        order = LOSSES if seen % 2 else LOSSES[::-1]
        for loss in order:
            others[loss].append(plain[loss].steps(every))
        resumed[0] = time.perf_counter()

    append, save = loop.RunLog.append, loop.save_checkpoint
    loop.RunLog.append, loop.save_checkpoint = timed(append, "logging"), timed(save, "checkpoints")
    try:
        with tempfile.TemporaryDirectory() as folder:
            final = runs.train_run(recipe, files["train"], files["val"], Path(folder) / "run", on_row=on_row)
    finally:
        loop.RunLog.append, loop.save_checkpoint = append, save
    # The last block holds the last evaluation, and the first one sets things up.
    tokens = final.tokens_seen / (blocks * every)
    per_token = [seconds / every / tokens for seconds in ours]
    chosen = range(1, blocks - 1)
    result = {f"ratio_{loss}": statistics.median(
        (others[loss][i] + others[loss][i + 1]) / 2 / per_token[i] for i in chosen) for loss in LOSSES}
    total = sum(ours)
    shares = {"batches": final.input_wait_s / total, **{key: value / total for key, value in spent.items()}}
    return result | {f"share_{key}": value for key, value in shares.items()} | {
        "tokens_per_s": 1 / statistics.median(per_token), "step_ms": 1e3 * tokens * statistics.median(per_token)}


def write_rows(rows: list[dict], path: Path) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False, lineterminator="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="tiny,laptop", help="comma-separated (default: tiny,laptop)")
    parser.add_argument("--text", type=Path, help="for recipe laptop, such as 5 MB of TinyStories")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--blocks", type=int, default=40, help="blocks per case (default: 40)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "training_loop.csv")
    args = parser.parse_args()
    rows = []
    for name in args.recipes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe(name, "bdh", args.overrides)
            files = prepare(recipe, Path(folder), None if recipe.data.corpus_stories else args.text)
            for model in ("bdh", "gpt2"):
                recipe = load_recipe(name, model, args.overrides)
                found = measure(recipe, files, args.blocks, recipe.training.log_interval)
                rows.append({"recipe": name, "model": model} | {key: f"{value:.5g}" for key, value in found.items()})
                together = sum(value for key, value in found.items() if key.startswith("share_"))
                print(f"{name} {model}: {found['ratio_cross_entropy']:.3f} times the tokens/s of the plain loop, "
                      f"{found['ratio_summed_nats']:.3f} with our loss in both; batches {found['share_batches']:.2%}, "
                      f"logging {found['share_logging']:.2%}, checkpoints {found['share_checkpoints']:.2%}, together "
                      f"{together:.2%} of the time; a step has {found['step_ms']:.0f} ms", flush=True)
    write_rows(rows, args.out)


if __name__ == "__main__":
    main()
