"""Model architectures: the protocol that every model fulfils, and the registry of model kinds.

The rest of the package uses a model only through `LanguageModel`, `ModelConfig` and `State`. The registry `KINDS` is
the only list of model kinds. A new kind needs an entry there, a section in each recipe, and

- for a class of `transformers`: a config class with the method `build_hf`, in `hf_kinds.py`;
- for any other model: a config class, a model class and a state class, in a file of their own.

Models know nothing of files, tokenizers, losses or optimizers. Importing this module does not import torch, so that
`--help` stays fast: the registry holds import paths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ModelConfig(Protocol):
    """The hyperparameters of a model: a frozen dataclass that raises `ValueError` for impossible values.

    A config class that inherits from this one has the numbers of a model that uses each weight once per token.
    """

    n_embd: int
    vocab_size: int
    tied_head: bool  # whether the head is the embedding

    @property
    def core_params(self) -> int:
        """Number of parameters without token and position embeddings and the unembedding."""

    @property
    def params(self) -> int:
        """Number of all parameters: core parameters, the embedding, and an untied head."""
        return self.core_params + (1 if self.tied_head else 2) * self.vocab_size * self.n_embd

    @property
    def weights_per_token(self) -> int:
        """Number of core parameters used to process one token; a shared parameter counts once per use."""
        return self.core_params

    def flops_per_token(self, context_length: int) -> int:
        """Return the forward FLOPs per token in a full row of `context_length` tokens.

        The count includes all matrix products, at two FLOPs per multiply-add, and the unembedding. Attention counts
        all T keys for every query; causality does not halve it. The count excludes embedding lookups, norms,
        activations, softmax, rotation and biases. These are model FLOPs, not hardware FLOPs: recomputation and
        skipped blocks do not change them.

        Source: Chowdhery et al. 2022 (PaLM), appendix B; Kaplan et al. 2020, section 2.1; nanoGPT's `estimate_mfu`.
        """

    def training_flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs per token of forward and backward pass; of a model that grows, their average over training.

        The backward pass has two products for each one of the forward pass.
        """
        return 3 * self.flops_per_token(context_length)

    def activation_bytes(self, batch_size: int, length: int, dtype: torch.dtype, device: str) -> int:
        """Return about how many bytes a training step's forward and backward pass hold at most, up to the features.

        The count includes tensors that forward stores for backward, buffers of backward, cached tables and copies of
        weights in half precision. It excludes parameters, their gradients, and the loss.

        Args:
            batch_size, length: of a micro-batch, in rows and tokens.
            dtype: of products: float32, or float16 or bfloat16 under autocast.
            device: "cpu" or "cuda".
        """


