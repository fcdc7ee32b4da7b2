"""What runs cost, from their folders, and what makes them unequal."""

import json

from plotarmour.flops import forward_flops_per_token, training_flops, weights_used_per_token


def budget_of(run) -> dict:
    """Return what a run cost, from its folder: parameters, training tokens, FLOPs, seconds, memory, hardware.

    Tokens, steps and seconds are those of the whole run; `checkpoint_step` is the step that was scored.
    """
    final = _ending(run)
    shape, T, tokens = run.model.config, run.context_length, final.get("tokens_seen")
    return {"model": run.config.model, "seed": run.config.training.seed, "params": run.info["params"],
            "params_non_embedding": run.info["params_non_embedding"], "params_per_token": weights_used_per_token(shape),
            "train_tokens": tokens, "flops_per_token": forward_flops_per_token(shape, T),
            "train_flops": None if tokens is None else training_flops(shape, T, tokens),
            "steps": final.get("step"), "checkpoint_step": run.step, "train_s": final.get("elapsed_s"),
            "peak_memory_mib": final.get("peak_memory_mib"), "hardware": run.info["hardware"],
            "ended": final.get("reason", "unfinished")}


def differences(runs: list) -> list[str]:
    """Say what makes a comparison of these runs unequal, one line each; empty where nothing does.

    Example:
        "tokens: 926,179 (bdh), 463,000 (gpt2)".
    """
    looked_at = {"training text": lambda run: run.info["train"]["payload_sha256"][:12],
                 "context": lambda run: f"{run.context_length:,}",
                 "rows per step": lambda run: f"{run.config.training.rows_per_step:,}",
                 "windows": lambda run: run.config.training.windows,
                 "hardware": lambda run: run.info["hardware"], "dtype": lambda run: run.info["dtype"],
                 "processes": lambda run: run.info.get("processes", 1),
                 "tokens": lambda run: f"{_ending(run).get('tokens_seen') or 0:,}",
                 "end": lambda run: _ending(run).get("reason", "unfinished")}
    found = []
    for what, value in looked_at.items():
        names: dict[str, list[str]] = {}
        for run in runs:
            names.setdefault(str(value(run)), []).append(run.name)
        if len(names) > 1:
            found.append(f"{what}: " + ", ".join(f"{v} ({', '.join(who)})" for v, who in names.items()))
    seeds = {kind: sorted({run.config.training.seed for run in runs if run.config.model == kind})
             for kind in sorted({run.config.model for run in runs})}
    if len({str(each) for each in seeds.values()}) > 1:  # several are none where every kind of model has the same
        found.append("seeds: " + ", ".join(f"{kind} {', '.join(map(str, each))}" for kind, each in seeds.items()))
    orders = {run.config.training.seed: set() for run in runs}
    for run in runs:
        orders[run.config.training.seed].add(run.info["train"].get("order_sha256"))
    if any(len(each) > 1 for each in orders.values()):
        found.append("order of the tokens: runs of one seed have different hashes, or none (run.json, order_sha256)")
    return found


def _ending(run) -> dict:
    """How a run ended, or stopped for now; empty while it is under way."""
    return next((json.loads((run.folder / name).read_text(encoding="utf-8"))
                 for name in ("DONE.json", "STOPPED.json") if (run.folder / name).exists()), {})
