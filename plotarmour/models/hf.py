"""GPT-2 (Radford et al. 2019) from Hugging Face `transformers`, behind the protocol of `plotarmour.models`.

The architecture is `transformers.GPT2LMHeadModel`, built from a config with random weights, with causal attention
through `scaled_dot_product_attention`. The unembedding is tied to the token embedding. There are `context_length`
learned positions. The state is the key/value cache, which grows with every token.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel, GPT2Model
from transformers import GPT2Config as HFConfig

from plotarmour.models import check_dimensions, check_ids, check_state, product_dtype

# `transformers` renamed the argument in 5.24 and warns if the old name is used.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(GPT2Model.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters of a GPT-2."""

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    vocab_size: int = 50257
    context_length: int = 1024
    dropout: float = 0.1

    def __post_init__(self):
        complaints = check_dimensions(self, ("n_layer", "n_embd", "n_head", "vocab_size", "context_length"))
        if not complaints and self.n_embd % self.n_head:
            complaints.append(f"n_embd = {self.n_embd} must be divisible by n_head = {self.n_head}")
        if complaints:
            raise ValueError("GPT-2: " + "; ".join(complaints))

    @property
    def core_params(self) -> int:
        """Number of parameters per layer (12·D² in matrices, 9·D biases, 4·D in two norms) and in the last norm."""
        return self.n_layer * (12 * self.n_embd**2 + 13 * self.n_embd) + 2 * self.n_embd

    @property
    def params(self) -> int:
        """Number of core parameters, and of token and position embeddings; the unembedding is the former."""
        return self.core_params + (self.vocab_size + self.context_length) * self.n_embd

    @property
    def weights_per_token(self) -> int:
        """Number of core parameters; each is used once per token."""
        return self.core_params

    def flops_per_token(self, context_length: int) -> int:
        """Return the forward FLOPs per token in a row of T tokens (`ModelConfig.flops_per_token`).

        Per layer: 24·D² for four matrices of 12·D² together, 2·T·D each for scores and values. Once: 2·D·V for logits.

        Raises:
            ValueError: a context length below 1, or above the number of positions.

        Example:
            2 layers, D 4, V 5, T 3: a layer takes 24 · 16 + 4 · 3 · 4 = 432 FLOPs; 2 · 432 + 2 · 4 · 5 = 904.
        """
        if context_length < 1:
            raise ValueError(f"context_length = {context_length} must be at least 1")
        if context_length > self.context_length:
            raise ValueError(f"context_length = {context_length} must be at most the {self.context_length} positions "
                             "of this GPT-2")
        D = self.n_embd
        return self.n_layer * (24 * D**2 + 4 * context_length * D) + 2 * D * self.vocab_size

    def activation_bytes(self, batch_size: int, length: int, dtype: torch.dtype, device: str) -> int:
        """Return about how many bytes `transformers`' GPT-2 holds in backward (`ModelConfig.activation_bytes`).

        The fused attention kernel stores queries, keys and values. There is none on a CPU with dropout, and on CUDA
        for heads of odd width: the formula stores them in float32, and scores before and after dropout.
        """
        is_cuda, size, n_values = device == "cuda", dtype.itemsize, batch_size * length * self.n_embd
        is_half = size < 4
        is_fused = self.n_embd // self.n_head % (8 if is_half else 4) == 0 if is_cuda else not self.dropout
        scores = 0 if is_fused else 3 * 4 * batch_size * self.n_head * length**2
        attention = 3 * n_values * (size if is_fused else 4) + scores
        gelu = (3 * (4 if is_cuda else size) + 2 * size) * 4 * n_values  # CUDA's autocast takes its cube in float32
        norms_and_products = (2 * 4 + 3 * size) * n_values
        masks = 2 * size * n_values if self.dropout else 0
        layer = norms_and_products + attention + gelu + masks + is_half * size * 12 * self.n_embd**2
        return self.n_layer * layer + 5 * 4 * n_values + scores


