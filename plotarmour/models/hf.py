"""Language models of Hugging Face `transformers` behind the protocol of `plotarmour.models`.

`HFModel` wraps any causal language model of `transformers`; the config classes of the kinds stand in `hf_kinds.py`. The
state is the key/value cache, which grows with every token.
"""

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from plotarmour.models import ModelConfig, State, check_ids, check_state, product_dtype, story_starts


@dataclass
class CacheState(State):
    """The keys and values of all tokens read so far."""

    shape: tuple[int, ...]  # (B, n_layer, heads of keys, head width); an empty cache does not know them
    cache: DynamicCache = field(default_factory=DynamicCache)  # per layer keys, values (B, heads, T, head width)

    @property
    def position(self) -> int:
        return self.cache.get_seq_length()

    @property
    def layout(self) -> tuple:
        of_keys = ((layer.keys.dtype, layer.keys.device) for layer in self.cache.layers)
        return "CacheState", self.shape, *next(of_keys, ())

    def tensors(self) -> dict[str, Tensor]:
        named = {"position": torch.tensor(self.position), "shape": torch.tensor(self.shape)}
        for i, layer in enumerate(self.cache.layers):
            named |= {f"keys.{i}": layer.keys.contiguous(), f"values.{i}": layer.values.contiguous()}
        return named

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "CacheState":
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

    story_start: int | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.hf = config, config.build_hf()
        self.context_length = getattr(config, "context_length", None)
        c = self.hf.config
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self._sizes = c.num_hidden_layers, getattr(c, "num_key_value_heads", c.num_attention_heads), width
        self._slopes = getattr(config, "decay", 0.0) / 2.0 ** torch.arange(c.num_attention_heads)
        # `transformers` renamed the argument in 5.24 and warns if the old name is used.
        arguments = inspect.signature(self.hf.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"
        self._experts = c if getattr(config, "balance_loss", 0.0) else None
        self.penalty: Tensor | None = None

    @property
    def unembedding(self) -> Tensor:
        """The (vocab_size, n_embd) matrix that gives logits."""
        return self.hf.get_output_embeddings().weight

    def initial_state(self, batch_size: int) -> CacheState:
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
        options = {self._cache_argument: cache}
        starts = story_starts(inputs, self.story_start, state)
        if starts is not None or self._slopes.any():
            # A mask with four dimensions is used as it is. `transformers` would also derive one from positions, but not
            # in every version, and not with a cache or a mask of ones.
            place = torch.arange(tokens, device=inputs.device)
            distance = place[-inputs.shape[1]:, None] - place  # (T, tokens read so far and now)
            is_seen = (distance >= 0)[None, None]
            if starts is not None:
                first = torch.where(starts, place, 0).cummax(1).values  # place where the story of each token begins
                is_seen = is_seen & (place >= first[:, None, :, None])
                options["position_ids"] = place - first
            # (heads, T, tokens), or one for all heads. Numbers, because every layer would make some of a bool mask.
            bias = -self._slopes.to(place.device)[:, None, None] * distance if self._slopes.any() else 0.0
            options["attention_mask"] = torch.where(is_seen, bias, -torch.inf).to(product_dtype(self.unembedding))
        is_balanced = self._experts is not None and self.training and torch.is_grad_enabled()
        if is_balanced:
            options["output_router_logits"] = True
        out = self.hf.base_model(input_ids=inputs, use_cache=state is not None, **options)
        self.penalty = self._balance_nats(out.router_logits) * inputs.numel() if is_balanced else None
        return out.last_hidden_state, state

    def _balance_nats(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """Return the weighted loss per token that keeps the experts of a mixture equally busy."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        c = self._experts
        return c.router_aux_loss_coef * load_balancing_loss_func(router_logits, c.num_local_experts,
                                                                 c.num_experts_per_tok)
