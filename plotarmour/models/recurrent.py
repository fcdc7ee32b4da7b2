"""BDH read from left to right: generation, scoring, and contexts of any length, in memory that does not grow.

Linear attention has a state: the past enters a pass as rope(x) S with S = Σ rope(x_s)ᵀ v_s, (N, D) per head and pass.
Each token reads S before it is written to it, so the order is strictly causal and the result exact.

- `read` takes many tokens by chunks: inside a chunk as in training, the past through S.
- `read_one` takes one token. For large matrices on a CPU it counts what fires at every token and pass. Where few x do,
  it touches only the rows of S of a pair (2i, 2i + 1) where either fires, and the columns of encoder_v where x does;
  where few x ∘ y do, only their rows of decoder. The rest are products with zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plotarmour.models.dropout import CounterDropout
from plotarmour.models.rotary import Rotation, rotate
from plotarmour.models.tiled import Scratch, Setting, Tiling, Weights, normalize, pass_forward

CHUNK = 256  # tokens
SPARSE_BELOW = 0.2  # share that fires; above it dense products are as fast (benchmarks/generation.py)
SPARSE_BATCH = 4  # stories; each has neurons of its own that fire
SPARSE_FROM = 2**21  # weights of a matrix; smaller ones stay in a CPU's cache, where a product costs less than a search


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
def read_one(v: Tensor, weights: Weights, rotation: Rotation, state: BDHState,
             by_neuron: Callable[[], Tensor] | None) -> Tensor:
    """Go through all passes with one token of each story.

    Args:
        v: (B, 1, D), float32 or float64.
        weights: in the dtype of products.
        rotation: of the positions.
        state: of as many passes as there are to go through; written to in place, its position apart.
        by_neuron: makes encoder_v as (H·N, D), one row per neuron, when it is needed; None: dense products only.

    Returns:
        v after the last pass, (B, 1, D).
    """
    B, (H, D, _), dtype = len(v), weights.shape, weights.encoder.dtype
    factors = rotation.table(state.position, 1, v.device, v.dtype)
    for synapses in state.synapses:
        token = v.transpose(0, 1).expand(H, B, D)
        x = torch.bmm(token.to(dtype), weights.encoder).relu_().transpose(0, 1).contiguous()  # (B, H, N)
        q = rotate(x, factors)  # float32 or wider
        if by_neuron is not None and x.count_nonzero() <= SPARSE_BELOW * x.numel():
            m = _sparse(x, q, v, synapses, by_neuron(), weights.decoder)
        else:
            m = _dense(x, q, v, synapses, weights, by_neuron is not None)
        v = normalize(v + normalize(m.to(v.dtype))[0])[0]
    return v


def _dense(x: Tensor, q: Tensor, v: Tensor, synapses: Tensor, weights: Weights, count: bool) -> Tensor:
    B, H, N = x.shape
    memory = synapses.view(B * H, N, -1)
    a = torch.bmm(q.view(B * H, 1, N), memory).view(B, H, -1)
    memory.baddbmm_(q.view(B * H, N, 1), v.expand(B, H, -1).reshape(B * H, 1, -1))
    normal = normalize(a)[0].to(x.dtype)
    y = torch.bmm(normal.transpose(0, 1), weights.encoder_v).relu_().transpose(0, 1)  # (B, H, N)
    g = x * y
    if count and g.count_nonzero() <= SPARSE_BELOW * g.numel():
        fired = g.view(-1).nonzero().squeeze(1)
        return _decode(fired, g.view(-1)[fired], weights.decoder, B)
    heads = torch.bmm(g.transpose(0, 1), weights.decoder.view(H, N, -1))  # (H, B, D), summed over H
    return heads.to(v.dtype).sum(0).unsqueeze(1)


def _sparse(x: Tensor, q: Tensor, v: Tensor, synapses: Tensor, by_neuron: Tensor, decoder: Tensor) -> Tensor:
    """As `_dense`, touching active neurons only; its sums are the same with their zeros left out."""
    (B, H, N), D = x.shape, v.shape[-1]
    pairs = x.view(-1, 2).sum(-1).nonzero().squeeze(1)
    rows = torch.stack((2 * pairs, 2 * pairs + 1), 1).flatten()  # of (B, H, N)
    weight, memory = q.view(-1)[rows], synapses.view(-1, D)
    a = F.embedding_bag(rows, memory, _starts(rows, B * H, N), mode="sum", per_sample_weights=weight)
    memory.index_add_(0, rows, weight.unsqueeze(1) * (v[0] if B == 1 else v[rows // (H * N), 0]))
    normal = normalize(a)[0].unsqueeze(2)  # (B·H, D, 1)
    active = x.view(-1).nonzero().squeeze(1)
    columns, starts = by_neuron.index_select(0, active % (H * N)), _starts(active, B * H, N).tolist()
    ends = [*starts[1:], len(active)]
    y = torch.cat([columns[i:j] @ normal[n] for n, (i, j) in enumerate(zip(starts, ends, strict=True))]).squeeze(1)
    g = x.view(-1)[active] * y.relu_()
    open_gates = g.nonzero().squeeze(1)
    return _decode(active[open_gates], g[open_gates], decoder, B)


def _decode(fired: Tensor, g: Tensor, decoder: Tensor, B: int) -> Tensor:
    """Rows of decoder (H·N, D) at the sorted places `fired` of (B, H, N), weighted by g and summed: (B, 1, D)."""
    starts = _starts(fired, B, len(decoder))
    return F.embedding_bag(fired % len(decoder), decoder, starts, mode="sum", per_sample_weights=g).unsqueeze(1)


def _starts(index: Tensor, groups: int, size: int) -> Tensor:
    """Where each group of `size` begins in a sorted index."""
    return torch.searchsorted(index, torch.arange(groups) * size)


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
