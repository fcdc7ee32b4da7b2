#!/usr/bin/env python3
"""Batch size: the time of a step against its rows, and the loss after equal samples and after equal time.

The time of a step is that of forward, loss, backward, clipping and AdamW; all sizes take turns, each on one batch in
memory again and again, and on batches from the reader. Beside it stands what readers cost: in the loop, by our thread
that reads ahead, or by the worker processes of torch's DataLoader, and on a GPU with pinned memory.

With --results FOLDER, of the grid plotarmour/recipes/batch_size.csv, nothing of this is measured: the runs there score
the test stories. Notebook 06 does both.
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.training_loop import write_rows  # noqa: E402
from plotarmour.cli import run_command  # noqa: E402
from plotarmour.config import Recipe, load_recipe  # noqa: E402
from plotarmour.data.batches import Windows  # noqa: E402
from plotarmour.data.token_file import TokenFile  # noqa: E402
from plotarmour.evaluation.arms import Arm, compare_arms  # noqa: E402
from plotarmour.evaluation.scoring import evaluate_run  # noqa: E402
from plotarmour.machine import find_machine  # noqa: E402
from plotarmour.resume import read_info  # noqa: E402
from plotarmour.run import load_run  # noqa: E402
from plotarmour.suite.steps import find_prepared, prepare  # noqa: E402
from plotarmour.training.distributed import ALONE  # noqa: E402
from plotarmour.training.ending import Ending  # noqa: E402
from plotarmour.training.prefetch import Batches  # noqa: E402
from plotarmour.training.step import Updates, accumulate, try_to_fit  # noqa: E402

SMALL = ("corpus_stories=4000", "eval_tokens=2000")  # of the notebook
REFERENCE = ROOT / "results" / "reference"
RULES = {"none": 0.0, "square root": 0.5, "linear": 1.0}  # the learning rate grows with this power of the batch size
NOTES = ((50, 5000), (500, 5000), (500, 500))  # batch size and steps of the table that is repeated


def step_times(recipe: Recipe, data: TokenFile, sizes: list[int], turns: int = 8) -> pd.DataFrame:
    """Return the median time of a step and rows per second for each batch size, until one does not fit into memory.

    `source` is "memory" (one batch again and again) or "reader" (the batches of training, read ahead by a thread).
    """
    t, machine = recipe.training, find_machine(recipe.training.device, recipe.training.dtype)
    model = recipe.build_model(data.header["vocab_size"]).to(machine.device).train()
    seconds, updates = {}, {}
    for size in sizes:
        windows = Windows(data, t.context_length, t.windows, t.seed, size)
        rows = windows.rows_of(0)
        batch = windows.micro_batch(rows)
        same = SimpleNamespace(rows_of=lambda _, rows=rows: rows, micro_batch=lambda _, batch=batch: batch)
        for source, read in (("memory", same), ("reader", windows)):
            one = Updates(model, read, replace(t, rows_per_step=size, micro_batch_size=size, max_steps=turns + 1),
                          machine, ALONE)
            one.begin(0, size)
            if try_to_fit(lambda one=one: one.take(0, 0.0)) is None:
                one.close()
                break
            updates[size, source], seconds[size, source] = one, []
        else:
            continue
        break
    for turn in range(1, turns + 1):
        for key, one in updates.items():
            begun = time.perf_counter()
            one.take(turn, 0.0)
            seconds[key].append(time.perf_counter() - begun)
    for one in updates.values():
        one.close()
    rows = [{"model": recipe.model, "device": machine.device.type, "context_length": t.context_length,
             "source": source, "batch_size": size, "step_ms": 1e3 * statistics.median(times),
             "samples_per_s": size / statistics.median(times)} for (size, source), times in seconds.items()]
    return pd.DataFrame(rows).sort_values(["source", "batch_size"], ignore_index=True)


@dataclass
class Steps:
    """The batches of steps as a dataset for torch's DataLoader."""

    windows: Windows
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.windows.micro_batch(self.windows.rows_of(step))


def reader_times(recipe: Recipe, data: TokenFile, steps: int = 20, workers: int = 2) -> pd.DataFrame:
    """Return the time of a step with each way to read batches; on a GPU with and without pinned memory.

    From pinned memory the copy to the GPU is asynchronous. The first steps, in which workers start, are left out.
    """
    t, machine = recipe.training, find_machine(recipe.training.device, recipe.training.dtype)
    model = recipe.build_model(data.header["vocab_size"]).to(machine.device).train()
    windows = Windows(data, t.context_length, t.windows, t.seed, t.rows_per_step)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    rows = []
    for pinned in (False, True)[:1 + (machine.device.type == "cuda")]:
        ahead = Batches(windows, 0, steps, t.rows_per_step, pinned=pinned)
        readers = {"in the loop": DataLoader(Steps(windows, steps), batch_size=None, pin_memory=pinned),
                   "a thread that reads ahead": (ahead.of(step)[1][0] for step in range(steps)),
                   f"{workers} worker processes": DataLoader(Steps(windows, steps), batch_size=None,
                                                             num_workers=workers, pin_memory=pinned)}
        for name, batches in readers.items():
            seconds, waited, begun = [], [], time.perf_counter()
            for batch in batches:
                waited.append(time.perf_counter() - begun)
                accumulate(model, [tuple(batch)], machine, scaler)
                model.zero_grad(set_to_none=True)
                seconds.append(time.perf_counter() - begun)
                begun = time.perf_counter()
            rows.append({"model": recipe.model, "device": machine.device.type, "reader": name, "pinned": pinned,
                         "batch_size": t.rows_per_step, "step_ms": 1e3 * statistics.median(seconds[5:]),
                         "of_it_waiting_ms": 1e3 * statistics.median(waited[5:])})
        ahead.close()
    return pd.DataFrame(rows)


