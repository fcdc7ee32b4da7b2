#!/usr/bin/env python3
"""Kill training at random moments after the first step, go on until it is done, and compare the bits.

A tiny run of each model, with dropout, accumulation, evaluation and early stopping counters, is trained once without a
break. Then the same command is started again and again in a new folder and killed by SIGKILL, until the run is done;
and all over, until there were enough kills. Two of three come at any time, one of three while a checkpoint is written
or removed. Each time, the last checkpoint's weights, optimizer state and counters, and log.csv without its timing
columns, must equal those of the whole run to the bit, with no file more or less; no start may repeat more steps than
lie between two checkpoints, or find anything damaged.

Processes are forks of one that has imported torch (see small_runs.py). Needs Linux or macOS.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_runs import (
    MODELS,
    SETTINGS,
    is_saving,
    logged_step,
    make_token_files,
    result,
    saved_step,
    start,
    wait_for,
    whole_run,
)

CHECKPOINT_INTERVAL = SETTINGS["checkpoint_interval"]
GIVEN_UP = {"log.cut.csv"}  # beside the log: rows after the checkpoint that a killed run went on from


def moment_of(run: Path, logged: int, saved: int) -> str:
    """What the killed process was at, by what it left."""
    if is_saving(run):
        return "writing or removing a checkpoint"
    if (run / "DONE.json").exists():
        return "after DONE.json"
    if logged == saved:
        return "between a checkpoint and the next step's row"
    return "training or evaluating"


def kill_again_and_again(folder: Path, files: dict[str, Path], whole: dict[str, tuple[dict, float]], enough: int,
                         seed: int) -> int:
    """Kill until there were enough kills, and print what came of it.

    Args:
        folder: for the runs.
        files: of `make_token_files`.
        whole: of each model, its whole run's result and seconds.
        enough: kills in all.
        seed: of the moments.

    Returns:
        How many runs went wrong.
    """
    draw, wrong, kills, done, lost, moments = random.Random(seed), 0, 0, 0, 0, Counter()
    while kills < enough:
        model = MODELS[done % 2]
        expected, seconds = whole[model]
        run, said, status = folder / f"killed_{done}", folder / f"killed_{done}.said", signal.SIGKILL
        mistakes = []
        while status == signal.SIGKILL:
            pid = start(model, files, run, said, SETTINGS)
            while not (first := (run / "log.csv").exists() and logged_step(run) >= 1):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    break
                time.sleep(0.002)
            if first:
                time.sleep(draw.random() * seconds * 0.6)
                if kills % 3 == 2:  # saving is short: every third kill waits for it
                    wait_for(lambda: is_saving(run), draw.random() * 0.01)
                if kills < enough:
                    os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
            if status == signal.SIGKILL:
                kills += 1
                logged, saved = logged_step(run), saved_step(run)
                lost = max(lost, logged - saved)
                moments[moment_of(run, logged, saved)] += 1
                if logged - saved > CHECKPOINT_INTERVAL:
                    mistakes.append(f"killed at step {logged}, goes on from {saved}")
        done += 1
        if "warning" in said.read_text():  # a kill damages nothing: no start has to fall back
            mistakes.append("a start warned")
        if status:
            mistakes.append(f"exit code {os.waitstatus_to_exitcode(status)}")
        else:
            found = result(run)
            found["files"] -= GIVEN_UP
            mistakes += [f"{key} differs" for key in found if found[key] != expected[key]]
        if mistakes:
            wrong += 1
            print(f"{model}, run {done}: {'; '.join(mistakes)}\n{said.read_text()[-2000:]}", flush=True)
    print(f"{kills} kills of {done} runs of {SETTINGS['max_steps']} steps, checkpoints every {CHECKPOINT_INTERVAL} and "
          f"at each best: {wrong} runs ended otherwise than the whole one; at most {lost} steps lost")
    print("killed while " + ", ".join(f"{what}: {count}" for what, count in moments.most_common()), flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, half of them for each model (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_token_files(folder)
        whole = {model: whole_run(model, files, folder / f"whole_{model}", SETTINGS) for model in MODELS}
        wrong = kill_again_and_again(folder, files, whole, args.kills, args.seed)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
