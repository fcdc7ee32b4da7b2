"""What to do when memory or disk runs out: recognize it, split a step further, or say what helps."""

import gc
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from plotarmour.cli import UserError
from plotarmour.config import TrainingConfig
from plotarmour.training.checkpoint import checkpoint_folders

REMEDY = ("set a shorter context_length or a smaller model, or free memory (tools/doctor.py --recipe R says what fits "
          "here)")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed: on a GPU, or in RAM where the system refuses it instead of killing."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in (
        "DefaultCPUAllocator", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def release() -> None:
    """Return unused memory to the device, so that smaller blocks can be allocated."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large(what: str) -> UserError:
    """Return the error that something does not fit into memory even one row at a time."""
    return UserError(f"{what} needs more memory than there is, even one row at a time; {REMEDY}.")


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Raise `UserError` where the work inside runs out of memory: for work that cannot be split.

    Args:
        what: for the message, such as "the model".
    """
    failed = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = True
    if failed:  # not in the except clause, where the error still holds the tensors
        raise UserError(f"{what} needs more memory than there is; {REMEDY}.")


def warn_of_low_disk(run: Path, model: nn.Module, step: int, config: TrainingConfig) -> None:
    """Warn where the disk has no room for all the checkpoints that the rest of a run will hold at once."""
    each = 3 * sum(p.nbytes for p in model.parameters()) + 2**21  # AdamW has two numbers per weight; 2 MiB for the rest
    kept = config.max_steps // config.keep_every - step // config.keep_every if config.keep_every else 0
    # The latest, the one before, the best, and one that is being written; some of them exist already.
    wanted = kept + 4 - min(3, len(checkpoint_folders(run)))
    free = shutil.disk_usage(run).free
    if free < wanted * each:
        warnings.warn(f"{run} will need up to {wanted * each / 1e6:,.0f} MB more for its checkpoints "
                      f"({each / 1e6:,.0f} MB each), and the disk has {free / 1e6:,.0f} MB left: free some, or keep "
                      "fewer checkpoints (keep_every). When the disk is full, training stops with what is saved.",
                      stacklevel=2)
