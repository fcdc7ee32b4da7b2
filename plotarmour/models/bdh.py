"""Baby Dragon Hatchling (BDH-GPU): Kosowski et al., arXiv 2509.26507.

One set of weights is used in each of `n_layer` passes over v, (B, T, D):

    x = relu(v · E_x)                        per head, (B, H, T, N): active neurons are > 0
    a = tril(rope(x) · rope(x)ᵀ, -1) · v     linear attention of x with itself, strictly causal
    y = relu(LN(a) · E_y)                    (B, H, T, N)
    v = LN(v + LN(dropout(x ∘ y) · D_))      the gate uses x without rotation
    logits = v · head                        the head is not tied to the embedding

    letter   name in code      shape
    D        n_embd            width of v
    H        n_head            number of heads
    N        neurons_per_head  mlp_internal_dim_multiplier · D / H
    E_x, E_y encoder, encoder_v (H, D, N)
    D_       decoder           (H·N, D)
    LN       layer norm over D without weights, eps 1e-5

Three forms give the same result and drop the same neurons: *parallel*, the formula as published (`form` = "parallel");
*tiled* (`tiled.py`), for training; *recurrent* (`recurrent.py`), for scoring and generation, without gradients.

Differences from the official code (pathwaycom/bdh), none of which changes the function: phases are computed in float64
and cached; dropout uses counter-based random numbers (`dropout.py`); float16 scores are scaled (`tiled.py`). Parameters
have the official names, so official checkpoints load unchanged.
"""

import statistics
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plotarmour.models import check_dimensions, check_ids, check_state, product_dtype
from plotarmour.models.dropout import CounterDropout
from plotarmour.models.parts import Weights, add_residual, normalize, powers
from plotarmour.models.recurrent import BDHState, read, read_one
from plotarmour.models.rotary import Rotation, rotate
from plotarmour.models.tiled import Passes, Setting, Tiling

RESIDUALS = {"plain": None, "gain": 1.0, "gate": 0.0, "embedding": 0.0, "passes": 0.0}  # learned factors begin there
DIFFERENCE = 0.2  # first value of the learned factors of differential scores, as in the first layer of Ye et al. 2024