class LanguageModel(Protocol):
    """The interface of a model, an `nn.Module`, for training, scoring and generation."""

    config: ModelConfig
    context_length: int | None  # maximum number of tokens in state and inputs together; None: no limit
    story_start: int | None  # id that begins a story: nothing before it is seen. None: a row is one text. Not every
    # model has this attribute: one that lacks it cannot be trained with mask_stories.
    progress: float  # share of training that is over: the training loop sets it, for models that grow
    penalty: Tensor | None  # nats to add to those of the last `features` in training: a mixture's balance of experts

    @property
    def unembedding(self) -> Tensor:
        """The (vocab_size, n_embd) matrix that gives logits: features @ unembedding.T."""

    def features(self, inputs: Tensor, state: State | None = None) -> tuple[Tensor, State | None]:
        """Map token ids to features; each feature depends on its own and earlier tokens only.

        Args:
            inputs: int64 (B, T), ids in [0, vocab_size).
            state: the state after the tokens before `inputs`, from `initial_state` or an earlier call, with the same
                B. The call may change it in place: continue with the returned state, and `copy` it first to branch.

        Returns:
            Features (B, T, n_embd), and the state after the last token, or None if `state` is None.

        Raises:
            ValueError: ids outside the vocabulary (`check_ids` says when this is checked), more tokens than
                `context_length`, or a state of another model, batch size, dtype or device.
        """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token ids, int64 (B, T), to logits (B, T, vocab_size)."""

    def initial_state(self, batch_size: int) -> State:
        """Return the state before the first token of `batch_size` stories."""


class State:
    """What a model carries from token to token."""

    position: int  # number of tokens read
    layout: tuple  # class name, then sizes, dtype and device, which `check_state` compares

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors, to save with safetensors; they share the memory of the state."""
        raise NotImplementedError

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> State:
        """Return the state that `tensors` gave."""
        raise NotImplementedError

    def copy(self) -> State:
        """Return an independent copy, to branch a story."""
        return self.from_tensors({name: tensor.clone() for name, tensor in self.tensors().items()})

    def detach(self) -> State:
        """Return the same values without gradient history, for truncated backpropagation through time."""
        return self.from_tensors({name: tensor.detach() for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class Kind:
    """An entry of the registry."""

    label: str  # name in figures and reports
    colors: tuple[str, ...]  # in figures: the first for the first arm of this kind, and so on
    config: str  # import path of the config class, "module:Class"
    model: str  # import path of the model class, which takes a config


# Colours of Okabe and Ito's palette for colour-blind readers: blues and violets for BDH, other hues for the
# others.
KINDS: dict[str, Kind] = {
    "bdh": Kind("BDH", ("#0072B2", "#56B4E9", "#004A75"), "plotarmour.models.bdh:BDHConfig",
                "plotarmour.models.bdh:BDH"),
    "bdh_plus": Kind("BDH plus", ("#5E3C99", "#B2ABD2"), "plotarmour.models.bdh:BDHConfig",  # the recipes set options
                     "plotarmour.models.bdh:BDH"),
    "gpt2": Kind("GPT-2", ("#D55E00", "#CC79A7", "#E69F00", "#7A3500"), "plotarmour.models.hf_kinds:GPT2Config",
                 "plotarmour.models.hf:HFModel"),
    "gpt2_rope": Kind("GPT-2 with RoPE", ("#E69F00", "#8A6000"), "plotarmour.models.hf_kinds:GPT2RopeConfig",
                      "plotarmour.models.hf:HFModel"),
    "llama": Kind("Llama", ("#CC79A7", "#7B3F61"), "plotarmour.models.hf_kinds:LlamaConfig",
                  "plotarmour.models.hf:HFModel"),
    "modern": Kind("Modern transformer", ("#009E73", "#00523C"), "plotarmour.models.hf_kinds:ModernConfig",
                   "plotarmour.models.hf:HFModel"),
    "moe": Kind("Mixture of experts", ("#B8AC00", "#6B6400"), "plotarmour.models.hf_kinds:MoEConfig",
                "plotarmour.models.hf:HFModel"),
    "lstm": Kind("LSTM", ("#777777", "#333333"), "plotarmour.models.lstm:LSTMConfig", "plotarmour.models.lstm:LSTM"),
}
SUITE = ("bdh", "gpt2")  # kinds that a suite without a grid trains
REFERENCE = "bdh"  # comparisons compare this kind with all others
LADDER = ("gpt2", "gpt2_rope", "llama", "modern", "bdh")  # from GPT-2 to BDH: each kind changes more of GPT-2
_FROM_DATA = ("vocab_size", "context_length")  # fields of a config class that a recipe's architecture does not set


def architecture_fields(kind: str) -> dict[str, dataclasses.Field]:
    """Return the fields of a kind's config class that a recipe sets, by name."""
    return {f.name: f for f in dataclasses.fields(resolve_name(KINDS[kind].config)) if f.name not in _FROM_DATA}


def model_config(kind: str, architecture: dict[str, Any], vocab_size: int, context_length: int) -> ModelConfig:
    """Return the config of a model.

    Args:
        kind: a key of `KINDS`.
        architecture: values of `architecture_fields`.
        vocab_size: entries of the tokenizer.
        context_length: tokens per row; ignored if the config class has no such field.

    Raises:
        ValueError: impossible values.
    """
    config_class = resolve_name(KINDS[kind].config)
    positions = {"context_length": context_length} if "context_length" in config_class.__dataclass_fields__ else {}
    return config_class(vocab_size=vocab_size, **positions, **architecture)


def build_model(kind: str, config: ModelConfig, seed: int) -> LanguageModel:
    """Build an untrained model on the CPU, with weights that depend on the seed of torch's generator only."""
    import torch

    torch.manual_seed(seed)
    return resolve_name(KINDS[kind].model)(config)


def check_dimensions(config: ModelConfig, complaints: Collection[str] = ()) -> None:
    """Raise `ValueError` with all integer fields below 1, a `dropout` outside [0, 1), and the other `complaints`."""
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    wrong = [f"{name} = {value} must be at least 1" for name, value in values.items()
             if type(value) is int and value < 1]
    if not 0.0 <= values.get("dropout", 0.0) < 1.0:
        wrong.append(f"dropout = {values['dropout']} must be in [0, 1)")
    if wrong := [*wrong, *complaints]:
        raise ValueError("; ".join(wrong))


def check_ids(inputs: Tensor, vocab_size: int, in_training: bool = False) -> None:
    """Raise `ValueError` unless `inputs` is int64 (B, T) with T ≥ 1 and every id in [0, vocab_size).

    Args:
        inputs: token ids, as passed to a model.
        vocab_size: number of ids of that model.
        in_training: whether the model is in training mode. The values are then not checked: on a GPU this would
            synchronize CPU and GPU once per micro-batch. `data/batches.py` has checked them in RAM already. A training
            loop without it must check them itself, because an invalid id ends the process on a GPU.
    """
    import torch

    if inputs.dim() != 2 or inputs.dtype != torch.int64 or not inputs.numel():
        raise ValueError(f"inputs: found {str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape)}, expected "
                         "int64 (B, T) of at least one token")
    if in_training:
        return
    smallest, largest = torch.stack(inputs.aminmax()).tolist()  # one transfer from a GPU instead of two
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(f"inputs: found id {smallest if smallest < 0 else largest}, expected ids in [0, {vocab_size});"
                         " use the tokenizer that the model was trained with")


def check_state(state: State, expected: tuple) -> None:
    """Raise `ValueError` unless a state has the layout that a model expects; an empty one may not know all of it."""
    found = state.layout if isinstance(state, State) else (type(state).__name__,)
    if found != expected[:len(found)]:
        raise ValueError(f"state: found {' '.join(map(str, found))}, expected {' '.join(map(str, expected))}; "
                         "use a state of this model, batch size, device and autocast setting (initial_state)")


def story_starts(inputs: Tensor, story_start: int | None, state: State | None) -> Tensor | None:
    """Return which tokens begin a story, bool (B, T), for a model whose state cannot forget; None: there is no mask.

    Raises:
        ValueError: a story begins after other tokens, and there is a state.
    """
    starts = None if story_start is None else inputs == story_start
    if starts is None or state is None:
        return starts
    if starts[:, int(state.position == 0):].any():
        raise ValueError("inputs: found a story that begins after other tokens of a state, which cannot forget them; "
                         "expected a state of its own for each story (initial_state)")
    return None


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with `tensor`: autocast's if it is enabled, except for float64."""
    import torch

    device = tensor.device.type
    enabled = torch.is_autocast_enabled(device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if enabled else tensor.dtype
