import csv
import dataclasses
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.config import TrainingConfig, largest_divisor, load_recipe
from plotarmour.data.batches import Windows
from plotarmour.data.token_file import TokenFile
from plotarmour.machine import Machine
from plotarmour.models import architecture_fields
from plotarmour.models.hf import HFModel
from plotarmour.models.hf_kinds import GPT2Config
from plotarmour.run import load_run, train_run
from plotarmour.training import loop
from plotarmour.training import step as step_module
from plotarmour.training.distributed import ALONE, Ranks
from plotarmour.training.ending import Ending
from plotarmour.training.optimizer import learning_rate
from plotarmour.training.step import Updates, try_to_fit


def run(recipe, files, out, **changes):
    changed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **changes))
    return train_run(changed, files["train"], files["val"], out)


def changes_of(out):
    return json.loads((out / "run.json").read_text(encoding="utf-8")).get("changes", [])


def room_for(rows, from_step, monkeypatch):
    """From a step on, let the device be out of memory for micro-batches of more rows. Returns what was tried."""
    original, tried = step_module.accumulate, []

    def accumulate(model, micro_batches, machine, scaler, dropout_seed, *rest):
        sizes = [len(inputs) for inputs, _ in micro_batches]
        tried.append((dropout_seed[1], sizes))
        if dropout_seed[1] >= from_step and max(sizes) > rows:
            original(model, micro_batches[:1], machine, scaler, dropout_seed, *rest)  # gradients that must not count
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(model, micro_batches, machine, scaler, dropout_seed, *rest)

    monkeypatch.setattr(step_module, "accumulate", accumulate)
    return tried


