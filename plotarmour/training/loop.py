"""The training loop: one step is one attempted optimizer update over `rows_per_step` rows.

Everything random in a step follows from (seed, step): which rows it reads, and the dropout of each micro-batch. So a
run that stops and resumes needs no replay and ends with the same bits (float32 on a CPU).
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from plotarmour.config import TrainingConfig
from plotarmour.errors import UserError
from plotarmour.files import write_json
from plotarmour.loss import IGNORE, summed_nats
from plotarmour.machine import Machine, peak_memory_mib
from plotarmour.text.batches import Windows
from plotarmour.training.checkpoint import load_training, save_checkpoint
from plotarmour.training.runlog import RunLog
from plotarmour.training.schedule import learning_rate

NON_FINITE_IN_A_ROW = 10
EVALUATION_ROWS = 8


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (parameters of two or more dimensions)."""
    groups = [([p for p in model.parameters() if p.dim() >= 2], config.weight_decay),
              ([p for p in model.parameters() if p.dim() < 2], 0.0)]
    return torch.optim.AdamW([{"params": ps, "weight_decay": decay} for ps, decay in groups if ps],
                             lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def accumulate(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]], machine: Machine,
               scaler: torch.amp.GradScaler, dropout_seed: tuple[int, int] | None = None) -> float:
    """Add the gradient of the mean loss over all micro-batches, weighted by tokens, to the parameters.

    Args:
        model: with the interface of `features` and `unembedding`.
        micro_batches: int64 (inputs, targets), each (B, T); any number of padded targets.
        machine: device and dtype.
        scaler: multiplies the loss under float16.
        dropout_seed: (seed, step); each micro-batch draws its dropout from it and its own number.

    Returns:
        The loss: summed nats of all micro-batches / count of their targets.
    """
    n_tokens = sum(int((targets != IGNORE).sum()) for _, targets in micro_batches)
    total = torch.zeros((), dtype=torch.float64, device=machine.device)
    for i, (inputs, targets) in enumerate(micro_batches):
        if dropout_seed is not None:
            seed, step = dropout_seed
            torch.manual_seed((seed * 1_000_003 + step) * 4099 + i)
        inputs, targets = inputs.to(machine.device), targets.to(machine.device)
        with machine.autocast:
            nats = summed_nats(model.features(inputs)[0], model.unembedding, targets)
        scaler.scale(nats / n_tokens).backward()
        total += nats.detach()
    return float(total) / n_tokens


@torch.no_grad()
def evaluate_windows(model: nn.Module, windows: Windows, rows: list[tuple[int, int]], token_bytes: np.ndarray,
                     machine: Machine) -> tuple[float, int, int]:
    """Score some windows of a token file.

    Returns:
        Summed nats, count of targets, and UTF-8 bytes these targets stand for. The model is left in the mode
        (training or evaluation) it was in.
    """
    was_training, nats, n_tokens, n_bytes = model.training, 0.0, 0, 0
    model.eval()
    for i in range(0, len(rows), EVALUATION_ROWS):
        inputs, targets = windows.micro_batch(rows[i:i + EVALUATION_ROWS])
        with machine.autocast:
            features = model.features(inputs.to(machine.device))[0]
            nats += float(summed_nats(features, model.unembedding, targets.to(machine.device)))
        counted = targets[targets != IGNORE].numpy()
        n_tokens, n_bytes = n_tokens + len(counted), n_bytes + int(token_bytes[counted].sum())
    model.train(was_training)
    return nats, n_tokens, n_bytes


