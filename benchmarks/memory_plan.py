#!/usr/bin/env python3
"""Compare the planned memory of a training step and an evaluation with what torch allocates for them.

On a GPU by torch.cuda.max_memory_allocated; on a CPU by the profiler's count of allocations and, on Linux, by the
growth of the resident set, gaps in the heap included. Every case runs in a process of its own.
"""

import argparse
import csv
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.config import Recipe, load_recipe
from plotarmour.data.batches import Windows
from plotarmour.machine import Machine
from plotarmour.memory import plan_training
from plotarmour.training.optimizer import make_optimizer
from plotarmour.training.step import EVALUATION_ROWS, accumulate, evaluate_windows

COLUMNS = ("recipe", "model", "vocab_size", "dtype", "settings", "device", "moment", "planned_mib", "measured_mib",
           "planned_of_measured", "resident_mib")
WIDE = "n_embd=256 mlp_internal_dim_multiplier=64"
CASES = [  # recipe, model, vocabulary, settings
    ("tiny", "bdh", 1024, ""), ("tiny", "gpt2", 1024, ""), ("laptop", "bdh", 4096, ""), ("laptop", "gpt2", 4096, ""),
    ("laptop", "bdh", 257, "rows_per_step=16 micro_batch_size=8 dropout=0.1"),
    ("laptop", "gpt2", 257, "rows_per_step=16 micro_batch_size=8 dropout=0.1"),
    ("laptop", "bdh", 1024, f"{WIDE} rows_per_step=1 micro_batch_size=1"),
    ("laptop", "bdh", 50257, f"{WIDE} rows_per_step=1 micro_batch_size=1"),
    ("laptop", "bdh", 1024, f"{WIDE} rows_per_step=8 dropout=0.1"),
    ("laptop", "bdh", 50257, f"{WIDE} rows_per_step=2 micro_batch_size=2 context_length=512 n_layer=4"),
    ("laptop", "gpt2", 1024, "n_embd=256 rows_per_step=1 micro_batch_size=1 context_length=64"),
    ("laptop", "gpt2", 50257, "n_embd=256 rows_per_step=2 micro_batch_size=2 context_length=512"),
    ("laptop", "gpt2", 50257, "n_embd=256 micro_batch_size=2 context_length=512 dropout=0.1"),
]
GPU_CASES = [("kaggle_t4", model, 50257, settings) for model in ("bdh", "gpt2")
             for settings in ("", "micro_batch_size=16 context_length=1024")]


def build(recipe: Recipe, vocab_size: int, machine: Machine) -> tuple[Callable, Callable, int]:
    """Return a training step, an evaluation, and the bytes held between steps, once the first step is done."""
    t, model = recipe.training, recipe.build_model(vocab_size).to(machine.device).train()
    if t.mask_stories:
        model.story_start = 0
    optimizer = make_optimizer(model, t)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    n_tokens = (EVALUATION_ROWS + t.rows_per_step + 1) * t.context_length
    data = SimpleNamespace(tokens=np.random.default_rng(0).integers(0, vocab_size, n_tokens), n_tokens=n_tokens,
                           offsets=np.zeros(1, np.uint64), header={"end_of_text_id": 0, "vocab_size": vocab_size},
                           path="drawn")
    windows = Windows(data, t.context_length, "stream", 0, t.rows_per_step)
    rows = windows.first_rows(min(t.eval_tokens, EVALUATION_ROWS * t.context_length))
    token_bytes = np.ones(vocab_size, np.int32)

    def step() -> None:
        rows = windows.rows_of(0)
        batches = [windows.micro_batch(rows[i:i + t.micro_batch_rows]) for i in range(0, len(rows), t.micro_batch_rows)]
        accumulate(model, batches, machine, scaler, (0, 0))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def evaluate() -> None:
        evaluate_windows(model, windows, [rows], token_bytes, machine)

    step()
    gc.collect()
    held = [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
    if recipe.model == "bdh":
        held += model._rotation._tables.values()
    return step, evaluate, sum(x.numel() * x.element_size() for x in held)


def peak_of_tensors(work: Callable, device: str = "cpu") -> int:
    """Return the most bytes that torch held at once during `work`: on a CPU of its own, on a GPU of all."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True,
                                acc_events=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    return int(np.cumsum([0, *(e["args"]["Bytes"] for e in memory)]).max())


@contextmanager
def resident_growth():
    """Yield a list that then holds by how many bytes the resident set grew at most (Linux), or nothing."""
    grown: list[int] = []
    linux = sys.platform == "linux"
    if linux:
        ctypes.CDLL(None).malloc_trim(0)  # freed heap memory still counts as resident
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
        before = _status("VmRSS")
    yield grown
    if linux:
        grown.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(recipe: Recipe, vocab_size: int, machine: Machine) -> tuple[int, int | None]:
    """Return bytes of tensors and of the resident set (None where unknown), what is held between steps included."""
    device = machine.device.type
    step, evaluate, held = build(recipe, vocab_size, machine)
    with resident_growth() as grown:
        step()
        evaluate()
    resident = held + grown[0] if grown and device == "cpu" else None
    step()
    gc.collect()
    peak = max(peak_of_tensors(work, device) for work in (step, evaluate))
    return (peak if device == "cuda" else held + peak), resident


def one(number: int, device: str, dtype: str) -> dict:
    """Plan and measure one case."""
    torch.set_num_threads(1)
    name, model, vocab_size, settings = (CASES + GPU_CASES)[number]
    recipe = load_recipe(name, model, settings.split())
    machine = Machine(torch.device(device), getattr(torch, dtype), "asked for", "")
    plan = plan_training(recipe, vocab_size, machine.dtype, device)
    measured, resident = measure(recipe, vocab_size, machine)
    mib = [f"{x / 2**20:.1f}" if x is not None else "" for x in (plan.total, measured, resident)]
    return dict(zip(COLUMNS, [name, model, vocab_size, dtype, settings, device, plan.moment, mib[0], mib[1],
                              f"{plan.total / measured:.3f}", mib[2]], strict=True))


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "memory_plan.csv", help="CSV")
    parser.add_argument("--one", nargs=2, metavar=("NUMBER", "DTYPE"), help="one case, as JSON (used by this script)")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(int(args.one[0]), args.device, args.one[1])))
        return
    dtypes = ("float32", "float16", "bfloat16") if args.device == "cuda" else ("float32", "bfloat16")
    cases = [(n, d) for n in range(len(CASES)) for d in dtypes]
    cases += [(n, "float16") for n in range(len(CASES), len(CASES + GPU_CASES)) if args.device == "cuda"]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, dtype in cases:
            command = [sys.executable, __file__, "--device", args.device, "--one", str(number), dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            writer.writerow(row)
            file.flush()
            print(f"{row['recipe']:<10} {row['model']:<5} {row['vocab_size']:>6} {dtype:<9} {row['settings']:<95} "
                  f"planned {row['planned_mib']:>7} measured {row['measured_mib']:>7} MiB, "
                  f"ratio {row['planned_of_measured']}, resident {row['resident_mib'] or '-'}", flush=True)


if __name__ == "__main__":
    main()
