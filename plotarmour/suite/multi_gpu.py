"""Several GPUs from a notebook: torchrun and its processes, started, watched and ended from here.

Their way to stop is a pipe: it is the standard input of all of them, and they stop, with a checkpoint, when its other
end is closed. That happens when somebody asks for it, and also when this process ends in whatever way: so no process
trains on alone. torchrun itself gets no signal, which would give its processes 30 seconds.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from plotarmour.cli import UserError
from plotarmour.config import Recipe
from plotarmour.limits import cores
from plotarmour.suite.relay import Relay
from plotarmour.training.distributed import check_share
from plotarmour.training.ending import Ending, Reason, ending_stamp
from plotarmour.training.stopping import StopRequest, ask_to_stop

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train.py"
STOP_AT_EOF = "PLOTARMOUR_STOP_AT_EOF"  # set for the processes that are started here
LOOK_S = 0.5  # between two looks at what they do


def check_gpus(gpus: int, recipe: Recipe) -> None:
    """Raise `UserError` unless so many processes can train a recipe here: one per GPU, or all on the CPU if it says so.

    Args:
        gpus: processes.
        recipe: resolved.
    """
    t = recipe.training
    if not isinstance(gpus, int) or gpus < 1:
        raise UserError(f"gpus = {gpus!r} is no number of GPUs; expected 1 or more (papermill: -p gpus 2, not -r).")
    check_share(t.rows_per_step, gpus)
    if gpus > 1 and t.device != "cpu":
        found = torch.cuda.device_count()
        most = max(found, 1)
        if gpus > found:
            raise UserError(f"gpus = {gpus}, and torch sees {found or 'no'} GPU{'s' * (found > 1)} here; expected at "
                            f"most {most}. Set gpus = {most}, or turn more on (on Kaggle: GPU T4 x2).")


def launch(recipe: Recipe, name: str, train: Path, val: Path, out: Path, overrides: list[str], gpus: int,
           extend: bool = False, from_step: int | None = None, on_row: Callable[[], None] | None = None) -> Ending:
    """Train one model on several GPUs (or processes on the CPU) of this machine; see `plotarmour.run.train_run`.

    An interrupt, or SIGTERM, is a request to stop: they finish their step and save. A second one ends them at once.

    Args:
        recipe: resolved.
        name, overrides: that it was loaded with.
        train, val: token files.
        out: the run folder.
        gpus: processes.
        extend, from_step: see `train_run`.
        on_row: called, in this process, after log.csv has grown.

    Returns:
        How the run ended.

    Raises:
        UserError: that one of them met.
        RuntimeError: they failed for another reason; their own words have been passed on.
        KeyboardInterrupt: interrupted before there was anything to save, or twice.
    """
    options = [part for o in overrides for part in ("--set", o)]
    options += ["--extend"] * extend + (["--from-step", str(from_step)] if from_step is not None else [])
    before = ending_stamp(out)
    with tempfile.TemporaryDirectory(prefix="plotarmour_", ignore_cleanup_errors=True) as logs, StopRequest() as stop:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
                   "--redirects=3", f"--log-dir={logs}", str(TOOL), "--recipe", name, "--model", recipe.model,
                   "--train", str(train), "--val", str(val), "--out", str(out), *options]
        threads = str(max(1, cores() // gpus))
        environment = {"OMP_NUM_THREADS": threads} | os.environ | {STOP_AT_EOF: "1", "PYTHONUNBUFFERED": "1"}
        with (Path(logs) / "torchrun.log").open("wb") as torchrun_log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=torchrun_log, stderr=subprocess.STDOUT,
                                       env=environment, start_new_session=True)
        relay, length = Relay(Path(logs)), _size(out / "log.csv")
        try:
            while process.poll() is None:
                time.sleep(LOOK_S)
                relay.pass_on()
                if stop.asked and not process.stdin.closed:
                    relay.say("finishing the step, then saving; once more stops at once")
                    process.stdin.close()
                if on_row is not None and _size(out / "log.csv") != length:
                    length = _size(out / "log.csv")
                    on_row()
        finally:
            _leave_nobody(process)
            relay.pass_on(to_the_end=True)
        ending = Ending.read(out)
        if process.returncode and ending_stamp(out) == before:  # of an earlier session
            ending = None
        if ending is None or ending.reason == Reason.LOST_PROCESS:
            relay.pass_on_others(gpus)
        if ending is not None:
            return ending
        if relay.errors:
            raise UserError(relay.errors[-1])
        if stop.asked:
            raise KeyboardInterrupt
        raise RuntimeError(f"training in {gpus} processes ended with exit code {process.returncode} and without a "
                           f"result: {relay.last_words()}")


def stop_with_launcher() -> bool:
    """In a process that `launch` has started: stop when the launcher asks for it, or is no more.

    Returns:
        Whether this is such a process.
    """
    if STOP_AT_EOF not in os.environ:
        return False

    def wait() -> None:
        with suppress(OSError):  # not sys.stdin: at exit, Python would wait for whoever reads it
            while os.read(0, 1):
                pass
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1.0)  # the first process hears it, too, and tells all why they stop, unless it is gone
        ask_to_stop("SIGINT")  # no real one: it may be ignored, or come before anybody heeds it

    threading.Thread(target=wait, daemon=True).start()
    return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _leave_nobody(process: subprocess.Popen) -> None:
    """End torchrun and its processes, which are in sessions of their own, at once; does nothing after their end."""
    if process.poll() is None:
        family = [psutil.Process(process.pid)]
        with suppress(psutil.NoSuchProcess):
            family = [*family[0].children(recursive=True), *family]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.stdin.close()
    process.wait()
