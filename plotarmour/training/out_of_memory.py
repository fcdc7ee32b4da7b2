"""What fits: rows of a micro-batch into memory, checkpoints onto the disk."""

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
from plotarmour.training.checkpoint import ALWAYS_KEPT, SLACK_BYTES, checkpoint_folders


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or (where the system refuses it instead of killing) in RAM."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in (
        "DefaultCPUAllocator", "CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


def largest_divisor(rows: int, at_most: int) -> int:
    """Return the largest number of rows, `at_most` or fewer, that divides `rows`.

    Example:
        largest_divisor(12, 5) is 4: micro-batches of 4 rows, 3 of them.
    """
    return next(n for n in range(min(rows, at_most), 0, -1) if rows % n == 0)


def release() -> None:
    """Give memory back that nobody holds any more, so that smaller pieces can be made of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large(what: str) -> UserError:
    """Return the complaint that something does not fit into memory even one row at a time."""
    return UserError(f"{what} needs more memory than there is, even one row at a time; set a shorter context_length or "
                     "a smaller model (tools/doctor.py --recipe R plans what fits).")


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Raise `UserError` where what is done inside runs out of memory: for what cannot be split any further.

    Args:
        what: for the message, such as "the model".
    """
    full = False
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        full = True
    if full:  # not in the except clause: there the error holds what was made until then
        raise UserError(f"{what} needs more memory than there is; choose a smaller model or a shorter context_length "
                        "(tools/doctor.py --recipe R plans what fits), or free some.")


def warn_of_low_disk(run: Path, model: nn.Module, step: int, config: TrainingConfig) -> None:
    """Warn where the disk has no room for all the checkpoints that the rest of a run will hold at once."""
    each = SLACK_BYTES + 3 * sum(p.nbytes for p in model.parameters())  # AdamW keeps two numbers beside each weight
    kept = config.max_steps // config.keep_every - step // config.keep_every if config.keep_every else 0
    wanted = ALWAYS_KEPT + 1 + kept - min(ALWAYS_KEPT, len(checkpoint_folders(run)))  # one more while it is written
    free = shutil.disk_usage(run).free
    if free < wanted * each:
        warnings.warn(f"{run} will need up to {wanted * each / 1e6:,.0f} MB more for its checkpoints "
                      f"({each / 1e6:,.0f} MB each), and the disk has {free / 1e6:,.0f} MB left: free some, or keep "
                      "fewer (keep_every). Where it is full, training stops and keeps what it has.", stacklevel=2)
