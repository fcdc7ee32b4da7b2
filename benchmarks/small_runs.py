"""Training runs of seconds whose processes can be stopped, for resume_training.py.

Processes are forks of one that has imported torch: a start costs a tenth of a second instead of several. They run
tools/train.py's own `main`. Needs Linux or macOS.
"""

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has none of the threads of its parent

from plotarmour.models import architecture_fields

TIMING = ("utc", "elapsed_s", "tokens_per_s", "peak_memory_mib")
SETTINGS = {"context_length": 24, "windows": "stream", "rows_per_step": 4, "micro_batch_size": 2, "max_steps": 40,
            "warmup_steps": 4, "log_interval": 1, "eval_interval": 3, "eval_tokens": 400, "patience": 30,
            "checkpoint_interval": 4, "keep_every": 20, "device": "cpu"}
SHAPE = {"n_layer": 2, "n_embd": 16, "n_head": 2, "dropout": 0.1, "intermediate_size": 24, "hidden_size": 20}


def make_token_files(folder: Path) -> dict[str, Path]:
    """Token files of 300 built-in stories; call it before any other function here.

    The tokenizer library starts threads, which a process that is to be forked must not have: a fork makes the files.
    """
    import torch

    import plotarmour.models.bdh  # noqa: F401, once, for all the forks
    import plotarmour.models.hf  # noqa: F401
    import plotarmour.models.hf_kinds  # noqa: F401
    import plotarmour.models.lstm  # noqa: F401
    import plotarmour.run  # noqa: F401

    torch.set_num_threads(1)
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # its progress bar
            from plotarmour.data.pretokenize import pre_tokenize
            from plotarmour.suite.steps import tell_corpus

            text, _ = tell_corpus(folder / "built-in.txt", 300, 0, (0, 1))
            pre_tokenize([text], "bpe:400", folder / "tokens.bin", "80:10:10")
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        sys.exit("the token files could not be made")
    return {part: folder / f"tokens.{part}.bin" for part in ("train", "val")}


def start(model: str, files: dict[str, Path], run: Path, said: Path, settings: dict,
          before: Callable[[], None] | None = None) -> int:
    """Fork a process that is `python tools/train.py ...`, its words going to a file; returns its pid.

    Args:
        model: a kind of model.
        files: of `make_token_files`.
        run: the run folder.
        said: gets what the process prints, behind what is there.
        settings: of the recipe `tiny`, overridden.
        before: called in the new process before the command.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a start in the background inherits an ignored one
        words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        shape = {key: value for key, value in SHAPE.items() if key in architecture_fields(model)}
        overrides = [word for key, value in (settings | shape).items() for word in ("--set", f"{key}={value}")]
        sys.argv = ["train.py", "--recipe", "tiny", "--model", model, "--train", str(files["train"]), "--val",
                    str(files["val"]), "--out", str(run), *overrides]
        sys.path.insert(0, str(ROOT / "tools"))
        import train

        if before:
            before()
        train.run_command(train.main)
        os._exit(0)
    except SystemExit as ended:
        sys.stdout.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def whole_run(model: str, files: dict[str, Path], run: Path, settings: dict) -> tuple[dict[str, object], float]:
    """Train without a break; returns its `result` and how many seconds it took."""
    said, begun = run.with_suffix(".said"), time.perf_counter()
    if os.waitpid(start(model, files, run, said, settings), 0)[1]:
        sys.exit(said.read_text(encoding="utf-8"))
    return result(run), time.perf_counter() - begun


def result(run: Path) -> dict[str, object]:
    """What must be the same: every file's name, the last and the best tensors, counters, the log but for its times."""
    from plotarmour.training.checkpoint import checkpoint_folders, find_checkpoint

    with (run / "log.csv").open(encoding="utf-8", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]
    latest, before = checkpoint_folders(run)[:2]
    names = {"latest": latest.name, "before": before.name, "best": find_checkpoint(run, "best").name}
    files = {str(path.relative_to(run)) for path in run.rglob("*")} - {"samples_by_step.csv"}  # the clock decides
    found = {"files": files, "log.csv": rows, "checkpoints": names}
    for path in (run / "DONE.json", latest / "state.json"):
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        found[path.name] = {k: v for k, v in values.items() if not k.endswith("_s") and k not in TIMING}
    for which in ("latest", "best"):
        for name in ("model.safetensors", "optimizer.safetensors"):
            found[f"{which} {name}"] = (run / "checkpoints" / names[which] / name).read_bytes()
    return found


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written or removed, or was when the process died."""
    return any((run / "checkpoints").glob(".*.unfinished"))


def wait_for(condition: Callable[[], bool], then_s: float) -> None:
    """Wait until a condition holds, a second at most, and a little more."""
    end = time.perf_counter() + 1
    while time.perf_counter() < end and not condition():
        time.sleep(0.0005)
    time.sleep(then_s)


def logged_step(run: Path) -> int:
    from plotarmour.training.log import last_step

    return last_step(run / "log.csv") or 0


def saved_step(run: Path) -> int:
    """The step of the checkpoint that the next start goes on from; -1: none yet."""
    from plotarmour.training.checkpoint import latest_whole_step

    step = latest_whole_step(run)
    return -1 if step is None else step
