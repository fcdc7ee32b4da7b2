import json
import math
import os
import pickle
import re
import signal
from dataclasses import replace

import psutil
import pytest

from plotarmour import machine
from plotarmour.config import AUTO
from plotarmour.machine import session_minutes
from plotarmour.run import train_run
from plotarmour.training.ending import (
    DONE,
    HANGUP,
    Ending,
    Reason,
    StopRequest,
    ask_to_stop,
    forget_ending,
    is_complete,
)

ENDING = Ending(Reason.MAX_STEPS, step=8, tokens_seen=800, elapsed_s=1.5, train_loss=0.5, val_loss=0.6, best_step=8,
                best_val_loss=0.6, skipped_steps=0, scaler_overflows=0, peak_memory_mib=None, last_checkpoint=8,
                micro_batch_size=4, input_wait_s=0.25)


@pytest.mark.parametrize("reason", Reason)
def test_an_ending_is_read_as_it_was_written_and_its_file_says_whether_it_is_complete(reason, tmp_path):
    """Guards: a stopped run with a DONE.json; a number that is lost on the way; a reason without a label or advice."""
    ending = replace(ENDING, reason=reason, best_val_loss=math.inf)
    ending.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["DONE.json" if reason in DONE else "STOPPED.json"]
    assert Ending.read(tmp_path) == ending and is_complete(tmp_path) == ending.is_done
    assert ending.label.startswith("done: ") == ending.is_done == (reason.advice == "")
    assert reason.exit_code == 0 or not ending.is_done
    assert pickle.loads(pickle.dumps(ending)) == ending  # as other processes get it
    assert ending.is_done or "step 8" in ending.advice("A cell")
    forget_ending(tmp_path)
    assert Ending.read(tmp_path) is None


def test_a_damaged_ending_counts_as_none(tmp_path):
    """Guards: a traceback, or a run that counts as complete, after a loss of power."""
    for text in ('{"reason": "max_', "[]", '"max_steps"', '{"step": 3}', '{"reason": "tired"}', "\x00" * 40):
        (tmp_path / "DONE.json").write_text(text)
        assert Ending.read(tmp_path) is None and not is_complete(tmp_path)
    (tmp_path / "DONE.json").write_text(json.dumps({"reason": "max_steps", "step": 1, "threads": 2}))
    assert Ending.read(tmp_path).step == 1  # of a notebook of one's own


def test_the_best_evaluation_in_words():
    """Guards: the untrained model presented as the best that training gave."""
    assert ENDING.best == "validation loss 0.6000 (perplexity 1.82) at step 8"
    assert "before any training" in replace(ENDING, best_step=0).best
    assert replace(ENDING, best_val_loss=math.inf).best == "never evaluated"


def test_the_run_folders_page_names_every_reason(root):
    """Guards: a reason in a user's DONE.json that no page explains."""
    page = (root / "docs" / "run-folder.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \| `(?:DONE|STOPPED)", page, re.M) == list(Reason)


def test_nothing_else_opens_the_two_files(root):
    """Guards: a second reader with ideas of its own of what a damaged file means."""
    paths = [*(root / "plotarmour").rglob("*.py"), *(root / "tools").glob("*.py")]
    assert [path.name for path in paths if re.search(r'"(DONE|STOPPED)\.json"', path.read_text(encoding="utf-8"))] == [
        "ending.py"]


@pytest.fixture
def age(monkeypatch):
    """Set how many minutes ago the oldest of the processes began that led to this one."""
    this = psutil.Process()
    began = min(process.create_time() for process in (this, *this.parents()))
    monkeypatch.setattr(machine.time, "time", lambda: began)
    return lambda minutes: monkeypatch.setattr(machine.time, "time", lambda: began + 60.0 * minutes)


@pytest.mark.parametrize(("kind", "minutes"), [("Interactive", 510.0), ("Batch", 660.0), ("Something", 510.0)])
def test_automatic_minutes_are_what_is_left_of_a_kaggle_session(kind, minutes, age, monkeypatch):
    """Guards: a session that Kaggle cuts because text was prepared before training began; no training at all in one
    that is old; a new kind of session without a limit."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", kind)
    assert session_minutes(AUTO) == pytest.approx(minutes)
    age(100)
    assert session_minutes(AUTO) == pytest.approx(minutes - 100)
    age(10_000)
    assert session_minutes(AUTO) == 1.0


def test_minutes_that_were_asked_for_hold_everywhere(age, monkeypatch):
    """Guards: a limit that Kaggle's replaces; a laptop that stops by Kaggle's clock."""
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setattr(machine, "host", lambda: "own machine")
    assert session_minutes(AUTO) == 0.0
    for name in ("own machine", "kaggle"):
        monkeypatch.setattr(machine, "host", lambda name=name: name)
        age(100)
        assert (session_minutes(0.0), session_minutes(90.0)) == (0.0, 90.0)
    monkeypatch.setattr(machine, "host", lambda: "kaggle")
    assert session_minutes(AUTO) == 410.0  # by its folder only: no word of which kind


def timed(recipe, **settings):
    return replace(recipe, training=replace(recipe.training, max_steps=10_000, keep_every=0,
                                                                    **settings))


@pytest.mark.parametrize("small_recipe", ["gpt2"], indirect=True)
@pytest.mark.parametrize(("every", "evaluation"), [(1, 1), (1, 3), (2, 3), (5, 2), (100, 100), (7, 4)])
def test_the_last_checkpoint_of_a_session_is_written_before_its_limit(small_recipe, every, evaluation, token_files,
                                                                      tmp_path, clock):
    """Guards: hours lost to a limit that is noticed when it is over, or that leaves no time to save; a session that
    stops long before. Whatever comes last: a step, an evaluation, one checkpoint or two."""
    for _ in range(2):
        begun = clock.now
        final = train_run(timed(small_recipe, checkpoint_interval=every, eval_interval=evaluation, max_minutes=9.0),
                          token_files["train"], token_files["val"], tmp_path / "run")
        assert final.reason == "time budget" and final.last_checkpoint == final.step
        assert 540 - 20 - 30 - 3 * 15 <= clock.now - begun <= 540
    assert Ending.read(tmp_path / "run") == final
    assert not (tmp_path / "run" / "DONE.json").exists()


@pytest.mark.parametrize("small_recipe", ["gpt2"], indirect=True)
def test_a_kaggle_session_stops_by_itself_and_the_next_one_goes_on(small_recipe, token_files, tmp_path, clock, age,
                                                                   monkeypatch):
    """Guards: a session that ends by Kaggle's hand, without its last checkpoint, though max_minutes is "auto"."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    age(650)
    files, steps = (token_files["train"], token_files["val"], tmp_path / "run"), []
    for _ in range(2):
        begun = clock.now
        final = train_run(timed(small_recipe), *files)
        assert final.reason == "time budget" and clock.now - begun <= 10 * 60
        steps.append(final.step)
    assert steps[1] > steps[0] > 5


def test_a_request_of_a_thread_stops_one_training_and_not_the_next():
    """Guards: a notebook in which every later run stops after one step; a request that comes before training does."""
    ask_to_stop()
    with StopRequest() as stop:
        pass
    assert stop.asked == "signal SIGINT"
    with StopRequest() as stop:
        assert stop.asked is None


@pytest.mark.skipif(HANGUP is None, reason="no SIGHUP on this system")
def test_nohup_stays_in_force():
    """Guards: a run that was started with nohup, so as to outlive its terminal, and stops when that is closed."""
    before = signal.signal(HANGUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), HANGUP)
            assert stop.asked is None
    finally:
        signal.signal(HANGUP, before)
