"""The transformers that BDH is compared with: their hyperparameters, arithmetic, and how `transformers` builds each.

    kind        positions  norm       MLP               class of `transformers`
    gpt2        learned    LayerNorm  GELU, 4·D         GPT2LMHeadModel
    gpt2_rope   rotary     LayerNorm  GELU, 4·D         GPTNeoXForCausalLM: GPT-2 with rotary positions, nothing else
    llama       rotary     RMSNorm    SwiGLU            LlamaForCausalLM
    modern      rotary     RMSNorm    ReLU², 4·D        NanoChatForCausalLM: also norms of queries and keys, no weights
                                                        in norms, no biases
    moe         rotary     RMSNorm    experts (SwiGLU)  MixtralForCausalLM

All start from random weights, with the initialization of their class, and use `scaled_dot_product_attention`.
`transformers` takes seconds to import, so it is imported where a model is built: a recipe is checked without it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from plotarmour.models import ModelConfig, check_dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Hyperparameters and arithmetic that the transformers share.

    A subclass has `layer_params`, the number of parameters of a layer; `layer_products`, the number of a layer's
    weights that one token is multiplied with; `layer_values(size, is_cuda)`, the bytes that a layer stores per token,
    without attention's own, with products of `size` bytes; and `build_hf()`, the `transformers` model with random
    weights.
    """

    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 12
    vocab_size: int = 50257
    decay: float = 0.0  # attention falls by exp(-decay · distance) in the first head, half as fast in each next one

    tied_head = True  # a field of each subclass, with its own default
    dropout = 0.0  # a field of the classes that have dropout
    positions = 0  # rows of a table of learned positions

    def __post_init__(self):
        check_dimensions(self, self.complaints())

    def complaints(self) -> list[str]:
        """Return what is wrong with the combination of values."""
        wrong = []
        if self.n_head > 0 and self.n_embd % self.n_head:
            wrong.append(f"n_embd = {self.n_embd} must be divisible by n_head = {self.n_head}")
        if not 0 <= self.decay < float("inf"):
            wrong.append(f"decay = {self.decay} must not be negative or infinite")
        return wrong

    @property
    def final_params(self) -> int:
        """Number of parameters of the last norm."""
        return self.n_embd

    @property
    def core_params(self) -> int:
        """Number of parameters in all layers and in the last norm."""
        return self.n_layer * self.layer_params + self.final_params

    @property
    def params(self) -> int:
        """Number of core parameters, of token and position embeddings, and of an untied head."""
        return super().params + self.positions * self.n_embd

    def flops_per_token(self, context_length: int) -> int:
        """Return the forward FLOPs per token in a row of T tokens (`ModelConfig.flops_per_token`).

        Per layer: 2 for each of `layer_products`, 2·T·D each for scores and values. Once: 2·D·V for logits.

        Example:
            GPT-2 with 2 layers, D 4, V 5, T 3: a layer takes 2 · 12 · 16 + 4 · 3 · 4 = 432 FLOPs;
            2 · 432 + 2 · 4 · 5 = 904.
        """
        layer = 2 * self.layer_products + 4 * context_length * self.n_embd
        return self.n_layer * layer + 2 * self.n_embd * self.vocab_size

    def activation_bytes(self, batch_size: int, length: int, dtype: torch.dtype, device: str) -> int:
        """Return about how many bytes `transformers` holds in backward (`ModelConfig.activation_bytes`).

        The fused attention kernel stores queries, keys and values. There is none on a CPU with dropout, and on CUDA
        for heads of odd width: the formula stores them in float32, and scores before and after dropout.
        """
        is_cuda, size, n_tokens = device == "cuda", dtype.itemsize, batch_size * length
        is_half = size < 4
        is_fused = self.n_embd // self.n_head % (8 if is_half else 4) == 0 if is_cuda else not self.dropout
        scores = 0 if is_fused else 3 * 4 * batch_size * self.n_head * length**2
        attention = 3 * self.n_embd * (size if is_fused else 4) * n_tokens + scores
        layer = attention + n_tokens * self.layer_values(size, is_cuda) + is_half * size * self.layer_products
        mask = (self.decay > 0) * 2 * 4 * self.n_head * length**2
        return self.n_layer * layer + 5 * 4 * n_tokens * self.n_embd + scores + mask

    def _hf_sizes(self) -> dict[str, Any]:
        """Return the arguments that most config classes of `transformers` share."""
        return {"vocab_size": self.vocab_size, "hidden_size": self.n_embd, "num_hidden_layers": self.n_layer,
                "num_attention_heads": self.n_head, "attn_implementation": "sdpa", "bos_token_id": None,
                "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": self.tied_head}


