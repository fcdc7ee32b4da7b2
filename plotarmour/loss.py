"""Nats from features, unembedding and targets, in chunks: (B·T, vocab_size) logits are never held whole.

One rule for every metric: add nats, count tokens, divide once, exponentiate once.
"""

import torch
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
    return _SummedNats.apply(features.flatten(0, 1), unembedding, targets.flatten(), torch.is_grad_enabled())


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
        found = [_chunk_nats(flat[i:j] @ table.T, wanted[i:j])[0]
                 for i, j in _chunks(len(flat), len(table), SMALL_CHUNK_LOGITS)]
    if found:
        nats[costs] = torch.cat(found)
    return nats


def _chunks(rows: int, vocab_size: int, logits: int = CHUNK_LOGITS) -> list[tuple[int, int]]:
    size = max(1, logits // vocab_size)
    return [(i, min(i + size, rows)) for i in range(0, rows, size)]


def _chunk_nats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nats (n,), float32 log-normalizers (n, 1) and safe indices (n, 1) for logits (n, V)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    normalizer = torch.logsumexp(logits, dim=-1, keepdim=True)
    index = targets.clamp(min=0).unsqueeze(1)
    nats = (normalizer - logits.gather(1, index)).squeeze(1)
    return nats.masked_fill(targets == IGNORE, 0.0), normalizer, index


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, unembedding, targets, with_gradient):
        total = 0.0
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        d_features = torch.empty_like(features) if with_gradient else None
        d_unembedding = torch.zeros(unembedding.shape, dtype=wide, device=features.device) if with_gradient else None
        with torch.autocast(features.device.type, enabled=False):
            for i, j in _chunks(len(features), len(unembedding)):
                logits = features[i:j] @ unembedding.T
                nats, normalizer, index = _chunk_nats(logits, targets[i:j])
                total = total + nats.sum()
                if with_gradient:
                    d = torch.exp(logits.to(wide) - normalizer)
                    d.scatter_add_(1, index, torch.full_like(index, -1, dtype=wide))
                    d = d.masked_fill_((targets[i:j] == IGNORE).unsqueeze(1), 0.0).to(features.dtype)
                    d_features[i:j] = d @ unembedding
                    d_unembedding += d.T @ features[i:j]
        ctx.save_for_backward(d_features, d_unembedding)
        ctx.dtypes = features.dtype, unembedding.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        d_features, d_unembedding = ctx.saved_tensors
        return (d_features * scale.to(d_features.dtype)), (d_unembedding * scale).to(ctx.dtypes[1]), None, None
