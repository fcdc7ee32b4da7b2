"""Counted FLOPs against those that torch counts of real models."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from plotarmour.config import load_recipe
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.hf import HFModel
from plotarmour.models.hf_kinds import GPT2Config, GPT2RopeConfig, LlamaConfig, ModernConfig, MoEConfig

SMALL = {"bdh": BDHConfig(2, 4, 2, 4, vocab_size=5, dropout=0.0),
         "gpt2": GPT2Config(2, 4, 2, vocab_size=5, context_length=3, dropout=0.0)}
REAL = {"bdh": BDHConfig(3, 16, 2, 8, vocab_size=50, dropout=0.0),
        "one pass": BDHConfig(1, 8, 4, 6, vocab_size=31, dropout=0.0),
        "gpt2": GPT2Config(3, 16, 2, vocab_size=50, context_length=40, dropout=0.0),
        "one layer": GPT2Config(1, 24, 4, vocab_size=31, context_length=64, dropout=0.0),
        "gpt2_rope": GPT2RopeConfig(3, 16, 2, vocab_size=50, dropout=0.0),
        "llama": LlamaConfig(3, 16, 2, vocab_size=50, intermediate_size=20),
        "modern": ModernConfig(3, 16, 2, vocab_size=50),
        "moe": MoEConfig(3, 16, 2, vocab_size=50, intermediate_size=20, n_experts=5)}


def counted(config, backward):
    """FLOPs that torch counts for 2 rows of 24 tokens.

    BDH by its formula, because torch does not see into the tiled form's own backward. GPT-2's attention by its
    formula, too: fused kernels on a CPU are not counted, and those on a GPU take their scores twice.
    """
    torch.manual_seed(0)
    model = BDH(config) if isinstance(config, BDHConfig) else HFModel(config)
    if isinstance(config, BDHConfig):
        model.form = "parallel"
    inputs = torch.randint(config.vocab_size, (2, 24))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if backward:
            model(inputs).square().sum().backward()
        else:
            model(inputs)
    return counter.get_total_flops()


def test_by_hand():
    """Guards: multiply-adds counted once, one head's neurons in place of all, the unembedding once per pass.

    BDH: H·N·D = 64, H·(N + D) = 24, a pass 6 · 64 + 6 · 24 = 528, all 2 · 528 + 2 · 4 · 5. GPT-2: a layer
    24 · 16 + 4 · 3 · 4 = 432, all 2 · 432 + 40.
    """
    assert {name: config.flops_per_token(3) for name, config in SMALL.items()} == {"bdh": 1096, "gpt2": 904}
    assert SMALL["bdh"].weights_per_token == 2 * 3 * 64
    assert SMALL["gpt2"].weights_per_token == sum(
        p.numel() for name, p in HFModel(SMALL["gpt2"]).named_parameters() if "wte" not in name and "wpe" not in name)


@pytest.mark.parametrize("name", REAL)
def test_forward_is_exactly_what_torch_counts(name):
    """Guards: a product that the formula forgets, or one that the model no longer makes."""
    assert 2 * 24 * REAL[name].flops_per_token(24) == counted(REAL[name], backward=False)


@pytest.mark.parametrize("name", REAL)
def test_training_is_three_times_forward(name):
    """Guards: a backward counted once, or four times with recomputation.

    Exactly so here: the first layer's inputs need gradients as well, because embeddings are trained.
    """
    assert 3 * 2 * 24 * REAL[name].flops_per_token(24) == counted(REAL[name], backward=True)


@pytest.mark.parametrize(("recipe", "vocab_size", "times"), [("laptop", 4096, 2.1), ("kaggle_t4", 50_257, 4.9)])
@pytest.mark.parametrize("model", ["gpt2", "gpt2_rope", "llama", "modern"])
def test_bdh_needs_as_many_times_a_transformers_flops_as_the_docs_say(recipe, vocab_size, times, model):
    """Guards: README.md and docs/results.md, when the shapes of a recipe change."""
    bdh, other = (load_recipe(recipe, kind) for kind in ("bdh", model))
    per_token = [each.model_config(vocab_size).flops_per_token(each.training.context_length) for each in (bdh, other)]
    assert round(per_token[0] / per_token[1], 1) == times
