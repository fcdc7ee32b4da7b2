"""What a run writes as it learns."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from plotarmour import run as run_module
from plotarmour.config import TrainingConfig
from plotarmour.run import train_run
from plotarmour.training import progress
from plotarmour.training.checkpoint import find_checkpoint
from plotarmour.training.log import add_sample, read_log, read_samples
from plotarmour.training.progress import Pace


@pytest.fixture
def every_step(monkeypatch):
    """Samples after every power of two, whatever they cost."""
    monkeypatch.setattr(progress, "SAMPLE_S", 0.0)
    monkeypatch.setattr(progress, "SAMPLES_SHARE", 1e9)


def weights(run):
    return (find_checkpoint(run, "latest") / "model.safetensors").read_bytes()


def test_samples_change_no_bit_of_a_run_and_stand_in_its_folder(small_recipe, token_files, tmp_path, monkeypatch,
                                                                every_step, capsys):
    """Guards: sampling that draws from training's random state, or leaves the model without dropout."""
    small_recipe = replace(small_recipe, training=replace(small_recipe.training, max_steps=12))
    states = []
    for name in ("with", "without"):
        torch.manual_seed(7)
        train_run(small_recipe, token_files["train"], token_files["val"], tmp_path / name)
        states.append((torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()))
        monkeypatch.setattr(progress, "SAMPLES_SHARE", -1.0)
    assert weights(tmp_path / "with") == weights(tmp_path / "without") and states[0] == states[1]
    losses = [read_log(tmp_path / name / "log.csv")["val_loss"].dropna().tolist() for name in ("with", "without")]
    assert losses[0] == losses[1]
    samples = read_samples(tmp_path / "with")
    assert list(samples) == [1, 2, 4, 8, 12] and all(text.startswith("Once upon") for text in samples.values())
    assert len(set(samples.values())) > 1 and all(text.isprintable() for text in samples.values())
    assert f"with writes at step 8: {samples[8]}\n" in capsys.readouterr().err
    assert read_samples(tmp_path / "without") == {}


def test_a_sample_that_fails_does_not_end_a_run(small_recipe, token_files, tmp_path, monkeypatch, every_step, warned):
    """Guards: a night of training that ends because a CSV is open in another program, or a probability is NaN."""
    def fail(*arguments, **options):
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr(run_module, "generate", fail)
    with warned("no sample at step 1 .RuntimeError: probability"):
        assert train_run(small_recipe, token_files["train"], token_files["val"], tmp_path / "run").is_done


def test_samples_of_steps_that_training_has_left_behind_are_replaced(tmp_path):
    """Guards: a resumed run whose table has a step twice; a text with commas, quotes or a cut line."""
    for step in (4, 8, 16):
        add_sample(tmp_path, step, f'He said, "{step}"')
    add_sample(tmp_path, 8, "again")
    assert read_samples(tmp_path) == {4: 'He said, "4"', 8: "again"}
    with (tmp_path / "samples_by_step.csv").open("a", encoding="utf-8") as file:
        file.write("1")
    assert list(read_samples(tmp_path)) == [4, 8]


@pytest.mark.parametrize(("step_s", "cost_s", "steps"), [
    (0.05, 0.05, [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 2200]),  # 110 s, of which 1 % is 1.1 s
    (0.05, 0.11, [4, 8, 16, 32, 64, 128, 512, 1024, 2048, 2200]),  # 0.55 s + 0.5 % of the time so far
    (0.05, 5.0, [4]), (0.001, 0.0, [])])
def test_about_ten_samples_take_at_most_a_hundredth_of_the_time(monkeypatch, step_s, cost_s, steps):
    """Guards: samples that take a part of a run on a slow device; one slow moment after which there are no more."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    config = TrainingConfig(context_length=8, rows_per_step=2, micro_batch_size=2, max_steps=2200, learning_rate=1e-3,
                            eval_interval=100, checkpoint_interval=100)
    pace, due = Pace(config, 0.0, 0.0, {"evaluation": 0.0, "save": 0.0}), []
    for step in range(1, 2201):
        now[0] += step_s
        pace.count(16, step_s)
        if pace.is_sample_due(step, step == 2200):
            due.append(step)
            with pace.timing("samples"):
                now[0] += cost_s
    assert due == steps
