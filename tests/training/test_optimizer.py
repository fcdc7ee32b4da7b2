"""Muon and updates that keep norms: on the core matrices of every kind, and on nothing else."""

import dataclasses

import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.config import TrainingConfig
from plotarmour.run import load_run, train_run
from plotarmour.training.optimizer import core_matrices, make_optimizer

CHOICES = {"muon": {"optimizer": "muon"}, "norms": {"keep_norm": True},
           "muon with norms": {"optimizer": "muon", "keep_norm": True}}


def take_updates(model, count=3, **settings):
    """The weights by name after some updates by gradients that are drawn."""
    optimizer = make_optimizer(model, TrainingConfig(12, 1, 1, 10, learning_rate=1e-2, **settings))
    draw = torch.Generator().manual_seed(0)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_core_is_all_but_tables_head_and_vectors(small_model):
    """Guards: Muon for an embedding or a head; a kind whose matrices it does not find."""
    vectors = sum(p.numel() for name, p in small_model.named_parameters() if p.dim() < 2)
    assert sum(p.numel() for p in core_matrices(small_model)) == small_model.config.core_params - vectors


def test_muon_is_torchs_for_each_head_and_adamw_for_the_rest(small_model):
    """Guards: heads that are orthogonalised as one matrix; a learning rate or momentum that does not reach Muon."""
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    core = {name for name, p in small_model.named_parameters() if any(p is each for each in core_matrices(small_model))}
    found = take_updates(small_model, optimizer="muon")
    with torch.no_grad():
        for name, p in small_model.named_parameters():
            p.copy_(before[name])
    for name, expected in take_updates(small_model).items():
        assert torch.equal(found[name], expected) is (name not in core), name
    draw, parameters = torch.Generator().manual_seed(0), {}
    for name, value in before.items():
        heads = [value.view(-1, *value.shape[-2:])] if name in core else []
        parameters[name] = [torch.nn.Parameter(head.clone()) for each in heads for head in each]
    own = torch.optim.Muon([head for heads in parameters.values() for head in heads], lr=1e-2, weight_decay=0.1,
                           adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for name, value in before.items():
            gradient = torch.randn(value.shape, generator=draw)
            if name in core:
                for head, part in zip(parameters[name], gradient.view(-1, *value.shape[-2:]), strict=True):
                    head.grad = part
        own.step()
    for name in core:
        assert torch.equal(torch.stack(list(parameters[name])).view_as(found[name]), found[name]), name


@pytest.mark.parametrize("choice", CHOICES)
def test_norms_stay_where_they_are_to_stay(small_model, choice):
    """Guards: norms that still grow or decay; an update that is lost."""
    before = {p: (p.detach().clone(), float(p.detach().norm())) for p in core_matrices(small_model)}
    take_updates(small_model, **CHOICES[choice])
    for p, (value, norm) in before.items():
        assert not torch.allclose(p, value)
        assert (abs(float(p.detach().norm()) / norm - 1) < 1e-5) is ("norms" in choice)


def test_embeddings_and_head_may_have_rates_of_their_own(small_recipe, token_files, tmp_path):
    """Guards: a fraction that the schedule overwrites, or that reaches other parameters; a tied head with two rates."""
    found = []
    for i, fractions in enumerate(({}, {"embedding_rate_fraction": 0.25, "head_rate_fraction": 0.5})):
        training = dataclasses.replace(small_recipe.training, max_steps=1, warmup_steps=0, weight_decay=0.0,
                                       device="cpu", **fractions)
        recipe = dataclasses.replace(small_recipe, training=training)
        train_run(recipe, token_files["train"], token_files["val"], tmp_path / str(i))
        run = load_run(tmp_path / str(i), "latest")
        begun = dict(recipe.build_model(run.info["vocab_size"]).named_parameters())
        found.append({name: (p - begun[name]).detach() for name, p in run.model.named_parameters()})
    embeddings = {id(m.weight) for m in run.model.modules() if isinstance(m, torch.nn.Embedding)}
    factors, head = set(), run.model.unembedding.data_ptr()
    for name, p in run.model.named_parameters():
        factor = 0.25 if id(p) in embeddings else 0.5 if p.data_ptr() == head else 1.0
        torch.testing.assert_close(found[1][name], factor * found[0][name], rtol=1e-3, atol=1e-7)
        factors.add(factor)
    assert factors == ({0.25, 1.0} if small_recipe.model in ("gpt2", "gpt2_rope", "lstm") else {0.25, 0.5, 1.0})


def test_a_run_that_stops_and_continues_ends_with_the_same_bits(small_recipe, token_files, tmp_path):
    """Guards: a momentum that no checkpoint holds."""
    training = dataclasses.replace(small_recipe.training, keep_every=1, checkpoint_interval=1, device="cpu",
                                   **CHOICES["muon with norms"])
    recipe, weights = dataclasses.replace(small_recipe, training=training), []
    for from_step in (None, 4):
        train_run(recipe, token_files["train"], token_files["val"], tmp_path / "run", from_step=from_step)
        weights.append(dict(load_run(tmp_path / "run", "latest").model.named_parameters()))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_old_torch_without_muon_is_one_line(small_recipe, token_files, tmp_path, monkeypatch):
    """Guards: an AttributeError after the run folder has been begun."""
    monkeypatch.delattr(torch.optim, "Muon")
    recipe = dataclasses.replace(small_recipe, training=dataclasses.replace(small_recipe.training, optimizer="muon"))
    with pytest.raises(UserError, match=r"optimizer=muon needs torch 2.9 or newer; found 2\."):
        train_run(recipe, token_files["train"], token_files["val"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
