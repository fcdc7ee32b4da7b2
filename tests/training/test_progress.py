import pytest
from hypothesis import given
from hypothesis import strategies as st

from plotarmour.config import TrainingConfig
from plotarmour.training import progress
from plotarmour.training.progress import Pace, coming


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def config(**settings):
    return TrainingConfig(**{"context_length": 8, "rows_per_step": 2, "micro_batch_size": 2, "max_steps": 100,
                             "learning_rate": 1e-3, "eval_interval": 10, "checkpoint_interval": 25, "max_minutes": 0.0}
                          | settings)


def new_pace(config, minutes=0.0, before_s=0.0, evaluation_s=0.0, save_s=0.0):
    return Pace(config, minutes, before_s, {"evaluation": evaluation_s, "save": save_s})


def take(pace, clock, seconds, steps=1):
    for _ in range(steps):
        clock[0] += seconds
        pace.count(16, seconds)


def test_coming_evaluations_and_checkpoints_by_hand():
    """Guards: the docstring's example. At 4, 8, 10 evaluations; checkpoints there and at 3, 6, 9."""
    t = config(max_steps=10, eval_interval=4, checkpoint_interval=3)
    assert coming(0, t) == (3, 6) and coming(8, t) == (1, 2) and coming(10, t) == (0, 0)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 40))
def test_coming_evaluations_and_checkpoints_are_counted(max_steps, every, save, step):
    """Guards: a closed form that counts a step twice, or not at all."""
    t, step = config(max_steps=max_steps, eval_interval=every, checkpoint_interval=save), min(step, max_steps)
    evaluated = {s for s in range(1, max_steps + 1) if s % every == 0 or s == max_steps}
    saved = evaluated | {s for s in range(1, max_steps + 1) if s % save == 0}
    assert coming(step, t) == (sum(s > step for s in evaluated), sum(s > step for s in saved))


def test_the_forecast_adds_steps_evaluations_and_checkpoints(clock):
    """Guards: a forecast of steps alone. 94 steps of 2 s, 10 evaluations of 30 s, 12 checkpoints of 5 s."""
    pace = new_pace(config(), evaluation_s=30.0, save_s=5.0)
    take(pace, clock, 60.0)  # the first one compiles, and does not count
    take(pace, clock, 2.0, 5)
    assert pace.left_s(6) == pytest.approx(94 * 2 + 10 * 30 + 12 * 5)
    line = pace.forecast(6)
    assert line.startswith("9 min to go, until ")
    assert "94 steps of 2 s, 10 evaluations of 30 s, up to 12 checkpoints of 5 s; 8 tokens/s" in line


def test_other_steps_make_a_new_pace(clock):
    """Guards: a forecast from the steps before the micro-batch was halved."""
    pace = new_pace(config())
    take(pace, clock, 1.0, 10)
    pace.forget()
    take(pace, clock, 50.0)
    take(pace, clock, 3.0, 5)
    assert pace.step_s == pytest.approx(3.0)


def test_a_time_budget_is_named_with_the_end_of_the_session(clock):
    """Guards: an end that this session will not see."""
    pace = new_pace(config(max_steps=10_000), minutes=10)
    take(pace, clock, 1.0, 6)
    line = pace.forecast(6)
    assert line.startswith("2 h 47 min to go") and "this session stops after 10 minutes, the next one continues" in line
    assert pace.session_left_s(6) == 10 * 60 - 6


def test_a_schedule_by_the_clock_ends_the_forecast(clock):
    """Guards: an estimate by steps that will not be taken. 5 minutes, 100 s of them in an earlier session."""
    pace = new_pace(config(max_steps=10_000, schedule_minutes=5.0), before_s=100.0, evaluation_s=2.0, save_s=1.0)
    take(pace, clock, 1.0, 6)
    assert pace.left_s(6) == pytest.approx(300 - 100 - 6)  # the last evaluation and checkpoint are within
    assert "the schedule ends after 5 minutes in all" in pace.forecast(6)