def test_a_step_that_does_not_fit_is_split_further_with_the_same_rows(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a run that dies of its micro-batch, other tokens per step, gradients of the failed attempt that count."""
    # Dropout and the balance of experts depend on the micro-batch.
    off = {name: 0.0 for name in ("dropout", "balance_loss") if name in architecture_fields(small_recipe.model)}
    recipe = dataclasses.replace(small_recipe, architecture=small_recipe.architecture | off)
    whole = run(recipe, token_files, tmp_path / "whole", micro_batch_size=4)
    tried = room_for(1, 2, monkeypatch)
    split = run(recipe, token_files, tmp_path / "split", micro_batch_size=4)
    assert tried == [(0, [4]), (1, [4]), (2, [4]), (2, [2, 2]), (2, [1] * 4), (3, [1] * 4), (4, [1] * 4), (5, [1] * 4)]
    assert (split.step, split.tokens_seen, split.micro_batch_size) == (6, whole.tokens_seen, 1)
    assert split.val_loss == pytest.approx(whole.val_loss, rel=1e-5)
    [change] = changes_of(tmp_path / "split")
    assert {key: change[key] for key in change if key != "utc"} == {
        "step": 2, "why": "out of memory", "micro_batch_size": [4, 1]}


def test_the_end_is_forecast_anew_once_steps_are_split(token_files, tmp_path, monkeypatch, capsys):
    """Guards: an end of the run, as printed, that is of the steps before they were split; a forecast per step."""
    room_for(1, 8, monkeypatch)
    recipe = load_recipe("tiny", "gpt2", ["rows_per_step=4", "micro_batch_size=4", "max_steps=30", "warmup_steps=0",
                                          "n_embd=16", "eval_tokens=100", "device=cpu"])
    train_run(recipe, token_files["train"], token_files["val"], tmp_path / "run")
    said = capsys.readouterr().err
    assert re.findall(r"to go, until [^;]*: (\d+) steps of", said) == ["24", "16"]


def test_a_split_run_resumes_with_the_bits_of_an_uninterrupted_one(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a resumed run that tries the size again that did not fit, and draws other dropout."""
    room_for(1, 2, monkeypatch)
    run(small_recipe, token_files, tmp_path / "whole")
    with monkeypatch.context() as patch:
        original = loop.RunLog.append

        def append(log, **values):
            original(log, **values)
            if values["step"] == 4:
                raise KeyboardInterrupt

        patch.setattr(loop.RunLog, "append", append)
        with pytest.raises(KeyboardInterrupt):
            run(small_recipe, token_files, tmp_path / "cut")
    tried = room_for(1, 0, monkeypatch)
    final = run(small_recipe, token_files, tmp_path / "cut")
    assert {len(sizes) for _, sizes in tried} == {4} and final.micro_batch_size == 1
    whole, cut = (load_run(tmp_path / name, "latest").model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_one_row_that_does_not_fit_is_one_clear_line(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: halving for ever, or a traceback."""
    room_for(0, 3, monkeypatch)
    with pytest.raises(UserError, match="one row of step 4 needs more memory than there is; set"):
        run(small_recipe, token_files, tmp_path / "run")


def test_an_optimizer_that_does_not_fit_is_one_clear_line(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a traceback where weights and gradients fit, and AdamW's state does not."""
    def step(scaler, optimizer):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.amp.GradScaler, "step", step)
    with pytest.raises(UserError, match="the optimizer's state needs more memory than there is"):
        run(small_recipe, token_files, tmp_path / "run")


def test_another_error_is_not_taken_for_a_lack_of_memory(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a bug that is retried with smaller and smaller micro-batches."""
    def broken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(step_module, "accumulate", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(small_recipe, token_files, tmp_path / "run")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("CUDA error: out of memory")])  # the last: not of torch's allocator
def test_every_lack_of_memory_is_noticed(error):
    """Guards: a traceback where a smaller micro-batch would fit."""
    def act():
        raise error

    assert try_to_fit(act) is None


def test_the_largest_divisor_by_hand():
    """Guards: micro-batches that do not add up to the rows of a step."""
    assert [largest_divisor(12, n) for n in (12, 11, 5, 3, 1)] == [12, 6, 4, 3, 1]
    assert largest_divisor(7, 6) == 1 and largest_divisor(4, 100) == 4


SCRIPT = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import psutil, torch
torch.set_num_threads(1)
from plotarmour.config import load_recipe
from plotarmour.run import train_run
recipe = load_recipe("tiny", "gpt2", sys.argv[5:])
limit = psutil.Process().memory_info().vms + 600 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
train_run(recipe, *(Path(path) for path in sys.argv[2:5]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_step_is_split_when_the_system_gives_no_more_memory(root, token_files, tmp_path):
    """Guards: an out-of-memory error that looks otherwise in reality. 64 rows of 160 tokens, in 600 MiB."""
    settings = ["windows=stream", "rows_per_step=64", "micro_batch_size=64", "max_steps=2", "warmup_steps=1",
                "eval_tokens=500", "device=cpu"]
    files = token_files["train"], token_files["val"]
    whole = train_run(load_recipe("tiny", "gpt2", settings), *files, tmp_path / "whole")
    command = [sys.executable, "-c", SCRIPT, str(root), *map(str, files), str(tmp_path / "split"), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "out of memory at step 1: " in done.stderr, done.stderr
    split = Ending.read(tmp_path / "split")
    assert split.micro_batch_size < 64 == whole.micro_batch_size
    assert split.val_loss == pytest.approx(whole.val_loss, rel=1e-6)
    assert changes_of(tmp_path / "split")[0]["why"] == "out of memory"


def test_evaluation_goes_on_in_smaller_batches(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a run that trains one row at a time and dies of the eight rows of its evaluation."""
    whole = run(small_recipe, token_files, tmp_path / "whole")
    original, sizes = loop.evaluate_windows, []

    def evaluate_windows(model, windows, batches, *rest):
        sizes.append(len(batches[0]))
        if len(batches[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(model, windows, batches, *rest)

    monkeypatch.setattr(loop, "evaluate_windows", evaluate_windows)
    final = run(small_recipe, token_files, tmp_path / "small")
    assert sizes == [8, 4, 2, 2, 2, 2] and final.val_loss == pytest.approx(whole.val_loss, rel=1e-6)


def test_two_processes_evaluate_every_row_once_whatever_memory_they_have(monkeypatch):
    """Guards: rows scored twice and rows left out where one of two GPUs is fuller. 20 rows; one has room for 2."""
    scored = []

    def evaluate_windows(model, windows, batches, token_bytes, room):
        if max(map(len, batches)) > room:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        scored.extend(row for batch in batches for row in batch)
        return 0.0, 1, 1

    monkeypatch.setattr(loop, "evaluate_windows", evaluate_windows)
    for rank, room in ((0, 8), (1, 2)):
        share = SimpleNamespace(val_rows=list(range(20)), ranks=Ranks(rank, 2), evaluation_rows=8, model=None,
                                val_windows=None, token_bytes=None, machine=room)
        assert loop.Session._evaluate_share(share) == (0.0, 1, 1)
    assert sorted(scored) == list(range(20))


def test_an_evaluation_that_fits_not_even_by_rows_is_one_clear_line(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: a traceback, or halving for ever."""
    def evaluate_windows(*args):
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    monkeypatch.setattr(loop, "evaluate_windows", evaluate_windows)
    with pytest.raises(UserError, match="one row of an evaluation needs more memory than there is"):
        run(small_recipe, token_files, tmp_path / "run")


def test_auto_takes_what_the_plan_says_and_keeps_the_rows_of_a_step(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: micro_batch_size = "auto" that changes the tokens per step, or chooses anew when it resumes."""
    from plotarmour import run as runs

    monkeypatch.setattr(runs, "_first_rows", lambda *args: 2)
    auto = {"rows_per_step": 8, "micro_batch_size": "auto"}
    first = run(small_recipe, token_files, tmp_path / "run", max_minutes=1e-9, **auto)
    assert (first.reason, first.micro_batch_size) == ("time budget", 2)
    monkeypatch.setattr(runs, "_first_rows", lambda *args: 4)
    final = run(small_recipe, token_files, tmp_path / "run", **auto)
    assert (final.micro_batch_size, final.tokens_seen) == (2, 6 * 8 * 24)


def test_auto_takes_the_most_rows_that_leave_a_reserve(monkeypatch):
    """Guards: a plan that takes all there is, or too little. GPT-2 of recipe kaggle_t4 on a CPU, 50,257 tokens."""
    from plotarmour import run as runs
    from plotarmour.machine import find_machine
    from plotarmour.memory import RESERVE, plan_training

    cpu, chosen = find_machine("cpu"), []
    for gib in (1, 5, 10, 1000):
        monkeypatch.setattr(runs, "memory_bytes", lambda device, gib=gib: gib * 2**30)
        chosen.append(runs._first_rows(load_recipe("kaggle_t4", "gpt2", ["micro_batch_size=auto"]), 50257, cpu, 1))
        for rows, fits in ((chosen[-1], True), (2 * chosen[-1], False)):
            recipe = load_recipe("kaggle_t4", "gpt2", [f"micro_batch_size={min(rows, 64)}"])
            plan = plan_training(recipe, 50257, cpu.dtype, "cpu").total
            assert (plan <= gib * 2**30 - RESERVE) == fits or (not fits and rows > 64) or (fits and rows == 1)
    assert chosen[0] == 1 < chosen[1] < chosen[2] < chosen[3] == 64
    monkeypatch.setattr(runs, "memory_bytes", lambda device: 10 * 2**30)
    assert runs._first_rows(load_recipe("kaggle_t4", "gpt2", ["micro_batch_size=auto"]), 50257, cpu, 2) < chosen[2]
    assert runs._first_rows(load_recipe("kaggle_t4", "gpt2"), 50257, cpu, 1) == 16


def float16_updates(model, token_files, monkeypatch, spoil):
    """Updates under a GradScaler, on a CPU; `spoil` is done to the gradients of every step."""
    recipe = load_recipe("tiny", "gpt2", ["rows_per_step=2", "micro_batch_size=2", "max_steps=40", "warmup_steps=0",
                                          "context_length=24"])
    windows = Windows(TokenFile.open(token_files["train"]), 24, "stream", 0, 2)
    taken = Updates(model, windows, recipe.training, Machine(torch.device("cpu"), torch.float16, "", ""), ALONE)
    taken.begin(0, 2)
    original = step_module.accumulate

    def accumulate(*args):
        loss = original(*args)
        spoil(list(model.parameters()))
        return loss

    monkeypatch.setattr(step_module, "accumulate", accumulate)
    return taken


def test_waiting_for_batches_is_counted(token_files, monkeypatch):
    """Guards: "0 % of the time waiting" said of a disk that is too slow."""
    taken = float16_updates(small_gpt2(token_files), token_files, monkeypatch, lambda parameters: None)
    taken.close()
    original = Windows.micro_batch

    def slow(self, rows):
        time.sleep(0.1)
        return original(self, rows)

    monkeypatch.setattr(Windows, "micro_batch", slow)
    taken.begin(0, 2)
    for step in range(3):
        taken.take(step, 1e-3)
    taken.close()
    assert taken.waited_s > 0.1


def small_gpt2(token_files):
    torch.manual_seed(0)
    return HFModel(GPT2Config(
        1, 16, 2, TokenFile.open(token_files["train"]).header["vocab_size"], context_length=24, dropout=0.0)).train()


def test_gradients_that_overflow_for_ever_end_the_run_at_a_scale_that_still_trains(token_files, monkeypatch):
    """Guards: a NaN that counts as an overflow of float16 each time, while checkpoints keep a scale of 1e-39."""
    model = small_gpt2(token_files)

    def spoil(parameters):
        parameters[0].grad.view(-1)[0] = torch.inf

    taken = float16_updates(model, token_files, monkeypatch, spoil)
    before = [p.detach().clone() for p in model.parameters()]
    found = [taken.take(step, 1e-3) for step in range(26)]
    taken.close()
    assert [update.overflowed for update in found] == [True] * 16 + [False] * 10
    assert [update.skipped for update in found] == [False] * 16 + [True] * 10
    assert taken.scaler.get_scale() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_norm_that_overflows_moves_nothing(token_files, monkeypatch):
    """Guards: AdamW stepping on its momentum where each gradient is finite but their norm is not; a scale that grows
    again after fewer good steps than growth_interval."""
    model = small_gpt2(token_files)
    taken = float16_updates(model, token_files, monkeypatch, lambda parameters: None)
    assert not taken.take(0, 1e-3).overflowed  # there is a momentum now
    original, before = step_module.accumulate, [p.detach().clone() for p in model.parameters()]

    def accumulate(*args):
        loss = original(*args)
        for parameter in model.parameters():
            parameter.grad.fill_(1e34)
        return loss

    monkeypatch.setattr(step_module, "accumulate", accumulate)
    update = taken.take(1, 1e-3)
    taken.close()
    assert update.overflowed and not update.skipped and taken.scaler.get_scale() == 2.0**15
    assert taken.scaler.state_dict()["_growth_tracker"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# The learning rate

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
