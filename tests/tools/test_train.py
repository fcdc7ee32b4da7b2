"""tools/train.py over a run that exists, or must not: one line on stderr, exit code 2, and nothing touched."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.run import LOCK
from plotarmour.training.checkpoint import sealed_json

SMALL = {"max_steps": 4, "warmup_steps": 1, "n_embd": 16, "eval_tokens": 100, "eval_interval": 2,
         "checkpoint_interval": 2, "context_length": 24}


def arguments(files, out, settings=None, *more):
    sets = [part for key, value in (SMALL | (settings or {})).items() for part in ("--set", f"{key}={value}")]
    return ["--recipe", "tiny", "--model", "gpt2", "--train", files["train"], "--val", files["val"], "--out", out,
            *sets, *more]


def contents(folder):
    """Every file's bytes and time of change, and the folders."""
    return {path.relative_to(folder): (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def finished(token_files, tmp_path_factory):
    """A run of 4 steps, never to be changed."""
    from plotarmour.config import load_recipe
    from plotarmour.run import train_run

    out = tmp_path_factory.mktemp("train") / "run"
    recipe = load_recipe("tiny", "gpt2", [f"{key}={value}" for key, value in SMALL.items()])
    train_run(recipe, token_files["train"], token_files["val"], out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that was stopped at its end, before it could say so."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "DONE.json").unlink()
    return tmp_path / "run"


def newer_checkpoint(run):
    path = run / "checkpoints" / "step_00000004" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(sealed_json(manifest | {"format": 2}))


def newer_run(run):
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"format": 2}))


def of_another_program(run):
    (run / "run.json").write_text('{"epochs": 3}')


def without_run_json(run):
    (run / "run.json").unlink()


BAD_GOES_ON = {
    "a newer checkpoint": (newer_checkpoint, {}, [], "step_00000004 has checkpoint format 2; this program reads 1. "
                           "Continue with the newer program that wrote it."),
    "a newer run": (newer_run, {}, [], "has run format 2; this program reads 1. Continue with the program"),
    "another program's": (of_another_program, {}, [], "has run format None; this program reads 1."),
    "no run.json": (without_run_json, {}, [], "is not empty and not a run folder; expected a new or empty folder"),
    "other settings": (None, {"learning_rate": 0.5, "seed": 3}, [], "seed was 0, now 3"),
    "other rows": (None, {"rows_per_step": 8}, [], "rows_per_step was 4, now 8. Use another --out."),
    "longer without --extend": (None, {"max_steps": 8}, [], "max_steps was 4, now 8. Leave that as it was, or add "
                                "--extend"),
    "shorter than it is": (None, {"max_steps": 3}, ["--extend"], "is at step 4, beyond max_steps = 3; set max_steps to "
                           "at least 4, or name an earlier, kept step with --from-step."),
    "back to no step": (None, {}, ["--from-step", "1"], "has no step-1 checkpoint; found step_0000000"),
    "never again": (None, {}, ["--resume", "never"], "holds a run already; expected a new folder"),
    "an unknown word": (None, {}, ["--resume", "yes"], "--resume 'yes' is unknown; expected auto, never or must"),
}


@pytest.mark.parametrize("case", BAD_GOES_ON)
def test_what_cannot_go_on_is_one_line_and_touches_nothing(run_main, run, token_files, case):
    """Guards: a traceback; a run folder that is changed by a command that was refused."""
    spoil, settings, more, message = BAD_GOES_ON[case]
    if spoil:
        spoil(run)
    before = contents(run)
    code, _, err = run_main("train", *arguments(token_files, run, settings, *more))
    assert (code, err.count("\n")) == (2, 1) and err.startswith("error: ") and message in err, err
    assert contents(run) == before


