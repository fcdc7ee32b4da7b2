"""Several GPUs from a notebook: starts torchrun with one process per GPU, shows what the first prints, and stops them.

The processes are stopped through a pipe: it is the standard input of all of them, and they save a checkpoint and stop
when its other end is closed. That happens when the user interrupts, and also when this process ends in any way, so that
no process trains on alone. torchrun itself gets no signal, because it would kill its processes after 30 seconds.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import psutil

from plotarmour.cli import LAUNCHED, UserError
from plotarmour.config import Recipe
from plotarmour.machine import cores
from plotarmour.training.ending import Ending, Reason, StopRequest, ask_to_stop

TOOL = Path(__file__).resolve().parents[2] / "tools" / "train.py"
PREFIX = "[default0]:"  # torchrun writes it before each line of the first process
LOOK_S = 0.5  # seconds between two looks at the processes


def check_gpus(gpus: int, recipe: Recipe) -> None:
    """Raise `UserError` unless there is a GPU for each of `gpus` processes, or the recipe's device is the CPU."""
    if gpus == 1:
        return
    import torch

    from plotarmour.training.distributed import check_share

    n_gpus = torch.cuda.device_count()
    if gpus < 1 or (gpus > max(n_gpus, 1) and recipe.training.device != "cpu"):
        raise UserError(f"gpus = {gpus}, and torch sees {n_gpus} here; expected 1 to {max(n_gpus, 1)}. Set another "
                        "number, or turn more GPUs on (on Kaggle: GPU T4 x2).")
    check_share(recipe.training.rows_per_step, gpus)


def launch(recipe: str, model: str, overrides: Sequence[str], train: Path, val: Path, out: Path, gpus: int,
           extend: bool = False, from_step: int | None = None, on_row: Callable[[], None] | None = None) -> Ending:
    """Train one model in several processes, with the arguments of `load_recipe` and `plotarmour.run.train_run`.

    `on_row` is called in this process. On an interrupt or SIGTERM, the processes finish their step and save. A second
    one kills them at once.

    Raises:
        UserError: what one of the processes raised.
        RuntimeError: a process failed for another reason; what it printed has been shown.
        KeyboardInterrupt: interrupted before there was anything to save, or twice.
    """
    options = [part for override in overrides for part in ("--set", override)]
    options += ["--extend"] * extend + (["--from-step", str(from_step)] if from_step is not None else [])
    before, length = Ending.read(out), _size(out / "log.csv")
    with tempfile.TemporaryDirectory(prefix="plotarmour_", ignore_cleanup_errors=True) as logs, StopRequest() as stop:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}",
                   "--tee=3", "--local-ranks-filter=0", f"--log-dir={logs}", str(TOOL), "--recipe", recipe,
                   "--model", model, "--train", str(train), "--val", str(val), "--out", str(out), *options]
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // gpus))} | os.environ | {
            LAUNCHED: "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   encoding="utf-8", errors="replace", env=environment, start_new_session=True)
        readers = [threading.Thread(target=_pass_on, args=streams, daemon=True)
                   for streams in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))]
        try:
            for reader in readers:
                reader.start()
            while process.poll() is None:
                time.sleep(LOOK_S)
                if stop.asked and not process.stdin.closed:
                    print("finishing the step, then saving; once more stops at once", file=sys.stderr, flush=True)
                    process.stdin.close()
                if on_row is not None and _size(out / "log.csv") != length:
                    length = _size(out / "log.csv")
                    on_row()
        finally:
            kill(family([process]))
            process.stdin.close()
            process.wait()
            for reader in readers:
                reader.join()
        errors = sorted((json.loads(path.read_text(encoding="utf-8")) | {"rank": int(path.parent.name)}
                         for path in Path(logs).glob("*/attempt_0/*/error.json")), key=lambda error: error["rank"])
    ending = Ending.read(out)
    if process.returncode and ending == before:  # it is of an earlier session
        ending = None
    for error in errors:
        if ending is None and error["kind"] == "UserError":
            raise UserError(error["message"])
        if error["rank"] and (ending is None or ending.reason == Reason.LOST_PROCESS):  # the first prints its own
            print(f"[process {error['rank']}] {error['message']}", file=sys.stderr, flush=True)
    if ending is not None:
        return ending
    if stop.asked:
        raise KeyboardInterrupt
    raise RuntimeError(f"training in {gpus} processes ended with exit code {process.returncode} and without a result"
                       + (f": {errors[0]['kind']}" if errors else "; a process may have been killed") + ".")


def stop_with_launcher() -> bool:
    """Stop this process when its launcher closes the pipe or has ended; return whether `launch` has started it."""
    if LAUNCHED not in os.environ:
        return False

    def wait() -> None:
        with suppress(OSError):  # not sys.stdin: at exit, Python would wait for the thread that reads it
            while os.read(0, 1):
                pass
        if os.environ.get("RANK", "0") != "0":
            time.sleep(1.0)  # the first process reads the pipe too, and tells all others why they stop
        ask_to_stop()  # not a real signal, which may be ignored or come too early

    threading.Thread(target=wait, daemon=True).start()
    return True


def _pass_on(source: TextIO, target: TextIO) -> None:
    """Print the lines of the first process; lines of torchrun itself are dropped."""
    with source:
        for line in source:
            if line.startswith(PREFIX):
                print(line.removeprefix(PREFIX), end="", file=target, flush=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def family(processes: list[subprocess.Popen]) -> set[psutil.Process]:
    """Return the processes that still run, with all their descendants, which may have sessions of their own."""
    members = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.poll() is None:
                parent = psutil.Process(process.pid)
                members |= {parent, *parent.children(recursive=True)}
    return members


def kill(members: set[psutil.Process]) -> None:
    """Kill processes; those that have ended do no harm."""
    for member in members:
        with suppress(psutil.NoSuchProcess):
            member.kill()
