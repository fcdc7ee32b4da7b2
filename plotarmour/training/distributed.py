"""Several processes that train one run, started by torchrun: one per GPU, or on CPUs for a test.

Each process has the whole model and its own share of every step's rows. Gradients are summed over all processes once
per step, as DistributedDataParallel does in the last micro-batch of a step. DistributedDataParallel itself does not
fit: it sums inside the backward pass, so that the other processes would wait there for ever if one is out of memory.
Here, all processes first agree that each of them has its gradients.

Numbers are exchanged through gloo on the CPU, which nearly always notices at once when a process has died. Where it
does not, torchrun ends the other processes after 30 seconds, and the same command continues from the latest checkpoint.
Gradients on GPUs are exchanged through nccl.
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

TIMEOUT = timedelta(hours=1)  # the other processes wait while the first one saves, or searches the texts for overlaps


class LostProcess(RuntimeError):
    """Another process of this run has died."""


class ToldElsewhere(UserError):
    """A user's mistake that the first process met and reports."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, and how many there are; by default the only one.

    What all processes do together raises `LostProcess` where one has died.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Return the sums of numbers over all processes, in float64."""
        if self.size == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64)
        _together(dist.all_reduce, total)
        return total.tolist()

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum the gradients over all processes, in place."""
        if self.size > 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    _together(dist.all_reduce, parameter.grad)

    def first(self, act: Callable[[], Any]) -> Any:
        """Call a function in the first process, and return its result in all of them.

        Raises:
            UserError: what the function raised, in the first process; `ToldElsewhere` in the others.
        """
        if self.size == 1:
            return act()
        answer, raised = [None, None], None  # result, message of an error
        if self.is_first:
            try:
                answer[0] = act()
            except BaseException as error:  # the others wait for an answer in any case
                raised, answer[1] = error, str(error)
        _together(dist.broadcast_object_list, answer, src=0)
        if raised is not None:
            raise raised
        if answer[1] is not None:
            raise ToldElsewhere(answer[1])
        return answer[0]


ALONE = Ranks()


def check_share(rows_per_step: int, processes: int) -> None:
    """Raise `UserError` unless the rows of a step can be shared out evenly."""
    if rows_per_step % processes:
        raise UserError(f"{rows_per_step} rows per step cannot be shared out evenly among {processes} processes; set "
                        f"rows_per_step to a multiple of {processes}.")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started; without torchrun, train alone. The models are on `device`."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        with warnings.catch_warnings(action="ignore"):
            dist.destroy_process_group()


def _together(act: Callable, *args, **keywords) -> None:
    try:
        act(*args, **keywords)
    except RuntimeError as error:  # gloo: closed by peer; nccl: a communicator that was aborted
        raise LostProcess(str(error).splitlines()[0]) from None
