#!/usr/bin/env python3
"""Windows of training: how fast one is found, the memory that takes, what a mask of stories costs, and which is best.

Stories have lengths like those of TinyStories, drawn anew; no text is needed. A million random windows go from their
number to story and place and back. The order is read step by step, as training reads it, on one core. A training step
with a mask and one without take turns on the same batch, in CPU time of one thread, which other processes hardly
change; the ratio is the median over turns.

With --results FOLDER, of the grid plotarmour/recipes/windows.csv, nothing of this is measured: every run there scores
the test stories, and window_losses.csv has a row for each kind of model, windows and mask, with its tokens per second,
measured in turn, and the share of its targets that it learned from for the first time. Notebook 05 does the same.
"""

import argparse
import statistics
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.training_loop import write_rows  # noqa: E402
from plotarmour.cli import run_command  # noqa: E402
from plotarmour.config import Recipe, load_recipe, restored  # noqa: E402
from plotarmour.data.batches import Windows  # noqa: E402
from plotarmour.data.token_file import TokenFile, Tokens, TokensInMemory  # noqa: E402
from plotarmour.data.windows import BY_PLACE, CUTS  # noqa: E402
from plotarmour.evaluation.arms import Arm, compare_arms, group_runs  # noqa: E402
from plotarmour.evaluation.metrics import totals  # noqa: E402
from plotarmour.evaluation.scoring import evaluate_run  # noqa: E402
from plotarmour.loss import IGNORE, summed_nats  # noqa: E402
from plotarmour.models import KINDS as MODELS  # noqa: E402
from plotarmour.resume import read_info  # noqa: E402
from plotarmour.run import load_run  # noqa: E402
from plotarmour.suite.steps import find_prepared  # noqa: E402
from plotarmour.training.ending import Ending  # noqa: E402

ROWS, T, MILLION = 32, 256, 1_000_000
SMALL = ("corpus_stories=4000", "corpus_min_events=0", "corpus_max_events=9", "eval_tokens=2000")  # of the notebook
REFERENCE = ROOT / "results" / "reference"
KINDS = tuple(CUTS)  # of windows
TOY = TokensInMemory([np.append(np.ones(n - 1, np.uint16), np.uint16(0)) for n in (6, 5, 7, 2, 3, 10)],
                     {"end_of_text_id": 0, "vocab_size": 2}, [1] * 6)  # stories of 6, 5, 7, ... tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=2_000_000, help="(default: 2,000,000)")
    parser.add_argument("--turns", type=int, default=20, help="steps with and without a mask (default: 20)")
    parser.add_argument("--results", type=Path, help="folder of the grid windows.csv, whose runs are compared instead")
    parser.add_argument("--out", type=Path, default=REFERENCE, help="(default: results/reference)")
    args = parser.parse_args()
    if args.results:
        return compared(sorted(path.parent for path in args.results.glob("*/DONE.json")), args.results
                        ).to_csv(args.out / "window_losses.csv", index=False, float_format="%.6g", lineterminator="\n")
    lengths = np.random.default_rng(0).lognormal(5.2, 0.45, args.stories).astype(np.int64).clip(5, 2000)
    data = SimpleNamespace(offsets=(np.cumsum(lengths) - lengths).astype(np.uint64), n_tokens=int(lengths.sum()),
                           n_stories=len(lengths), path="drawn")
    write_rows([read(Windows(data, T, kind, 0, ROWS)) for kind in ("packed", *BY_PLACE)], args.out / "windows.csv")
    torch.set_num_threads(1)
    rows = [masked(model, args.turns) for model in ("bdh", "gpt2", "gpt2_rope", "lstm")]
    rows.append(masked("gpt2", args.turns, "n_embd=48", "context_length=384", "rows_per_step=2", "micro_batch_size=2"))
    write_rows(rows, args.out / "mask_stories.csv")


