import dataclasses
import errno
import io
import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from plotarmour.cli import UserError, run_command
from plotarmour.files import write_json
from plotarmour.run import LOCK, load_run, train_run
from plotarmour.training import checkpoint, loop
from plotarmour.training import step as step_module
from plotarmour.training.checkpoint import (
    FILES,
    TrainState,
    checkpoint_folders,
    damage_of,
    find_checkpoint,
    find_latest_whole,
    load_training,
    rewind,
    save_checkpoint,
    sealed_json,
)


def network(step):
    """A small network and its optimizer after one update; the weights tell the step."""
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(run, step, best_step=3, keep_every=0):
    save_checkpoint(run, *network(step), TrainState(step, tokens_seen=100 * step, best_step=best_step), keep_every)


@pytest.fixture
def saved(tmp_path):
    """A run folder with the checkpoints of steps 3 (the best), 6 and 9."""
    for step in (3, 6, 9):
        save(tmp_path / "saved", step)
    return tmp_path / "saved"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(folder):
    return [path.name for path in folder.rglob(".*")]


def train(recipe, files, out, **changes):
    changed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))
    return train_run(changed, files["train"], files["val"], out)


def step_names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def change_manifest(folder, change):
    """Change the manifest of a checkpoint as another program would: it is whole afterwards."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / "MANIFEST.json").write_text(sealed_json(manifest))


def last_bits(run):
    folder = find_checkpoint(run, "latest")
    return [(folder / name).read_bytes() for name in FILES[:2]]


# Writing

class Faults:
    """A disk that fails: at the n-th call only (a bad block), or from there on (full). Makes, opens, writes, syncs and
    renames count; what is read or removed does not."""

    def __init__(self, patch, code, n, stays):
        self.code, self.n, self.stays, self.calls, self.hit = code, n, stays, 0, False
        for module, name in ((os, "mkdir"), (os, "fsync"), (os, "replace")):
            patch.setattr(module, name, self.failing(getattr(module, name)))
        patch.setattr(checkpoint, "save_file", self.failing_library(checkpoint.save_file))
        patch.setattr(io, "open", self.failing_open(io.open))

    def fails(self):
        self.calls += 1
        now = self.calls == self.n or self.stays and self.calls > self.n
        self.hit = self.hit or now
        return now

    def error(self):
        return OSError(self.code, os.strerror(self.code))

    def failing(self, call):
        def called(*args, **kwargs):
            there = call.__name__ == "mkdir" and os.path.isdir(args[0])  # not written: "exists already"
            if not there and self.fails():
                raise self.error()
            return call(*args, **kwargs)
        return called

    def failing_library(self, call):
        def called(tensors, path):
            call(tensors, path)
            if self.fails():  # half of it is there
                os.truncate(path, path.stat().st_size // 2)
                raise SafetensorError(f"I/O error: {os.strerror(self.code)} (os error {self.code})")
        return called

    def failing_open(self, call):
        def called(file, mode="r", *args, **kwargs):
            if set(mode) & set("wa+x"):
                if self.fails():
                    raise self.error()
                opened = call(file, mode, *args, **kwargs)
                if "b" not in mode:
                    write = opened.write
                    # A file object of C has no settable methods: one in Python around it.
                    return FaultyFile(opened, self.failing(write))
                return opened
            return call(file, mode, *args, **kwargs)
        return called


class FaultyFile:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.mark.parametrize(("code", "stays"), [(errno.ENOSPC, True), (errno.EIO, False), (errno.EFBIG, False),
                                             (errno.EACCES, True)])
def test_a_save_that_fails_anywhere_leaves_the_old_checkpoints_and_says_so(saved, tmp_path, monkeypatch, warned, code,
                                                                              stays):
    """Guards: an old checkpoint that is lost, a half-written one under a final name, leftovers, a traceback."""
    before, n, failed = contents(saved), 0, 0
    while True:
        n += 1
        run = tmp_path / f"run_{n}"
        shutil.copytree(saved, run)
        with monkeypatch.context() as patch, warned() as messages:
            faults = Faults(patch, code, n, stays)
            try:
                save(run, 12)
                said = ""
            except UserError as error:
                said = str(error)
        assert faults.hit == bool(said or messages), n
        assert all(damage_of(folder) is None for folder in checkpoint_folders(run))
        if said:
            failed += 1
            assert os.strerror(code) in said and "Earlier checkpoints are intact" in said and "\n" not in said
            assert hidden(run) == []
            if "step_00000012" in step_names(run):  # the very last sync failed: it is there beside the old ones
                assert set(before) < set(contents(run))
            else:
                assert contents(run) == before
        else:
            assert load_training(find_checkpoint(run, "latest"), *network(0)).step == 12
        save(run, 15)  # it goes on
        if not said and not messages:
            break
    assert n > 15 and failed > 12


def test_a_checkpoint_that_cannot_be_removed_does_not_stop_the_run(saved, monkeypatch, warned):
    """Guards: hours of training that end because an old folder is open in another program."""
    monkeypatch.setattr(checkpoint, "_remove", lambda folder: os.rmdir(folder))
    with warned("step_00000006 cannot be removed: Directory not empty"):
        save(saved, 12)
    monkeypatch.undo()
    save(saved, 15)
    assert step_names(saved) == ["step_00000003", "step_00000012", "step_00000015"]


@contextmanager
def file_size_limit(n_bytes):
    """No file of this process may grow beyond so many bytes: a real failure, deep inside a library."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_that_may_not_grow_fail_a_save_cleanly(saved):
    """Guards: a short write inside safetensors or Python that is hashed and published as whole."""
    before = contents(saved)
    largest = max(len(raw) for path, raw in before.items() if path.parent.name == "step_00000009")
    for limit in range(0, largest, largest // 40):
        with file_size_limit(limit), pytest.raises(UserError, match="cannot be written: .*File too large"):
            save(saved, 12)
        assert contents(saved) == before and hidden(saved) == []
    with file_size_limit(largest):
        save(saved, 12)


def test_a_log_that_cannot_grow_stops_the_run_with_one_line(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a traceback, or training on without a log, where the disk is full; a torn line that stays."""
    train(small_recipe, token_files, tmp_path / "whole")
    appended, original = [], loop.RunLog.append

    def full(log, **values):
        appended.append(values["step"])
        if len(appended) == 5:
            with file_size_limit(log.path.stat().st_size + 20):
                return original(log, **values)
        return original(log, **values)

    with monkeypatch.context() as patch:
        patch.setattr(loop.RunLog, "append", full)
        with pytest.raises(UserError, match="log.csv cannot be written: File too large. Free some disk space"):
            train(small_recipe, token_files, tmp_path / "run")
    assert train(small_recipe, token_files, tmp_path / "run").reason == "max_steps"
    assert last_bits(tmp_path / "run") == last_bits(tmp_path / "whole")


def test_the_latest_the_one_before_the_best_and_every_nth_are_kept(tmp_path):
    """Guards: a disk that fills up; a best checkpoint that is removed; untrained weights that stay for nothing."""
    save(tmp_path, 0, best_step=0)
    save(tmp_path, 1, best_step=0)
    assert step_names(tmp_path) == ["step_00000000", "step_00000001"]
    for step in range(2, 8):
        save(tmp_path, step, best_step=2, keep_every=5)
    assert step_names(tmp_path) == [f"step_{step:08d}" for step in (2, 5, 6, 7)]
    assert find_checkpoint(tmp_path, "latest").name == "step_00000007"
    assert find_checkpoint(tmp_path, "best").name == "step_00000002"


# Damage

def damage_at_random(run, count, draw, truncate=False):
    """Flip a bit of a random file of the latest checkpoint, `count` times, and undo it each time.

    Yields:
        The path of the damaged file and what was done to it.
    """
    latest = run / "checkpoints" / "step_00000009"
    for _ in range(count):
        path = latest / draw.choice([*FILES, "MANIFEST.json"])
        raw = path.read_bytes()
        if truncate:
            at = draw.randrange(len(raw))
            path.write_bytes(raw[:at])
        else:
            at = draw.randrange(8 * len(raw))
            changed = bytearray(raw)
            changed[at // 8] ^= 1 << at % 8
            path.write_bytes(changed)
        yield path, f"{path.name}, {'bytes' if truncate else 'bit'} {at}"
        path.write_bytes(raw)


def check_noticed(run, path, what, warned):
    """That the damage is seen by whoever scores, and announced by whoever goes on."""
    with warned() as messages:
        found = find_latest_whole(run)
    [message] = messages
    assert path.name in message, what
    assert found.name == "step_00000006" and "continuing from the checkpoint of step 6 instead" in message, what
    for which in (9, "latest"):
        with pytest.raises(UserError, match=path.name):
            find_checkpoint(run, which)


@pytest.mark.parametrize(("flips", "cuts"), [(300, 30), pytest.param(2000, 100, marks=pytest.mark.slow)])
def test_no_damage_is_loaded_as_if_whole(saved, flips, cuts, warned):
    """Guards: rotten weights, optimizer states, counters or manifests that are believed."""
    draw, done = random.Random(flips), 0
    for truncate, count in ((False, flips), (True, cuts)):
        for path, what in damage_at_random(saved, count, draw, truncate):
            check_noticed(saved, path, what, warned)
            done += 1
    assert done == flips + cuts and find_checkpoint(saved, "latest").name == "step_00000009"


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_a_lost_last_byte_is_damage(saved, name, warned):
    """Guards: JSON that says the same without its last line feed, believed though the file was cut."""
    path = saved / "checkpoints" / "step_00000009" / name
    path.write_bytes(path.read_bytes()[:-1])
    check_noticed(saved, path, name, warned)


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_a_missing_file_or_folder_is_damage(saved, name, warned):
    """Guards: a manifest that is the only file that must be there."""
    (saved / "checkpoints" / "step_00000009" / name).unlink()
    with pytest.raises(UserError, match=f"{name} is damaged .No such .*Whole .*: step_00000006, step_00000003"):
        find_checkpoint(saved, "latest")
    with warned(f"{name} is damaged .No such .*: continuing .* of step 6 instead"):
        assert find_latest_whole(saved).name == "step_00000006"
    shutil.rmtree(saved / "checkpoints" / "step_00000006")
    with warned(f"{name} is damaged .No such .*: continuing .* of step 3 instead"):
        assert find_latest_whole(saved).name == "step_00000003"


def test_a_copy_of_another_step_is_damage(saved):
    """Guards: a run that continues from other weights than those of the step that the folder names."""
    shutil.copytree(saved / "checkpoints" / "step_00000006", saved / "checkpoints" / "step_00000012")
    assert "MANIFEST.json is damaged (it is of step 6)" in damage_of(saved / "checkpoints" / "step_00000012")


def test_a_damaged_best_names_what_really_helps(saved):
    """Guards: advice to take a checkpoint that is damaged, too."""
    folders = saved / "checkpoints"
    (folders / "step_00000003" / "model.safetensors").write_text("{}")
    with pytest.raises(UserError, match="step_00000003.* is damaged.*Whole checkpoints: step_00000009, step_00000006"):
        find_checkpoint(saved, "best")
    (folders / "step_00000009" / "model.safetensors").write_text("{}")
    with pytest.raises(UserError, match="Whole checkpoints: step_00000006. Name a whole one .* give the command"):
        find_checkpoint(saved, "best")
    (folders / "step_00000006" / "model.safetensors").write_text("{}")
    with pytest.raises(UserError, match="Whole checkpoints: none.* or restore the folder from a copy"):
        find_checkpoint(saved, "best")
    with pytest.raises(UserError, match="has no step-7 checkpoint; .* multiples of keep_every"):
        find_checkpoint(saved, 7)


def test_which_step_is_the_best_is_never_taken_from_a_damaged_or_an_older_state(saved):
    """Guards: another checkpoint scored as the best where the latest state.json, which names the best, is damaged."""
    path = saved / "checkpoints" / "step_00000009" / "state.json"
    path.write_text(path.read_text().replace('"best_step": 3', '"best_step": 6'))
    with pytest.raises(UserError, match="step_00000009.*state.json is damaged.*give the command that trained the run"):
        find_checkpoint(saved, "best")


def test_where_the_best_is_gone_the_latest_takes_its_place(saved):
    """Guards: a run that went back to before its best, and cannot be scored."""
    shutil.rmtree(saved / "checkpoints" / "step_00000003")
    assert find_checkpoint(saved, "best").name == "step_00000009"


def test_only_the_files_that_are_asked_for_are_verified(saved):
    """Guards: scoring that reads three times as many bytes as it loads: the optimizer's state is twice the weights."""
    (saved / "checkpoints" / "step_00000009" / "optimizer.safetensors").unlink()
    assert find_checkpoint(saved, "latest", ["model.safetensors"]).name == "step_00000009"
    with pytest.raises(UserError, match="optimizer.safetensors is damaged"):
        find_checkpoint(saved, "latest")


def test_weights_can_be_read_by_whoever_can_read_the_rest(saved):
    """Guards: safetensors' 0600, with which nobody else on a shared machine can score a run."""
    files = list((saved / "checkpoints").glob("step_*/*"))
    assert files and len({path.stat().st_mode for path in files}) == 1


def test_where_none_is_whole_nothing_starts_over(saved):
    """Guards: a run of days that silently begins at step 0."""
    for folder in (saved / "checkpoints").glob("step_*"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(UserError, match="has no whole checkpoint: .*state.json.*Restore the folder from a copy"):
        find_latest_whole(saved)


def test_a_newer_format_is_refused_by_name_and_not_fallen_back_from(saved):
    """Guards: an older program that forks a run, or calls what it cannot read damaged."""
    change_manifest(saved / "checkpoints" / "step_00000009", lambda manifest: manifest.update(format=2, more=[]))
    for look in (find_latest_whole, lambda run: find_checkpoint(run, "latest")):
        with pytest.raises(UserError, match="checkpoint format 2; this program reads 1"):
            look(saved)


@pytest.mark.parametrize("removals", [0, 1, 2])
def test_a_future_that_was_given_up_does_not_become_the_latest_after_a_kill(tmp_path, monkeypatch, removals):
    """Guards: a --from-step that is killed on the way, and a next start that goes on from the end that it gave up."""
    for step in (3, 6, 9, 12):
        save(tmp_path, step, keep_every=3)
    original, removed = checkpoint._remove, []

    def remove(folder):
        if len(removed) == removals:
            raise KeyboardInterrupt
        removed.append(folder.name)
        original(folder)

    before = {path: raw for path, raw in contents(tmp_path).items() if path.parts[0] != "checkpoints"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "_remove", remove)
        rewind(tmp_path, 3)
    assert find_latest_whole(tmp_path).name == ["step_00000012", "step_00000009", "step_00000006"][removals]
    assert {path: raw for path, raw in contents(tmp_path).items() if path.parts[0] != "checkpoints"} == before
    rewind(tmp_path, 3)
    assert step_names(tmp_path) == ["step_00000003"]


def test_a_later_checkpoint_that_is_damaged_goes_with_the_next_save(saved, warned):
    """Guards: a damaged folder that stays the highest for good, so that each start warns and loses steps again."""
    (saved / "checkpoints" / "step_00000009" / "state.json").write_text("{}")
    with warned("step 6 instead"):
        checkpoint.tidy(saved, find_latest_whole(saved), 0)
    assert "step_00000009" in step_names(saved)
    save(saved, 8)
    assert step_names(saved) == ["step_00000003", "step_00000006", "step_00000008"]
    assert find_latest_whole(saved).name == "step_00000008"


# Runs

def test_a_run_whose_latest_checkpoint_is_damaged_ends_with_the_same_bits(small_recipe, token_files, tmp_path, warned):
    """Guards: damage that stops a run for good or changes what it learns, a finished one included."""
    run = tmp_path / "run"
    final = train(small_recipe, token_files, run)
    bits, log = last_bits(run), (run / "log.csv").read_text()
    (run / "checkpoints" / "step_00000006" / "optimizer.safetensors").write_bytes(bits[1][:-1])
    with warned("optimizer.safetensors is damaged .*: continuing from the checkpoint of step"):
        assert train(small_recipe, token_files, run).step == final.step == 6
    assert last_bits(run) == bits and len((run / "log.csv").read_text().splitlines()) == len(log.splitlines())
    assert train(small_recipe, token_files, run).step == 6  # and nothing to do
    assert last_bits(run) == bits


def test_other_weights_than_the_best_are_never_scored_instead(small_recipe, token_files, tmp_path):
    """Guards: a damaged best checkpoint, and a comparison of whatever else was there."""
    final = train(small_recipe, token_files, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / f"step_{final.best_step:08d}" / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-4] + bytes(4))
    with pytest.raises(UserError, match="model.safetensors is damaged .*Whole .*step_.*give the command"):
        load_run(tmp_path / "run")
    path.write_bytes(raw)
    (path.parent / "optimizer.safetensors").write_bytes(b"")
    assert load_run(tmp_path / "run").step == final.best_step  # it loads no optimizer state, and reads none


def test_what_a_killed_start_left_goes_at_the_next(small_recipe, token_files, tmp_path):
    """Guards: hidden folders of gigabytes that nobody removes; a folder that is refused because of its own lock."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.1-abc.unfinished").write_text("{")
    (run / LOCK).mkdir()
    (run / LOCK / "owner.json").write_text('{"pid": 1, "since": "2026-01-01"}')
    (run / LOCK / "lock").write_text("")
    final = train(small_recipe, token_files, run)
    before = contents(run)
    (run / "DONE.json").unlink()
    (run / ".DONE.json.1-abc.unfinished").write_text("{")
    (run / ".log.csv.1-abc.unfinished").write_text("")
    shutil.copytree(run / "checkpoints" / "step_00000006", run / "checkpoints" / ".step_00000006.1-abc.unfinished")
    shutil.copytree(run / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000001")  # not removed yet
    assert train(small_recipe, token_files, run).step == final.step
    assert set(contents(run)) == set(before)


def test_a_killed_early_stop_does_not_train_on(small_recipe, token_files, tmp_path):
    """Guards: steps beyond the end of a run that was killed between its last checkpoint and DONE.json."""
    worse = {"learning_rate": 30.0, "warmup_steps": 0, "max_steps": 50, "eval_interval": 1, "patience": 2}
    final = train(small_recipe, token_files, tmp_path / "run", **worse)
    (tmp_path / "run" / "DONE.json").unlink()
    again = train(small_recipe, token_files, tmp_path / "run", **worse)
    assert (again.reason, again.step) == (final.reason, final.step) == ("early stopping", final.step)


def test_a_run_is_trained_by_one_process_at_a_time(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: two starts of one command that tear each other's log and checkpoints."""
    original, complaints = step_module.accumulate, []

    def second(*args):
        if not complaints:
            with pytest.raises(UserError, match=f"is being written by process {os.getpid()}, since 20") as caught:
                train(small_recipe, token_files, tmp_path / "run")
            complaints.append(caught)
        return original(*args)

    monkeypatch.setattr(step_module, "accumulate", second)
    assert train(small_recipe, token_files, tmp_path / "run").step == 6
    assert complaints and not (tmp_path / "run" / LOCK).exists()


def test_nothing_is_written_where_the_tokens_are(small_recipe, token_files, tmp_path):
    """Guards: training that needs to write into an attached, read-only input folder."""
    folder = tmp_path / "input"
    folder.mkdir()
    inputs = {part: Path(shutil.copy(token_files[part], folder)) for part in ("train", "val")}
    for path in (*inputs.values(), folder):
        path.chmod(path.stat().st_mode & ~0o222)
    before = folder.stat().st_mtime_ns, sorted(folder.iterdir())
    assert train(small_recipe, inputs, tmp_path / "run").step == 6
    assert (folder.stat().st_mtime_ns, sorted(folder.iterdir())) == before
    folder.chmod(0o755)


def test_a_write_that_fails_names_its_file(tmp_path, capsys):
    """Guards: "File too large", of which no one knows the file; a traceback for a full disk."""
    def command():
        with file_size_limit(10):
            write_json(tmp_path / "DONE.json", list(range(100)))

    with pytest.raises(SystemExit) as ended:
        run_command(command)
    assert ended.value.code == 2 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == (f"error: {tmp_path / 'DONE.json'}: File too large. Check the path, its "
                                       "permissions and the disk.\n")