@pytest.mark.parametrize(("settings", "message"), [
    ({"context_length": 0}, "context_length = 0 must be at least 1."), ({"max_steps": -5}, "max_steps = -5 must be at"),
    ({"n_head": 0}, "n_head = 0 must be at least 1."),
    ({"rows_per_step": 6}, "rows_per_step = 6 is not a multiple of micro_batch_size = 4: set micro_batch_size to 3 or"),
    ({"grad_accum_steps": 3}, "--set grad_accum_steps=3: expected key=value with a known key; keys are "),
    ({"learning_rate": "nan", "windows": "story", "eval_tokens": 0, "rows_per_step": 0, "n_layer": -1},
     "rows_per_step = 0 must be at least 1; learning_rate = nan must be positive and finite; "),
    ({"n_embd": 30}, "n_embd = 30 must be divisible by n_head = 4"),
], ids=lambda value: "" if isinstance(value, str) else ",".join(value))
def test_a_recipe_that_cannot_be_is_one_line_and_makes_no_folder(run_main, token_files, tmp_path, settings, message):
    """Guards: a traceback out of a matrix product; an empty run folder that is in the way of the right command."""
    code, _, err = run_main("train", *arguments(token_files, tmp_path / "new", settings))
    assert (code, err.count("\n")) == (2, 1) and err.startswith("error: recipe tiny (gpt2): ")
    assert message in err and all(key in err for key in settings), err
    assert list(tmp_path.iterdir()) == []


def test_a_data_setting_beside_token_files_is_warned_of(run_main, run, token_files, warned):
    """Guards: --set tokenizer=bytes that is accepted, while the token files were made with another one."""
    with warned("^tokenizer is ignored: the token files are made already"):
        assert run_main("train", *arguments(token_files, run, {"tokenizer": "bytes"}))[0] == 0