def train(run: Path, model: nn.Module, windows: Windows, val_windows: Windows, token_bytes: np.ndarray,
          config: TrainingConfig, machine: Machine, resume_from: Path | None = None) -> dict:
    """Train until the schedule ends, early stopping fires, or something stops the run.

    Args:
        run: folder for log.csv, checkpoints, DONE.json or STOPPED.json.
        model: on the machine's device, float32.
        windows: of the training tokens.
        val_windows: of the validation tokens; the first `eval_tokens` of them, in order, are evaluated.
        token_bytes: int32 (vocab_size,), bytes that each id stands for.
        config: the training part of a recipe.
        machine: device and dtype.
        resume_from: a checkpoint folder to go on from.

    Returns:
        What DONE.json or STOPPED.json holds; its `reason` tells which.
    """
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    state = {"tokens_seen": 0, "elapsed_s": 0.0, "skipped_steps": 0, "scaler_overflows": 0, "best_val_loss": math.inf,
             "best_step": 0, "evaluations_without_improvement": 0, "val_loss": None, "train_loss": None,
             "since_row": [0.0, 0]}
    step = 0
    if resume_from is not None:
        state = load_training(resume_from, model, optimizer)
        step = state.pop("step")
        if not (run / "checkpoints" / f"step_{state['best_step']:08d}").is_dir():  # after going back
            state.update(best_step=step, best_val_loss=state["val_loss"])
        if scaler.is_enabled():
            scaler.load_state_dict(state["scaler"])
    out_of_patience = config.patience and state["evaluations_without_improvement"] >= config.patience
    if step > config.max_steps:
        raise UserError(f"{run} has reached step {step}, beyond max_steps = {config.max_steps}; set max_steps to at "
                        f"least {step}.")
    val_rows = val_windows.first_rows(config.eval_tokens)
    for name in ("DONE.json", "STOPPED.json"):
        (run / name).unlink(missing_ok=True)
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)
    log = RunLog(run / "log.csv", -1 if resume_from is None else step)
    clock, stop = _Clock(state["elapsed_s"]), _StopRequest()
    non_finite, saved = 0, step if resume_from else None
    # Killed after the last checkpoint, before DONE.json: one more step would be one too many.
    reason = "early stopping" if out_of_patience and step < config.max_steps else None

    def evaluate() -> dict:
        nats, n_tokens, n_bytes = evaluate_windows(model, val_windows, val_rows, token_bytes, machine)
        state["val_loss"] = loss = nats / n_tokens
        if loss < state["best_val_loss"]:
            state.update(best_val_loss=loss, best_step=step, evaluations_without_improvement=0)
        else:
            state["evaluations_without_improvement"] += 1
        return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0)),
                "val_bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None}

    def write_row(rate: float | None, norm: float | None, measured: dict) -> None:
        nats, count = state["since_row"]
        if count:
            state["train_loss"] = nats / count
        log.append(utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), step=step, epoch=windows.epoch_of(step),
                   tokens_seen=state["tokens_seen"], elapsed_s=clock.elapsed_s, learning_rate=rate, grad_norm=norm,
                   train_loss=state["train_loss"] if count else None, tokens_per_s=clock.rate(),
                   peak_memory_mib=peak_memory_mib(machine.device), skipped_steps=state["skipped_steps"],
                   scaler_overflows=state["scaler_overflows"], **measured)
        state["since_row"] = [0.0, 0]

    def save(best: bool = False) -> None:
        nonlocal saved
        state["elapsed_s"] = clock.elapsed_s
        extra = {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}
        save_checkpoint(run, step, model, optimizer, state | extra, best, config.keep_every)
        saved = step

    every_s = 1.0 if sys.stderr.isatty() else 5.0  # a notebook keeps every line
    with stop, tqdm(total=config.max_steps, initial=step, desc=run.name, unit="step", mininterval=every_s,
                    smoothing=0.05) as bar:
        if resume_from is None:
            write_row(None, None, evaluate())
            save(best=True)
        model.train()
        while step < config.max_steps and reason is None:
            rate = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = windows.rows_of(step)
            batches = [windows.micro_batch(rows[i:i + config.micro_batch_size])
                       for i in range(0, len(rows), config.micro_batch_size)]
            loss = accumulate(model, batches, machine, scaler, (config.seed, step))
            scaler.unscale_(optimizer)
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
            scale, overflowed = scaler.get_scale(), False
            finite = math.isfinite(norm) and math.isfinite(loss)
            if finite or (scaler.is_enabled() and math.isfinite(loss)):  # the scaler skips an overflowed update
                scaler.step(optimizer)
                scaler.update()
                overflowed = scaler.get_scale() < scale
            elif scaler.is_enabled():
                scaler.update(scale)  # the loss is not scaled: what is wrong with it is not the scale's doing
            optimizer.zero_grad(set_to_none=True)
            step += 1
            n_tokens = sum(end - begin for begin, end in rows)
            state["tokens_seen"] += n_tokens
            if math.isfinite(loss):
                state["since_row"] = [state["since_row"][0] + loss * n_tokens, state["since_row"][1] + n_tokens]
            state["scaler_overflows"] += overflowed
            skipped = not (finite or overflowed)
            state["skipped_steps"] += skipped
            non_finite = non_finite + 1 if skipped else 0
            clock.count(n_tokens)
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {clock.rate():,.0f} tokens/s", refresh=False)

            last = step == config.max_steps
            evaluated = evaluate() if step % config.eval_interval == 0 or last else {}
            if evaluated or step % config.log_interval == 0:
                write_row(rate, norm, evaluated)
            best = bool(evaluated) and state["best_step"] == step
            if non_finite == NON_FINITE_IN_A_ROW:
                reason = "non-finite"
            elif last:
                reason = "max_steps"
            elif evaluated and config.patience and state["evaluations_without_improvement"] >= config.patience:
                reason = "early stopping"
            elif stop.asked:
                reason = f"signal {stop.asked}"
            elif config.max_minutes and clock.session_s > 60 * config.max_minutes:
                reason = "time budget"
            if reason != "non-finite" and (reason or best or step % config.checkpoint_interval == 0):
                save(best)
    final = {"reason": reason or "max_steps", "step": step, "tokens_seen": state["tokens_seen"],
             "elapsed_s": round(clock.elapsed_s, 2), "train_loss": state["train_loss"],
             "val_loss": state["val_loss"], "best_step": state["best_step"], "best_val_loss": state["best_val_loss"],
             "skipped_steps": state["skipped_steps"], "scaler_overflows": state["scaler_overflows"],
             "peak_memory_mib": peak_memory_mib(machine.device), "last_checkpoint": saved}
    done = final["reason"] in ("max_steps", "early stopping")
    write_json(run / ("DONE.json" if done else "STOPPED.json"), final)
    return final


class _Clock:
    """Elapsed seconds, over all sessions of a run, and tokens per second over the last 50 steps."""

    def __init__(self, before_s: float):
        self.before_s, self.start = before_s, time.perf_counter()
        self.recent: deque[tuple[float, int]] = deque([(self.start, 0)], maxlen=50)

    @property
    def session_s(self) -> float:
        return time.perf_counter() - self.start

    @property
    def elapsed_s(self) -> float:
        return self.before_s + self.session_s

    def count(self, n_tokens: int) -> None:
        self.recent.append((time.perf_counter(), n_tokens))

    def rate(self) -> float | None:
        span = self.recent[-1][0] - self.recent[0][0]
        return sum(n for _, n in list(self.recent)[1:]) / span if span > 0 else None


class _StopRequest(contextlib.AbstractContextManager):
    """SIGINT and SIGTERM ask the loop to finish its step and save; a second one stops at once."""

    def __init__(self):
        self.asked: str | None = None
        self.before: dict = {}

    def __enter__(self) -> "_StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
