from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.evaluation.arms import Arm, compare_arms, group_runs, ladder_of, pairs_of

KINDS = ("gpt2", "llama", "modern", "bdh")


def infos(**settings):
    """What run.json holds of runs; a run's name begins with its model."""
    return {name: {"recipe": asdict(load_recipe("tiny", name.split("_")[0], each)),
                   "train": {"payload_sha256": "abc"}} for name, each in settings.items()}


def test_runs_that_differ_only_in_their_seed_are_one_arm():
    """Guards: seeds taken for recipes, recipes taken for seeds."""
    arms = group_runs(infos(bdh_2=["seed=2"], gpt2_1=["seed=1"], gpt2_long_1=["seed=1", "max_steps=4400"],
                            bdh_1=["seed=1"], gpt2_2=["seed=2", "log_interval=5"]))
    assert [(arm.name, arm.runs, arm.seeds) for arm in arms] == [
        ("bdh", ("bdh_1", "bdh_2"), (1, 2)), ("gpt2", ("gpt2_1", "gpt2_2"), (1, 2)),
        ("gpt2_long_1", ("gpt2_long_1",), (1,))]
    losses = {"bdh_1": 2.0, "bdh_2": 2.0, "gpt2_1": 3.0, "gpt2_2": 3.2, "gpt2_long_1": 3.05}
    pairs = pairs_of(arms, "bdh", losses)
    assert [(a.name, b.name) for a, b in pairs] == [("bdh", "gpt2_long_1"), ("bdh", "gpt2")]


def test_a_ladder_leads_from_gpt2_to_bdh_at_equal_tokens():
    """Guards: a step from a model that had more tokens or is no part of BDH; a step whose sign is turned around."""
    arms = {name: Arm(name, name, (name,), (1,)) for name in ("bdh", "gpt2", "llama", "modern", "moe")}
    pairs = [(arms["bdh"], arms[name]) for name in ("modern", "llama", "gpt2", "moe")]
    by_arm = pd.DataFrame({"name": ["modern", "bdh", "llama", "gpt2", "moe", "trigram baseline"],
                           "loss": [2.5, 2.6, 2.7, 3.0, 2.9, 3.3],
                           "train_tokens": [2000, 1000, 1010, 1000, 1000, 9000]})
    assert [(a.name, b.name) for a, b in ladder_of(pairs, by_arm, KINDS)] == [("llama", "gpt2"), ("bdh", "llama")]
    assert ladder_of(pairs[:2], by_arm[:3].assign(train_tokens=[2000, 1000, 1010]), KINDS) == []
    assert ladder_of([], by_arm, KINDS) == []


def test_one_run_under_two_names_is_refused():
    """Guards: an interval that shrinks because one run is counted twice."""
    with pytest.raises(UserError, match="bdh_a and bdh_b have the same settings and the same seed"):
        group_runs(infos(bdh_a=[], bdh_b=[]))


def test_pairs_say_what_is_matched_and_what_the_interval_speaks_of():
    """Guards: matchings that are claimed and not there; one seed's interval sold as the recipe's.

    Two stories of 10 tokens. bdh costs 20 and 22 nats with seed 1, 24 and 26 with seed 2: 92 / 40 = 2.3 a token;
    gpt2 30 and 30 with both: 3.0. The difference is -0.7.
    """
    arms = group_runs(infos(bdh_1=["seed=1"], bdh_2=["seed=2"], gpt2_1=["seed=1"], gpt2_2=["seed=2"]))
    nats = {"bdh_1": [20, 22], "bdh_2": [24, 26], "gpt2_1": [30, 30], "gpt2_2": [30, 30]}
    scores = {name: pd.DataFrame({"story": [0, 1], "tokens": 10, "bytes": 40, "nats": np.array(each, float)})
              for name, each in nats.items()}
    cheap = {"core_params": 100, "train_tokens": 1000, "flops_per_token": 10, "train_flops": 1e4,
             "train_s": 60}
    dear = cheap | {"core_params": 102, "flops_per_token": 20, "train_flops": 2e4, "train_s": None}
    budgets = {name: dear if name.startswith("bdh") else cheap for name in nats}
    pairs = compare_arms(pairs_of(arms, "bdh", dict.fromkeys(scores, 1.0)), scores, budgets, same_order=True)
    assert pairs["speaks_of"].tolist() == ["recipes", "checkpoints", "checkpoints"]
    assert pairs["is_arms"].tolist() == [True, False, False]
    whole = pairs.iloc[0]
    assert whole["loss_difference"] == pytest.approx(-0.7) and whole["bits_per_byte_ratio"] == pytest.approx(2.3 / 3)
    assert whole["perplexity_ratio"] == pytest.approx(np.exp(-0.7)) and whole["a_better"] == 2
    assert whole["matched"] == "core parameters, training tokens"
    assert whole["flops_per_token_ratio"] == 2 and np.isnan(whole["train_s_ratio"])
    assert pairs.iloc[1][["a", "b"]].tolist() == ["bdh_1", "gpt2_1"]
    assert pairs.iloc[1]["loss_difference"] == pytest.approx(-0.9)
