import csv
import dataclasses

import pytest

from plotarmour.config import TrainingConfig
from plotarmour.run import train_run
from plotarmour.training.ending import Ending
from plotarmour.training.schedule import learning_rate

COSINE = TrainingConfig(8, 1, 1, 10, 1.0, warmup_steps=2, final_learning_rate_fraction=0.0)
TAIL = dataclasses.replace(COSINE, schedule="linear_tail", decay_fraction=0.5)


def rates(config, *points):
    """Learning rates at (step, minutes)."""
    return pytest.approx([learning_rate(step, config, 60.0 * minutes) for step, minutes in points], abs=1e-6)


def test_the_schedule_by_hand():
    """Guards: a schedule that is off by one step."""
    assert [learning_rate(s, COSINE) for s in (0, 1, 2, 6)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert [learning_rate(s, TAIL) for s in (0, 1, 4, 5, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.8, 0.2])


def test_the_schedule_by_the_clock_by_hand():
    """Guards: a schedule that is cut by the clock instead of ending with it; a clock that holds fast steps up."""
    cosine, tail = (dataclasses.replace(c, schedule_minutes=10.0) for c in (COSINE, TAIL))
    assert [0.5, 1.0, 0.5, 0.0, 0.0] == rates(cosine, (0, 0), (2, 0), (2, 5), (2, 10), (2, 11))
    assert [0.5, 0.5] == rates(cosine, (6, 1), (6, 5))  # the steps are ahead; neither is
    assert [1.0, 1.0, 0.6, 0.2, 0.0, 0.0] == rates(tail, (2, 0), (2, 5), (2, 7), (2, 9), (2, 10), (2, 12))
    assert [0.8, 0.2, 0.6] == rates(tail, (6, 3), (9, 9), (6, 7))
    low = dataclasses.replace(tail, final_learning_rate_fraction=0.1)
    assert [0.1, 0.55] == rates(low, (2, 10), (2, 7.5))
    assert [1.0, 1.0] == rates(dataclasses.replace(tail, decay_fraction=0.0), (2, 9), (9, 9.9))


def test_without_minutes_the_clock_does_not_matter():
    """Guards: rates, and bits, that depend on how fast a machine is."""
    for config in (COSINE, TAIL):
        assert [learning_rate(s, config, 1e9) for s in range(10)] == [learning_rate(s, config) for s in range(10)]


@pytest.mark.parametrize("config", [COSINE, TAIL], ids=["cosine", "linear_tail"])
def test_minutes_that_end_during_warm_up_still_end_low(config):
    """Guards: a run on a slow machine that ends at its highest rate, because warm-up knows no clock."""
    slow = dataclasses.replace(config, warmup_steps=8, schedule_minutes=10.0)
    rates = [learning_rate(step, slow, 60.0 * minutes) for step, minutes in enumerate((0, 2, 4, 6, 8, 10))]
    assert rates[:2] == pytest.approx([0.125, 0.25]) and rates[5] == pytest.approx(0.0, abs=1e-6)
    assert rates[3] > rates[4] > rates[5]


def column(run, name):
    with (run / "log.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def timed(recipe, **settings):
    settings = {"max_steps": 1000, "checkpoint_interval": 3,
                "keep_every": 0, "final_learning_rate_fraction": 0.1} | settings
    return dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **settings))


@pytest.mark.parametrize("small_recipe", ["gpt2"], indirect=True)
@pytest.mark.parametrize("schedule", ["cosine", "linear_tail"])
@pytest.mark.parametrize(("stop_after", "evaluation", "end_s"), [(0, 4, 600), (0, 1, 615), (3, 5, 600), (8, 2, 600)])
def test_a_schedule_by_the_clock_ends_inside_its_minutes(small_recipe, schedule, stop_after, evaluation, end_s,
                                                         token_files, tmp_path, clock):
    """Guards: a run that is cut while its rate is high, overruns its minutes, reports a loss of long before its end,
    or begins its minutes anew in every session."""
    files = token_files["train"], token_files["val"], tmp_path / "run"
    settings = {"schedule": schedule, "eval_interval": evaluation, "schedule_minutes": end_s / 60}
    if stop_after:  # each session's budget: evaluation and save at first, then so many steps
        recipe = timed(small_recipe, **settings, max_minutes=(110 + 20 * stop_after) / 60)
        assert train_run(recipe, *files).reason == "time budget"
        clock.now += 10**6  # between sessions the clock of the run stands still
    final = train_run(timed(small_recipe, **settings), *files)
    assert final.reason == "schedule_minutes" and final == Ending.read(tmp_path / "run")
    assert end_s - 20 - 30 - 2 * 15 <= final.elapsed_s <= end_s
    found = column(tmp_path / "run", "learning_rate")
    assert found[0] == 0.0015 and 0.0024 < found[1] <= 0.003 and len(found) == final.step < 1000
    assert all(a >= b for a, b in zip(found[1:], found[2:], strict=False))
    assert 0.0003 <= found[-1] < 0.0008  # a tenth, but for the last step and what comes after it
    last = [line.split(",") for line in (tmp_path / "run" / "log.csv").read_text().splitlines()][-1]
    assert last[1] == str(final.step) == str(final.last_checkpoint) and float(last[8]) == pytest.approx(
        final.val_loss, rel=1e-6)
    before = (tmp_path / "run" / "log.csv").read_bytes()
    assert train_run(timed(small_recipe, **settings), *files) == final  # done stays done
    assert (tmp_path / "run" / "log.csv").read_bytes() == before
