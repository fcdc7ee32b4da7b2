"""GPT-2 (Radford et al., 2019) as `transformers` has it, behind the interface that BDH has too.

The architecture is `transformers.GPT2LMHeadModel`, built from a config with random weights and attention through
`scaled_dot_product_attention` (causal): the field's own reference, not ours. The unembedding is tied to the token
table, positions are learned, and there are `context_length` of them.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel
from transformers import GPT2Config as HFConfig


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
    def non_embedding_params(self) -> int:
        """Per layer 12·D² in matrices, 9·D in biases of the four, 4·D in two layer norms; 2·D in the last norm."""
        return self.n_layer * (12 * self.n_embd**2 + 13 * self.n_embd) + 2 * self.n_embd


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

    def initial_state(self, batch_size: int) -> DynamicCache:
        """Return an empty key/value cache."""
        return DynamicCache()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map int64 (B, T) ids to logits (B, T, vocab_size)."""
        return self.features(inputs)[0] @ self.unembedding.T

    def features(self, inputs: Tensor, state: DynamicCache | None = None) -> tuple[Tensor, DynamicCache | None]:
        """Map ids to features; each depends on its own and earlier tokens only.

        Args:
            inputs: int64 (B, T), ids in [0, vocab_size); past and T together at most `context_length`.
            state: the past that `inputs` continues (changed in place, as `transformers` does).

        Returns:
            Features (B, T, n_embd), and the state after the last token (None where none came in).

        Raises:
            ValueError: more tokens than positions.
        """
        past = state.get_seq_length() if state is not None else 0
        if past + inputs.shape[1] > self.context_length:
            raise ValueError(f"{past + inputs.shape[1]} tokens, but this GPT-2 has {self.context_length} positions: "
                             "score with a sliding window or shorten the text")
        out = self.hf.transformer(input_ids=inputs, past_key_values=state, use_cache=state is not None)
        return out.last_hidden_state, state