def arms(recipe: Recipe, sizes: list[int], n_samples: int, times: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Return runs with each batch size and rule of learning rates: names MODEL-BUDGET-SIZE-RULE, and settings.

    The rate of the recipe is that of its own batch size, "base". "samples" gives each run `n_samples` rows, "time" as
    many as take the time of "base" by `times`, of `step_times`, with the rate scaled by the square root.
    """
    t, found = recipe.training, []
    ms = times[times["source"] == "reader"].set_index("batch_size")["step_ms"]
    base_ms = ms[t.rows_per_step] * n_samples / t.rows_per_step
    for size in sizes:
        for rule, power in RULES.items() if size != t.rows_per_step else {"base": 0.0}.items():
            rate = t.learning_rate * (size / t.rows_per_step)**power
            found.append((f"{recipe.model}-samples-{size}-{rule}", _settings(size, n_samples / size, rate)))
            if rule == "square root" and size in ms:
                found.append((f"{recipe.model}-time-{size}-{rule}", _settings(size, base_ms / ms[size], rate)))
    return [(name.replace(" ", "_"), settings) for name, settings in found]


def notes(recipe: Recipe, rows_over: int, steps_over: int) -> list[tuple[str, list[str]]]:
    """Return the runs of `NOTES`, with batch sizes and steps divided by these numbers and the recipe's rate."""
    return [(f"{recipe.model}-notes-{size // rows_over}-{steps // steps_over}",
             _settings(size // rows_over, steps / steps_over, recipe.training.learning_rate)) for size, steps in NOTES]


def _settings(size: int, steps: float, rate: float) -> list[str]:
    steps = max(1, round(steps))
    return [f"rows_per_step={size}", f"micro_batch_size={size}", f"max_steps={steps}", f"warmup_steps={steps // 20}",
            f"learning_rate={rate:.4g}"]


def losses(runs: list[Path], test: TokenFile) -> pd.DataFrame:
    """Score test stories under runs of `arms` and `notes`; return a row per run.

    `less_base` is the loss less that of the run at the recipe's own batch size (of "notes": less the first one's), with
    its 95 % interval over stories.
    """
    scores, rows = {run.name: evaluate_run(load_run(run), test)[0] for run in runs}, []
    for run in runs:
        model, budget, size, rule = run.name.split("-")
        others = [other.name for other in runs if other.name.startswith(f"{model}-")
                  and (budget == "notes") == ("-notes-" in other.name)]
        base = next((name for name in others if name.endswith("-base")), others[0])
        training, ending, own = read_info(run)["recipe"]["training"], Ending.read(run), scores[run.name]
        row = {"model": model, "budget": budget, "rule": rule.replace("_", " "), "batch_size": int(size),
               "steps": ending.step, "samples": ending.step * int(size), "train_tokens": ending.tokens_seen,
               "learning_rate": training["learning_rate"], "elapsed_s": ending.elapsed_s,
               "loss": own["nats"].sum() / own["tokens"].sum()}
        row["perplexity"] = math.exp(row["loss"])
        if run.name != base:
            one, other = (Arm(name, model, (name,), (training["seed"],)) for name in (run.name, base))
            [pair] = compare_arms([(one, other)], scores, {name: {} for name in scores}, False).to_dict("records")
            row |= {f"less_base{end}": pair[f"loss_difference{end}"] for end in ("", "_low", "_high")}
        rows.append(row)
    return pd.DataFrame(rows).sort_values(["model", "budget", "batch_size", "rule"], ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="laptop", help="(default: laptop)")
    parser.add_argument("--text", type=Path, help="for recipe laptop, such as 5 MB of TinyStories")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--models", default="bdh,gpt2", help="(default: bdh,gpt2)")
    parser.add_argument("--largest", type=int, default=256, help="batch size that the doubling ends with")
    parser.add_argument("--tokens", type=Path, required=True, help="folder for the token files")
    parser.add_argument("--results", type=Path, help="folder of the grid batch_size.csv, whose runs are scored instead")
    parser.add_argument("--out", type=Path, default=REFERENCE, help="(default: results/reference)")
    args = parser.parse_args()
    if args.results:
        runs = sorted(path.parent for path in args.results.glob("*/DONE.json"))
        return write_rows(losses(runs, TokenFile.open(find_prepared(args.results)["test"])), args.out /
                          "batch_losses.csv")
    recipes = [load_recipe(args.recipe, model, args.overrides) for model in args.models.split(",")]
    data = TokenFile.open(prepare(recipes[0], args.tokens, args.text)["train"])
    sizes = [2**i for i in range(args.largest.bit_length())]
    for name, measure in (("batch_times.csv", lambda recipe: step_times(recipe, data, sizes)),
                          ("batch_readers.csv", lambda recipe: reader_times(recipe, data))):
        table = pd.concat([measure(recipe) for recipe in recipes])
        print(table.round(2).to_string(index=False), flush=True)
        write_rows(table.round(4).to_dict("records"), args.out / name)


if __name__ == "__main__":
    run_command(main)
