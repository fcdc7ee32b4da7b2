"""Nats from features, unembedding and targets, in chunks: the (B·T, vocab_size) logits never exist at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # target of a padding position
CHUNK_LOGITS = 2**25  # logits per chunk: 128 MiB in float32
SMALL_CHUNK_LOGITS = 2**21  # without gradients: 8 MiB, which the allocator reuses without page faults


def summed_nats(features: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Sum the negative log-probabilities of the targets, differentiably.

    Args:
        features: float (B, T, C). Products have autocast's dtype if it is enabled, sums are in float32 or float64.
        unembedding: float (V, C).
        targets: int64 (B, T); `IGNORE` marks padding, which adds nothing.

    Returns:
        float32 scalar, in nats. The loss is this sum divided by the number of targets other than `IGNORE`.

    Source: the forward pass computes the gradient (softmax minus one-hot) of each chunk together with its logits, as
    Liger-Kernel's fused linear cross entropy does (arXiv 2410.10989).
    """
    if torch.is_autocast_enabled(features.device.type):
        features = features.to(torch.get_autocast_dtype(features.device.type))
    unembedding = unembedding.to(features.dtype)
    features, targets, has_padding = features.flatten(0, 1), targets.flatten(), True
    if features.device.type == "cpu":  # on a GPU, counting the padding would synchronize it with the CPU
        scored = (targets != IGNORE).nonzero().squeeze(1)
        if len(scored) < len(targets):
            features, targets = features.index_select(0, scored), targets[scored]
        has_padding = False
    return _SummedNats.apply(features, unembedding, targets, torch.is_grad_enabled(), has_padding)


@torch.no_grad()
def token_nats(features: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Compute the negative log-probability of each target of `summed_nats`, without gradient.

    Products are in float32 or float64 also under autocast: the error of a half-precision logit of 16 is up to 0.06.

    Returns:
        float32 or float64 (B, T), in nats; 0 where the target is `IGNORE`.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    nats = torch.zeros(targets.shape, dtype=dtype, device=targets.device)
    scored = targets != IGNORE
    features, unembedding, targets = features[scored].to(dtype), unembedding.to(dtype), targets[scored]
    with torch.autocast(features.device.type, enabled=False):
        nats[scored] = torch.cat([_nats(_log_probs(features[i:j] @ unembedding.T), targets[i:j])
                                  for i, j in _chunks(len(features), len(unembedding), SMALL_CHUNK_LOGITS)])
    return nats


def loss_bytes(n_tokens: int, n_embd: int, vocab_size: int, dtype: torch.dtype, with_gradient: bool = True) -> int:
    """Return about how many bytes `summed_nats` holds at most for B·T tokens, without features and unembedding.

    Half precision, the dtype of products, adds copies of both; `with_gradient` adds their gradients.
    """
    is_half = dtype.itemsize < 4
    rows = min(n_tokens, max(1, CHUNK_LOGITS // vocab_size))
    chunk = rows * vocab_size * (dtype.itemsize + (8 if is_half else 4))  # logits, and log-probabilities in float32
    copies = is_half * dtype.itemsize * (n_tokens + vocab_size) * n_embd
    return chunk + copies + with_gradient * (4 * vocab_size + dtype.itemsize * n_tokens) * n_embd


def _chunks(rows: int, vocab_size: int, logits: int) -> list[tuple[int, int]]:
    """Return the [begin, end) of each chunk of rows; one empty chunk if there are no rows."""
    size = max(1, logits // vocab_size)
    return [(i, min(i + size, rows)) for i in range(0, max(rows, 1), size)]


def _log_probs(logits: Tensor) -> Tensor:
    """Return log-probabilities (n, V) of logits (n, V), in float32 or float64."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _nats(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the nats (n,) of targets (n,); 0 where the target is `IGNORE`."""
    return F.nll_loss(log_probs, targets, ignore_index=IGNORE, reduction="none")


class _SummedNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, unembedding, targets, with_gradient, has_padding):
        total, d_unembedding = 0.0, None
        d_features = torch.empty_like(features) if with_gradient else None
        wide = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            for i, j in _chunks(len(features), len(unembedding), CHUNK_LOGITS):
                chunk = features[i:j]
                if has_padding:  # mask features, (n, C), which are smaller than logits, (n, V)
                    padding = (targets[i:j] == IGNORE).unsqueeze(1)
                    chunk = chunk.masked_fill(padding, 0.0)
                d = _log_probs(chunk @ unembedding.T)
                total = total + _nats(d, targets[i:j]).sum()
                if with_gradient:
                    # In place: the gradient of the logits is the probabilities, minus 1 at each target.
                    index = targets[i:j].clamp(min=0).unsqueeze(1)
                    d = d.exp_().scatter_add_(1, index, torch.full_like(index, -1, dtype=wide)).to(features.dtype)
                    d_chunk = d @ unembedding
                    d_features[i:j] = d_chunk.masked_fill_(padding, 0.0) if has_padding else d_chunk
                    part = d.T @ chunk
                    d_unembedding = part.to(wide) if d_unembedding is None else d_unembedding.add_(part)
                d = part = None  # frees memory before the next chunk's logits
        ctx.save_for_backward(d_features, d_unembedding)
        ctx.dtype = unembedding.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        d_features, d_unembedding = ctx.saved_tensors
        return (d_features * scale.to(d_features.dtype)), (d_unembedding * scale).to(ctx.dtype), None, None, None