@pytest.mark.skipif(os.name != "posix", reason="how a process is held")
def test_a_run_that_another_process_trains_is_named_with_pid_and_time(run_main, run, token_files):
    """Guards: two programs that write one log and one index; a lock that does not say who holds it."""
    from plotarmour.files import locked

    hold = ("import sys, pathlib; sys.path.insert(0, sys.argv[1]); from plotarmour.files import locked\n"
            "out = pathlib.Path(sys.argv[2])\nwith locked(out / '.lock', out): print('held', flush=True); input()")
    root = os.path.dirname(os.path.dirname(sys.modules["plotarmour"].__file__))
    other = subprocess.Popen([sys.executable, "-c", hold, root, str(run)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n" and LOCK == ".lock"
        before = contents(run)
        code, _, err = run_main("train", *arguments(token_files, run))
        assert code == 2 and f"{run} is being written by process {other.pid}, since 20" in err and err.count("\n") == 1
        assert err.endswith(". Wait for it, stop it, or use another --out.\n")
        assert contents(run) == before
    finally:
        other.communicate("\n", timeout=30)
    with locked(run / LOCK, run):
        pass  # the other has let go
    assert run_main("train", *arguments(token_files, run))[0] == 0


def test_a_disk_that_is_too_small_for_the_checkpoints_is_told_at_the_start(run_main, token_files, tmp_path,
                                                                           monkeypatch, warned):
    """Guards: a disk that is found to be full after hours; a warning where there is room."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9_000_000))
    with warned(r"new will need up to \d+ MB more .* the disk has 9 MB left: free some"):
        code, out, err = run_main("train", *arguments(token_files, tmp_path / "new"))
    assert code == 0 and "done: all steps taken; 4 steps" in out and "error" not in err
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=40_000_000))
    assert run_main("train", *arguments(token_files, tmp_path / "roomy"))[0] == 0
    with warned(r"need up to \d+ MB more"):  # every second step's is kept
        run_main("train", *arguments(token_files, tmp_path / "kept", {"keep_every": 1, "max_steps": 20}))


def flip_high_bits(path):
    """One bit of every id's upper byte."""
    from plotarmour.data.token_file import TokenFile

    offset, length = TokenFile.open(path).header["sections"]["tokens"]
    with open(path, "r+b") as file:
        file.seek(offset)
        ids = file.read(length)
        file.seek(offset)
        file.write(bytes(byte | 0x40 * (i % 2) for i, byte in enumerate(ids)))


def test_a_damaged_file_to_score_is_one_line(run_main, run, token_files, tmp_path, warned):
    """Guards: a traceback out of the model for a test file whose header is whole."""
    path = shutil.copy(token_files["test"], tmp_path)
    flip_high_bits(path)
    with warned("not finished"):
        code, _, err = run_main("evaluate", run, "--unfinished", "--data", path, "--out", tmp_path / "scores")
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {path} is damaged: found id 16,"), err
    assert "Traceback" not in err


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_token_file_damaged_behind_its_header_is_one_line(run_main, token_files, tmp_path, part):
    """Guards: a traceback out of the thread that reads, for bits that flipped on the disk."""
    files = {name: shutil.copy(token_files[name], tmp_path) for name in ("train", "val")}
    flip_high_bits(files[part])
    code, _, err = run_main("train", *arguments(files, tmp_path / "new"))
    *bar, said = err.splitlines()
    assert code == 2 and said.startswith(f"error: {files[part]} is damaged: found id 16,") and "Traceback" not in err
    assert f"expected ids in [0, 400). Look with tools/pre_tokenize.py --verify {files[part]}, make the" in said
    assert not any("error" in line for line in bar)
    code, _, err = run_main("pre_tokenize", "--verify", files[part])
    assert code == 2 and "tokens in block 0" in err  # the command that was named says the same


def too_much(*args):
    """What the allocator says of 4 PiB, at once: more than a process can address."""
    torch.empty(2**50)


def test_a_model_that_does_not_fit_into_memory_is_one_line_and_makes_no_run(run_main, token_files, tmp_path):
    """Guards: a traceback out of the allocator. The first weights alone would take 16 PiB: refused at once."""
    size = {"n_head": 2, "mlp_internal_dim_multiplier": 2**44}
    args = [arg.replace("gpt2", "bdh") if isinstance(arg, str) else arg
            for arg in arguments(token_files, tmp_path / "new", size)]
    code, _, err = run_main("train", *args)
    assert (code, err.count("\n")) == (2, 1) and list(tmp_path.iterdir()) == []
    assert err.startswith("error: the model needs more memory than there is; set a shorter context_length"), err


@pytest.mark.parametrize("what", ["load_training", "make_optimizer"])
def test_training_that_does_not_fit_into_memory_is_one_line_and_keeps_the_run(run_main, run, token_files, monkeypatch,
                                                                              what):
    """Guards: a traceback for an optimizer's state that does not fit, where a run goes on; a checkpoint lost by it."""
    from plotarmour.training import loop
    from plotarmour.training import step as step_module

    saved = {path: found for path, found in contents(run / "checkpoints").items() if found[0]}
    monkeypatch.setattr(loop if what == "load_training" else step_module, what, too_much)
    code, _, err = run_main("train", *arguments(token_files, run, {"max_steps": 6}, "--extend"))
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: training needs more memory than there is; set a shorter context_length"), err
    assert {path: found for path, found in contents(run / "checkpoints").items() if found[0]} == saved
    monkeypatch.undo()
    assert run_main("train", *arguments(token_files, run, {"max_steps": 6}, "--extend"))[0] == 0


def test_a_trained_model_that_does_not_fit_into_memory_is_the_users_mistake(run, monkeypatch):
    """Guards: a traceback where a large run is scored on a small machine; other errors said to be memory's."""
    from plotarmour import run as runs

    monkeypatch.setattr(runs, "load_model", too_much)
    with pytest.raises(UserError, match="the model needs more memory than there is"):
        runs.load_run(run)
    monkeypatch.setattr(runs, "load_model", lambda *args: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        runs.load_run(run)


def test_a_run_is_extended_on_the_command_line(run_main, run, token_files):
    """Guards: --extend that is parsed and not passed on."""
    code, out, _ = run_main("train", *arguments(token_files, run, {"max_steps": 6}, "--extend"))
    assert code == 0 and "done: all steps taken; 6 steps" in out and (run / "DONE.json").exists()
    assert json.loads((run / "run.json").read_text())["changes"][0]["max_steps"] == [4, 6]


def test_a_mistake_in_a_fresh_process_has_no_traceback(root, run, token_files):
    """Guards: one line in this process, and a traceback or another exit code in a real one."""
    before = contents(run)
    command = [sys.executable, str(root / "tools" / "train.py"), *map(str, arguments(token_files, run, {"seed": 1}))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {run} is a different run: seed was 0, now 1. Use another --out.\n"
    assert contents(run) == before
