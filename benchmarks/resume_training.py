#!/usr/bin/env python3
"""Stop or kill training after every step and at random moments, go on with the same command, and compare the bits.

Part each-step: a run of each model, with dropout, accumulation over four micro-batches, evaluations of which some are
no improvement and a log row every third step, is stopped by a signal during each of its steps in turn and continued.
So are runs that early stopping ends, at a few steps. The end must equal that of the run that was never stopped: the
last and the best weights and optimizer state, counters, DONE.json and log.csv but for times, with no file more or less.

Part signals: SIGTERM and SIGINT in turn, at random moments after a start's first step; a third wait for an evaluation,
a third for a save. The process is frozen first, to read what it has logged. Every signal must leave a checkpoint of the
step that was under way, and nothing unfinished; the run goes on until it is done, and ends with the same bits.

Part kills: runs are killed by SIGKILL at random moments, a third while a checkpoint is written or removed, and started
again until they are done. The end must have the same bits; no start may repeat more steps than lie between two
checkpoints, or find anything damaged.

Processes are forks (see small_runs.py). Needs Linux or macOS.
"""

import argparse
import itertools
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from small_runs import (
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

from plotarmour.models import KINDS, SUITE

PARTS = ("each-step", "signals", "kills")
# The log's rows, evaluations and checkpoints fall on different steps: each finds counters that others have begun. The
# learning rate is far too high, so that evaluations without improvement come early and late.
EACH_STEP = SETTINGS | {"micro_batch_size": 1, "log_interval": 3, "eval_interval": 2,
                        "eval_tokens": 200, "patience": 100, "checkpoint_interval": 7, "keep_every": 14,
                        "learning_rate": 0.3, "warmup_steps": 0}
STOPS_EARLY = EACH_STEP | {"max_steps": 60, "eval_interval": 1, "patience": 3}
EARLY_CUTS = 5
SIGNALS_PER_RUN = 3
CHECKPOINT_INTERVAL = SETTINGS["checkpoint_interval"]
GIVEN_UP = {"log.cut.csv"}  # beside the log: rows after the checkpoint that a killed run went on from


def signal_during(step: int, number: int) -> Callable[[], None]:
    """What makes a process send itself a signal while its n-th update is under way."""
    def before() -> None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        updates = itertools.count(1)
        register_optimizer_step_pre_hook(lambda *_: os.kill(os.getpid(), number) if next(updates) == step else None)
    return before


def show_evaluations(shown: mmap.mmap) -> Callable[[], None]:
    """What makes a process tell its parent whether its model is in evaluation mode."""
    def before() -> None:
        from torch import nn

        original = nn.Module.train

        def train(module: nn.Module, mode: bool = True) -> nn.Module:
            shown[0] = not mode
            return original(module, mode)

        nn.Module.train = train
    return before


def mistakes_of_a_stop(run: Path, status: int, number: int, steps: range, every_step_logged: bool) -> list[str]:
    """What a stopped process got wrong; `steps` are those that it may have stopped after."""
    if os.waitstatus_to_exitcode(status) != 130:
        return [f"exit code {os.waitstatus_to_exitcode(status)} instead of 130"]
    if not (run / "STOPPED.json").exists() or (run / "DONE.json").exists():
        return ["no STOPPED.json, or a DONE.json"]
    final = json.loads((run / "STOPPED.json").read_text(encoding="utf-8"))
    step, reason = final["step"], f"signal {signal.Signals(number).name}"
    reached = {"last_checkpoint": final["last_checkpoint"], "latest": saved_step(run)}
    if every_step_logged:
        reached["log.csv"] = logged_step(run)
    found = [f"stopped after step {step}, but {name} has {other}" for name, other in reached.items() if other != step]
    if step not in steps:
        found.append(f"stopped after step {step} instead of {' or '.join(map(str, steps))}")
    if final["reason"] != reason:
        found.append(f"reason {final['reason']!r} instead of {reason!r}")
    return found + [f"left {path.name}" for path in run.rglob(".*")]


def expected_when_cut(expected: dict, settings: dict, cut: int) -> dict:
    """A whole run's result, as it is where the last stop came after a step: a stop leaves a checkpoint of its own.

    It differs where this is the one before the last: instead of the whole run's, unless that is kept for good.
    """
    names = expected["checkpoints"]
    before, stop = names["before"], f"step_{cut:08d}"
    if not before < stop < names["latest"]:
        return expected
    kept = before == names["best"] or int(before.removeprefix("step_")) % settings["keep_every"] == 0
    files = {name for name in expected["files"] if kept or before not in name}
    files |= {name.replace(names["latest"], stop) for name in expected["files"] if names["latest"] in name}
    return expected | {"files": files, "checkpoints": names | {"before": stop}}


def go_on(model: str, files: dict[str, Path], run: Path, settings: dict, expected: dict, cut: int) -> list[str]:
    """Give the same command again, until the end; returns what differs there."""
    said = run.with_suffix(".said")
    status = os.waitpid(start(model, files, run, said, settings), 0)[1]
    return mistakes_of_an_end(run, status, settings, expected, cut)


def mistakes_of_an_end(run: Path, status: int, settings: dict, expected: dict, cut: int) -> list[str]:
    if status:
        return [f"exit code {os.waitstatus_to_exitcode(status)}"]
    found, expected = result(run), expected_when_cut(expected, settings, cut)
    return ["a start warned"] * ("warning" in run.with_suffix(".said").read_text(encoding="utf-8")) + [
        f"{key} differs" for key in found if found[key] != expected[key]]


def report(model: str, what: str, run: Path, mistakes: list[str]) -> int:
    """Print what went wrong, if anything; returns 1 then."""
    if mistakes:
        print(f"{model}, {what}: {'; '.join(mistakes)}",
              run.with_suffix(".said").read_text(encoding="utf-8")[-2000:], sep="\n", flush=True)
    return 1 if mistakes else 0


def cut_and_resume(folder: Path, files: dict[str, Path], model: str, settings: dict, expected: dict,
                   steps: list[int]) -> int:
    """Stop a run during each of some steps and continue it; returns how many ended otherwise."""
    wrong = 0
    for step in steps:
        run, number = folder / f"cut_{step}", (signal.SIGTERM, signal.SIGINT)[step % 2]
        pid = start(model, files, run, run.with_suffix(".said"), settings, signal_during(step, number))
        mistakes = mistakes_of_a_stop(run, os.waitpid(pid, 0)[1], number, range(step, step + 1), False)
        mistakes += go_on(model, files, run, settings, expected, step)
        wrong += report(model, f"stopped during step {step}", run, mistakes)
    return wrong


def each_step(folder: Path, files: dict[str, Path], models: list[str], max_steps: int, steps: list[int]) -> int:
    """Run part each-step; returns how many runs ended otherwise than the whole one."""
    wrong, resumes, early, unchanged = 0, 0, [], []
    for model in models:
        for settings in (EACH_STEP | {"max_steps": max_steps}, STOPS_EARLY):
            place = folder / f"{model}_{settings['patience']}"
            place.mkdir()
            expected, _ = whole_run(model, files, place / "whole", settings)
            losses = [float(row["val_loss"]) for row in expected["log.csv"] if row["val_loss"]]
            better = [loss < min(losses[:i]) for i, loss in enumerate(losses) if i]
            last, cuts = expected["DONE.json"]["step"], steps
            if settings["patience"] < 100:
                cuts = [step for step in steps if step < last]
                cuts = cuts[::-(-len(cuts) // -EARLY_CUTS) or 1][:EARLY_CUTS]
                early.append(f"{model} at step {last}, cut after {', '.join(map(str, cuts))}")
                if expected["DONE.json"]["reason"] != "early stopping" or not cuts:
                    sys.exit(f"{model}: nothing was cut that early stopping ends: it ended at step {last}")
            elif all(better) or not any(better):
                sys.exit(f"{model}: all evaluations of the whole run improve, or none: its counters never move")
            else:
                resumes += len(cuts)
                unchanged.append(f"{model} {better.count(False)} of {len(better)}")
            wrong += cut_and_resume(place, files, model, settings, expected, cuts)
    print(f"each-step: {resumes} runs of {max_steps} steps, stopped after one of {len(steps)} steps and continued, and "
          f"those that early stopping ends ({'; '.join(early)}): {wrong} ended otherwise than the whole one; "
          f"evaluations without improvement: {', '.join(unchanged)}", flush=True)
    return wrong


def freeze(pid: int) -> int | None:
    """Halt a process; returns its status if it has ended instead."""
    os.kill(pid, signal.SIGSTOP)
    status = os.waitpid(pid, os.WUNTRACED)[1]
    return None if os.WIFSTOPPED(status) else status


def signals(folder: Path, files: dict[str, Path], whole: dict[str, tuple[dict, float]], enough: int, seed: int) -> int:
    """Run part signals; returns how many stops and ends were wrong."""
    draw, wrong, sent, done, moments, beyond = random.Random(seed), 0, 0, 0, Counter(), Counter()
    shown, max_steps = mmap.mmap(-1, 1), SETTINGS["max_steps"]
    while sent < enough:
        model, run = list(whole)[done % len(whole)], folder / f"signalled_{done}"
        (expected, seconds), cut, ended, enough_here = whole[model], 0, None, min(enough, sent + SIGNALS_PER_RUN)
        while ended is None:
            shown[0] = 0
            pid, number = start(model, files, run, run.with_suffix(".said"), SETTINGS, show_evaluations(shown)), 0
            # Before its first step a start may not have its handlers yet; the log has rows of earlier starts.
            while sent < enough_here and ended is None and logged_step(run) <= cut:
                gone, status = os.waitpid(pid, os.WNOHANG)
                ended = status if gone else None
                time.sleep(0.002)
            if sent < enough_here and ended is None:
                time.sleep(draw.random() * seconds * 0.5)
                wait_for((lambda: True, lambda: shown[0], lambda: is_saving(run))[sent % 3], draw.random() * 0.01)
                ended = freeze(pid)
            if sent < enough_here and ended is None:
                logged, saving, evaluating = logged_step(run), is_saving(run), shown[0]
                if saving or logged < max_steps:  # after the last save, nothing is left to be stopped
                    number = (signal.SIGTERM, signal.SIGINT)[sent % 2]
                    os.kill(pid, number)
                    sent += 1
                    moments["saving" if saving else "evaluating" if evaluating else "training"] += 1
                os.kill(pid, signal.SIGCONT)
            if ended is None:
                status = os.waitpid(pid, 0)[1]
                if not number or (logged >= max_steps - 1 and (run / "DONE.json").exists()):
                    ended = status
                else:  # the step that was under way, or the one logged where it was not yet over
                    mistakes = mistakes_of_a_stop(run, status, number, range(logged, logged + 2), True)
                    wrong += report(model, f"signal {sent} with step {logged} logged", run, mistakes)
                    if mistakes:
                        break
                    cut = saved_step(run)
                    beyond[cut - logged] += 1
        done += 1
        if ended is not None:
            wrong += report(model, f"run {done}", run, mistakes_of_an_end(run, ended, SETTINGS, expected, cut))
    stops = ", ".join(f"{n} times {more}" for more, n in sorted(beyond.items()))
    print(f"signals: {sent} signals ({', '.join(f'{n} while {what}' for what, n in moments.most_common())}) to {done} "
          f"runs of {max_steps} steps, {sum(beyond.values())} of them stops: {wrong} wrong; steps ended after the last "
          f"logged one: {stops}", flush=True)
    return wrong


def moment_of(run: Path, logged: int, saved: int) -> str:
    """What the killed process was at, by what it left."""
    if is_saving(run):
        return "writing or removing a checkpoint"
    if (run / "DONE.json").exists():
        return "after DONE.json"
    if logged == saved:
        return "between a checkpoint and the next step's row"
    return "training or evaluating"


def kills(folder: Path, files: dict[str, Path], whole: dict[str, tuple[dict, float]], enough: int, seed: int) -> int:
    """Run part kills; return how many runs ended otherwise than the whole one."""
    draw, wrong, sent, done, lost, moments = random.Random(seed), 0, 0, 0, 0, Counter()
    while sent < enough:
        model = list(whole)[done % len(whole)]
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
                if sent % 3 == 2:  # saving is short: every third kill waits for it
                    wait_for(lambda: is_saving(run), draw.random() * 0.01)
                if sent < enough:
                    os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
            if status == signal.SIGKILL:
                sent += 1
                logged, saved = logged_step(run), saved_step(run)
                lost = max(lost, logged - saved)
                moments[moment_of(run, logged, saved)] += 1
                if logged - saved > CHECKPOINT_INTERVAL:
                    mistakes.append(f"killed at step {logged}, goes on from {saved}")
        done += 1
        if "warning" in said.read_text(encoding="utf-8"):  # a kill damages nothing: no start has to fall back
            mistakes.append("a start warned")
        if status:
            mistakes.append(f"exit code {os.waitstatus_to_exitcode(status)}")
        else:
            found = result(run)
            found["files"] -= GIVEN_UP
            mistakes += [f"{key} differs" for key in found if found[key] != expected[key]]
        if mistakes:
            wrong += 1
            print(f"{model}, run {done}: {'; '.join(mistakes)}", said.read_text(encoding="utf-8")[-2000:], sep="\n",
                  flush=True)
    print(f"{sent} kills of {done} runs of {SETTINGS['max_steps']} steps, checkpoints every {CHECKPOINT_INTERVAL} and "
          f"at each best: {wrong} runs ended otherwise than the whole one; at most {lost} steps lost")
    print("killed while " + ", ".join(f"{what}: {count}" for what, count in moments.most_common()), flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--models", default=",".join(SUITE), help=f"of {', '.join(KINDS)} (default: {','.join(SUITE)})")
    parser.add_argument("--max-steps", type=int, default=60, help="of the runs of part each-step (default: 60)")
    parser.add_argument("--steps", help="after which to stop in part each-step, as 1,30 (default: all but the last)")
    parser.add_argument("--signals", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--kills", type=int, default=200, help="in all (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts {args.parts}; expected some of {', '.join(PARTS)}")
    steps = [int(step) for step in args.steps.split(",")] if args.steps else list(range(1, args.max_steps))
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_token_files(folder)
        if "each-step" in parts:
            wrong += each_step(folder, files, args.models.split(","), args.max_steps, steps)
        if {"signals", "kills"} & set(parts):
            whole = {model: whole_run(model, files, folder / f"whole_{model}", SETTINGS)
                     for model in args.models.split(",")}
        if "signals" in parts:
            wrong += signals(folder, files, whole, args.signals, args.seed)
        if "kills" in parts:
            wrong += kills(folder, files, whole, args.kills, args.seed)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