def read(windows: Windows) -> dict:
    """Measure one kind of windows."""
    tracemalloc.start()
    windows.rows_of(0)
    cut = windows.cut
    row = {"kind": cut.kind, "windows": cut.per_epoch, "padding_share": f"{cut.padding_share:.4f}",
           "held_bytes_per_story": f"{tracemalloc.get_traced_memory()[0] / windows.data.n_stories:.2f}"}
    tracemalloc.stop()
    begun = time.perf_counter()
    n = sum(len(windows.rows_of(step)) for step in range(5000))
    row["read_per_s"] = f"{n / (time.perf_counter() - begun):.0f}"
    if cut.kind in BY_PLACE:
        numbers = np.random.default_rng(1).integers(cut.per_epoch, size=MILLION)
        begun = time.perf_counter()
        story, place = cut.story_and_place(numbers)
        back = cut.firsts[story].astype(np.int64) + place
        row["found_per_s"] = f"{MILLION / (time.perf_counter() - begun):.0f}"
        assert (back == numbers).all() and (place >= 0).all()
    print(row, flush=True)
    return row


def masked(kind: str, turns: int, *overrides: str) -> dict:
    """Measure forward and backward of recipe laptop's model with and without a mask, stories of 90 tokens."""
    recipe, seconds = load_recipe("laptop", kind, overrides), {None: [], 0: []}
    model, shape = recipe.build_model(4096).train(), (recipe.training.rows_per_step, recipe.training.context_length)
    inputs, targets = torch.randint(1, 4096, (2, *shape), generator=torch.Generator().manual_seed(0))
    inputs[:, 20::90] = 0
    for turn in range(turns + 2):
        for model.story_start in (None, 0) if turn % 2 else (0, None):
            begun = time.process_time()
            summed_nats(model.features(inputs)[0], model.unembedding, targets).backward()
            model.zero_grad(set_to_none=True)
            seconds[model.story_start].append(time.process_time() - begun)
    without, with_mask = (times[2:] for times in seconds.values())
    ratio = statistics.median(b / a for a, b in zip(without, with_mask, strict=True))
    row = {"model": kind, "n_embd": model.config.n_embd, "rows": shape[0], "context_length": shape[1],
           "step_ms": f"{1e3 * statistics.median(without):.0f}", "masked_of_unmasked": f"{ratio:.3f}"}
    print(row, flush=True)
    return row


def arms(recipe: Recipe, data: Tokens, n_tokens: int) -> list[tuple[str, list[str]]]:
    """Return a run for each kind of windows, with and without a mask: its name and settings.

    Each learns from `n_tokens` targets, in steps of about as many targets as the recipe has with windows=stream: more
    rows where some of them is padding.
    """
    t, found = recipe.training, []
    for kind in KINDS:
        filled = 1 - CUTS[kind](data, t.context_length, kind, t.seed).padding_share
        rows = max(1, round(t.rows_per_step / filled))
        steps = max(1, round(n_tokens / (rows * t.context_length * filled)))
        settings = [f"windows={kind}", f"rows_per_step={rows}", f"micro_batch_size={rows}", f"max_steps={steps}",
                    f"warmup_steps={steps // 20}"]
        found.append((f"{recipe.model}-{kind}", settings))
        if kind not in ("slide_through", "full"):  # each row begins with its story
            found.append((f"{recipe.model}-{kind}-masked", [*settings, "mask_stories=true"]))
    return found


def compared(runs: list[Path], tokens: Path) -> pd.DataFrame:
    """Return `losses` and `speeds` of runs as one table; `tokens` is the folder of their token files."""
    data = {part: TokenFile.open(path) for part, path in find_prepared(tokens).items() if path.suffix == ".bin"}
    table = pd.DataFrame(losses(runs, data["test"]))
    first = {(recipe["model"], recipe["training"]["windows"], recipe["training"]["mask_stories"]): run
             for run, recipe in ((run, read_info(run)["recipe"]) for run in runs)}
    return table.merge(speeds(list(first.values()), data["train"]))


