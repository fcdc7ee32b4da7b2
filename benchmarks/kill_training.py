#!/usr/bin/env python3
"""Kill training at random moments after the first step, go on until it is done, and compare the bits.

A tiny run of each model, with dropout, accumulation, evaluation and early stopping counters, is trained once without a
break. Then the same command is started again and again in a new folder and killed by SIGKILL, until the run is done;
and all over, until there were enough kills. Two of three come at any time, one of three while a checkpoint is written
or removed. Each time, the last checkpoint's weights, optimizer state and counters, and log.csv without its timing
columns, must equal those of the whole run to the bit, with no file more or less; no start may repeat more steps than
lie between two checkpoints, or find anything damaged.

Processes are forks of one that has imported torch: a start costs a tenth of a second instead of three. They run
tools/train.py's own `main`. Needs Linux or macOS.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has none of the threads of its parent

TIMING = ("utc", "elapsed_s", "tokens_per_s", "peak_memory_mib")
CHECKPOINT_INTERVAL = 4
SETTINGS = {"context_length": 24, "windows": "stream", "micro_batch_size": 2, "grad_accum_steps": 2, "max_steps": 40,
            "warmup_steps": 4, "log_interval": 1, "eval_interval": 3, "eval_tokens": 400, "patience": 30,
            "checkpoint_interval": CHECKPOINT_INTERVAL, "keep_every": 20, "n_layer": 2, "n_embd": 16, "n_head": 2,
            "dropout": 0.1, "device": "cpu"}


def make_token_files(folder: Path) -> dict[str, Path]:
    from plotarmour.suite.steps import tell_corpus
    from plotarmour.text.pretokenize import pre_tokenize

    text, _ = tell_corpus(folder / "built-in.txt", 300, 0, (0, 1))
    parts = pre_tokenize([text], "bpe:400", folder / "tokens.bin", "80:10:10")
    return dict(zip(("train", "val", "test"), parts, strict=True))


def start(model: str, files: dict[str, Path], run: Path, said: Path) -> int:
    """Fork a process that is `python tools/train.py ...`, its words going to a file; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        overrides = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
        sys.argv = ["train.py", "--recipe", "tiny", "--model", model, "--train", str(files["train"]), "--val",
                    str(files["val"]), "--out", str(run), *overrides]
        sys.path.insert(0, str(ROOT / "tools"))
        import train

        train.run_command(train.main)
        os._exit(0)
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def result(run: Path) -> dict[str, object]:
    """What must be the same: every file's name, the tensors of the last checkpoint, the log but for its times."""
    last = max((run / "checkpoints").glob("step_*"))
    with (run / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != "log.cut.csv")
    state = json.loads((last / "state.json").read_text(encoding="utf-8"))
    state = {key: value for key, value in state.items() if not key.endswith("_s")}  # but for times
    return {"files": names, "log.csv": rows, "state.json": state} | {name: (last / name).read_bytes() for name in (
        "model.safetensors", "optimizer.safetensors")}


def wait_for_a_save(run: Path, then_s: float) -> None:
    """Wait until a checkpoint is being written or removed, a second at most, and a little more."""
    end = time.perf_counter() + 1
    while time.perf_counter() < end and not any((run / "checkpoints").glob(".*.unfinished")):
        time.sleep(0.0005)
    time.sleep(then_s)


def logged_step(run: Path) -> int:
    from plotarmour.training.runlog import last_step

    return last_step(run / "log.csv") or 0


def saved_step(run: Path) -> int:
    """The step of the checkpoint that the next start goes on from; -1: none yet."""
    from plotarmour.training.checkpoint import read_index

    latest = read_index(run).get("latest")
    return int(latest.removeprefix("step_")) if latest else -1


def moment_of(run: Path, logged: int, saved: int) -> str:
    """What the killed process was at, by what it left."""
    if any((run / "checkpoints").glob(".*.unfinished")):
        return "writing or removing a checkpoint"
    if (run / "DONE.json").exists():
        return "after DONE.json"
    if logged == saved:
        return "between a checkpoint and the next step's row"
    return "training or evaluating"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in all, half of them for each model (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    import torch

    import plotarmour.runs  # noqa: F401, once, for all the forks

    torch.set_num_threads(1)
    draw, wrong, kills, done, lost, moments = random.Random(args.seed), 0, 0, 0, 0, Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pid = os.fork()  # the tokenizer library starts threads, which a fork must not have
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its progress bar
            make_token_files(folder)
            os._exit(0)
        os.waitpid(pid, 0)
        files = {part: folder / f"tokens.{part}.bin" for part in ("train", "val")}
        whole, seconds = {}, {}
        for model in ("bdh", "gpt2"):
            run, begun = folder / f"whole_{model}", time.perf_counter()
            if os.waitpid(start(model, files, run, folder / "said.txt"), 0)[1]:
                sys.exit((folder / "said.txt").read_text())
            whole[model], seconds[model] = result(run), time.perf_counter() - begun
        while kills < args.kills:
            model = ("bdh", "gpt2")[done % 2]
            run, said, status = folder / f"run_{done}", folder / f"said_{done}.txt", signal.SIGKILL
            mistakes = []
            while status == signal.SIGKILL:
                pid = start(model, files, run, said)
                while not (first := (run / "log.csv").exists() and logged_step(run) >= 1):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        break
                    time.sleep(0.002)
                if first:
                    time.sleep(draw.random() * seconds[model] * 0.6)
                    if kills % 3 == 2:  # saving is short: every third kill waits for it
                        wait_for_a_save(run, draw.random() * 0.01)
                    if kills < args.kills:
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
                mistakes += [f"{key} differs" for key in found if found[key] != whole[model][key]]
            if mistakes:
                wrong += 1
                print(f"{model}, run {done}: {'; '.join(mistakes)}\n{said.read_text()[-2000:]}", flush=True)
    print(f"{kills} kills of {done} runs of {SETTINGS['max_steps']} steps, checkpoints every {CHECKPOINT_INTERVAL} and "
          f"at each best: {wrong} runs ended otherwise than the whole one; at most {lost} steps lost")
    print("killed while " + ", ".join(f"{what}: {count}" for what, count in moments.most_common()))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
