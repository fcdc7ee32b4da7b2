"""One attempted update: gradients of all micro-batches and processes, clipping, AdamW, and what can go wrong.

    out of memory          the step is split into more and smaller micro-batches and repeated
    a non-finite number    never reaches the optimizer
    a float16 overflow     the scaler skips the update and lowers its scale

`evaluate_windows` is the forward pass alone, over validation windows.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from plotarmour.config import TrainingConfig, largest_divisor
from plotarmour.data.batches import Windows
from plotarmour.loss import IGNORE, summed_nats
from plotarmour.machine import Machine
from plotarmour.training.distributed import Ranks, check_share
from plotarmour.training.out_of_memory import is_out_of_memory, release, too_large
from plotarmour.training.prefetch import Batches

EVALUATION_ROWS = 8  # per forward pass of an evaluation
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
    """Takes the updates of a session, in order.

    Args:
        model: on the machine's device, float32, in training mode when `take` is called.
        windows: of the training tokens.
        config: the training part of a recipe.
        machine: device and dtype.
        ranks: which of several processes this is.

    Attributes:
        micro_batch_size: rows per micro-batch now; 0 before `begin`.
    """

    def __init__(self, model: nn.Module, windows: Windows, config: TrainingConfig, machine: Machine, ranks: Ranks):
        self.model, self.windows, self.config, self.machine, self.ranks = model, windows, config, machine, ranks
        self.optimizer = make_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
        check_share(config.rows_per_step, ranks.size)
        self.share = config.rows_per_step // ranks.size
        self.micro_batch_size, self._batches, self._waited_s = 0, None, 0.0

    def begin(self, step: int, micro_batch_size: int) -> None:
        """Start to read batches from a step on, in micro-batches of at most `micro_batch_size` rows."""
        self.close()
        self.micro_batch_size = largest_divisor(self.share, micro_batch_size)
        self._batches = Batches(self.windows, step, self.config.max_steps, self.micro_batch_size,
                                (self.ranks.rank, self.ranks.size), pinned=self.machine.device.type == "cuda")

    def close(self) -> None:
        """Stop reading ahead."""
        if self._batches is not None:
            self._batches.close()
            self._waited_s, self._batches = self.waited_s, None

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for batches."""
        return self._waited_s + (self._batches.wait_s if self._batches else 0.0)

    def take(self, step: int, learning_rate: float) -> Update:
        """Attempt the update of a step.

        Args:
            step: index of the step, from 0.
            learning_rate: of this step.

        Raises:
            UserError: the step does not fit into memory even one row at a time.
            LostProcess: another process has died.
        """
        optimizer, scaler = self.optimizer, self.scaler
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        loss, n_tokens = self._gradients(step)
        scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, self.config.grad_clip)
        finite = math.isfinite(norm) and math.isfinite(loss)
        scale = scaler.get_scale()
        # A non-finite loss is no overflow: the scale does not act on it. Nor is a gradient that overflows at the least
        # scale: it counts as non-finite, which ends the run, because a lower scale would make gradients underflow.
        overflowed = scaler.is_enabled() and not finite and math.isfinite(loss) and scale > LEAST_SCALE
        if finite:
            self._step()
            scaler.update()
        elif scaler.is_enabled():
            scaler.update(scale * scaler.get_backoff_factor() if overflowed else scale)
        optimizer.zero_grad(set_to_none=True)
        return Update(loss, n_tokens, norm, overflowed, not (finite or overflowed))

    def _step(self) -> None:
        """Update the weights."""
        failed = False
        try:
            self.scaler.step(self.optimizer)
        except (RuntimeError, MemoryError) as error:  # AdamW allocates its state at the first step
            if not is_out_of_memory(error):
                raise
            failed = True
        if failed:
            raise too_large("the optimizer's state")

    def _gradients(self, step: int) -> tuple[float, int]:
        """Sum the gradients of a step, in ever smaller micro-batches until it fits; return its loss and targets."""
        while True:
            n_tokens, micro_batches = self._batches.of(step)
            first = self.ranks.rank * len(micro_batches)  # the dropout of a micro-batch follows from its number
            loss, failed = 0.0, False
            try:
                loss = accumulate(self.model, micro_batches, self.machine, self.scaler, (self.config.seed, step),
                                  n_tokens, first)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            # Not in the except clause, where the error still holds the tensors of the step.
            loss, n_failed = self.ranks.sum(loss, failed)
            if not n_failed:
                self.ranks.sum_gradients(self.model)
                return loss, n_tokens
            self._split_further(step)

    def _split_further(self, step: int) -> None:
        """Repeat a step, in smaller micro-batches."""
        if self.micro_batch_size == 1:
            raise too_large(f"step {step + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        self.close()
        release()
        self.begin(step, self.micro_batch_size - 1)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only (parameters of two or more dimensions)."""
    groups = [([p for p in model.parameters() if p.dim() >= 2], config.weight_decay),
              ([p for p in model.parameters() if p.dim() < 2], 0.0)]
    return torch.optim.AdamW([{"params": ps, "weight_decay": decay} for ps, decay in groups if ps],
                             lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


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
            _seed((seed * 1_000_003 + step) * 4099 + i, machine.device)
        # They are in pinned memory: the copy overlaps with what the GPU still computes.
        inputs, targets = (tensor.to(machine.device, non_blocking=True) for tensor in (inputs, targets))
        with machine.autocast:
            nats = summed_nats(model.features(inputs)[0], model.unembedding, targets)
        scaler.scale(nats / n_tokens).backward()
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
def evaluate_windows(model: nn.Module, windows: Windows, batches: list[list[tuple[int, int]]],
                     token_bytes: np.ndarray | None, machine: Machine) -> tuple[float, int, int]:
    """Score some windows of a token file.

    Args:
        model: with `features` and `unembedding`, as in `plotarmour.models`.
        windows: of the token file.
        batches: rows ([begin, end) in targets) of each forward pass.
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


def _seed(number: int, device: torch.device) -> None:
    """Seed the CPU and the device; `torch.manual_seed` also looks for all other devices, which takes 0.4 ms."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
