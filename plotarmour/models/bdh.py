"""Baby Dragon Hatchling (BDH-GPU): Kosowski et al., arXiv 2509.26507, in its parallel form.

One set of weights, used at every one of `n_layer` passes over v, (B, T, D):

    x = relu(v · E_x)                        per head, (B, H, T, N): neurons that fire
    a = tril(rope(x) · rope(x)ᵀ, -1) · v     linear attention of x with itself, strictly causal
    y = relu(LN(a) · E_y)                    (B, H, T, N)
    v = LN(v + LN(dropout(x ∘ y) · D_))      the gate uses the x that was not rotated
    logits = v · head                        the head is not tied to the embedding

    letter   name in code      shape
    D        n_embd            width of v
    H        n_head            heads
    N        neurons_per_head  mlp_internal_dim_multiplier · D / H
    E_x, E_y encoder, encoder_v (H, D, N)
    D_       decoder           (H·N, D)
    LN       layer norm over D without weights, eps 1e-5

Differences from the official code (pathwaycom/bdh), none of which changes the function: phases are multiplied and
reduced in float64, their tables kept; a state can be carried from token to token (`initial_state`): by
linearity the past enters `a` as rope(x) · S with S = Σ rope(x_s)ᵀ v_s, of shape (H, N, D) per pass, at any length.
Weights keep the official names, so official checkpoints load unchanged.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 2.0**16
TABLE_ROWS = 256  # rotation tables hold a multiple of so many positions


@dataclass(frozen=True)
class BDHConfig:
    """Shape of a BDH. `n_layer` counts passes through the one shared set of weights."""

    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256
    dropout: float = 0.1

    def __post_init__(self):
        wrong = [f"{name} = {getattr(self, name)} must be at least 1"
                 for name in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "vocab_size")
                 if getattr(self, name) < 1]
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout = {self.dropout} must be in [0, 1)")
        if not wrong and self.mlp_internal_dim_multiplier * self.n_embd % (2 * self.n_head):
            wrong.append(f"mlp_internal_dim_multiplier · n_embd = {self.mlp_internal_dim_multiplier * self.n_embd} "
                         f"must be divisible by 2 · n_head = {2 * self.n_head}: rotation works on pairs of neurons")
        if wrong:
            raise ValueError("BDH: " + "; ".join(wrong))

    @property
    def neurons_per_head(self) -> int:
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head

    @property
    def non_embedding_params(self) -> int:
        """encoder + encoder_v + decoder, each H·N·D = multiplier · D²."""
        return 3 * self.mlp_internal_dim_multiplier * self.n_embd**2


@dataclass
class BDHState:
    """What the past left behind: `synapses[pass]` is (B, H, N, D) float32, `position` counts tokens read so far."""

    synapses: list[Tensor]
    position: int = 0


class BDH(nn.Module):
    """BDH with the interface that training, scoring and sampling share: `features`, `unembedding`, `initial_state`."""

    context_length = None  # no table of positions: any length works

    def __init__(self, config: BDHConfig):
        super().__init__()
        self.config = config
        heads, width, neurons = config.n_head, config.n_embd, config.neurons_per_head
        self.decoder = nn.Parameter(torch.empty(heads * neurons, width).normal_(std=0.02))
        self.encoder = nn.Parameter(torch.empty(heads, width, neurons).normal_(std=0.02))
        self.embed = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.encoder_v = nn.Parameter(torch.empty(heads, width, neurons).normal_(std=0.02))
        self.lm_head = nn.Parameter(torch.empty(width, config.vocab_size).normal_(std=0.02))
        self.dropout = nn.Dropout(config.dropout)
        self._tables: dict[torch.device, tuple[int, Tensor, Tensor]] = {}  # first position, cosines, sines
        # Official checkpoints carry the frequencies as a buffer; they follow from N and are not loaded.
        self.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: state.pop(prefix + "attn.freqs", None))

    @property
    def unembedding(self) -> Tensor:
        """(vocab_size, n_embd): logits are features @ unembedding.T."""
        return self.lm_head.T

    def initial_state(self, batch_size: int) -> BDHState:
        """Return the empty state for `batch_size` stories."""
        c = self.config
        zeros = [torch.zeros(batch_size, c.n_head, c.neurons_per_head, c.n_embd, device=self.decoder.device)
                 for _ in range(c.n_layer)]
        return BDHState(zeros)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map int64 (B, T) ids to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: BDHState | None = None) -> tuple[Tensor, BDHState | None]:
        """Map ids to features; each depends on its own and earlier tokens only.

        Args:
            inputs: int64 (B, T), ids in [0, vocab_size).
            state: from `initial_state` or an earlier call, with the same B; the past that `inputs` continues.

        Returns:
            Features (B, T, n_embd), and the state after the last token (None where none came in). The state that came
            in is not changed.
        """
        (B, T), c = inputs.shape, self.config
        start = state.position if state else 0
        cos, sin = self._rotation(start, T, inputs.device)
        after = []
        v = _layer_norm(self.embed(inputs)).unsqueeze(1)  # (B, 1, T, D)
        for level in range(c.n_layer):
            x = F.relu(v @ self.encoder)  # (B, H, T, N)
            if state is None:
                a = _attend(_rotate(x, cos, sin), v)
            else:
                a, synapses = _attend_and_remember(_rotate(x, cos, sin), v, state.synapses[level])
                after.append(synapses)
            y = F.relu(_layer_norm(a) @ self.encoder_v)  # (B, H, T, N)
            xy = self.dropout(x * y).transpose(1, 2).reshape(B, 1, T, -1)  # (B, 1, T, H·N)
            v = _layer_norm(v + _layer_norm(xy @ self.decoder))
        return v.squeeze(1), BDHState(after, start + T) if state else None

    def _rotation(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (length, N / 2) of positions start, start + 1, ..., from a table of some hundred."""
        first, cos, sin = self._tables.get(device, (0, None, None))
        if cos is None or not first <= start <= start + length <= first + len(cos):
            N = self.config.neurons_per_head
            pair = torch.arange(0, N, 2, dtype=torch.float32)
            cycles = 1.0 / (ROPE_THETA ** (pair / N)) / (2 * math.pi)  # float32, as published; one per pair
            position = torch.arange(start, start + -(-length // TABLE_ROWS) * TABLE_ROWS, dtype=torch.float64)
            angle = (position[:, None] * cycles.double() % 1.0) * (2 * math.pi)  # exact to 10^6 positions
            cos, sin = (f(angle).float().to(device) for f in (torch.cos, torch.sin))
            first = start
            self._tables[device] = first, cos, sin
        return cos[start - first:start - first + length], sin[start - first:start - first + length]


def _layer_norm(v: Tensor) -> Tensor:
    return F.layer_norm(v, v.shape[-1:])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of neurons by their phase; x is (..., T, N).

    All first halves come out before all second ones. The official order interleaves them; scores are sums over the
    neurons, so the order is free as long as it is the same everywhere.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _attend(q: Tensor, v: Tensor) -> Tensor:
    """Strictly causal linear attention of q (B, H, T, N), query and key at once, over v (B, 1, T, D)."""
    if q.dtype == torch.float16:  # sums over thousands of neurons overflow fp16
        with torch.autocast(q.device.type, enabled=False):
            return _attend(q.float(), v.float())
    return (q @ q.mT).tril(-1) @ v


def _attend_and_remember(q: Tensor, v: Tensor, synapses: Tensor) -> tuple[Tensor, Tensor]:
    """As `_attend`, with the past read from `synapses` (B, H, N, D) before this chunk is written to it."""
    with torch.autocast(q.device.type, enabled=False):
        q, v = q.float(), v.float()
        return _attend(q, v) + q @ synapses, synapses + q.mT @ v
