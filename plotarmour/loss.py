"""Nats from features, unembedding and targets, in chunks: (B·T, vocab_size) logits are never held whole.

One rule for every metric: add nats, count tokens, divide once, exponentiate once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of a position that is padding
CHUNK_LOGITS = 2**25  # logits per chunk: 128 MiB in float32
SMALL_CHUNK_LOGITS = 2**21  # without gradients: 8 MiB, which the heap keeps and a cache half holds


def summed_nats(features: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Sum the negative log-probabilities of the targets.

    Args:
        features: (B, T, C), float; under autocast products are made in its dtype, sums always in float32 or wider.
        unembedding: (V, C), float.
        targets: int64 (B, T); `IGNORE` marks positions that cost nothing.

    Returns:
        float32 scalar, nats; differentiable in features and unembedding. Divide by the count of targets that are
        not `IGNORE` for the loss.

    Raises:
        ValueError: shapes that do not fit.

    Source: the gradient (softmax minus one-hot) is formed chunk by chunk in the forward pass, while the chunk's
    logits are at hand, as Liger-Kernel's fused linear cross entropy does (arXiv 2410.10989).
    """
    if features.shape[:2] != targets.shape or features.shape[2] != unembedding.shape[1]:
        raise ValueError(f"features {tuple(features.shape)}, unembedding {tuple(unembedding.shape)} and targets "
                         f"{tuple(targets.shape)} do not fit: expected (B, T, C), (V, C) and (B, T)")
    if torch.is_autocast_enabled(features.device.type):
        features = features.to(torch.get_autocast_dtype(features.device.type))
    unembedding = unembedding.to(features.dtype)
    features, targets, may_ignore = features.flatten(0, 1), targets.flatten(), True
    if features.device.type == "cpu":  # a GPU would have to stop and tell how many rows cost something
        scored = (targets != IGNORE).nonzero().squeeze(1)
        if len(scored) < len(targets):
            features, targets = features.index_select(0, scored), targets[scored]
        may_ignore = False
    return _SummedNats.apply(features, unembedding, targets, torch.is_grad_enabled(), may_ignore)


@torch.no_grad()
def token_nats(features: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Return the nats of each target, float32 (B, T); 0 where the target is `IGNORE`. No gradient.

    Products are made in float32 also under autocast: a half-precision logit of 16 is off by up to 0.06.
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    nats = torch.zeros(targets.shape, dtype=wide, device=targets.device)
    costs = targets != IGNORE
    flat, table, wanted = features[costs].to(wide), unembedding.to(wide), targets[costs]
    with torch.autocast(features.device.type, enabled=False):
        found = [_nats(_log_probs(flat[i:j] @ table.T), wanted[i:j])
                 for i, j in _chunks(len(flat), len(table), SMALL_CHUNK_LOGITS)]
    nats[costs] = torch.cat(found)
    return nats


def _chunks(rows: int, vocab_size: int, logits: int = CHUNK_LOGITS) -> list[tuple[int, int]]:
    """[begin, end) of each chunk; a single empty one where there are no rows."""
    size = max(1, logits // vocab_size)
    return [(i, min(i + size, rows)) for i in range(0, max(rows, 1), size)]


def _log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities (n, V) of logits (n, V), in float32 or wider."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _nats(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Nats (n,) of targets (n,); 0 where the target is `IGNORE`."""
    return F.nll_loss(log_probs, targets, ignore_index=IGNORE, reduction="none")


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, unembedding, targets, with_gradient, may_ignore):
        total, d_unembedding = 0.0, None
        d_features = torch.empty_like(features) if with_gradient else None
        wide = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            for i, j in _chunks(len(features), len(unembedding)):
                kept = features[i:j]
                if may_ignore:  # rows that cost nothing are cleared where they are C wide, not V
                    ignored = (targets[i:j] == IGNORE).unsqueeze(1)
                    kept = kept.masked_fill(ignored, 0.0)
                d = _log_probs(kept @ unembedding.T)
                total = total + _nats(d, targets[i:j]).sum()
                if with_gradient:
                    # In place: the gradient by the logits is the probabilities, less one at each target.
                    index = targets[i:j].clamp(min=0).unsqueeze(1)
                    d = d.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=wide)).to(features.dtype)
                    d_kept = d @ unembedding
                    d_features[i:j] = d_kept.masked_fill_(ignored, 0.0) if may_ignore else d_kept
                    part = d.T @ kept
                    d_unembedding = part.to(wide) if d_unembedding is None else d_unembedding.add_(part)
                d = part = None  # before the next chunk's logits
        ctx.save_for_backward(d_features, d_unembedding)
        ctx.dtypes = features.dtype, unembedding.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        d_features, d_unembedding = ctx.saved_tensors
        return (d_features * scale.to(d_features.dtype)), (d_unembedding * scale).to(ctx.dtypes[1]), None, None, None
