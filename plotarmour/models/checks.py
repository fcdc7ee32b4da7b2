"""What every model refuses before any arithmetic, by name and rule."""

import torch
from torch import Tensor


def check_ids(inputs: Tensor, vocab_size: int, in_training: bool = False) -> None:
    """Raise `ValueError` unless `inputs` is int64 (B, T) with T ≥ 1 and every id in [0, vocab_size).

    Args:
        inputs: as a model was given them.
        vocab_size: of that model.
        in_training: whether the model is in training mode. Ids on a GPU are then taken as they are: to see them the
            CPU would wait for the GPU once per micro-batch, and could not prepare the next one meanwhile. The reader
            of token files (`Windows.micro_batch`) has checked them already, while they lay in RAM. A training loop of
            your own must do the same: an id outside the vocabulary ends a process on a GPU.
    """
    if inputs.dim() != 2 or inputs.dtype != torch.int64 or not inputs.numel():
        raise ValueError(f"inputs: found {str(inputs.dtype).removeprefix('torch.')} {tuple(inputs.shape)}, expected "
                         "int64 (B, T) of at least one token")
    if in_training and inputs.device.type != "cpu":
        return
    least, most = torch.stack(inputs.aminmax()).tolist()  # one transfer from a GPU, not two
    if least < 0 or most >= vocab_size:
        raise ValueError(f"inputs: found id {least if least < 0 else most}, expected ids in [0, {vocab_size}); were "
                         "they made with another tokenizer?")


def check_state(found: Tensor, expected: tuple[int, ...], dtype: torch.dtype, device: torch.device, what: str,
                remedy: str = "make it with this model's initial_state") -> None:
    """Raise `ValueError` unless a tensor of a state has the shape, dtype and device that the model expects."""
    if tuple(found.shape) != expected:
        raise ValueError(f"state: found {what} of shape {tuple(found.shape)}, expected {expected}; make it with this "
                         "model's initial_state for this batch")
    if found.dtype != dtype or found.device != device:
        raise ValueError(f"state: found {what} as {found.dtype} on {found.device}, expected {dtype} on {device}; "
                         f"{remedy}")
