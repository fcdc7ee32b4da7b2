"""Executors: what runs the rows of a grid. They start rows, say which have ended, and stop them.

`Local` runs them here, contrib/slurm.py and contrib/kaggle_kernels.py elsewhere. The run folders alone say what became
of a row; see `plotarmour.suite.runner`. A row is its index in the grid.
"""

from collections.abc import Iterator
from typing import Protocol

from plotarmour.suite.grid import Grid
from plotarmour.suite.notebooks import start_notebook, stop_notebooks


class Executor(Protocol):
    """What `plotarmour.suite.runner` needs of an executor."""

    look_s: float  # seconds between two looks

    def start(self, waiting: list[int]) -> list[int]:
        """Start as many of the waiting rows as can start now, and return them."""

    def ended(self) -> Iterator[tuple[int, int | str]]:
        """Give each row that has ended since the last call, with the exit code of papermill.

        A text takes its place where the machine failed and not the row: it says how, and the row is started again.
        """

    def stop(self) -> None:
        """Stop all rows; return when none runs."""


class Local:
    """Runs each row in a process of its own on this machine, with one of the grid's environments."""

    look_s = 0.2

    def __init__(self, grid: Grid):
        self.grid, self.free, self.running = grid, list(grid.environments), {}

    def start(self, waiting: list[int]) -> list[int]:
        started = waiting[:len(self.free)]
        for i in started:
            row, environment = self.grid.rows[i], self.free.pop(0)
            process = start_notebook(self.grid.notebook, row.executed, row.parameters, environment)
            self.running[i] = process, environment
        return started

    def ended(self) -> Iterator[tuple[int, int | str]]:
        for i, (process, environment) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[i]
                self.free.append(environment)
                yield i, process.returncode

    def stop(self) -> None:
        if self.running:
            stop_notebooks([process for process, _ in self.running.values()])
