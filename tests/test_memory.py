"""The memory plan against what torch allocates."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from plotarmour.config import load_recipe
from plotarmour.machine import Machine
from plotarmour.memory import describe_memory, largest_micro_batch, plan_training
from plotarmour.models import KINDS
from plotarmour.models.tiled import Tiling

GIB = 2**30


@pytest.fixture(scope="module")
def benchmark(root):
    spec = importlib.util.spec_from_file_location("memory_plan", root / "benchmarks" / "memory_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = {  # in each, another part of the memory is large
    "evaluation": ("bdh", 1024, "bfloat16", ["context_length=64", "rows_per_step=1", "micro_batch_size=1"]),
    "loss": ("gpt2", 1024, "float32", ["context_length=64"]),
    "loss, mostly the unembedding's": ("gpt2", 4096, "bfloat16", ["context_length=16", "rows_per_step=8"]),
    "backward, mostly scores": ("bdh", 64, "float32", ["n_embd=32", "context_length=256", "rows_per_step=8",
                                                       "micro_batch_size=8"]),
    "backward, mostly scratch": ("bdh", 64, "bfloat16", ["n_embd=32", "context_length=256", "rows_per_step=8",
                                                        "micro_batch_size=8", "mlp_internal_dim_multiplier=32",
                                                        "dropout=0.1"]),
    "backward, mostly weights": ("bdh", 300, "float32", ["context_length=16", "rows_per_step=8"]),
    "backward, mostly v": ("bdh", 64, "bfloat16", ["n_embd=128", "mlp_internal_dim_multiplier=1", "context_length=48",
                                                   "rows_per_step=16", "micro_batch_size=16", "n_layer=1",
                                                   "dropout=0.1"]),
    "backward, attention as a formula": ("gpt2", 100, "float32", ["context_length=128", "dropout=0.1",
                                                                 "rows_per_step=8"]),
    "mask of stories": ("gpt2", 64, "float32", ["n_embd=16", "n_head=1", "context_length=512", "mask_stories=true"]),
    "GPT-2 with rotary positions": ("gpt2_rope", 100, "float32", ["context_length=128", "rows_per_step=8",
                                                                  "micro_batch_size=8"]),
    "Llama": ("llama", 100, "bfloat16", ["context_length=128", "rows_per_step=8", "micro_batch_size=8"]),
    "modern": ("modern", 100, "float32", ["context_length=128", "rows_per_step=8", "micro_batch_size=8"]),
    "mixture of experts": ("moe", 100, "float32", ["context_length=128", "rows_per_step=8", "micro_batch_size=8"]),
    "scores that decay": ("bdh", 64, "float32", ["n_embd=16", "context_length=512", "decay=0.1", "rows_per_step=1",
                                                  "micro_batch_size=1"]),
    "weights per pass": ("bdh", 300, "float32", ["context_length=16", "rows_per_step=8", "weights_per_pass=true",
                                                 "tied_head=true"]),
    "embeddings in every pass": ("bdh", 64, "float32", ["n_embd=128", "mlp_internal_dim_multiplier=1", "n_layer=1",
                                                       "context_length=48", "residual=embedding"]),
    "sums of passes": ("bdh", 64, "float32", ["n_embd=128", "mlp_internal_dim_multiplier=1", "n_layer=12",
                                              "context_length=48", "residual=passes", "differential=true"]),
    "attention that decays": ("gpt2", 64, "float32", ["n_embd=16", "n_head=4", "context_length=512", "decay=0.1"]),
    "Muon": ("bdh", 300, "float32", ["context_length=16", "rows_per_step=8", "optimizer=muon"]),
    "LSTM": ("lstm", 100, "float32", ["context_length=128", "rows_per_step=8", "micro_batch_size=8"]),
    "token table": ("bdh", 8192, "float32", ["context_length=8", "rows_per_step=1", "micro_batch_size=1",
                                             "eval_tokens=8"]),
}


OF_OTHER_KINDS = ("GPT-2 with rotary positions", "Llama", "modern", "mixture of experts", "LSTM")


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in OF_OTHER_KINDS else ())
                                  for case in CASES])
def test_the_plan_is_within_a_fifth_of_what_torch_allocates(benchmark, case):
    """Guards: a buffer added to a model or the loss that no config states; a recipe that then dies on the GPU."""
    model, vocab_size, dtype, settings = CASES[case]
    machine = Machine(torch.device("cpu"), getattr(torch, dtype), "asked for", "")
    recipe = load_recipe("tiny", model, ["windows=stream", *settings])
    plan = plan_training(recipe, vocab_size, machine.dtype, "cpu")
    measured, _ = benchmark.measure(recipe, vocab_size, machine)
    assert plan.total == pytest.approx(measured, rel=0.2), plan


def test_a_plan_counts_the_gradients_of_earlier_micro_batches():
    """Guards: a plan of accumulated steps that leaves out the gradients which wait for the next micro-batch."""
    one, two = (plan_training(load_recipe("tiny", "gpt2", ["windows=stream", "context_length=16", "micro_batch_size=1",
                                                           f"rows_per_step={rows}"]), 8192, torch.float32, "cpu")
                for rows in (1, 2))
    assert two.moment == "loss" and two.parts["gradients"] == two.parts["weights"] and two.total > one.total


def test_the_plan_follows_the_tiles_of_a_gpu(benchmark, monkeypatch):
    """Guards: a plan for a T4 made with the tiles of a CPU."""
    tiles = Tiling.for_shape
    monkeypatch.setattr(Tiling, "for_shape", lambda B, T, N, device: tiles(B, T, N, torch.device("cuda")))
    machine = Machine(torch.device("cpu"), torch.bfloat16, "asked for", "")
    recipe = load_recipe("tiny", "bdh", ["windows=stream", "context_length=200", "rows_per_step=8", "dropout=0.1"])
    plan = plan_training(recipe, 300, machine.dtype, "cpu")
    measured, _ = benchmark.measure(recipe, 300, machine)
    assert plan.parts["activations"] > plan.total / 2 and plan.total == pytest.approx(measured, rel=0.2), plan


def test_planning_allocates_nothing(benchmark):
    """Guards: a doctor that runs out of the memory it plans."""
    recipe = load_recipe("kaggle_t4", "bdh", ["n_embd=65536", "context_length=65536"])
    plans = []
    assert benchmark.peak_of_tensors(lambda: plans.append(plan_training(recipe, 50257, torch.float16, "cuda"))) == 0
    assert plans[0].total > 10_000 * GIB


@pytest.mark.parametrize("model", ["bdh", "gpt2"])
def test_the_kaggle_recipe_fits_with_room_to_spare(model):
    """Guards: a recipe for 16 GB that needs more; long contexts that no longer fit a T4 at all."""
    assert plan_training(load_recipe("kaggle_t4", model), 50257, torch.float16, "cuda").total < 6 * GIB
    long = load_recipe("kaggle_t4", model, ["micro_batch_size=16", "context_length=1024"])
    assert plan_training(long, 50257, torch.float16, "cuda").total < 12 * GIB


@pytest.mark.parametrize("model", ["bdh", "gpt2"])
def test_the_largest_micro_batch_is_the_largest_that_divides_a_step(model):
    """Guards: advice that is off by one size, or changes the tokens of a step."""
    recipe, budget = load_recipe("kaggle_t4", model, ["context_length=1024"]), 5 * GIB
    most = largest_micro_batch(recipe, 50257, torch.float16, "cuda", budget)
    totals = [plan_training(replace(recipe, training=replace(recipe.training, micro_batch_size=rows)), 50257,
                            torch.float16, "cuda").total for rows in (most, 2 * most)]
    assert 1 < most < 64 == recipe.training.rows_per_step and totals[0] <= budget < totals[1]
    assert largest_micro_batch(recipe, 50257, torch.float16, "cuda", GIB // 2) == 0


@pytest.mark.parametrize("model", KINDS)
def test_a_config_states_the_number_of_parameters(model):
    """Guards: a plan for another model than the one that is built."""
    recipe = load_recipe("tiny", model)
    assert recipe.model_config(300).params == sum(p.numel() for p in recipe.build_model(300).parameters())


def test_the_advice_names_what_to_set(monkeypatch):
    """Guards: a plan that does not fit and does not say what would."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = load_recipe("kaggle_t4", "gpt2", ["micro_batch_size=64", "device=cuda", "dtype=float16"])
    told = [describe_memory(recipe, 50257, n).splitlines()[-1] for n in (15, 7, 1)]
    assert told[0] == ("fits 15 GiB less 1.0 in reserve: the largest micro-batch of 64 rows per step is 64; "
                       "the recipe's is 64")
    assert "set micro_batch_size=16, which keeps 32,768 tokens a step" in told[1]
    assert "not even a row at a time" in told[2]
