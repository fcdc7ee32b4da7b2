"""One update: gradients over all micro-batches and processes, clipping, AdamW, and what can go wrong with them.

    out of memory          the step is split into more and smaller micro-batches and done again
    a non-finite number    never reaches the optimizer
    a float16 overflow     the scaler skips the update and lowers its scale
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from plotarmour.config import TrainingConfig
from plotarmour.data.batches import Windows
from plotarmour.machine import Machine
from plotarmour.training.distributed import Ranks, check_share
from plotarmour.training.out_of_memory import is_out_of_memory, largest_divisor, release, too_large
from plotarmour.training.passes import accumulate, clip_gradients, make_optimizer
from plotarmour.training.prefetch import Batches

LEAST_SCALE = 1.0  # of the loss under float16: 16 overflows in a row below GradScaler's first one


@dataclass(frozen=True)
class Update:
    """What came of a step: mean nats per target, count of targets, the gradient's norm before clipping."""

    loss: float
    n_tokens: int
    norm: float
    overflowed: bool  # the scaler's scale was too high: no update
    skipped: bool  # a non-finite loss or gradient: no update


class Updates:
    """The updates of a session, in order.

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
        """Start reading batches from a step on, in micro-batches of at most so many rows."""
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
        """Attempt the update of a step (from 0).

        Raises:
            UserError: it does not fit into memory, one row at a time.
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
        # A loss is not scaled: what is wrong with it is not the scale's doing. Nor is a gradient that overflows at the
        # least scale: that is counted as not finite, so that it ends the run, and no scale is left that gradients
        # vanish under.
        overflowed = scaler.is_enabled() and not finite and math.isfinite(loss) and scale > LEAST_SCALE
        if finite:
            self._step()
            scaler.update()
        elif scaler.is_enabled():
            scaler.update(scale * scaler.get_backoff_factor() if overflowed else scale)
        optimizer.zero_grad(set_to_none=True)
        return Update(loss, n_tokens, norm, overflowed, not (finite or overflowed))

    def _step(self) -> None:
        full = False
        try:
            self.scaler.step(self.optimizer)
        except (RuntimeError, MemoryError) as error:  # AdamW makes its state at the first step
            if not is_out_of_memory(error):
                raise
            full = True
        if full:
            raise too_large("the optimizer's state")

    def _gradients(self, step: int) -> tuple[float, int]:
        """Add up the gradients of a step; return its loss and its targets. Split it until it fits."""
        while True:
            n_tokens, micro_batches = self._batches.of(step)
            first = self.ranks.rank * len(micro_batches)  # dropout follows from a micro-batch's place in the step
            loss, full = 0.0, False
            try:
                loss = accumulate(self.model, micro_batches, self.machine, self.scaler, (self.config.seed, step),
                                  n_tokens, first)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                full = True
            # Not in the except clause: there the error holds the failed step's tensors.
            loss, n_full = self.ranks.sum(loss, full)
            if not n_full:
                self.ranks.sum_gradients(self.model)
                return loss, n_tokens
            self._split_further(step)

    def _split_further(self, step: int) -> None:
        if self.micro_batch_size == 1:
            raise too_large(f"step {step + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        self.close()
        release()
        self.begin(step, self.micro_batch_size - 1)
