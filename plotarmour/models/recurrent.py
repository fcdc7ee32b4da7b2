"""Recurrent form of BDH: reads left to right with constant memory, for generation and scoring at any length.

Linear attention has a state S = Σ rope(x_s)ᵀ v_s per head and pass, (N, D), summed over the tokens s read so far. They
contribute rope(x) S to a. A token reads S before it writes to S: attention is strictly causal, and the result is exact.

With decay, S is multiplied by it before each token, so that the token s has the factor decay^(t - s) at t.

- `read` processes many tokens in chunks: attention inside a chunk as in training, earlier chunks through S.
- `read_one` processes one token of each story.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plotarmour.models import State
from plotarmour.models.dropout import CounterDropout
from plotarmour.models.parts import Weights, add_residual, normalize, powers
from plotarmour.models.rotary import Rotation, rotate
from plotarmour.models.tiled import Scratch, Setting, Tiling, pass_forward

CHUNK = 256  # tokens per chunk


@dataclass
class BDHState(State):
    """The state after some tokens; its size does not depend on their number."""

    synapses: list[Tensor]  # S of each pass, (B, H, N, D), in the dtype of the model
    position: int = 0

    @property
    def layout(self) -> tuple:
        S = self.synapses[0]
        return "BDHState", len(self.synapses), tuple(S.shape), S.dtype, S.device

    def tensors(self) -> dict[str, Tensor]:
        named = {f"synapses.{level}": S.contiguous() for level, S in enumerate(self.synapses)}
        return named | {"position": torch.tensor(self.position)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "BDHState":
        return cls([tensors[f"synapses.{level}"] for level in range(len(tensors) - 1)], int(tensors["position"]))


@torch.no_grad()
def read(v: Tensor, weights: Weights, n_layer: int, rotation: Rotation, dropout: CounterDropout | None,
         state: BDHState | None, starts: Tensor | None = None) -> Tensor:
    """Apply all passes to T tokens, chunk by chunk.

    Args:
        v: embeddings, (B, T, D), float32 or float64.
        weights: in the dtype of products.
        n_layer: number of passes.
        rotation, dropout: of the model; the mask is None without dropout.
        state: updated in place, except for `position`; None: start from the first token and discard the state.
        starts: bool (B, T), the tokens that begin a story and do not see the state before them; None: no token does.

    Returns:
        v after the last pass, (B, T, D).
    """
    (B, T, D), (H, _, N), before = v.shape, weights.shape, []
    first = 0 if state is None else state.position
    # Without a state, one chunk of T tokens costs less than several chunks with a state while T <= CHUNK + 4 D.
    chunk, scratch = T if state is None and T <= CHUNK + 4 * D else CHUNK, Scratch(v.device)
    for level in range(n_layer):
        synapses = state.synapses[level] if state else None
        if synapses is None and T > chunk:
            synapses = torch.zeros(B, H, N, D, dtype=v.dtype, device=v.device)
        pieces = []
        for start in range(0, T, chunk):
            piece = v[:, start:start + chunk].contiguous()
            length = piece.shape[1]
            setting = Setting(rotation.table(first + start, length, v.device, v.dtype), dropout,
                              Tiling.for_shape(B, length, N, v.device), first + start,
                              None if starts is None else starts[:, start:start + chunk].cumsum(1),
                              powers(weights.decay, length, v.dtype))
            pieces.append(pass_forward(level, piece, weights.of_pass(level), setting, scratch, synapses=synapses))
        before = [*before, v] if weights.mix is not None else [v]
        v = normalize(add_residual(before, normalize(torch.cat(pieces, 1))[0], weights.mix, level))[0]
    return v


@torch.no_grad()
def read_one(v: Tensor, weights: Weights, rotation: Rotation, state: BDHState) -> Tensor:
    """Apply all passes to one token of each story, v (B, 1, D), as `read` does; it is faster for one token."""
    B, (H, D, N), dtype, before = len(v), weights.shape, weights.encoder.dtype, []
    factors = rotation.table(state.position, 1, v.device, v.dtype)
    for level, synapses in enumerate(state.synapses):
        own = weights.of_pass(level)
        x = torch.bmm(v.transpose(0, 1).expand(H, B, D).to(dtype), own.encoder).relu_()
        x = x.transpose(0, 1).contiguous()  # (B, H, N)
        q = rotate(x, factors)  # float32 or float64
        if weights.decay is not None:
            synapses.mul_(weights.decay.to(v.dtype)[:, None, None])
        S = synapses.view(B * H, N, D)
        reads = q if own.signs is None else q * own.signs.to(q.dtype)
        a = torch.bmm(reads.view(B * H, 1, N), S).view(B, H, D)  # read before write: strictly causal
        S.baddbmm_(q.view(B * H, N, 1), v.expand(B, H, D).reshape(B * H, 1, D))
        normal = normalize(a)[0].to(dtype)
        y = torch.bmm(normal.transpose(0, 1), own.encoder_v).relu_().transpose(0, 1)  # (B, H, N)
        heads = torch.bmm((x * y).transpose(0, 1), own.decoder.view(H, N, D))  # (H, B, D)
        m = heads.to(v.dtype).sum(0).unsqueeze(1)  # (B, 1, D)
        before.append(v)
        v = normalize(add_residual(before, normalize(m)[0], weights.mix, level))[0]
    return v