@dataclass
class GPT2State:
    """The keys and values of all tokens read so far.

    Attributes:
        shape: (n_layer, B, n_head, head width) of the model and batch; an empty cache does not know them.
        cache: per layer keys and values, (B, n_head, position, head width), in the dtype of products.
    """

    shape: tuple[int, int, int, int]
    cache: DynamicCache = field(default_factory=DynamicCache)

    @property
    def position(self) -> int:
        """Number of tokens read."""
        return self.cache.get_seq_length()

    def copy(self) -> "GPT2State":
        """Return an independent copy, to branch a story."""
        return self._map(Tensor.clone)

    def detach(self) -> "GPT2State":
        """Return the same values without gradient history, for truncated backpropagation through time."""
        return self._map(Tensor.detach)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors, to save with safetensors."""
        named = {"position": torch.tensor(self.position), "shape": torch.tensor(self.shape)}
        for i, layer in enumerate(self.cache.layers):
            named[f"keys.{i}"], named[f"values.{i}"] = (
                tensor.clone(memory_format=torch.contiguous_format) for tensor in (layer.keys, layer.values))
        return named

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "GPT2State":
        """Return the state that `tensors` gave.

        Raises:
            ValueError: tensors of another kind of state.
        """
        try:
            state = GPT2State(tuple(tensors["shape"].tolist()))
            if tensors["position"]:
                for i in range(state.shape[0]):
                    state.cache.update(tensors[f"keys.{i}"], tensors[f"values.{i}"], i)
        except KeyError as missing:
            raise ValueError(f"state: found tensors {', '.join(sorted(tensors)[:4])} ... without {missing}, expected "
                             "those of a GPT2State; load them with the class that saved them") from None
        return state

    def _map(self, function: Callable[[Tensor], Tensor]) -> "GPT2State":
        state = GPT2State(self.shape)
        for i, layer in enumerate(self.cache.layers):
            state.cache.update(function(layer.keys), function(layer.values), i)
        return state


class GPT2(nn.Module):
    """`transformers.GPT2LMHeadModel` behind the protocol `plotarmour.models.LanguageModel`."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.hf = GPT2LMHeadModel(HFConfig(
            vocab_size=config.vocab_size, n_positions=config.context_length, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=config.dropout, embd_pdrop=config.dropout,
            attn_pdrop=config.dropout, attn_implementation="sdpa", bos_token_id=None, eos_token_id=None))

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def unembedding(self) -> Tensor:
        """The (vocab_size, n_embd) matrix that gives logits, tied to the token embedding."""
        return self.hf.lm_head.weight

    def initial_state(self, batch_size: int) -> GPT2State:
        """Return the state before the first token: an empty cache."""
        return GPT2State(self._state_shape(batch_size))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token ids, int64 (B, T), to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: GPT2State | None = None) -> tuple[Tensor, GPT2State | None]:
        """Map token ids to features (`LanguageModel.features`)."""
        check_ids(inputs, self.config.vocab_size, self.training)
        if state is not None:
            self._check_state(state, len(inputs))
        tokens = inputs.shape[1] + (state.position if state is not None else 0)
        if tokens > self.context_length:
            raise ValueError(f"{tokens} tokens, but this GPT-2 has {self.context_length} positions: score with a "
                             "sliding window or shorten the text")
        cache = state.cache if state is not None else None
        out = self.hf.transformer(input_ids=inputs, use_cache=state is not None, **{CACHE_ARGUMENT: cache})
        return out.last_hidden_state, state

    def _state_shape(self, batch_size: int) -> tuple[int, int, int, int]:
        c = self.config
        return c.n_layer, batch_size, c.n_head, c.n_embd // c.n_head

    def _check_state(self, state: GPT2State, batch_size: int) -> None:
        if not isinstance(state, GPT2State):
            raise ValueError(f"state: found {type(state).__name__}, expected GPT2State; use initial_state")
        if state.shape != self._state_shape(batch_size):
            raise ValueError(f"state: found (layers, B, heads, head width) {state.shape}, expected "
                             f"{self._state_shape(batch_size)}; use a state of this model and batch size "
                             "(initial_state)")
        _, B, heads, width = state.shape
        weight = self.unembedding
        for layer in state.cache.layers:
            for name in ("keys", "values"):
                check_state(name, getattr(layer, name), (B, heads, state.position, width), product_dtype(weight),
                            weight.device)
