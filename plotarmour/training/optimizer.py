"""The optimizer: AdamW, Muon, or updates that keep norms; and the learning rate of each step."""

import math

import torch
from torch import Tensor, nn

from plotarmour.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig, elapsed_s: float = 0.0) -> float:
    """Return the learning rate of one update.

    After a linear warm-up over `warmup_steps`, it follows a cosine down to `final_learning_rate_fraction`, or
    ("linear_tail") it is constant and falls linearly to the same end over the last `decay_fraction`. With
    `schedule_minutes`, the schedule follows the clock where the clock is ahead of the steps, so that it is complete
    when the time is over.

    Args:
        step: index of the update, from 0.
        config: the training part of a recipe.
        elapsed_s: seconds of training, over all sessions; used only with `schedule_minutes`.

    Example (max_steps = 10, warmup_steps = 2, learning_rate = 1, fraction 0):
        steps 0, 1, 2 of a cosine: 0.5, 1.0, 1.0; step 6 is half-way between 2 and 10: 0.5. With schedule_minutes = 10,
        step 2 after 5 minutes is half-way as well.
    """
    warm = config.learning_rate * (step + 1) / max(1, config.warmup_steps)
    if step < config.warmup_steps and not config.schedule_minutes:
        return warm
    by_clock = elapsed_s / (60 * config.schedule_minutes) if config.schedule_minutes else 0.0
    if config.schedule == "cosine":
        after, total = step - config.warmup_steps, config.max_steps - config.warmup_steps
        high = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(after / total, by_clock))))
    else:
        left = (config.max_steps - step) / max(1.0, config.decay_fraction * config.max_steps)
        left_by_clock = (1.0 - by_clock) / max(1e-9, config.decay_fraction)
        high = min(1.0, max(0.0, min(left, left_by_clock)))
    low = config.final_learning_rate_fraction
    rate = config.learning_rate * (low + (1.0 - low) * high)
    return min(warm, rate) if step < config.warmup_steps else rate  # the time may be over during warm-up


def progress_of(step: int, config: TrainingConfig, elapsed_s: float = 0.0) -> float:
    """Return the share of training that is over before an update, by steps or by the clock; see `learning_rate`."""
    by_clock = elapsed_s / (60 * config.schedule_minutes) if config.schedule_minutes else 0.0
    return max(step / config.max_steps, by_clock)


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Return the optimizer, with weight decay on matrices only (parameters of two or more dimensions)."""
    core, embeddings = core_matrices(model), _embeddings(model)
    head = [p for p in model.parameters() if p.dim() >= 2 and all(p is not other for other in (*core, *embeddings))]
    groups = [(core, config.weight_decay, 1.0), (embeddings, config.weight_decay, config.embedding_rate_fraction),
              (head, config.weight_decay, config.head_rate_fraction),
              ([p for p in model.parameters() if p.dim() < 2], 0.0, 1.0)]
    groups = [{"params": ps, "weight_decay": decay, "rate_fraction": part} for ps, decay, part in groups if ps]
    options = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "fused": True}
    if config.optimizer == "adamw" and not config.keep_norm:
        return torch.optim.AdamW(groups, **options)
    return MatrixOptimizer(core, config, groups, **options)


def core_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of two or more dimensions that are neither a table of embeddings nor the head."""
    tables = {t.data_ptr() for t in (*_embeddings(model), model.unembedding)}
    return [p for p in model.parameters() if p.dim() >= 2 and p.data_ptr() not in tables]


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    """Return the tables of embeddings; a tied head is one of them."""
    tables = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Embedding)}
    return [p for p in model.parameters() if p.data_ptr() in tables]


class MatrixOptimizer(torch.optim.AdamW):
    """AdamW with other updates of the core matrices: those of Muon, or such that leave their norms as they are.

    In a parameter with more than two dimensions, such as BDH's encoder, each head is a matrix for Muon. Its updates
    have the size of AdamW's ("match_rms_adamw", Liu et al. 2025, arXiv 2502.16982), so they share a learning rate.
    """

    def __init__(self, matrices: list[nn.Parameter], config: TrainingConfig, groups: list[dict], **options):
        super().__init__(groups, **options)
        self.matrices, self.keeps_norm, self.muon = matrices, config.keep_norm, None
        if config.optimizer == "muon":
            self.heads = [[nn.Parameter(head) for head in _heads(p.detach())] for p in matrices]  # share memory with p
            self.muon = torch.optim.Muon([head for heads in self.heads for head in heads],
                                         weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        """Take an update; Muon's momentum is part of `state`."""
        norms = [p.norm() for p in self.matrices]
        if self.muon is not None:
            for p, heads in zip(self.matrices, self.heads, strict=True):
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                for head, *values in zip(heads, _heads(p.grad), _heads(self.state[p]["momentum_buffer"]), strict=True):
                    head.grad, self.muon.state[head]["momentum_buffer"] = values
                p.grad = None  # AdamW leaves it alone
            self.muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            self.muon.step()
            self.muon.zero_grad()
        super().step()
        if self.keeps_norm:
            for p, norm in zip(self.matrices, norms, strict=True):
                p.mul_(norm / p.norm())


def _heads(parameter: Tensor) -> Tensor:
    """Return a parameter (..., m, n) as matrices (heads, m, n), without a copy."""
    return parameter.view(-1, *parameter.shape[-2:])
