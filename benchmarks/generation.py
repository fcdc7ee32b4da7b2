#!/usr/bin/env python3
"""Generation and reading: time per token against the length of the text so far.

BDH from its state, BDH by running the published formula over all of the text again, GPT-2 (its own core parameters,
as many) from its cache, and GPT-2 by `transformers`' own generate. Then reading a prompt through the state against
the published forward pass. All in this process, in turn; medians.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "models")]

SHAPE = {"n_layer": 6, "n_embd": 256, "n_head": 4}
MULTIPLIER, VOCABULARY = 128, 256
GPT2_SHAPE = {"n_layer": 8, "n_embd": 512, "n_head": 8}  # 25.2 M core parameters, as BDH's 25.2 M


def once_ms(action) -> float:
    """Milliseconds of a call."""
    import torch

    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def median_ms(action, times: int) -> float:
    """Median milliseconds of a call, after one to warm up."""
    return statistics.median([once_ms(action) for _ in range(times + 1)][1:])


def models(device, contexts: list[int]):
    """Ours, the published formula with the same weights, and a GPT-2 with positions enough."""
    import torch
    from published_bdh import PublishedBDH

    from plotarmour.models.bdh import BDH, BDHConfig
    from plotarmour.models.hf import HFModel
    from plotarmour.models.hf_kinds import GPT2Config

    torch.manual_seed(0)
    bdh = BDH(BDHConfig(**SHAPE, mlp_internal_dim_multiplier=MULTIPLIER, vocab_size=VOCABULARY, dropout=0.0))
    published = PublishedBDH(**SHAPE, multiplier=MULTIPLIER, vocab_size=VOCABULARY)
    published.load_state_dict(bdh.state_dict())
    gpt2 = HFModel(GPT2Config(**GPT2_SHAPE, vocab_size=VOCABULARY, context_length=max(contexts) + 512, dropout=0.0))
    return [m.to(device).eval() for m in (bdh, published, gpt2)]


def against_context(device, contexts: list[int], recompute_to: int, tokens: int) -> list[dict]:
    """ms per token of each way to go on, at each context; and the bytes of what is carried."""
    import torch

    bdh, published, gpt2 = models(device, contexts)
    rows, states = [], {}
    for context in contexts:
        text = torch.randint(0, VOCABULARY, (1, context), device=device)
        for name, model in (("BDH recurrent", bdh), ("GPT-2 with cache", gpt2)):
            state = model.features(text, model.initial_state(1))[1]
            states[name, context] = [model, state]
        if context <= recompute_to:
            ms = median_ms(lambda text=text: published(text), 3)
            rows.append({"what": "BDH by full recomputation", "context": context, "ms_per_token": ms})
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    times = {key: [] for key in states}
    for _, key in itertools.product(range(tokens), states):  # in turn, so that noise falls on all
        model, state = states[key]
        times[key].append(median_ms(lambda model=model, state=state: model(token) if state is None else
                                    model.features(token, state)[0] @ model.unembedding.T, 1))
    for (name, context), found in times.items():
        held = sum(t.numel() * t.element_size() for t in states[name, context][1].tensors().values())
        pairs = zip(found, times[name, contexts[0]], strict=True)
        rows.append({"what": name, "context": context, "ms_per_token": statistics.median(found),
                     "times_the_first": statistics.median(a / b for a, b in pairs), "state_mib": held / 2**20})
    return rows


def against_transformers(device, tokens: int, rounds: int) -> list[dict]:
    """Greedy decoding by our sampler and by `transformers.generate`, the same GPT-2: tokens and speed."""
    import torch

    from plotarmour.evaluation.generation import generate
    from plotarmour.machine import find_machine

    _, _, gpt2 = models(device, [tokens + 64])
    machine, prompt = find_machine(device.type, "float32"), list(range(32))
    start = torch.tensor([[VOCABULARY - 1, *prompt]], device=device)

    def theirs() -> list[int]:
        out = gpt2.hf.generate(start, do_sample=False, max_new_tokens=tokens, attention_mask=torch.ones_like(start),
                               pad_token_id=0)
        return out[0, start.shape[1]:].tolist()

    def ours() -> list[int]:
        return generate(gpt2, prompt, VOCABULARY - 1, machine, max_new_tokens=tokens, temperature=0)

    times, same = {"ours": [], "transformers": []}, ours() == theirs()
    for _ in range(rounds):
        for name, way in (("ours", ours), ("transformers", theirs)):
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["transformers"], strict=True))
    return [{"what": f"GPT-2, {tokens} tokens by {name}", "context": tokens,
             "ms_per_token": 1000 * statistics.median(found) / tokens, "same_tokens": same,
             "ours_times_faster": 1.0 if name == "ours" else ratio} for name, found in times.items()]


def prefill(device, lengths: list[int], rounds: int) -> list[dict]:
    """Reading a prompt through the state against the published forward pass over it."""
    import torch

    bdh, published, _ = models(device, [64])
    rows = []
    for length in lengths:
        text = torch.randint(0, VOCABULARY, (1, length), device=device)
        times = {"state": [], "published": []}
        ways = {"state": lambda text=text: bdh.features(text, bdh.initial_state(1)),
                "published": lambda text=text: published.features(text)}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                times[name].append(once_ms(way))
        times = {name: found[1:] for name, found in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["state"], times["published"], strict=True))
        for name, found in times.items():
            rows.append({"what": f"prompt read by {'the published forward' if name == 'published' else 'the state'}",
                         "context": length, "ms_per_token": statistics.median(found) / length,
                         "ours_times_faster": ratio if name == "published" else 1.0})
    return rows


def activity(v, weights, n_layer: int, rotation) -> list[dict[str, float]]:
    """Count which neurons of a BDH are active, per pass.

    Args:
        v: embeddings, (B, T, D), float32 or float64.
        weights: `plotarmour.models.tiled.Weights` in the dtype of v.
        n_layer: number of passes.
        rotation: `plotarmour.models.rotary.Rotation` of the model.

    Returns:
        Per pass the shares, between 0 and 1, of active `x`, of `pairs` (2i, 2i + 1) with an active x, of active `y`,
        and of `xy`, where both are active, over all heads, neurons and positions.
    """
    import torch

    from plotarmour.models.rotary import rotate
    from plotarmour.models.tiled import normalize

    (B, T, _), (H, _, N), shares = v.shape, weights.shape, []
    factors = rotation.table(0, T, v.device, v.dtype)
    for _ in range(n_layer):
        m, counts = torch.zeros_like(v), dict.fromkeys(("x", "pairs", "y", "xy"), 0)
        for h in range(H):
            x = torch.relu(v @ weights.encoder[h])  # (B, T, N)
            q = rotate(x, factors)
            y = torch.relu(normalize((q @ q.mT).tril(-1) @ v)[0] @ weights.encoder_v[h])
            m += (x * y) @ weights.decoder[h * N:(h + 1) * N]
            for name, values in (("x", x), ("pairs", x.unflatten(-1, (-1, 2)).sum(-1)), ("y", y), ("xy", x * y)):
                counts[name] += int(values.count_nonzero())
        total = B * T * H * N
        shares.append({name: n / (total // 2 if name == "pairs" else total) for name, n in counts.items()})
        v = normalize(v + normalize(m)[0])[0]
    return shares


def trained_run(folder: Path, data: Path) -> list[dict]:
    """Activity of a trained run on text it has not seen, per pass."""
    import torch

    from plotarmour.data.token_file import TokenFile
    from plotarmour.models.tiled import normalize
    from plotarmour.run import load_run

    run, file = load_run(folder), TokenFile.open(data)
    length = run.config.training.context_length
    n = min(16, file.n_tokens // length)
    text = torch.tensor(file.tokens[:n * length].astype("int64")).view(n, length).to(run.machine.device)
    with torch.no_grad():
        v = normalize(run.model.embed(text))[0]
        counted = activity(v, run.model._weights(torch.float32), run.model.config.n_layer, run.model._rotation)
    return [{"what": f"{folder.name}: active in pass {i + 1}", "context": length,
             **{f"active_{name}": share for name, share in found.items()}} for i, found in enumerate(counted)]


def draw(rows: list[dict], path: Path) -> None:
    """ms per token against context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for what, colour, marker in (("BDH by full recomputation", "#D55E00", "o"), ("GPT-2 with cache", "#CC79A7", "s"),
                                 ("BDH recurrent", "#0072B2", "^")):
        points = sorted((int(r["context"]), float(r["ms_per_token"])) for r in rows if r["what"] == what)
        ax.plot(*zip(*points, strict=True), color=colour, marker=marker, label=what)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel("tokens before it")
    ax.set_ylabel("ms per token")
    ax.set_title("One more token, 25 M core parameters", fontsize=10)
    ax.grid(alpha=0.3, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 64, 1024, 2048, 8192],
                        help="tokens; others are compared with the first")
    parser.add_argument("--recompute-to", type=int, default=1024, help="largest context for full recomputation, tokens")
    parts = ("context", "transformers", "prompt", "run")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="rows of others in --out stay")
    parser.add_argument("--tokens", type=int, default=40, help="generated per case; medians are stated")
    parser.add_argument("--run", type=Path, help="a trained BDH run: measure its activity too")
    parser.add_argument("--data", type=Path, help="a token file for --run that it was not trained on")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "generation.csv", help="CSV; figure beside it")
    args = parser.parse_args()
    import pandas as pd
    import torch

    device = torch.device(args.device)
    parts = {"context": lambda: against_context(device, args.contexts, args.recompute_to, args.tokens),
             "transformers": lambda: against_transformers(device, 256, 7) + against_transformers(device, 1024, 3),
             "prompt": lambda: prefill(device, [2048], 3),
             "run": lambda: trained_run(args.run, args.data) if args.run else []}
    rows = []
    if len(args.parts) < len(parts) and args.out.exists():
        earlier = pd.read_csv(args.out)
        rows = earlier[~earlier["part"].isin(args.parts)].to_dict("records")
    for part in args.parts:
        with torch.no_grad():
            found = parts[part]()
        for row in found:
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            rows.append({"device": args.device, "part": part} | row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(args.out, index=False, lineterminator="\n")
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
