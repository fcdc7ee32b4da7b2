"""Grids on a Slurm cluster: a job for each row, which saves before its walltime and continues after it.

An executor for `plotarmour.suite.runner`; it needs the package submitit and the commands of Slurm.
"""

import os
import shlex
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.suite.grid import Grid, Row
from plotarmour.suite.notebooks import ROOT, SAVE_S, start_notebook, stop_notebooks
from plotarmour.training.checkpoint import latest_whole_step

TOO_SHORT = "walltime"


@dataclass
class Job:
    """A row as a job of Slurm, which submitit pickles, calls on a node, and asks to save before the walltime."""

    notebook: Path
    row: Row

    def __call__(self) -> int | str:
        """Run the notebook; return papermill's exit code."""
        self.first_step = latest_whole_step(self.row.folder)
        handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends it to all processes of a job
        self.process = start_notebook(self.notebook, self.row.executed, self.row.parameters)
        signal.signal(signal.SIGUSR2, handler)
        try:  # first without the lock of `wait`, which `checkpoint` needs when a signal interrupts this
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
            return self.process.wait()
        except TimeoutError:
            return TOO_SHORT

    def checkpoint(self):
        """Save and end the notebook, and return what submitit runs when Slurm starts this job again."""
        from submitit.helpers import DelayedSubmission

        stop_notebooks([self.process])
        if latest_whole_step(self.row.folder) == self.first_step:  # it would never end
            raise TimeoutError
        return DelayedSubmission(Job(self.notebook, self.row))


class Slurm:
    """Submits each row as a job of its own. Slurm starts it again after a preemption or at the end of its walltime.

    The jobs have a name that only this results folder gives, so that the jobs of a process that was killed are found
    and stopped before new ones are submitted.
    """

    look_s = 10.0
    result_s = 60.0  # until a file that a node has written is seen here

    def __init__(self, grid: Grid, at_once: int | None, minutes: float, options: list[str]):
        for command in ("sbatch", "srun", "squeue", "scancel"):
            if shutil.which(command) is None:
                raise UserError(f"{command} is not found; expected the commands of Slurm. Call this on a login node of "
                                "the cluster, or leave out --executor slurm.")
        try:
            from submitit import SlurmExecutor
        except ImportError:
            raise UserError("--executor slurm needs the package submitit. Install it: pip install "
                            "'plotarmour[cluster]', or pip install submitit.") from None
        if minutes * 60 < 2 * SAVE_S + 60:
            raise UserError(f"--walltime {minutes:g} leaves no time to train beside the {1.5 * SAVE_S:.0f} s in which "
                            "a job saves; expected 5 minutes or more.")
        self.grid, self.at_once, self.jobs = grid, max(1, at_once or len(grid.rows)), {}
        self.name = f"plotarmour-{zlib.crc32(str(grid.out.resolve()).encode()):08x}"
        self.executor = SlurmExecutor(grid.out.resolve() / "slurm", max_num_timeout=10**6)
        more = {key: value or True for key, _, value in (option.partition("=") for option in options)}
        setup = [f"export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH"]
        self.executor.update_parameters(job_name=self.name, time=int(minutes), signal_delay_s=int(1.5 * SAVE_S),
                                        setup=setup, additional_parameters=more | {"requeue": True})
        self.stop()

    def start(self, waiting: list[int]) -> list[int]:
        from submitit.core.utils import FailedJobError

        started = waiting[:self.at_once - len(self.jobs)]
        for i in started:
            row = self.grid.rows[i]
            on_cpu = row.recipe is not None and row.recipe.training.device == "cpu"
            gpus = None if on_cpu else row.parameters.get("gpus", 1)
            self.executor.update_parameters(gpus_per_node=gpus)
            row.executed.unlink(missing_ok=True)
            try:
                self.jobs[i] = self.executor.submit(Job(self.grid.notebook.resolve(), row))
            except FailedJobError as error:
                raise UserError(f"sbatch refuses the job: {str(error).strip().splitlines()[-1]}. Expected options of "
                                "this cluster: --slurm partition=NAME, --walltime MINUTES, --device cpu without "
                                "GPUs.") from None
        return started

    def ended(self) -> Iterator[tuple[int, int | str]]:
        queued = self._queued()
        for i, job in list(self.jobs.items()):
            if queued is None or job.job_id in queued:
                continue
            result, until = job.paths.result_pickle, time.monotonic() + self.result_s
            while not result.exists() and time.monotonic() < until:
                time.sleep(1)
                os.utime(result.parent)  # a network drive then looks at the folder anew
            if not result.exists() and not job.paths.stdout.exists():
                raise UserError(f"job {job.job_id} has ended and has written nothing into {result.parent}; expected a "
                                "results folder that the nodes see at the same path. Use an --out on a shared disk.")
            outcome = job.result() if result.exists() and job.exception() is None else 1
            if outcome == TOO_SHORT:
                raise UserError(f"the walltime is over before {self.grid.rows[i].run} has saved a step; expected more "
                                "time than the start and the steps between two checkpoints take. Use a longer "
                                "--walltime.")
            del self.jobs[i]
            yield i, outcome

    def stop(self) -> None:
        while (queued := self._queued()) != set():
            if queued is None:
                raise UserError(f"Slurm does not answer squeue; jobs may go on. Try again later, or end them: scancel "
                                f"--name {self.name}.")
            subprocess.run(["scancel", *queued], check=False)
            time.sleep(min(2.0, self.look_s))

    def _queued(self) -> set[str] | None:
        """Return the ids of this grid's jobs that wait or run; None where Slurm does not answer."""
        done = subprocess.run(["squeue", "--me", "--noheader", "--format=%A", "--name", self.name],
                              capture_output=True, text=True, check=False)
        return set(done.stdout.split()) if done.returncode == 0 else None
