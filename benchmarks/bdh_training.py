#!/usr/bin/env python3
"""A training step of BDH: the published formula (eager and compiled) against our tiled form, in time and memory.

Each side lives in a process of its own with the same weights and tokens; they take steps in turn, and ratios are
medians over pairs of neighbouring steps. A step is forward, loss, backward and AdamW. Activation memory is the peak of
a step less weights, gradients and optimizer state: resident memory on a CPU (Linux), allocated memory on CUDA.
`products_share` is the share of matrix products in the time of all operators of a step, by torch's profiler: what is
left is all that could be saved without other products.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "models")]

SHAPES = {"25M": {"n_layer": 6, "n_embd": 256, "n_head": 4, "multiplier": 128},
          "1.8M": {"n_layer": 4, "n_embd": 128, "n_head": 4, "multiplier": 32}}
# (T, B): time and memory against T, then against batch; the first is the one that the README states.
SWEEPS = {"25M": [(512, 1), (128, 1), (256, 1), (1024, 1), (512, 2), (512, 4)],
          "1.8M": [(512, 4), (128, 4), (256, 4), (1024, 4), (2048, 4), (512, 1), (512, 2), (512, 8), (512, 16)]}
GPU_SWEEPS = {"25M": [(512, 16), (512, 4), (512, 32), (1024, 8), (2048, 4)],  # a GPU computes many rows at once
              "1.8M": [(512, 16), (512, 64), (2048, 16)]}
SIDES = ("published", "compiled", "tiled")
# A heap that is never given back and uses huge pages spares page faults; both sides get it.
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
VOCABULARY = 256
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")}


def worker(spec: dict) -> None:
    """Take a step for every line of standard input, "time", "memory" or "products"; answer with a line of JSON."""
    import torch
    import torch.nn.functional as F
    from published_bdh import PublishedBDH

    from plotarmour.loss import summed_nats
    from plotarmour.models.bdh import BDH, BDHConfig

    torch.manual_seed(0)
    shape, device, dtype = spec["shape"], torch.device(spec["device"]), getattr(torch, spec["dtype"])
    model = PublishedBDH(**shape, vocab_size=VOCABULARY)
    if spec["side"] == "tiled":
        config = BDHConfig(shape["n_layer"], shape["n_embd"], shape["n_head"], shape["multiplier"], VOCABULARY, 0.0)
        ours = BDH(config)
        ours.load_state_dict(model.state_dict())
        model = ours
    model.to(device)
    torch.manual_seed(1)  # making ours has drawn more
    inputs, targets = torch.randint(0, VOCABULARY, (2, spec["B"], spec["T"]), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if spec["side"] == "compiled" else model

    def loss_of() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            if spec["side"] == "tiled":
                return summed_nats(model.features(inputs)[0], model.unembedding, targets) / targets.numel()
            return F.cross_entropy(forward(inputs).flatten(0, 1).float(), targets.flatten())

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = float(loss.detach())
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, loss

    def products_share() -> float:
        kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        with torch.profiler.profile() as profiler:
            step()
        found = {event.key: getattr(event, kind) for event in profiler.key_averages()}
        return sum(found.get(name, 0.0) for name in PRODUCTS) / sum(found.values())

    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    for command in sys.stdin:
        gc.collect()
        if command == "products\n":
            print(json.dumps({"share": products_share()}), flush=True)
            continue
        base = resident(device, reset=True) if command == "memory\n" else None
        seconds, loss = step()
        memory = None if base is None else (resident(device, peak=True) - base - gradients) / 2**20
        print(json.dumps({"s": seconds, "loss": loss, "mib": memory}), flush=True)


def resident(device, reset: bool = False, peak: bool = False) -> int | None:
    """Bytes held now, or at most since the last reset. None where it cannot be told."""
    import torch

    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if not sys.platform.startswith("linux"):
        return None
    if reset:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what is free but kept would hide in the base
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


class Side:
    """A worker process."""

    def __init__(self, spec: dict, tuned: bool):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(spec)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=os.environ | (TUNED if tuned else {}))

    def step(self, command: str) -> dict:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(shape: str, T: int, B: int, sides: tuple[str, ...], rounds: int, args, tuned: bool = False) -> list[dict]:
    """Alternate the sides; returns a row for each, with ratios to ours."""
    running, answers = {}, {}
    for name in sides:  # one after the other: a first step allocates, compiles and warms up
        spec = {"side": name, "shape": SHAPES[shape], "T": T, "B": B, "device": args.device, "dtype": args.dtype}
        side = Side(spec, tuned)
        try:
            first, memory = side.step("time"), side.step("memory")["mib"]
            share = None if name == "compiled" else side.step("products")["share"]  # compiled products have other names
        except RuntimeError as error:
            print(f"  {name} left out: {error}", flush=True)
            continue
        running[name], answers[name] = side, {"loss": first["loss"], "mib": memory, "share": share, "s": []}
    for _ in range(rounds):
        for name, side in running.items():
            answers[name]["s"].append(side.step("time")["s"])
    for side in running.values():
        side.close()
    ours, rows = answers["tiled"], []
    for name, found in answers.items():
        ratio = statistics.median(a / b for a, b in zip(found["s"], ours["s"], strict=True))
        rows.append({"device": args.device, "dtype": args.dtype, "allocator": "tuned" if tuned else "default",
                     "shape": shape, "T": T, "B": B, "form": name, "rounds": rounds,
                     "tokens_per_s": round(B * T / statistics.median(found["s"]), 1),
                     "ours_times_faster": round(ratio, 3), "activations_mib": found["mib"] and round(found["mib"], 1),
                     "products_share": found["share"] and round(found["share"], 3),
                     "ours_times_leaner": found["mib"] and round(found["mib"] / ours["mib"], 2),
                     "loss_differs_by": f"{abs(found['loss'] - ours['loss']):.1e}"})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Tokens per second and activation memory, against context length and against batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["allocator"] == "default"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(2 * len(shapes), 2, figsize=(9, 6 * len(shapes)), squeeze=False, layout="constrained")
    styles = {"published": ("#D55E00", "o", "published formula"), "compiled": ("#CC79A7", "s", "the same, compiled"),
              "tiled": ("#0072B2", "^", "tiled (ours)")}
    for i, shape in enumerate(shapes):
        T0, B0 = next((r["T"], r["B"]) for r in rows if r["shape"] == shape)  # the stated case comes first
        for column, (axis, fixed, at) in enumerate((("T", "B", B0), ("B", "T", T0))):
            for row, (value, label) in enumerate((("tokens_per_s", "tokens per second"),
                                                  ("activations_mib", "activation memory, MiB"))):
                ax = axes[2 * i + row][column]
                for form, (colour, marker, name) in styles.items():
                    points = sorted((r[axis], r[value]) for r in rows if r["shape"] == shape and r["form"] == form
                                    and r[fixed] == at and r[value])
                    if points:
                        ax.plot(*zip(*points, strict=True), color=colour, marker=marker, label=name)
                ax.set_xscale("log", base=2)
                ax.set_yscale("log" if value == "activations_mib" else "linear")
                ax.set_ylim(bottom=0 if value == "tokens_per_s" else None)
                ax.xaxis.set_major_formatter("{x:,.0f}")
                ax.yaxis.set_major_formatter("{x:,.0f}")
                ax.set_xlabel("context length, tokens" if axis == "T" else "batch, rows")
                ax.set_ylabel(label)
                ax.set_title(f"{shape} core parameters, {'batch' if fixed == 'B' else 'context'} {at}", fontsize=10)
                ax.grid(alpha=0.3)
                ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="core parameters")
    parser.add_argument("--rounds", type=int, default=10, help="alternations for the stated case of each shape")
    parser.add_argument("--sweep-rounds", type=int, default=3, help="alternations of the others; 0: leave them out")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="autocast's")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bdh_training.csv", help="CSV; figure beside it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(json.loads(args.worker))
    import pandas as pd  # not in a worker, whose memory is measured

    sides = tuple(side for side in SIDES if side != "compiled" or not args.no_compile)
    rows, sweeps = [], SWEEPS if args.device == "cpu" else GPU_SWEEPS
    for shape in args.shapes:
        (T, B), *others = sweeps[shape]
        rows += measure(shape, T, B, sides, args.rounds, args)
        if args.device == "cpu":
            rows += measure(shape, T, B, sides, max(3, args.rounds // 2), args, tuned=True)
        for T, B in others if args.sweep_rounds else []:
            rows += measure(shape, T, B, ("published", "tiled"), args.sweep_rounds, args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(args.out, index=False, lineterminator="\n")
    draw(rows, args.out.with_suffix(".png"))
    return None


if __name__ == "__main__":
    main()
