"""GPT-2 (Radford et al., 2019) as `transformers` has it, behind the interface that BDH has too.

The architecture is `transformers.GPT2LMHeadModel`, built from a config with random weights and attention through
`scaled_dot_product_attention` (causal): the field's own reference, not ours. The unembedding is tied to the token
table, positions are learned, and there are `context_length` of them. Its state is the key/value cache, which grows
with every token.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel, GPT2Model
from transformers import GPT2Config as HFConfig

from plotarmour.models import check_ids, check_state

# `transformers` renamed the argument in 5.24, and warns where the old name is used.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(GPT2Model.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2."""

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    vocab_size: int = 50257
    context_length: int = 1024
    dropout: float = 0.1

    def __post_init__(self):
        wrong = [f"{name} = {getattr(self, name)} must be at least 1"
                 for name in ("n_layer", "n_embd", "n_head", "vocab_size", "context_length") if getattr(self, name) < 1]
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout = {self.dropout} must be in [0, 1)")
        if not wrong and self.n_embd % self.n_head:
            wrong.append(f"n_embd = {self.n_embd} must be divisible by n_head = {self.n_head}")
        if wrong:
            raise ValueError("GPT-2: " + "; ".join(wrong))

    @property
    def core_params(self) -> int:
        """Per layer 12·D² in matrices, 9·D in biases of the four, 4·D in two layer norms; 2·D in the last norm."""
        return self.n_layer * (12 * self.n_embd**2 + 13 * self.n_embd) + 2 * self.n_embd

    @property
    def weights_per_token(self) -> int:
        """The core parameters, each once; biases and norms included."""
        return self.core_params

    def flops_per_token(self, context_length: int) -> int:
        """Count the FLOPs of one token's forward pass in a row of T tokens (`models.ModelConfig`).

        Per layer: four matrices of 12·D² together, 24·D²; scores and values, 2·T·D each. Once: the unembedding, 2·D·V.

        Raises:
            ValueError: a context below 1, or of more tokens than there are positions.

        Example:
            2 layers, D 4, V 5, T 3: a layer takes 24 · 16 + 4 · 3 · 4 = 432; 2 · 432 + 2 · 4 · 5 = 904.
        """
        if context_length < 1:
            raise ValueError(f"context_length = {context_length} must be at least 1")
        if context_length > self.context_length:
            raise ValueError(f"context_length = {context_length} must be at most the {self.context_length} positions "
                             "of this GPT-2")
        D = self.n_embd
        return self.n_layer * (24 * D**2 + 4 * context_length * D) + 2 * D * self.vocab_size


@dataclass
class GPT2State:
    """What the past left behind: the keys and values of every token read.

    Attributes:
        shape: (n_layer, B, n_head, width of a head), of the model and the stories that the state was made for: a cache
            that has read nothing does not know them.
        cache: of `transformers`; per layer keys and values (B, n_head, position, width of a head), in the dtype of
            products: under autocast its dtype, else the model's.
    """

    shape: tuple[int, int, int, int]
    cache: DynamicCache = field(default_factory=DynamicCache)

    @property
    def position(self) -> int:
        """How many tokens were read."""
        return self.cache.get_seq_length()

    def copy(self) -> "GPT2State":
        """Return a state of its own, to branch a story."""
        return self._with_each(Tensor.clone)

    def detach(self) -> "GPT2State":
        """Return the same values without their history: training by pieces of a long text stops here."""
        return self._with_each(Tensor.detach)

    def tensors(self) -> dict[str, Tensor]:
        """Return all as tensors by name, to be saved (safetensors)."""
        named = {"position": torch.tensor(self.position), "shape": torch.tensor(self.shape)}
        for i, layer in enumerate(self.cache.layers):
            named |= {f"{name}.{i}": held.clone(memory_format=torch.contiguous_format)
                      for name, held in (("keys", layer.keys), ("values", layer.values))}
        return named

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "GPT2State":
        """Return the state that `tensors` described.

        Raises:
            ValueError: tensors of something else.
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

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "GPT2State":
        state = GPT2State(self.shape)
        for i, layer in enumerate(self.cache.layers):
            state.cache.update(change(layer.keys), change(layer.values), i)
        return state


class GPT2(nn.Module):
    """`transformers.GPT2LMHeadModel` with the interface `features`, `unembedding`, `initial_state`."""

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
        """(vocab_size, n_embd), tied to the token table."""
        return self.hf.lm_head.weight

    def initial_state(self, batch_size: int) -> GPT2State:
        """Return the empty state for `batch_size` stories."""
        return GPT2State(self._state_shape(batch_size))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map int64 (B, T) ids to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: GPT2State | None = None) -> tuple[Tensor, GPT2State | None]:
        """Map ids to features; each depends on its own and earlier tokens only.

        Args:
            inputs: int64 (B, T), ids in [0, vocab_size); past and T together at most `context_length`.
            state: from `initial_state` or an earlier call, with the same B; the past that `inputs` continues. It is
                used up: go on with the returned one, and `copy` it first to branch.

        Returns:
            Features (B, T, n_embd), and the state after the last token (None where none came in).

        Raises:
            ValueError: ids outside the vocabulary (unseen in training on a GPU: `check_ids`); more tokens than
                positions; a state of another model, batch, dtype (also: made under another autocast) or device.
        """
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
            raise ValueError(f"state: found {type(state).__name__}, expected GPT2State, from initial_state")
        if state.shape != self._state_shape(batch_size):
            raise ValueError(f"state: found {_in_words(state.shape)}, expected "
                             f"{_in_words(self._state_shape(batch_size))}; make it with this model's initial_state for "
                             "this batch")
        _, *stories_and_heads, width = state.shape
        expected = (*stories_and_heads, state.position, width)
        for layer in state.cache.layers:
            for what, found in (("keys", layer.keys), ("values", layer.values)):
                check_state(found, expected, self._product_dtype(), self.unembedding.device, what,
                            "go on with the model, the device and the autocast that made it")

    def _product_dtype(self) -> torch.dtype:
        """Of keys and values: autocast's where it is on, else the model's own; autocast leaves float64 as it is."""
        own, kind = self.unembedding.dtype, self.unembedding.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and own != torch.float64 else own


def _in_words(shape: tuple[int, int, int, int]) -> str:
    n_layer, batch_size, n_head, width = shape
    return f"{n_layer} layers of {n_head} heads of width {width} for {batch_size} stories"
