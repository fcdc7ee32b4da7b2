"""Architectures only. Knows nothing of files, tokenizers, losses or devices.

`LanguageModel` is what every model offers, and `ModelConfig` what its config states; the rest of the package uses no
more of a model than that. `KINDS` is the one place that lists the kinds of model. A new kind needs its own file, an
entry here and a section in a recipe.

Importing this module does not import torch, so that `--help` stays quick: the registry holds import paths, and
`model_config` and `build_model` follow them.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ModelConfig(Protocol):
    """The shape of a model: a frozen dataclass that raises `ValueError` for an impossible shape."""

    vocab_size: int

    @property
    def core_params(self) -> int:
        """Parameters apart from token and position tables and the unembedding."""

    @property
    def weights_per_token(self) -> int:
        """Core parameters that a token passes through; shared ones count at every use."""

    def flops_per_token(self, context_length: int) -> int:
        """Count the FLOPs of one token's forward pass in a full row of `context_length` tokens.

        Matrix products only, two FLOPs per multiply-add, the unembedding included. Attention counts all T keys for
        every query and is not halved for causality. Not counted: embedding lookups, norms, activations, softmax,
        rotation, biases. These are model FLOPs, not hardware FLOPs: recomputation and skipped blocks change the time
        and not this number.

        Raises:
            ValueError: a context that the model cannot have.

        Source: Chowdhery et al. 2022 (PaLM), appendix B; Kaplan et al. 2020, section 2.1; nanoGPT's `estimate_mfu`.
        """


class LanguageModel(Protocol):
    """What training, scoring and generation use of a model, an `nn.Module`."""

    config: ModelConfig
    context_length: int | None  # the most tokens of past and inputs together; None: no limit

    @property
    def unembedding(self) -> Tensor:
        """(vocab_size, n_embd): logits are features @ unembedding.T."""

    def features(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Map int64 (B, T) ids to features (B, T, n_embd), and return the state after the last token.

        A feature depends on its own and earlier tokens only. The state is None where none came in.
        """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map int64 (B, T) ids to logits (B, T, vocab_size)."""

    def initial_state(self, batch_size: int) -> Any:
        """Return the state before the first token, with `position`, `copy`, `detach`, `tensors`, `from_tensors`."""


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        label: its name in figures and reports.
        colors: of its arms in figures, the first one first.
        config: import path of its config class, "module:Class".
        model: import path of its model class, built from a config.
    """

    label: str
    colors: tuple[str, ...]
    config: str
    model: str


# Colours are Okabe and Ito's, safe for the colour-blind: blues for BDH, warm ones for the others.
KINDS: dict[str, Kind] = {
    "bdh": Kind("BDH", ("#0072B2", "#56B4E9", "#004A75"), "plotarmour.models.bdh:BDHConfig",
                "plotarmour.models.bdh:BDH"),
    "gpt2": Kind("GPT-2", ("#D55E00", "#CC79A7", "#E69F00", "#7A3500"), "plotarmour.models.hf:GPT2Config",
                 "plotarmour.models.hf:GPT2"),
}
REFERENCE = "bdh"  # the kind that comparisons name first: how does it do against the others?


def model_config(kind: str, architecture: dict[str, Any], vocab_size: int, context_length: int) -> ModelConfig:
    """Return the config of a model.

    Args:
        kind: a key of `KINDS`.
        architecture: fields of the kind's config class.
        vocab_size: entries of the tokenizer.
        context_length: tokens per row; only for a config class that has such a field.

    Raises:
        ValueError: an impossible shape, or a field that the config class does not have.
    """
    config_class = _load(KINDS[kind].config)
    positions = {"context_length": context_length} if "context_length" in config_class.__dataclass_fields__ else {}
    try:
        return config_class(vocab_size=vocab_size, **positions, **architecture)
    except TypeError as error:
        raise ValueError(str(error)) from None


def build_model(kind: str, architecture: dict[str, Any], vocab_size: int, context_length: int,
                seed: int) -> LanguageModel:
    """Build an untrained model on the CPU; its weights follow from the seed alone.

    Args:
        kind, architecture, vocab_size, context_length: as in `model_config`.
        seed: of torch's generator, which this sets.

    Raises:
        ValueError: as `model_config`.
    """
    import torch

    config = model_config(kind, architecture, vocab_size, context_length)
    model_class = _load(KINDS[kind].model)
    torch.manual_seed(seed)
    return model_class(config)


def label_of(kind: str) -> str:
    """Return a kind's name in figures and reports; an unknown kind is its own label."""
    return KINDS[kind].label if kind in KINDS else kind


def colors_of(kind: str) -> tuple[str, ...]:
    """Return the colours of a kind's arms; gray for an unknown kind."""
    return KINDS[kind].colors if kind in KINDS else ("#8A8A8A",)


def check_ids(inputs: Tensor, vocab_size: int, in_training: bool = False) -> None:
    """Raise `ValueError` unless `inputs` is int64 (B, T) with T ≥ 1 and every id in [0, vocab_size).

    Args:
        inputs: the ids that a model received.
        vocab_size: of that model.
        in_training: whether the model is in training mode. The values of ids on a GPU are then not checked: the check
            makes the CPU wait for the GPU once per micro-batch, and the next one could not be prepared meanwhile. The
            reader of token files (`Windows.micro_batch`) has checked them in RAM. Another training loop must do the
            same: an id outside the vocabulary ends a process on a GPU.
    """
    import torch

    if inputs.dim() != 2 or inputs.dtype != torch.int64 or not inputs.numel():
        raise ValueError(f"inputs: found {str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape)}, expected "
                         "int64 (B, T) of at least one token")
    if in_training and inputs.device.type != "cpu":
        return
    least, most = torch.stack(inputs.aminmax()).tolist()  # one transfer from a GPU, not two
    if least < 0 or most >= vocab_size:
        raise ValueError(f"inputs: found id {least if least < 0 else most}, expected ids in [0, {vocab_size}); were "
                         "they made with another tokenizer?")


def check_state(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str,
                remedy: str = "make it with this model's initial_state") -> None:
    """Raise `ValueError` unless a tensor of a state has the shape, dtype and device that the model expects."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"state: found {what} of shape {tuple(tensor.shape)}, expected {shape}; make it with this "
                         "model's initial_state for this batch")
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"state: found {what} as {tensor.dtype} on {tensor.device}, expected {dtype} on {device}; "
                         f"{remedy}")


def _load(path: str) -> type:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
