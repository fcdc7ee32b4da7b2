"""Several processes on one run, as torchrun starts them: one per GPU, or on CPUs for a try.

Each has the whole model and its own share of every step's rows. Gradients are added up over all of them once per step,
as DistributedDataParallel does with the last micro-batch of a step. It is written out here because all processes must
first agree that each has its share: where one is out of memory or stopped, DistributedDataParallel's others would wait
for it inside the backward pass for ever.

Numbers go through gloo on the CPU, which notices at once when a process has died; gradients on GPUs through nccl.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from plotarmour.cli import UserError

BUCKET = 2**23  # gradients added up at a time: 32 MiB of them
PATIENCE = timedelta(hours=1)  # while the first process saves or looks at the texts, the others wait


class LostProcess(RuntimeError):
    """Another process of this run has died."""


class ToldElsewhere(UserError):
    """The first process has met a user's mistake, and says so itself."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many; the only one by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run folder."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Add numbers up over all processes, in float64.

        Raises:
            LostProcess: one has died.
        """
        if self.size == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64)
        _together(dist.all_reduce, total)
        return total.tolist()

    def sum_gradients(self, model: nn.Module) -> None:
        """Add gradients up over all processes, in place, some 32 MiB at a time.

        Raises:
            LostProcess: one has died.
        """
        if self.size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        while gradients:
            bucket, count = [], 0
            while gradients and (not bucket or count + gradients[0].numel() <= BUCKET):
                bucket.append(gradients.pop(0))
                count += bucket[-1].numel()
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            _together(dist.all_reduce, flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def first(self, act: Callable[[], Any]) -> Any:
        """Let the first process act, and return what it found (JSON, paths, None) in all of them.

        Raises:
            UserError: what it raised, in it; `ToldElsewhere` in the others.
        """
        if self.size == 1:
            return act()
        told, raised = [None, None], None
        if self.is_first:
            try:
                told[0] = act()
            except BaseException as error:  # the others wait for an answer in any case
                raised, told[1] = error, str(error)
        _together(dist.broadcast_object_list, told, src=0)
        if raised is not None:
            raise raised
        if told[1] is not None:
            raise ToldElsewhere(told[1])
        return told[0]


ALONE = Ranks()


def check_share(rows_per_step: int, processes: int) -> None:
    """Raise `UserError` unless the rows of a step can be shared out evenly."""
    if rows_per_step % processes:
        raise UserError(f"{rows_per_step} rows per step cannot be shared out evenly among {processes} processes; set "
                        f"rows_per_step to a multiple of {processes}.")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started; alone without torchrun.

    Args:
        device: "cpu" or "cuda", of the models.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.destroy_process_group()


def _together(act: Callable, *args, **keywords) -> None:
    try:
        act(*args, **keywords)
    except RuntimeError as error:  # gloo: closed by peer; nccl: a communicator that was aborted
        raise LostProcess(str(error).splitlines()[0]) from None