@dataclass(frozen=True)
class GPT2RopeConfig(TransformerConfig):
    """Hyperparameters of a GPT-2 with rotary positions (Su et al. 2021, theta 10,000) instead of learned ones."""

    dropout: float = 0.1
    tied_head: bool = True

    def build_hf(self) -> "PreTrainedModel":
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        hf = GPTNeoXForCausalLM(GPTNeoXConfig(
            **self._hf_sizes(), intermediate_size=4 * self.n_embd, hidden_act="gelu_new", use_parallel_residual=False,
            rotary_pct=1.0, attention_dropout=self.dropout, hidden_dropout=self.dropout))
        for name, weight in hf.named_parameters():
            if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                weight.data /= (2 * self.n_layer) ** 0.5  # GPT-2's initialization of what adds to the residual
        return hf

    @property
    def layer_params(self) -> int:
        """Number of parameters of a layer: 12·D² in matrices, 9·D biases, 4·D in two norms."""
        return 12 * self.n_embd**2 + 13 * self.n_embd

    @property
    def layer_products(self) -> int:
        return 12 * self.n_embd**2

    @property
    def final_params(self) -> int:
        return 2 * self.n_embd

    def layer_values(self, size: int, is_cuda: bool) -> int:
        gelu = (3 * (4 if is_cuda else size) + 2 * size) * 4  # CUDA's autocast takes its cube in float32
        norms_and_products, masks = 2 * 4 + 3 * size, 2 * size if self.dropout else 0
        return (norms_and_products + gelu + masks) * self.n_embd


@dataclass(frozen=True)
class GPT2Config(GPT2RopeConfig):
    """Hyperparameters of a GPT-2 (Radford et al. 2019)."""

    context_length: int = 1024  # learned positions

    @property
    def positions(self) -> int:
        return self.context_length

    def build_hf(self) -> "PreTrainedModel":
        from transformers import GPT2Config as HFGPT2Config
        from transformers import GPT2LMHeadModel

        return GPT2LMHeadModel(HFGPT2Config(
            **self._hf_sizes(), n_positions=self.context_length, resid_pdrop=self.dropout, embd_pdrop=self.dropout,
            attn_pdrop=self.dropout))


@dataclass(frozen=True)
class LlamaConfig(TransformerConfig):
    """Hyperparameters of a Llama (Touvron et al. 2023), with as many heads of keys as of queries."""

    intermediate_size: int = 2048  # width of the MLP; 8/3 · D gives it GPT-2's number of weights
    tied_head: bool = False

    def build_hf(self) -> "PreTrainedModel":
        from transformers import LlamaConfig as HFLlamaConfig
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM(HFLlamaConfig(
            **self._hf_sizes(), num_key_value_heads=self.n_head, intermediate_size=self.intermediate_size))

    @property
    def layer_params(self) -> int:
        """Number of parameters of a layer: 4·D² in attention, 3·D·F in the MLP, 2·D in two norms."""
        return self.layer_products + 2 * self.n_embd

    @property
    def layer_products(self) -> int:
        return 4 * self.n_embd**2 + 3 * self.n_embd * self.intermediate_size

    def layer_values(self, size: int, is_cuda: bool) -> int:
        return (2 * 8 + 4 * size) * self.n_embd + 4 * size * self.intermediate_size


