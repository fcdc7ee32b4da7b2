"""Parts that all forms of BDH share: the weights of a pass, decay of scores, layer norm and residual."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True)
class Weights:
    """Weights in the dtype of products, or their gradients in the dtype of the parameters.

    Where each pass has weights of its own, the first dimension of all three is the pass.
    """

    encoder: Tensor  # (H, D, N)
    encoder_v: Tensor  # (H, D, N)
    decoder: Tensor  # (H·N, D)
    decay: Tensor | None = None  # (H,), the factor on a score per token of distance; None: 1
    mix: Tensor | None = None  # (passes, passes + 1, D), factors of the residual, in the dtype of v: `add_residual`
    signs: Tensor | None = None  # (passes, H, N), factors on the products of neurons that are added to scores; None: 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.encoder.shape[-3:]

    def of_pass(self, level: int) -> "Weights":
        """Return the weights of one pass."""
        own = self if self.signs is None else replace(self, signs=self.signs[level])
        if self.encoder.dim() == 3:
            return own
        return replace(own, encoder=self.encoder[level], encoder_v=self.encoder_v[level], decoder=self.decoder[level])

    @property
    def score_scale(self) -> float:
        """The factor s on q: in float16 the power of two next to 1 / sqrt(N), otherwise 1."""
        N = self.shape[2]
        return 2.0 ** -math.ceil(math.log2(N) / 2) if self.encoder.dtype == torch.float16 else 1.0


def powers(decay: Tensor | None, length: int, dtype: torch.dtype) -> Tensor | None:
    """Return the factors of each head, (H,), on scores of distance 0, ..., length, (H, length + 1); None: all are 1."""
    if decay is None:
        return None
    return (decay.double()[:, None] ** torch.arange(length + 1, device=decay.device)).to(dtype)


def normalize(v: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Return the layer norm over the last dimension, without weights, and 1 / sqrt(variance + eps), (..., 1)."""
    out, _, rstd = torch.native_layer_norm(v, v.shape[-1:], None, None, eps)
    return out, rstd


def normalize_backward(d: Tensor, normal: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient with respect to the input of `normalize` from the gradient d of its output."""
    projection = (d * normal).mean(-1, keepdim=True)
    return (d - d.mean(-1, keepdim=True)).sub_(normal * projection).mul_(rstd)


def add_residual(before: list[Tensor], normal: Tensor, mix: Tensor | None, level: int) -> Tensor:
    """Return v after a pass, before its layer norm: v + normal, where there are no factors.

    Args:
        before: v before each pass up to this one, (..., D); without factors only the last one counts.
        normal: layer norm of what the pass computed.
        mix: factors on these for each pass, in its last row on `normal`; None: 1 on the last two, otherwise 0.
        level: index of the pass.
    """
    if mix is None:
        return before[-1] + normal
    return sum((factor * v for factor, v in zip(mix[level], before, strict=False)), mix[level, -1] * normal)
