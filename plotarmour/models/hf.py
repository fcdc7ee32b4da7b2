"""Language models of Hugging Face `transformers` behind the protocol of `plotarmour.models`; GPT-2 is one of them.

`HFModel` wraps any causal language model of `transformers`. A kind adds a config class to this file: hyperparameters,
arithmetic, and `build_hf`, which returns the `transformers` model with random weights and attention through
`scaled_dot_product_attention`. The state is the key/value cache, which grows with every token.

`transformers` takes seconds to import, so it is imported where a model is built: a recipe is checked without it.
"""

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from plotarmour.models import State, check_dimensions, check_ids, check_state, product_dtype

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class GPT2Config:
    """Hyperparameters of a GPT-2 (Radford et al. 2019); its unembedding is tied to the token embedding."""

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    vocab_size: int = 50257
    context_length: int = 1024  # learned positions
    dropout: float = 0.1

    def __post_init__(self):
        check_dimensions(self)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} must be divisible by n_head = {self.n_head}")

    def build_hf(self) -> "PreTrainedModel":
        """Return the `transformers` model with random weights."""
        from transformers import GPT2Config as HFGPT2Config
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel(HFGPT2Config(
            vocab_size=self.vocab_size, n_positions=self.context_length, n_embd=self.n_embd, n_layer=self.n_layer,
            n_head=self.n_head, resid_pdrop=self.dropout, embd_pdrop=self.dropout, attn_pdrop=self.dropout,
            attn_implementation="sdpa", bos_token_id=None, eos_token_id=None))

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

        Example:
            2 layers, D 4, V 5, T 3: a layer takes 24 · 16 + 4 · 3 · 4 = 432 FLOPs; 2 · 432 + 2 · 4 · 5 = 904.
        """
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


def _empty_cache() -> "DynamicCache":
    from transformers import DynamicCache

    return DynamicCache()


@dataclass
class CacheState(State):
    """The keys and values of all tokens read so far."""

    shape: tuple[int, ...]  # (B, n_layer, heads of keys, head width); an empty cache does not know them
    cache: "DynamicCache" = field(default_factory=_empty_cache)  # per layer keys, values (B, heads, T, head width)

    @property
    def position(self) -> int:
        return self.cache.get_seq_length()

    @property
    def layout(self) -> tuple:
        of_keys = ((layer.keys.dtype, layer.keys.device) for layer in self.cache.layers)
        return "CacheState", self.shape, *next(of_keys, ())

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors, to save with safetensors; they share the memory of the state."""
        named = {"position": torch.tensor(self.position), "shape": torch.tensor(self.shape)}
        for i, layer in enumerate(self.cache.layers):
            named |= {f"keys.{i}": layer.keys.contiguous(), f"values.{i}": layer.values.contiguous()}
        return named

    @classmethod
    def _load(cls, tensors: dict[str, Tensor]) -> "CacheState":
        state = cls(tuple(tensors["shape"].tolist()))
        if tensors["position"]:
            for i in range(state.shape[1]):
                state.cache.update(tensors[f"keys.{i}"], tensors[f"values.{i}"], i)
        return state


class HFModel(nn.Module):
    """A causal language model of `transformers` behind the protocol `plotarmour.models.LanguageModel`.

    Args:
        config: a `plotarmour.models.ModelConfig` with the method `build_hf`.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config, self.hf = config, config.build_hf()
        self.context_length = getattr(config, "context_length", None)
        c = self.hf.config
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self._sizes = c.num_hidden_layers, getattr(c, "num_key_value_heads", c.num_attention_heads), width
        # `transformers` renamed the argument in 5.24 and warns if the old name is used.
        arguments = inspect.signature(self.hf.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"

    @property
    def unembedding(self) -> Tensor:
        """The (vocab_size, n_embd) matrix that gives logits."""
        return self.hf.get_output_embeddings().weight

    def initial_state(self, batch_size: int) -> "CacheState":
        """Return the state before the first token: an empty cache."""
        return CacheState((batch_size, *self._sizes))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token ids, int64 (B, T), to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: CacheState | None = None) -> tuple[Tensor, CacheState | None]:
        """Map token ids to features (`LanguageModel.features`)."""
        check_ids(inputs, self.config.vocab_size, self.training)
        B, tokens = inputs.shape
        cache = None
        if state is not None:
            weight = self.unembedding
            check_state(state, ("CacheState", (B, *self._sizes), product_dtype(weight), weight.device))
            tokens, cache = tokens + state.position, state.cache
        if self.context_length is not None and tokens > self.context_length:
            raise ValueError(f"{tokens} tokens, but this model has {self.context_length} positions: score with a "
                             "sliding window or shorten the text")
        out = self.hf.base_model(input_ids=inputs, use_cache=state is not None, **{self._cache_argument: cache})
        return out.last_hidden_state, state
