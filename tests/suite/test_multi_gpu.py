import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.run import train_run
from plotarmour.suite import multi_gpu as launching
from plotarmour.suite.multi_gpu import check_gpus, launch
from plotarmour.training.ending import Ending, Reason

SETTINGS = ["warmup_steps=0", "n_embd=16", "eval_tokens=200", "eval_interval=2", "log_interval=1", "device=cpu",
            "context_length=24", "schedule=linear_tail"]  # whose rate stays the same at first

WAITS = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from plotarmour.suite.multi_gpu import stop_with_launcher
from plotarmour.training.ending import StopRequest
out = sys.argv[sys.argv.index("--out") + 1]
stop_with_launcher()
with StopRequest() as stop:
    open(os.path.join(out, "started"), "w").close()
    while not stop.asked:
        time.sleep(0.05)
if os.environ["RANK"] == "0":
    json.dump({{"reason": stop.asked}}, open(os.path.join(out, "STOPPED.json"), "w"))
"""

FAILS = """
import os, sys
sys.path.insert(0, {root!r})
from plotarmour.cli import UserError, run_command
def main():
    print("a line")
    raise {kind}("{message}")
if os.environ["RANK"] == "0":
    run_command(main)
"""

ALONE_FAILS = """
import os, runpy, sys
sys.path.insert(0, {root!r})
from plotarmour import cli as errors
from plotarmour.data.batches import Windows
errors.OTHERS_WAIT_S = 2
def fail(*args):
    raise OSError(5, "Input/output error", "/data/t.train.bin")
if os.environ["RANK"] == "1":
    Windows.micro_batch = fail
runpy.run_path({train!r}, run_name="__main__")
"""


def start(token_files, out, settings=SETTINGS[:1], **options):
    return launch("tiny", "bdh", settings, token_files["train"], token_files["val"], out, gpus=2, **options)


def column(out, name):
    with (out / "log.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name] or "nan") for row in csv.DictReader(file)]


@pytest.fixture
def tool(root, tmp_path, monkeypatch):
    """Put another program in the place of tools/train.py, which takes long to start."""
    def put(code, **values):
        path = tmp_path / "tool.py"
        path.write_text(code.format(root=str(root), **values))
        monkeypatch.setattr(launching, "TOOL", path)

    return put


def test_two_processes_learn_like_one_and_an_interrupt_waits_for_their_checkpoint(token_files, tmp_path, capfd):
    """Guards: gradients added up wrongly, rows that both read, a stop button that kills between two checkpoints."""
    two, asked = tmp_path / "two", []

    def stop():
        if len(column(two, "step")) > 12 and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGINT))

    ending = start(token_files, two, [*SETTINGS, "max_steps=100000"], on_row=stop)
    assert "finishing the step, then saving" in capfd.readouterr().err
    assert ending == Ending.read(two) and ending.reason == Reason.SIGINT
    assert ending.last_checkpoint == ending.step > 12
    train_run(load_recipe("tiny", "bdh", [*SETTINGS, "max_steps=20"]), token_files["train"], token_files["val"],
              tmp_path / "one")
    for name in ("train_loss", "tokens_seen", "grad_norm"):
        together, alone = column(two, name)[1:13], column(tmp_path / "one", name)[1:13]
        assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_launcher_that_is_killed_leaves_a_saved_run_and_nobody_behind(root, tmp_path, tool):
    """Guards: a kernel that dies, and two processes that train on for hours, unseen, and lock the run folder."""
    tool(WAITS)
    call = (f"import sys; sys.path.insert(0, {str(root)!r})\nfrom pathlib import Path\n"
            "from plotarmour.suite import multi_gpu as launch\n"
            f"launch.TOOL, out = Path({str(launching.TOOL)!r}), Path({str(tmp_path)!r})\n"
            "launch.launch('tiny', 'bdh', [], out, out, out, 2)")
    launcher = subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) >= 3, "torchrun and two processes"
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [] and Ending.read(tmp_path).reason == Reason.SIGINT


def test_a_users_mistake_arrives_in_one_line(token_files, tmp_path, tool, capfd):
    """Guards: torchrun's page of traceback around, and a stale ending in place of, what was wrong."""
    (tmp_path / "STOPPED.json").write_text('{"reason": "time budget"}')
    tool(FAILS, kind="UserError", message="found this; expected that.")
    with pytest.raises(UserError) as refused:
        start(token_files, tmp_path)
    assert str(refused.value) == "found this; expected that."
    assert capfd.readouterr() == ("a line\n", "")


def test_any_other_error_is_shown_and_named(token_files, tmp_path, tool, capfd):
    """Guards: a traceback that is lost between torchrun and the notebook."""
    tool(FAILS, kind="ZeroDivisionError", message="boom")
    with pytest.raises(RuntimeError, match="2 processes ended with exit code 1 .*: ZeroDivisionError"):
        start(token_files, tmp_path)
    assert "ZeroDivisionError: boom" in capfd.readouterr().err


@pytest.mark.slow
def test_what_the_second_process_alone_has_met_is_passed_on(root, token_files, tmp_path, tool, capfd):
    """Guards: a notebook that says "lost a process" of a disk that fails, and is started again for ever."""
    tool(ALONE_FAILS, train=str(root / "tools" / "train.py"))
    assert start(token_files, tmp_path / "run", [*SETTINGS, "max_steps=8"]).reason == Reason.LOST_PROCESS
    lines = [line for line in capfd.readouterr().err.splitlines() if "/data/t.train.bin" in line]
    assert lines == ["[process 1] /data/t.train.bin: Input/output error. Check the path, its permissions and the disk."]


def test_more_gpus_than_there_are_is_one_line_before_anything_starts(monkeypatch):
    """Guards: two processes that fail one after the other on one GPU; a CPU taken for a GPU."""
    recipe = load_recipe("tiny", "bdh")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="gpus = 2, and torch sees 1 here; expected 1 to 1."):
        check_gpus(2, recipe)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="torch sees 0 here"):
        check_gpus(2, recipe)
    with pytest.raises(UserError, match="gpus = 0"):
        check_gpus(0, recipe)
    on_cpu = replace(recipe, training=replace(recipe.training, device="cpu"))
    check_gpus(2, on_cpu)
    with pytest.raises(UserError, match="4 rows per step cannot be shared out evenly among 3"):
        check_gpus(3, on_cpu)
