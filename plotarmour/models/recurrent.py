"""BDH read from left to right: generation, scoring, and contexts of any length, in memory that does not grow.

Linear attention has a state: the past enters a pass as rope(x) S with S = Σ rope(x_s)ᵀ v_s, (N, D) per head and pass.
Each token reads S before it is written to it, so the order is strictly causal and the result exact.

- `read` takes many tokens by chunks: inside a chunk as in training, the past through S.
- `read_one` takes one token of each story.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from plotarmour.models.dropout import CounterDropout
from plotarmour.models.rotary import Rotation, rotate
from plotarmour.models.tiled import Scratch, Setting, Tiling, Weights, normalize, pass_forward

CHUNK = 256  # tokens


@dataclass
class BDHState:
    """What the past left behind.

    Attributes:
        synapses: per pass (B, H, N, D), float32 (float64 for a float64 model).
        position: how many tokens were read.
    """

    synapses: list[Tensor]
    position: int = 0

    def copy(self) -> "BDHState":
        """Return a state of its own, to branch a story."""
        return BDHState([s.clone() for s in self.synapses], self.position)

    def detach(self) -> "BDHState":
        """Return the same values without their history: training by pieces of a long text stops here."""
        return BDHState([s.detach() for s in self.synapses], self.position)

    def tensors(self) -> dict[str, Tensor]:
        """Return all as tensors by name, to be saved (safetensors)."""
        named = {f"synapses.{level}": s.contiguous() for level, s in enumerate(self.synapses)}
        return named | {"position": torch.tensor(self.position)}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "BDHState":
        """Return the state that `tensors` described; reading on changes them.

        Raises:
            ValueError: tensors of something else.
        """
        try:
            synapses = [tensors[f"synapses.{level}"] for level in range(len(tensors) - 1)]
            return BDHState(synapses, int(tensors["position"]))
        except KeyError as missing:
            raise ValueError(f"state: found tensors {', '.join(sorted(tensors)[:4])} ... without {missing}, expected "
                             "those of a BDHState; load them with the class that saved them") from None


@torch.no_grad()
def read(v: Tensor, weights: Weights, n_layer: int, rotation: Rotation, dropout: CounterDropout | None,
         state: BDHState | None) -> Tensor:
    """Go through all passes, left to right by chunks.

    Args:
        v: (B, T, D), float32 or float64.
        weights: in the dtype of products.
        n_layer: number of passes.
        rotation: of the positions.
        dropout: or None.
        state: written to in place, its position apart; None where nobody wants it.

    Returns:
        v after the last pass, (B, T, D).
    """
    (B, T, D), (H, _, N) = v.shape, weights.shape
    first = 0 if state is None else state.position
    # Without a state to fill, scores of all tokens cost less than a state up to some length: T against chunk + 4 D.
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
                              Tiling.for_shape(B, length, N, v.device), first + start)
            pieces.append(pass_forward(level, piece, weights, setting, scratch, synapses=synapses))
        v = normalize(v + normalize(torch.cat(pieces, 1))[0])[0]
    return v


@torch.no_grad()
def read_one(v: Tensor, weights: Weights, rotation: Rotation, state: BDHState) -> Tensor:
    """Go through all passes with one token of each story.

    Args:
        v: (B, 1, D), float32 or float64.
        weights: in the dtype of products.
        rotation: of the positions.
        state: of as many passes as there are to go through; written to in place, its position apart.

    Returns:
        v after the last pass, (B, 1, D).
    """
    B, (H, D, N), dtype = len(v), weights.shape, weights.encoder.dtype
    factors = rotation.table(state.position, 1, v.device, v.dtype)
    for synapses in state.synapses:
        x = torch.bmm(v.transpose(0, 1).expand(H, B, D).to(dtype), weights.encoder).relu_()
        x = x.transpose(0, 1).contiguous()  # (B, H, N)
        q = rotate(x, factors)  # float32 or wider
        memory = synapses.view(B * H, N, D)
        a = torch.bmm(q.view(B * H, 1, N), memory).view(B, H, D)  # before this token is written
        memory.baddbmm_(q.view(B * H, N, 1), v.expand(B, H, D).reshape(B * H, 1, D))
        normal = normalize(a)[0].to(dtype)
        y = torch.bmm(normal.transpose(0, 1), weights.encoder_v).relu_().transpose(0, 1)  # (B, H, N)
        heads = torch.bmm((x * y).transpose(0, 1), weights.decoder.view(H, N, D))  # (H, B, D)
        m = heads.to(v.dtype).sum(0).unsqueeze(1)  # (B, 1, D)
        v = normalize(v + normalize(m)[0])[0]
    return v


@torch.no_grad()
def activity(v: Tensor, weights: Weights, n_layer: int, rotation: Rotation) -> list[dict[str, float]]:
    """Count which neurons fire, per pass.

    Args:
        v: (B, T, D), as `read` takes it.
        weights, n_layer, rotation: as there.

    Returns:
        Per pass the shares, between 0 and 1, of `x`, of `pairs` (2i, 2i + 1) where either x fires, of `y`, and of
        `xy`, where both do, over all heads, neurons and positions.
    """
    (B, T, _), (H, _, N), counted = v.shape, weights.shape, []
    factors = rotation.table(0, T, v.device, v.dtype)
    for _ in range(n_layer):
        m, count = torch.zeros_like(v), dict.fromkeys(("x", "pairs", "y", "xy"), 0)
        for h in range(H):
            x = torch.relu(v @ weights.encoder[h])  # (B, T, N)
            q = rotate(x, factors)
            y = torch.relu(normalize((q @ q.mT).tril(-1) @ v)[0] @ weights.encoder_v[h])
            m += (x * y) @ weights.decoder[h * N:(h + 1) * N]
            for name, fires in (("x", x), ("pairs", x.unflatten(-1, (-1, 2)).sum(-1)), ("y", y), ("xy", x * y)):
                count[name] += int(fires.count_nonzero())
        total = B * T * H * N
        counted.append({name: n / (total // 2 if name == "pairs" else total) for name, n in count.items()})
        v = normalize(v + normalize(m)[0])[0]
    return counted
