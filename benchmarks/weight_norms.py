#!/usr/bin/env python3
"""Norms of a run's matrices, and its updates as a fraction of them, at each kept checkpoint (--set keep_every=N).

A layer norm follows every matrix of BDH but the head, so the loss does not change where one is multiplied by a number:
only the update against the norm counts. The update is computed from the optimizer's state, without weight decay.
"""

import argparse
import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COLUMNS = ("run", "step", "matrix", "norm", "root_mean_square", "relative_update")


def update_of(moments: dict, rate: float, config):
    """The update that AdamW, or Muon, has taken last."""
    import torch

    if "momentum_buffer" in moments:  # Muon's: of each head, without the share of the last gradient
        heads = [torch.nn.Parameter(torch.zeros_like(head)) for head in moments["momentum_buffer"].flatten(0, -3)]
        for head, momentum in zip(heads, moments["momentum_buffer"].flatten(0, -3), strict=True):
            head.grad = momentum
        torch.optim.Muon(heads, lr=rate, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
        return torch.stack([head.detach() for head in heads])
    step = float(moments["step"])
    mean, square = moments["exp_avg"] / (1 - config.beta1**step), moments["exp_avg_sq"] / (1 - config.beta2**step)
    return rate * mean / (square.sqrt() + 1e-8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "weight_norms.csv", help="CSV")
    args = parser.parse_args()
    from safetensors.torch import load_file

    from plotarmour.run import load_run
    from plotarmour.training.checkpoint import checkpoint_folders, step_of

    rows = []
    for folder in args.runs:
        run = load_run(folder, "latest", device="cpu")
        rates = run.log.set_index("step")["learning_rate"].dropna()
        for checkpoint in reversed(checkpoint_folders(folder)):
            step, state = step_of(checkpoint), load_file(checkpoint / "optimizer.safetensors")
            for name, weight in load_file(checkpoint / "model.safetensors").items():
                moments = {key.rsplit("/", 1)[1]: value for key, value in state.items() if key.startswith(f"{name}/")}
                if weight.dim() < 2 or not moments:
                    continue
                norm, update = float(weight.norm()), update_of(moments, rates.loc[:step].iloc[-1], run.config.training)
                rows.append((run.name, step, name, f"{norm:.4g}", f"{norm / weight.numel()**0.5:.4g}",
                             f"{float(update.norm()) / norm:.4g}"))
                print(*rows[-1], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
