"""One attempted update: gradients of all micro-batches and processes, clipping, optimizer, failures.

    out of memory          the step is split into more and smaller micro-batches and repeated
    a non-finite number    never reaches the optimizer
    a float16 overflow     the scaler skips the update and lowers its scale

`evaluate_windows` is the forward pass alone, over validation windows.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plotarmour.cli import UserError
from plotarmour.config import TrainingConfig, largest_divisor
from plotarmour.data.batches import Row, Windows
from plotarmour.loss import IGNORE, summed_nats
from plotarmour.machine import Machine
from plotarmour.training.distributed import Ranks
from plotarmour.training.optimizer import make_optimizer
from plotarmour.training.prefetch import Batches

EVALUATION_ROWS = 8  # per forward pass of an evaluation
# Of a RuntimeError: in RAM, where the system refuses memory instead of killing, and on a GPU outside torch's allocator.
OUT_OF_MEMORY = ("DefaultCPUAllocator", "Storage size calculation overflowed", "CUDA error: out of memory",
                 "CUBLAS_STATUS_ALLOC_FAILED")
LEAST_SCALE = 1.0  # of the loss in float16; 16 overflows in a row lead there from GradScaler's first scale


@dataclass(frozen=True)
class Update:
    """The result of a step."""

    loss: float  # mean nats per target
    n_tokens: int  # targets
    norm: float  # of the gradient, before clipping
    overflowed: bool  # no update, because the scaler's scale was too high
    skipped: bool  # no update, because loss or gradient were not finite


class Updates:
    """Takes the updates of a session, in order. The model is float32 and in training mode whenever `take` is called."""

    def __init__(self, model: nn.Module, windows: Windows, config: TrainingConfig, machine: Machine, ranks: Ranks):
        self.model, self.windows, self.config, self.machine, self.ranks = model, windows, config, machine, ranks
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        self.share = config.rows_per_step // ranks.size
        self.waited_s = 0.0  # for batches; near zero where reading keeps up

    def begin(self, step: int, micro_batch_size: int) -> None:
        """Start to read batches from a step on, in micro-batches of at most `micro_batch_size` rows."""
        self.micro_batch_size = largest_divisor(self.share, micro_batch_size)
        self._batches = Batches(self.windows, step, self.config.max_steps, self.micro_batch_size, self.ranks,
                                pinned=self.machine.device.type == "cuda")

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()

    def take(self, step: int, rate: float) -> Update:
        """Attempt the update of a step. What does not fit into memory even one row at a time raises `UserError`."""
        optimizer, scaler = self.optimizer, self.scaler
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_fraction"]
        loss, n_tokens = self._gradients(step)
        scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, self.config.grad_clip)
        finite = math.isfinite(norm) and math.isfinite(loss)
        scale = scaler.get_scale()
        # A non-finite loss is no overflow: the scale does not act on it. Nor is a gradient that overflows at the least
        # scale: it counts as non-finite, which ends the run, because a lower scale would make gradients underflow.
        overflowed = scaler.is_enabled() and not finite and math.isfinite(loss) and scale > LEAST_SCALE
        if finite:
            within_memory("the optimizer's state", lambda: scaler.step(optimizer))  # AdamW allocates it at step 0
            scaler.update()
        elif scaler.is_enabled():
            scaler.update(scale * scaler.get_backoff_factor() if overflowed else scale)
            # A given scale leaves the count of good steps as it was: the scale would grow again too early.
            scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 0})
        optimizer.zero_grad(set_to_none=True)
        return Update(loss, n_tokens, norm, overflowed, not (finite or overflowed))

    def _gradients(self, step: int) -> tuple[float, int]:
        """Sum the gradients of a step, in ever smaller micro-batches until it fits; return its loss and targets."""
        while True:
            begun = time.perf_counter()
            n_tokens, micro_batches = self._batches.of(step)
            self.waited_s += time.perf_counter() - begun
            first = self.ranks.rank * len(micro_batches)  # the dropout of a micro-batch follows from its number
            seed = (self.config.seed, step)
            loss = try_to_fit(
                lambda: accumulate(self.model, micro_batches, self.machine, self.scaler, seed, n_tokens, first))
            total, n_failed = self.ranks.sum(loss or 0.0, loss is None)
            if not n_failed:
                self.ranks.sum_gradients(self.model)
                return total, n_tokens
            if self.micro_batch_size == 1:
                raise too_large(f"one row of step {step + 1}")
            self.optimizer.zero_grad(set_to_none=True)
            self.close()
            self.begin(step, self.micro_batch_size - 1)


def accumulate(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]], machine: Machine,
               scaler: torch.amp.GradScaler, dropout_seed: tuple[int, int] | None = None, n_tokens: int | None = None,
               first: int = 0) -> float:
    """Add the gradient of the mean loss over all micro-batches, weighted by tokens, to the parameters.

    Args:
        model: with `features` and `unembedding`, as in `plotarmour.models`.
        micro_batches: int64 (inputs, targets), each (B, T); targets may be padded with IGNORE.
        machine: device and dtype.
        scaler: scales the loss in float16.
        dropout_seed: (seed, step); with its number, it gives the dropout of each micro-batch.
        n_tokens: number of targets in the whole step, where these micro-batches are one process's share.
        first: number of the first micro-batch within the step.

    Returns:
        Summed nats of these micro-batches / n_tokens: the loss, or this process's part of it.
    """
    if n_tokens is None:
        n_tokens = sum(int((targets != IGNORE).sum()) for _, targets in micro_batches)
    total = torch.zeros((), dtype=torch.float64, device=machine.device)
    for i, (inputs, targets) in enumerate(micro_batches, first):
        if dropout_seed is not None:
            seed, step = dropout_seed
            number = (seed * 1_000_003 + step) * 4099 + i
            torch.default_generator.manual_seed(number)  # torch.manual_seed looks for all other devices: 0.4 ms
            if machine.device.type == "cuda":
                torch.cuda.manual_seed(number)
        # They are in pinned memory: the copy overlaps with what the GPU still computes.
        inputs, targets = (tensor.to(machine.device, non_blocking=True) for tensor in (inputs, targets))
        with machine.autocast:
            nats = summed_nats(model.features(inputs)[0], model.unembedding, targets)
        objective = nats if model.penalty is None else nats + model.penalty
        scaler.scale(objective / n_tokens).backward()
        total += nats.detach()
    return float(total) / n_tokens


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients down to a norm of `limit` if they exceed it (0: never); return their norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    before = float(norm)
    if limit and before > limit:  # most steps stay below it and need no second pass
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return before


@torch.no_grad()
def evaluate_windows(model: nn.Module, windows: Windows, batches: list[list[Row]],
                     token_bytes: np.ndarray | None, machine: Machine) -> tuple[float, int, int]:
    """Score some windows of a token file.

    Args:
        model: with `features` and `unembedding`, as in `plotarmour.models`.
        windows: of the token file.
        batches: rows of each forward pass.
        token_bytes: int32 (vocab_size,), bytes that each id stands for; None where that is not exact.
        machine: device and dtype.

    Returns:
        Summed nats, number of targets, and the UTF-8 bytes that these targets stand for. The model stays in the mode,
        training or evaluation, that it was in.
    """
    was_training, nats, n_tokens, n_bytes = model.training, 0.0, 0, 0
    model.eval()
    try:
        for rows in batches:
            inputs, targets = windows.micro_batch(rows)
            with machine.autocast:
                features = model.features(inputs.to(machine.device))[0]
                nats += float(summed_nats(features, model.unembedding, targets.to(machine.device)))
            counted = targets[targets != IGNORE].numpy()
            n_tokens += len(counted)
            n_bytes += int(token_bytes[counted].sum()) if token_bytes is not None else 0
    finally:
        model.train(was_training)
    return nats, n_tokens, n_bytes


def try_to_fit(act: Callable[[], Any]) -> Any:
    """Call a function and return its result; None where memory runs out. Unused memory then returns to the device."""
    try:
        return act()
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
    gc.collect()  # not in the except clause, where the error still holds the tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def too_large(what: str) -> UserError:
    """Return the error that something does not fit into memory."""
    return UserError(f"{what} needs more memory than there is; set a shorter context_length or a smaller model, or "
                     "free memory (tools/doctor.py --recipe R says what fits here).")


def within_memory(what: str, act: Callable[[], Any]) -> Any:
    """Call a function that cannot be split, and return its result; a `UserError` says that `what` does not fit."""
    result = try_to_fit(lambda: (act(),))  # the result alone may be None
    if result is None:
        raise too_large(what)
    return result[0]