def losses(runs: list[Path], test: TokenFile) -> list[dict]:
    """Score test stories under runs; return a row per kind of model, windows and mask.

    `less_stream` is the loss less that of windows=stream without a mask, `less_unmasked` less that of the same windows
    without a mask, each with the ends of its 95 % interval over stories and, where there are several, seeds.
    """
    infos = {run.name: read_info(run) for run in runs}
    scores = {run.name: evaluate_run(load_run(run), test)[0] for run in runs}
    by_kind: dict[tuple, Arm] = {}
    for arm in group_runs(infos):
        training = infos[arm.runs[0]]["recipe"]["training"]
        by_kind[arm.model, training["windows"], training["mask_stories"]] = arm
    order = sorted(by_kind, key=lambda key: (list(MODELS).index(key[0]), KINDS.index(key[1]), key[2]))
    rows, folders = [], {run.name: run for run in runs}
    for model, kind, is_masked in order:
        arm = by_kind[model, kind, is_masked]
        nats = sum(scores[run]["nats"].sum() for run in arm.runs) / len(arm.runs)
        n_tokens, n_bytes = (int(scores[arm.runs[0]][column].sum()) for column in ("tokens", "bytes"))
        endings = [Ending.read(folders[run]) for run in arm.runs]
        row = {"model": model, "windows": kind, "mask": is_masked, "seeds": len(arm.runs), "steps": endings[0].step,
               "train_tokens": endings[0].tokens_seen,
               "padding_share": infos[arm.runs[0]]["train"]["padding_share"], **totals(nats, n_tokens, n_bytes)}
        for name, other in (("less_stream", (model, "stream", False)), ("less_unmasked", (model, kind, False))):
            if other in by_kind and other != (model, kind, is_masked):
                # Only with the same windows have runs of one seed the same tokens in the same order.
                [pair, *_] = compare_arms([(arm, by_kind[other])], scores, {run: {} for run in scores},
                                          same_order=other[1] == kind).to_dict("records")
                row |= {name + end: pair[f"loss_difference{end}"] for end in ("", "_low", "_high")}
        rows.append(row)
    return rows


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of `compared` for people."""
    shown = table[["model", "windows", "mask", "seeds"]].assign(
        padding=[f"{share:.1%}" for share in table["padding_share"]], tokens_per_s=table["tokens_per_s"],
        distinct=[f"{share:.0%}" for share in table["distinct"]],
        loss=table["loss"].round(3))
    for name in ("less_stream", "less_unmasked"):
        shown[name] = [f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if mean == mean else "" for mean, low, high in
                       table[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)]
    return shown


def speeds(runs: list[Path], data: TokenFile, turns: int = 8) -> pd.DataFrame:
    """Measure forward and backward of untrained models of some runs in turn, with each run's windows and mask.

    Returns:
        A row per run: model, windows, mask, targets per second, the median over turns, and `distinct_share`.
    """
    recipes, seconds = [restored(read_info(run)["recipe"]) for run in runs], [[] for _ in runs]
    models = [recipe.build_model(data.header["vocab_size"]).train() for recipe in recipes]
    for turn in range(turns + 1):
        for recipe, model, times in zip(recipes, models, seconds, strict=True):
            t = recipe.training
            windows = Windows(data, t.context_length, t.windows, t.seed, t.rows_per_step)
            inputs, targets = windows.micro_batch(windows.rows_of(turn))
            model.story_start = data.header["end_of_text_id"] if t.mask_stories else None
            begun = time.perf_counter()
            summed_nats(model.features(inputs)[0], model.unembedding, targets).backward()
            model.zero_grad(set_to_none=True)
            times.append((time.perf_counter() - begun) / int((targets != IGNORE).sum()))
    return pd.DataFrame({"model": recipe.model, "windows": recipe.training.windows, "mask":
                         recipe.training.mask_stories, "tokens_per_s": round(1 / statistics.median(times[1:])),
                         "distinct": distinct_share(recipe, data)}
                        for recipe, times in zip(recipes, seconds, strict=True))


def distinct_share(recipe: Recipe, data: TokenFile) -> float:
    """Return the share of a run's targets that it read for the first time: distinct targets / all."""
    t, times = recipe.training, np.zeros(data.n_tokens, dtype=np.int64)
    windows = Windows(data, t.context_length, t.windows, t.seed, t.rows_per_step)
    for row in (row for step in range(t.max_steps) for row in windows.rows_of(step)):
        for begin, end in zip(row[::2], row[1::2], strict=True):
            times[begin:end] += 1
    return np.count_nonzero(times) / times.sum()


if __name__ == "__main__":
    run_command(main)
