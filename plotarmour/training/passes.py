"""What happens to a batch: gradients added up and clipped, a validation loss, the optimizer's groups."""

import numpy as np
import torch
from torch import Tensor, nn

from plotarmour.config import TrainingConfig
from plotarmour.data.batches import Windows
from plotarmour.loss import IGNORE, summed_nats
from plotarmour.machine import Machine

EVALUATION_ROWS = 8


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (parameters of two or more dimensions)."""
    groups = [([p for p in model.parameters() if p.dim() >= 2], config.weight_decay),
              ([p for p in model.parameters() if p.dim() < 2], 0.0)]
    return torch.optim.AdamW([{"params": ps, "weight_decay": decay} for ps, decay in groups if ps],
                             lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def accumulate(model: nn.Module, micro_batches: list[tuple[Tensor, Tensor]], machine: Machine,
               scaler: torch.amp.GradScaler, dropout_seed: tuple[int, int] | None = None, n_tokens: int | None = None,
               first: int = 0) -> float:
    """Add the gradient of the mean loss over all micro-batches, weighted by tokens, to the parameters.

    Args:
        model: with the interface of `features` and `unembedding`.
        micro_batches: int64 (inputs, targets), each (B, T); any number of padded targets.
        machine: device and dtype.
        scaler: multiplies the loss under float16.
        dropout_seed: (seed, step); each micro-batch draws its dropout from it and its own number.
        n_tokens: targets of the whole step, where these micro-batches are one process's share; None: of these.
        first: the number of the first micro-batch within the step.

    Returns:
        Summed nats of these micro-batches / n_tokens: the loss, or this share's part of it.
    """
    if n_tokens is None:
        n_tokens = sum(int((targets != IGNORE).sum()) for _, targets in micro_batches)
    total = torch.zeros((), dtype=torch.float64, device=machine.device)
    for i, (inputs, targets) in enumerate(micro_batches, first):
        if dropout_seed is not None:
            seed, step = dropout_seed
            _seed((seed * 1_000_003 + step) * 4099 + i, machine.device)
        # Pinned by the reader: the copy goes on while the GPU computes what came before.
        inputs, targets = (tensor.to(machine.device, non_blocking=True) for tensor in (inputs, targets))
        with machine.autocast:
            nats = summed_nats(model.features(inputs)[0], model.unembedding, targets)
        scaler.scale(nats / n_tokens).backward()
        total += nats.detach()
    return float(total) / n_tokens


def clip_gradients(model: nn.Module, limit: float) -> float:
    """Scale all gradients down until their norm is `limit`, if it is over it; 0: never. Return the norm before."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    before = float(norm)
    if limit and before > limit:  # most steps of a run are under it: no pass over the gradients for them
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return before


def _seed(number: int, device: torch.device) -> None:
    """What `torch.manual_seed` does for these devices; it asks after all others too, which takes 0.4 ms each time."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


@torch.no_grad()
def evaluate_windows(model: nn.Module, windows: Windows, batches: list[list[tuple[int, int]]], token_bytes: np.ndarray,
                     machine: Machine) -> tuple[float, int, int]:
    """Score some windows of a token file.

    Args:
        model: with the interface of `features` and `unembedding`.
        windows: of the token file.
        batches: rows ([begin, end) in targets) of each forward pass.
        token_bytes: int32 (vocab_size,), bytes that each id stands for.
        machine: device and dtype.

    Returns:
        Summed nats, count of targets, and UTF-8 bytes these targets stand for. The model is left in the mode
        (training or evaluation) it was in.
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
            n_tokens, n_bytes = n_tokens + len(counted), n_bytes + int(token_bytes[counted].sum())
    finally:
        model.train(was_training)
    return nats, n_tokens, n_bytes
