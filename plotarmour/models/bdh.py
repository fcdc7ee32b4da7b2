"""Baby Dragon Hatchling (BDH-GPU): Kosowski et al., arXiv 2509.26507.

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

Three forms that agree, and drop the same neurons: *parallel*, the formula as published (`form` = "parallel"); *tiled*
(`tiled.py`), for training; *recurrent* (`recurrent.py`), for reading without gradients and for generation.

Differences from the official code (pathwaycom/bdh), none of which changes the function: phases are multiplied and
reduced in float64, their tables kept; dropout is by counter (`dropout.py`); float16 scores carry a scale (`tiled.py`).
Weights keep the official names, so official checkpoints load unchanged.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plotarmour.models import check_ids, check_state
from plotarmour.models.dropout import CounterDropout
from plotarmour.models.recurrent import BDHState, read, read_one
from plotarmour.models.rotary import Rotation, rotate
from plotarmour.models.tiled import Setting, Tiling, Weights, normalize, run_passes


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
    def core_params(self) -> int:
        """encoder + encoder_v + decoder, each H·N·D = multiplier · D²."""
        return 3 * self.mlp_internal_dim_multiplier * self.n_embd**2

    @property
    def weights_per_token(self) -> int:
        """The core parameters once per pass. 2 passes and 3 · 64 weights: 384."""
        return self.n_layer * self.core_params

    def flops_per_token(self, context_length: int) -> int:
        """Count the FLOPs of one token's forward pass in a row of T tokens (`models.ModelConfig`).

        Per pass: x, y and the decoder, 2·H·N·D each; scores 2·T·H·N and values 2·T·H·D. Once: the unembedding, 2·D·V.

        Raises:
            ValueError: a context below 1.

        Example:
            2 passes, D 4, 2 heads of N 8, V 5, T 3: H·N·D is 64 and H·(N + D) is 24, so a pass takes
            6 · 64 + 2 · 3 · 24 = 528; 2 · 528 + 2 · 4 · 5 = 1,096.
        """
        if context_length < 1:
            raise ValueError(f"context_length = {context_length} must be at least 1")
        D, H, N = self.n_embd, self.n_head, self.neurons_per_head
        level = 6 * H * N * D + 2 * context_length * H * (N + D)
        return self.n_layer * level + 2 * D * self.vocab_size


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
        self.form = "tiled"  # or "parallel": the formula as published, which holds (B, H, T, N) tensors
        self._rotation = Rotation(neurons)
        self.tiling: Tiling | None = None  # of the tiled form; None: chosen by shape and device
        self._reading: list | None = None  # what `_weights` keeps
        # Official checkpoints carry the frequencies as a buffer; they follow from N and are not loaded.
        self.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: state.pop(prefix + "attn.freqs", None))

    @property
    def unembedding(self) -> Tensor:
        """(vocab_size, n_embd): logits are features @ unembedding.T."""
        return self.lm_head.T

    def initial_state(self, batch_size: int) -> BDHState:
        """Return the empty state for `batch_size` stories: n_layer times (B, H, N, D)."""
        c = self.config
        return BDHState([torch.zeros(batch_size, c.n_head, c.neurons_per_head, c.n_embd, dtype=self.decoder.dtype,
                                     device=self.decoder.device) for _ in range(c.n_layer)])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map int64 (B, T) ids to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: BDHState | None = None) -> tuple[Tensor, BDHState | None]:
        """Map ids to features; each depends on its own and earlier tokens only.

        With gradients they come from the tiled form, without from the recurrent one; `form` = "parallel" asks for
        the published formula. A state with gradients goes through the formula too.

        Args:
            inputs: int64 (B, T), ids in [0, vocab_size).
            state: from `initial_state` or an earlier call, with the same B; the past that `inputs` continues. It is
                used up: go on with the returned one, and `copy` it first to branch.

        Returns:
            Features (B, T, n_embd), and the state after the last token (None where none came in).

        Raises:
            ValueError: ids outside the vocabulary (unseen in training on a GPU: `check_ids`); a state of another
                model, batch, dtype or device.
        """
        (B, T), c = inputs.shape if inputs.dim() == 2 else (0, 0), self.config
        check_ids(inputs, c.vocab_size, self.training)
        if state is not None:
            self._check_state(state, B)
        v = normalize(self.embed(inputs))[0]  # (B, T, D)
        dropout = None
        if self.training and c.dropout:
            key = int(torch.randint(2**62, ()))  # from the generator that the training loop seeds
            dropout = CounterDropout(c.dropout, key, c.neurons_per_head, v.device)
        differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.form == "parallel" or (state is not None and differentiable):
            return self._parallel(v, dropout, state)
        dtype = _product_dtype(v)
        if differentiable:
            self._reading = None
            setting = Setting(self._rotation.table(0, T, v.device, v.dtype), dropout,
                              self.tiling or Tiling.for_shape(B, T, c.neurons_per_head, v.device))
            return run_passes(v, self.encoder, self.encoder_v, self.decoder, c.n_layer, dtype, setting), None
        with torch.autocast(v.device.type, enabled=False):
            if state is not None and T == 1 and dropout is None:
                v = read_one(v, self._weights(dtype), self._rotation, state)
            else:
                v = read(v, self._weights(dtype), c.n_layer, self._rotation, dropout, state)
        if state is not None:
            state.position += T
        return v, state

    def _parallel(self, v: Tensor, dropout: CounterDropout | None, state: BDHState | None,
                  ) -> tuple[Tensor, BDHState | None]:
        """The formula as it stands above, on (B, H, T, N) tensors. Attention in float32 or wider."""
        (B, T, _), c = v.shape, self.config
        start, synapses = (state.position, []) if state else (0, None)
        factors = self._rotation.table(start, T, v.device, v.dtype)
        v = v.unsqueeze(1)  # (B, 1, T, D)
        for level in range(c.n_layer):
            x = F.relu(v @ self.encoder)  # (B, H, T, N)
            with torch.autocast(v.device.type, enabled=False):
                q = rotate(x, factors)
                a = (q @ q.mT).tril(-1) @ v
                if state is not None:
                    a = a + q @ state.synapses[level]
                    synapses.append(state.synapses[level] + q.mT @ v)
            y = F.relu(normalize(a)[0] @ self.encoder_v)  # (B, H, T, N)
            xy = x * y
            if dropout is not None:
                batch, head, position = (torch.arange(i, i + n, device=v.device)
                                         for i, n in ((0, B), (0, c.n_head), (start, T)))
                rows = dropout.rows(level, batch[:, None, None], head[:, None], position)
                xy = xy * dropout.kept(rows, 0, c.neurons_per_head).to(xy.dtype) * dropout.scale
            m = xy.transpose(1, 2).reshape(B, 1, T, -1) @ self.decoder
            v = normalize(v + normalize(m.to(v.dtype))[0])[0]
        return v.squeeze(1), BDHState(synapses, start + T) if state else None

    def _weights(self, dtype: torch.dtype) -> Weights:
        """Weights for reading. Copies are kept while the parameters stay what they are."""
        parameters = self.encoder, self.encoder_v, self.decoder
        made_of = dtype, *((p.data_ptr(), p._version) for p in parameters)
        if self._reading is None or self._reading[0] != made_of:
            self._reading = made_of, Weights(*(p.detach().to(dtype) for p in parameters))
        return self._reading[1]

    def _check_state(self, state: BDHState, batch_size: int) -> None:
        c = self.config
        if not isinstance(state, BDHState):
            raise ValueError(f"state: found {type(state).__name__}, expected BDHState, from initial_state")
        if len(state.synapses) != c.n_layer:
            raise ValueError(f"state: found {len(state.synapses)} passes, expected {c.n_layer}; it is another model's")
        for synapses in state.synapses:
            check_state(synapses, (batch_size, c.n_head, c.neurons_per_head, c.n_embd), self.decoder.dtype,
                        self.decoder.device, "synapses")


def _product_dtype(v: Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on, else that of v."""
    kind = v.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else v.dtype
