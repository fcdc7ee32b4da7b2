import dataclasses

import psutil
import pytest

from plotarmour.config import AUTO
from plotarmour.run import train_run
from plotarmour.training import stopping
from plotarmour.training.ending import Ending
from plotarmour.training.stopping import StopRequest, ask_to_stop, session_minutes


@pytest.fixture
def age(monkeypatch):
    """Set how many minutes ago the oldest of the processes began that led to this one."""
    this = psutil.Process()
    began = min(process.create_time() for process in (this, *this.parents()))
    monkeypatch.setattr(stopping.time, "time", lambda: began)
    return lambda minutes: monkeypatch.setattr(stopping.time, "time", lambda: began + 60.0 * minutes)


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
    monkeypatch.setattr(stopping, "host", lambda: "own machine")
    assert session_minutes(AUTO) == 0.0
    for name in ("own machine", "kaggle"):
        monkeypatch.setattr(stopping, "host", lambda name=name: name)
        age(100)
        assert (session_minutes(0.0), session_minutes(90.0)) == (0.0, 90.0)
    monkeypatch.setattr(stopping, "host", lambda: "kaggle")
    assert session_minutes(AUTO) == 410.0  # by its folder only: no word of which kind


def timed(recipe, **settings):
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, max_steps=10_000, keep_every=0,
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
