import csv
import json
import math
import os
import shutil
import signal

import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.config import TrainingConfig, load_recipe
from plotarmour.loss import IGNORE
from plotarmour.machine import find_machine
from plotarmour.run import load_run, train_run
from plotarmour.training import loop, progress
from plotarmour.training import step as step_module
from plotarmour.training.checkpoint import checkpoint_folders, rewind
from plotarmour.training.ending import Reason
from plotarmour.training.log import COLUMNS
from plotarmour.training.optimizer import make_optimizer
from plotarmour.training.step import accumulate, clip_gradients

TIMING = ("utc", "elapsed_s", "tokens_per_s", "peak_memory_mib")
CPU = find_machine("cpu")


def scaler():
    return torch.amp.GradScaler("cpu", enabled=False)


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def run(recipe, files, out, **changes):
    import dataclasses

    changed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))
    return train_run(changed, files["train"], files["val"], out)


def test_accumulated_gradients_equal_the_whole_batchs(small_model):
    """Guards: a mean of micro-batch means, which weights padded rows too heavily."""
    torch.manual_seed(1)
    inputs, targets = torch.randint(0, 50, (4, 12)), torch.randint(0, 50, (4, 12))
    targets[0, 3:] = IGNORE
    small_model.eval()
    whole = accumulate(small_model, [(inputs, targets)], CPU, scaler())
    expected = [p.grad.clone() for p in small_model.parameters()]
    small_model.zero_grad()
    parts = accumulate(small_model, [(inputs[i:i + 1], targets[i:i + 1]) for i in range(4)], CPU, scaler())
    assert parts == pytest.approx(whole, rel=1e-6)
    for parameter, gradient in zip(small_model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_one_steps_numbers_are_pinned(small_model):
    """Guards: any unnoticed change to initialisation, loss, optimizer or decay."""
    config = TrainingConfig(12, 1, 1, 10, learning_rate=1e-2)
    optimizer = make_optimizer(small_model, config)
    inputs = torch.arange(24).view(2, 12) % 50
    losses = []
    for _ in range(2):
        losses.append(accumulate(small_model, [(inputs, inputs + 1)], CPU, scaler()))
        optimizer.step()
        optimizer.zero_grad()
    name = type(small_model.config).__name__ + " plus" * getattr(small_model.config, "weights_per_pass", False)
    assert losses == pytest.approx(PINNED[name], rel=1e-5)


PINNED = {
    "BDHConfig plus": [3.9142176310221353, 3.773798624674479],
    "BDHConfig": [3.905440012613932, 3.6481653849283853], "GPT2Config": [3.9156058629353843, 3.7569847106933594],
    "GPT2RopeConfig": [3.875380198160807, 3.737887700398763], "LlamaConfig": [3.946326573689779, 3.6869786580403647],
    "ModernConfig": [3.924907684326172, 3.6804847717285156], "MoEConfig": [3.929656982421875, 3.6844469706217446],
    "LSTMConfig": [3.9086694717407227, 3.8938639958699546],
}


@pytest.mark.parametrize("limit", [0.0, 0.01, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(small_model, limit):
    """Guards: a norm under the limit that is scaled up, one over it that is kept, 0 that clips to nothing."""
    inputs = torch.arange(24).view(2, 12) % 50
    accumulate(small_model, [(inputs, inputs + 1)], CPU, scaler())
    before = [p.grad.clone() for p in small_model.parameters()]
    norm = clip_gradients(small_model, limit)
    clipped = [p.grad for p in small_model.parameters()]
    for parameter, gradient in zip(small_model.parameters(), before, strict=True):
        parameter.grad = gradient
    assert norm == float(torch.nn.utils.clip_grad_norm_(small_model.parameters(), limit or math.inf)) > 0.01
    assert all(torch.equal(found, p.grad) for found, p in zip(clipped, small_model.parameters(), strict=True))


def test_decay_is_on_matrices_only(small_model):
    """Guards: weight decay on biases and layer norms."""
    for group in make_optimizer(small_model, TrainingConfig(8, 1, 1, 10, 1e-3)).param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_a_stopped_and_resumed_run_has_the_bits_of_an_uninterrupted_one(small_recipe, token_files, tmp_path,
                                                                         monkeypatch):
    """Guards: data order, dropout, optimizer state or log that differ after a resume. Dropout 0.1, accumulation 2."""
    run(small_recipe, token_files, tmp_path / "whole")

    class StopsAfterTwo(loop.StopRequest):
        looks = 0

        @property
        def asked(self):
            StopsAfterTwo.looks += 1
            return Reason.SIGTERM if StopsAfterTwo.looks >= 2 else None

    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", StopsAfterTwo)
        final = run(small_recipe, token_files, tmp_path / "cut")
    assert final.reason == "signal SIGTERM" and (tmp_path / "cut" / "STOPPED.json").exists()
    assert final.step < 6 and final.last_checkpoint == final.step
    final = run(small_recipe, token_files, tmp_path / "cut")
    assert final.step == 6 and not (tmp_path / "cut" / "STOPPED.json").exists()

    whole, cut = (load_run(tmp_path / name, "latest") for name in ("whole", "cut"))
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    optimizers = [(tmp_path / n / "checkpoints" / "step_00000006" / "optimizer.safetensors").read_bytes()
                  for n in ("whole", "cut")]
    assert optimizers[0] == optimizers[1]
    assert rows(tmp_path / "whole" / "log.csv") == rows(tmp_path / "cut" / "log.csv")


def test_training_learns_and_leaves_what_the_design_lists(small_recipe, token_files, tmp_path):
    """Guards: weights-only checkpoints, a log with other columns, a DONE.json without numbers."""
    final = run(small_recipe, token_files, tmp_path / "run", max_steps=40, eval_interval=20)
    table = rows(tmp_path / "run" / "log.csv")
    assert float(table[0]["val_loss"]) == pytest.approx(math.log(400), rel=0.05)  # an untrained model guesses
    assert final.val_loss < float(table[0]["val_loss"]) - 0.3
    with (tmp_path / "run" / "log.csv").open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    assert {"run.json", "log.csv", "tokenizer.json", "checkpoints", "DONE.json"} == {
        p.name for p in (tmp_path / "run").iterdir()} - {"samples_by_step.csv"}  # on a slow machine, there are samples
    folder = checkpoint_folders(tmp_path / "run")[0]
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json",
                                                  "MANIFEST.json"}
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["core_params"] > 0 and info["dtype_reason"] and info["train"]["payload_sha256"]
    assert run(small_recipe, token_files, tmp_path / "run", max_steps=40, eval_interval=20) == final  # done stays done


def test_two_models_with_one_seed_read_the_same_tokens(token_files, tmp_path, monkeypatch):
    """Guards: an order that depends on the model or on its micro-batches, which makes the comparison unfair."""
    read, original = {}, step_module.accumulate

    def record(model, micro_batches, *rest, **options):
        read.setdefault(type(model).__name__, []).append([targets for _, targets in micro_batches])
        return original(model, micro_batches, *rest, **options)

    monkeypatch.setattr(step_module, "accumulate", record)
    for model, size in (("bdh", 4), ("gpt2", 2)):
        recipe = load_recipe("tiny", model, ["max_steps=3", "warmup_steps=0", "n_embd=16", "eval_tokens=100",
                                             "rows_per_step=8", f"micro_batch_size={size}", "seed=5"])
        train_run(recipe, token_files["train"], token_files["val"], tmp_path / model)
    bdh, gpt2 = read.values()
    assert [len(step) for step in bdh] == [2] * 3 and [len(step) for step in gpt2] == [4] * 3
    steps = [[[row[row != IGNORE].tolist() for targets in step for row in targets] for step in read_by]
             for read_by in (bdh, gpt2)]
    assert steps[0] == steps[1]


def test_the_model_is_in_training_mode_after_an_evaluation(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a model left in eval mode after the first evaluation, so that dropout is never on again."""
    modes = []
    original = step_module.accumulate
    monkeypatch.setattr(step_module, "accumulate",
                        lambda model, *rest: modes.append(model.training) or original(model, *rest))
    run(small_recipe, token_files, tmp_path / "run")
    assert modes == [True] * 6


def test_early_stopping_keeps_the_best(small_recipe, token_files, tmp_path):
    """Guards: the last weights reported instead of the best ones. A huge learning rate makes it worse at once."""
    final = run(small_recipe, token_files, tmp_path / "run", learning_rate=30.0, warmup_steps=0, max_steps=50,
                eval_interval=1, patience=2, grad_clip=0.0)
    assert final.reason == "early stopping" and final.step < 50
    assert load_run(tmp_path / "run").step == final.best_step < final.step


def test_a_non_finite_gradient_never_reaches_the_optimizer(small_recipe, token_files, tmp_path, monkeypatch, warned):
    """Guards: NaN weights. Ten bad steps in a row stop the run; the checkpoint stays good."""
    original = step_module.accumulate

    def poisoned(model, *rest):
        loss = original(model, *rest)
        next(model.parameters()).grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(step_module, "accumulate", poisoned)
    final = run(small_recipe, token_files, tmp_path / "run", max_steps=50)
    assert (final.reason, final.step, final.skipped_steps) == ("non-finite", 10, 10)
    with warned("not finished: this is its checkpoint of step 9"):
        loaded = load_run(tmp_path / "run", "latest")
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())


def test_bad_steps_in_a_row_are_counted_across_sessions(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a run killed among bad steps that takes ten more of them, where a whole one has stopped."""
    original, append = step_module.accumulate, loop.RunLog.append

    def poisoned(model, *rest):
        loss = original(model, *rest)
        next(model.parameters()).grad.fill_(math.nan)
        return loss

    def killed(log, **values):
        append(log, **values)
        if values["step"] == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(step_module, "accumulate", poisoned)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.RunLog, "append", killed)
        run(small_recipe, token_files, tmp_path / "run", max_steps=50)
    final = run(small_recipe, token_files, tmp_path / "run", max_steps=50)
    assert (final.reason, final.step, final.skipped_steps) == ("non-finite", 10, 10)


@pytest.mark.parametrize("sent", [["SIGTERM"], ["SIGHUP", "SIGHUP"]])  # a closing terminal may send it twice
def test_a_signal_finishes_the_step_and_saves(small_recipe, token_files, tmp_path, monkeypatch, sent):
    """Guards: a session cut by SIGTERM, or by a terminal that closes, that loses its work. Real signals."""
    if not hasattr(signal, sent[0]):
        pytest.skip("no SIGHUP on this system")
    original = step_module.accumulate

    def signalled(*args):
        for name in sent:
            os.kill(os.getpid(), getattr(signal, name))
        return original(*args)

    monkeypatch.setattr(step_module, "accumulate", signalled)
    final = run(small_recipe, token_files, tmp_path / "run")
    assert (final.reason, final.step, final.last_checkpoint) == (f"signal {sent[0]}", 1, 1)


def test_another_run_in_the_same_folder_is_refused_with_the_differences(small_recipe, token_files, tmp_path):
    """Guards: a log that silently mixes two runs."""
    run(small_recipe, token_files, tmp_path / "run")
    with pytest.raises(UserError, match="learning_rate was 0.003, now 0.5; .*seed was 0, now 9"):
        run(small_recipe, token_files, tmp_path / "run", learning_rate=0.5, seed=9)


def test_a_time_budget_counts_this_session_only(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a resumed run that stops after one step, because its earlier sessions used the budget up."""
    clock = iter(range(0, 10**6, 20))  # every look at the clock is 20 s later
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    reached = []
    for _ in range(2):
        final = run(small_recipe, token_files, tmp_path / "run", max_steps=100, max_minutes=5.0)
        assert final.reason == "time budget"
        reached.append(final.step)
    assert reached[1] > reached[0] + 1


def test_going_back_to_a_kept_step_forgets_what_came_after(small_recipe, token_files, tmp_path):
    """Guards: a killed --from-step run that jumps back to the abandoned future."""
    run(small_recipe, token_files, tmp_path / "run")
    whole = [p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert {"step_00000003", "step_00000006"} <= set(whole)
    rewind(tmp_path / "run", 3)
    assert not [p for p in (tmp_path / "run" / "checkpoints").glob("step_*") if p.name > "step_00000003"]
    before = rows(tmp_path / "run" / "log.csv")
    final = train_run(small_recipe, token_files["train"], token_files["val"], tmp_path / "run", from_step=3)
    assert final.step == 6 and rows(tmp_path / "run" / "log.csv") == before


def test_a_run_killed_before_its_first_checkpoint_starts_with_a_fresh_log(small_recipe, token_files, tmp_path, warned):
    """Guards: the first row written twice; a run that starts over without a word."""
    run(small_recipe, token_files, tmp_path / "run")
    before = rows(tmp_path / "run" / "log.csv")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "DONE.json").unlink()
    with warned("no checkpoint left, although its log reaches step 6: starting from step 0"):
        run(small_recipe, token_files, tmp_path / "run")
    assert rows(tmp_path / "run" / "log.csv") == before


def test_resume_must_needs_a_checkpoint(small_recipe, token_files, tmp_path):
    """Guards: --resume must that silently starts anew."""
    run(small_recipe, token_files, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint to continue from"):
        train_run(small_recipe, token_files["train"], token_files["val"], tmp_path / "run", "must")


def test_validating_on_the_training_text_is_refused(small_recipe, token_files, tmp_path):
    """Guards: a best checkpoint chosen on what was learned by heart."""
    with pytest.raises(UserError, match="is the training text itself"):
        train_run(small_recipe, token_files["train"], token_files["train"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