@dataclass(frozen=True)
class BDHConfig:
    """Hyperparameters of a BDH. `n_layer` is the number of passes through the one shared set of weights."""

    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    mlp_internal_dim_multiplier: int = 128
    vocab_size: int = 256
    dropout: float = 0.1
    # Options that the published BDH does not have; docs/bdh-recipes.md has their sources.
    init_std: float = 0.02  # of the initial encoder, encoder_v and decoder
    weights_per_pass: bool = False  # whether each pass has an encoder, an encoder_v and a decoder of its own
    tied_head: bool = False  # whether the head is the embedding
    residual: str = "plain"  # or gain, gate, embedding, passes: learned factors on what a pass adds to, and adds
    differential: bool = False  # whether every second pair of neurons of a head lowers scores, by a learned factor
    decay: float = 0.0  # scores fall by exp(-decay · distance) in the first head, half as fast in each next one
    depth_curriculum: str = ""  # passes in equal parts of training, such as "1:2"; otherwise always n_layer

    def __post_init__(self):
        neurons, of_pairs, stages = self.mlp_internal_dim_multiplier * self.n_embd, 2 * self.n_head, self.stages
        rules = (
            (of_pairs < 1 or neurons % of_pairs == 0,
             f"mlp_internal_dim_multiplier · n_embd = {neurons} must be divisible by 2 · n_head = {of_pairs}: rotation "
             "works on pairs of neurons"),
            (0 < self.init_std < float("inf"), f"init_std = {self.init_std} must be positive and finite"),
            (0 <= self.decay < float("inf"), f"decay = {self.decay} must not be negative or infinite"),
            (self.residual in RESIDUALS, f"residual = {self.residual} must be one of {', '.join(RESIDUALS)}"),
            (not (self.weights_per_pass and self.depth_curriculum),
             "weights_per_pass and depth_curriculum exclude each other: the last passes would have no trained weights"),
            (not self.depth_curriculum or (stages[0] > 0 and stages == sorted(stages) and stages[-1] == self.n_layer),
             f"depth_curriculum = {self.depth_curriculum} must be numbers of passes between colons that never fall and "
             f"end in n_layer = {self.n_layer}"))
        check_dimensions(self, [message for is_possible, message in rules if not is_possible])

    @property
    def stages(self) -> list[int]:
        """Passes in equal parts of training. "1:2:2": [1, 2, 2]."""
        parts = self.depth_curriculum.split(":") if self.depth_curriculum else []
        return [int(part) if part.isdecimal() else 0 for part in parts] or [self.n_layer]

    @property
    def neurons_per_head(self) -> int:
        return self.mlp_internal_dim_multiplier * self.n_embd // self.n_head

    @property
    def learned_factors(self) -> int:
        """Number of learned factors of the residual, D each, and of differential scores, one per pass and head."""
        n = self.n_layer
        vectors = {"plain": 0, "passes": n * (n + 3) // 2}.get(self.residual, n)
        return vectors * self.n_embd + n * self.n_head * self.differential

    @property
    def core_params(self) -> int:
        """Number of parameters of encoder, encoder_v and decoder, each H·N·D = multiplier · D², and learned factors."""
        sets = self.n_layer if self.weights_per_pass else 1
        return sets * 3 * self.mlp_internal_dim_multiplier * self.n_embd**2 + self.learned_factors

    @property
    def params(self) -> int:
        """Number of core parameters, and of the embedding and the head, (V, D) each."""
        return self.core_params + (1 if self.tied_head else 2) * self.vocab_size * self.n_embd

    @property
    def weights_per_token(self) -> int:
        """Number of core parameters times passes. 2 passes with 3 · 64 parameters: 384."""
        return self.n_layer * 3 * self.mlp_internal_dim_multiplier * self.n_embd**2 + self.learned_factors

    def flops_per_token(self, context_length: int) -> int:
        """Return the forward FLOPs per token in a row of T tokens (`ModelConfig.flops_per_token`).

        Per pass: 2·H·N·D each for x, y and the decoder, 2·T·H·N for scores, 2·T·H·D for a. Once: 2·D·V for logits.

        Example:
            2 passes, D 4, 2 heads of N 8, V 5, T 3: H·N·D = 64 and H·(N + D) = 24, so a pass takes
            6 · 64 + 2 · 3 · 24 = 528 FLOPs; 2 · 528 + 2 · 4 · 5 = 1,096.
        """
        D, H, N = self.n_embd, self.n_head, self.neurons_per_head
        flops_per_pass = 6 * H * N * D + 2 * context_length * H * (N + D)
        return self.n_layer * flops_per_pass + 2 * D * self.vocab_size

    def training_flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs per token of forward and backward pass, averaged over the stages of training."""
        shapes = (replace(self, n_layer=n, depth_curriculum="") for n in self.stages)
        return 3 * statistics.fmean(shape.flops_per_token(context_length) for shape in shapes)

    def activation_bytes(self, batch_size: int, length: int, dtype: torch.dtype, device: str) -> int:
        """Return about how many bytes `tiled.py` holds in backward (`ModelConfig.activation_bytes`)."""
        B, T, D, H, N, size = batch_size, length, self.n_embd, self.n_head, self.neurons_per_head, dtype.itemsize
        is_half = size < 4
        has_wide_copies = is_half or self.dropout > 0  # tiles in float32 beside those in half precision, or a mask
        tiling = Tiling.for_shape(B, T, N, torch.device(device))
        rows, tile = tiling.rows * T, tiling.rows * T * tiling.neurons
        v = 4 * B * T * D
        scores = 4 * H * B * T * min(T, (T + tiling.positions) // 2)
        saved = 2 * v + self.n_layer * (2 * v + scores)
        tiles = size * (2 * rows * N + 4 * tile) + 8 * tile + has_wide_copies * (size + 4) * tile
        heads = 4 * rows * (6 * D + T) + 4 * T * tiling.neurons  # a, LN(a), their gradients, dS, conjugate factors
        saved += (4 + self.n_layer) * v * (self.residual != "plain")  # about: products with factors, gradients of all v
        tiles += 2 * size * tile * self.differential
        heads += 4 * H * T * T * (self.decay > 0)  # factors on scores
        return saved + tiles + heads + 6 * v + is_half * size * self.core_params + 4 * T * N  # and rotation factors


class BDH(nn.Module):
    """BDH behind the protocol `plotarmour.models.LanguageModel`."""

    context_length = None  # no position embeddings: any length works
    story_start: int | None = None
    penalty = None
    progress = 1.0  # share of training that is over, which the training loop sets

    def __init__(self, config: BDHConfig):
        super().__init__()
        self.config = config
        heads, width, neurons = config.n_head, config.n_embd, config.neurons_per_head
        passes = (config.n_layer,) if config.weights_per_pass else ()
        self.decoder = nn.Parameter(torch.empty(*passes, heads * neurons, width).normal_(std=config.init_std))
        self.encoder = nn.Parameter(torch.empty(*passes, heads, width, neurons).normal_(std=config.init_std))
        self.embed = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.encoder_v = nn.Parameter(torch.empty(*passes, heads, width, neurons).normal_(std=config.init_std))
        if not config.tied_head:
            self.lm_head = nn.Parameter(torch.empty(width, config.vocab_size).normal_(std=0.02))
        if config.residual != "plain":  # a vector, which has no weight decay
            learned = config.learned_factors - config.n_layer * heads * config.differential
            self.mix = nn.Parameter(torch.full((learned,), RESIDUALS[config.residual]))
        if config.differential:
            self.difference = nn.Parameter(torch.full((config.n_layer * heads,), DIFFERENCE))
        self.form = "tiled"  # or "parallel": the formula as published, with (B, H, T, N) tensors
        self.tiling: Tiling | None = None  # of the tiled form; None: chosen by shape and device
        self._rotation = Rotation(neurons)
        slopes = config.decay / 2.0 ** torch.arange(heads, dtype=torch.float64)
        self.register_buffer("decay", torch.exp(-slopes) if config.decay else None, persistent=False)
        self._weights_cache: tuple | None = None  # of `_weights`
        # Official checkpoints contain the frequencies as a buffer. They depend on N only and are not loaded.
        self.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: state.pop(prefix + "attn.freqs", None))

    @property
    def unembedding(self) -> Tensor:
        """The (vocab_size, n_embd) matrix that gives logits: features @ unembedding.T."""
        return self.embed.weight if self.config.tied_head else self.lm_head.T

    def initial_state(self, batch_size: int) -> BDHState:
        """Return the state before the first token: zeros of shape (B, H, N, D) for each pass."""
        c = self.config
        return BDHState([torch.zeros(batch_size, c.n_head, c.neurons_per_head, c.n_embd, dtype=self.decoder.dtype,
                                     device=self.decoder.device) for _ in range(c.n_layer)])

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token ids, int64 (B, T), to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: BDHState | None = None) -> tuple[Tensor, BDHState | None]:
        """Map token ids to features (`LanguageModel.features`).

        The tiled form computes them with gradients, the recurrent form without. The parallel form computes them if
        `form` is "parallel", or if a state is given and gradients are needed.
        """
        c = self.config
        check_ids(inputs, c.vocab_size, self.training)
        B, T = inputs.shape
        if state is not None:
            shape = (B, c.n_head, c.neurons_per_head, c.n_embd)
            check_state(state, ("BDHState", c.n_layer, shape, self.decoder.dtype, self.decoder.device))
        starts = None if self.story_start is None else inputs == self.story_start
        v = normalize(self.embed(inputs))[0]  # (B, T, D)
        dropout = None
        if self.training and c.dropout:
            key = int(torch.randint(2**62, ()))  # from torch's generator, which the training loop seeds
            dropout = CounterDropout(c.dropout, key, c.neurons_per_head, v.device)
        stages = c.stages if self.training and state is None else [c.n_layer]
        n_passes = stages[min(int(self.progress * len(stages)), len(stages) - 1)]
        differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.form == "parallel" or (state is not None and differentiable):
            return self._parallel(v, n_passes, dropout, state, starts)
        dtype = product_dtype(v)
        if differentiable:
            self._weights_cache = None
            setting = Setting(self._rotation.table(0, T, v.device, v.dtype), dropout,
                              self.tiling or Tiling.for_shape(B, T, c.neurons_per_head, v.device),
                              stories=None if starts is None else starts.cumsum(1),
                              decays=powers(self.decay, T, v.dtype))
            return Passes.apply(v, self.encoder, self.encoder_v, self.decoder, self._residual(), self._signs(),
                                n_passes, dtype, setting), None
        with torch.autocast(v.device.type, enabled=False):
            if state is not None and T == 1 and dropout is None and starts is None:
                v = read_one(v, self._weights(dtype), self._rotation, state)
            else:
                v = read(v, self._weights(dtype), n_passes, self._rotation, dropout, state, starts)
        if state is not None:
            state.position += T
        return v, state

    def _parallel(self, v: Tensor, n_passes: int, dropout: CounterDropout | None, state: BDHState | None,
                  starts: Tensor | None) -> tuple[Tensor, BDHState | None]:
        """Apply the published formula with (B, H, T, N) tensors; attention in float32 or float64."""
        (B, T, _), c = v.shape, self.config
        start, synapses = (state.position, []) if state else (0, None)
        factors = self._rotation.table(start, T, v.device, v.dtype)
        same = reads = writes = kept = 1.0  # reads: the state; writes: to the new state; kept: the state is
        if starts is not None:
            story = starts.cumsum(1)[:, None, :, None]  # (B, 1, T, 1); 0 is that of the state
            last = story[:, :, -1:]
            same, reads, writes, kept = story == story.mT, story == 0, story == last, last == 0
        decays = powers(self.decay, T, v.dtype)  # (H, T + 1)
        if decays is not None:
            place = torch.arange(T, device=v.device)
            same = same * decays[:, (place[:, None] - place).abs()]
            reads, writes, kept = (a * b for a, b in zip((reads, writes, kept), (
                decays[:, 1:, None], decays[:, :-1, None].flip(1), decays[:, -1:, None]), strict=True))
        weights = Weights(self.encoder, self.encoder_v, self.decoder, None, self._residual(), self._signs())
        v, before = v.unsqueeze(1), []  # (B, 1, T, D)
        for level in range(n_passes):
            own = weights.of_pass(level)
            x = F.relu(v @ own.encoder)  # (B, H, T, N)
            with torch.autocast(v.device.type, enabled=False):
                q = rotate(x, factors)
                signed = q if own.signs is None else q * own.signs[:, None]
                a = ((signed @ q.mT).tril(-1) * same) @ v
                if state is not None:
                    a = a + signed * reads @ state.synapses[level]
                    synapses.append(state.synapses[level] * kept + (q * writes).mT @ v)
            y = F.relu(normalize(a)[0] @ own.encoder_v)  # (B, H, T, N)
            xy = x * y
            if dropout is not None:
                rows = dropout.rows(level, range(B), range(c.n_head), range(start, start + T))
                xy = xy * dropout.kept(rows, 0, c.neurons_per_head).to(xy.dtype) * dropout.scale
            m = xy.transpose(1, 2).reshape(B, 1, T, -1) @ own.decoder
            before.append(v)
            v = normalize(add_residual(before, normalize(m.to(v.dtype))[0], weights.mix, level))[0]
        return v.squeeze(1), BDHState(synapses, start + T) if state else None

    def _residual(self) -> Tensor | None:
        """Return the factors of `add_residual`, (n_layer, n_layer + 1, D), from the learned ones."""
        n, kind = self.config.n_layer, self.config.residual
        if kind == "plain":
            return None
        learned, each = self.mix.view(-1, self.config.n_embd), torch.arange(n)
        factors = learned.new_zeros(n, n + 1, learned.shape[1])
        factors[each, each] = 1 - learned.sigmoid() if kind == "gate" else torch.ones_like(learned[:n])
        factors[:, -1] = {"gain": learned, "gate": learned.sigmoid()}.get(kind, torch.ones_like(learned[:n]))
        if kind == "embedding":
            factors[:, 0] += learned
        elif kind == "passes":
            is_there = torch.ones(n, n + 1, dtype=torch.bool, device=learned.device).tril()
            is_there[:, -1] = True
            factors[is_there] += learned
        return factors

    def _signs(self) -> Tensor | None:
        """Return the factors of neurons on scores, (n_layer, H, N): 1, and less a learned one for every other pair."""
        c = self.config
        if not c.differential:
            return None
        less = self.difference.view(c.n_layer, c.n_head, 1)
        return torch.where(torch.arange(c.neurons_per_head, device=less.device) // 2 % 2 == 0, 1.0, -less)

    def _weights(self, dtype: torch.dtype) -> Weights:
        """Return detached weights in `dtype`; the copies are cached until a parameter changes."""
        parameters = self.encoder, self.encoder_v, self.decoder
        key = dtype, *((p.data_ptr(), p._version) for p in self.parameters())
        if self._weights_cache is None or self._weights_cache[0] != key:
            copies = (p.detach().to(dtype) for p in parameters)
            self._weights_cache = key, Weights(*copies, self.decay, self._residual(), self._signs())
        return self._weights_cache[1]