@dataclass(frozen=True)
class ModernConfig(TransformerConfig):
    """Hyperparameters of the transformer of nanochat (Karpathy 2025).

    Its core parameters are 12·L·D², those of a BDH with the multiplier 4·L.
    """

    tied_head: bool = False

    def build_hf(self) -> "PreTrainedModel":
        """Return the `transformers` model with random weights. Raise `ValueError` if `transformers` is too old."""
        import transformers

        if int(transformers.__version__.split(".")[0]) < 5:
            raise ValueError(f"found transformers {transformers.__version__}, expected 5.0 or newer for the model "
                             "modern; upgrade it, or choose the model llama")
        return transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
            **self._hf_sizes(), num_key_value_heads=self.n_head, intermediate_size=4 * self.n_embd,
            final_logit_softcapping=None))  # which would stand between features and logits

    @property
    def layer_params(self) -> int:
        return self.layer_products

    @property
    def layer_products(self) -> int:
        """Number of a layer's weights: 4·D² in attention, 8·D² in the MLP."""
        return 12 * self.n_embd**2

    @property
    def final_params(self) -> int:
        return 0

    def layer_values(self, size: int, is_cuda: bool) -> int:
        norms = 2 * (4 + size) + 2 * 4  # of the residual, before and after; of queries and keys, before
        return (norms + 2 * size + 2 * size * 4) * self.n_embd


@dataclass(frozen=True)
class MoEConfig(LlamaConfig):
    """Hyperparameters of a mixture of experts (Mixtral, Jiang et al. 2024): a Llama with several MLPs per layer.

    A router sends each token to `active_experts` of them. No expert has a limit of tokens, so none is dropped and a
    token's experts do not depend on other tokens.
    """

    n_experts: int = 8
    active_experts: int = 2
    balance_loss: float = 0.01  # weight of the loss that keeps experts equally busy, beside the loss per token

    def complaints(self) -> list[str]:
        wrong = super().complaints()
        if self.active_experts > self.n_experts:
            wrong.append(f"active_experts = {self.active_experts} must be at most n_experts = {self.n_experts}")
        if not 0 <= self.balance_loss < float("inf"):
            wrong.append(f"balance_loss = {self.balance_loss} must not be negative or infinite")
        return wrong

    def build_hf(self) -> "PreTrainedModel":
        from transformers import MixtralConfig, MixtralForCausalLM

        return MixtralForCausalLM(MixtralConfig(
            **self._hf_sizes(), num_key_value_heads=self.n_head, intermediate_size=self.intermediate_size,
            num_local_experts=self.n_experts, num_experts_per_tok=self.active_experts, sliding_window=None,
            router_aux_loss_coef=self.balance_loss, experts_implementation="eager"))  # grouped_mm has no float64

    @property
    def layer_params(self) -> int:
        """Number of parameters of a layer: 4·D² in attention, 3·D·F in each expert, E·D in the router, 2·D in norms."""
        D, E = self.n_embd, self.n_experts
        return 4 * D**2 + E * (3 * D * self.intermediate_size + D) + 2 * D

    @property
    def layer_products(self) -> int:
        D = self.n_embd
        return 4 * D**2 + self.active_experts * 3 * D * self.intermediate_size + self.n_experts * D

    @property
    def weights_per_token(self) -> int:
        """Number of core parameters without those of experts that a token is not sent to."""
        inactive = (self.n_experts - self.active_experts) * 3 * self.n_embd * self.intermediate_size
        return self.core_params - self.n_layer * inactive

    def layer_values(self, size: int, is_cuda: bool) -> int:
        return (2 * 8 + 4 * size) * self.n_embd + self.active_experts * (
            4 * size * self.intermediate_size + 2 * size * self.n_embd)
