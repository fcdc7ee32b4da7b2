"""Options of BDH: each is off by default, and where it is on, all that holds for the published formula holds too."""

import dataclasses
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from plotarmour.cli import UserError
from plotarmour.config import DataConfig, Recipe, TrainingConfig, load_recipe
from plotarmour.loss import summed_nats
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.parts import powers
from plotarmour.models.tiled import Tiling
from plotarmour.run import load_run, train_run
from plotarmour.training.optimizer import progress_of

OPTIONS = {"depth_curriculum": {"depth_curriculum": "1:2:3"}, "decay": {"decay": 0.05},
           "weights_per_pass": {"weights_per_pass": True}, "tied_head": {"tied_head": True},
           "gain": {"residual": "gain"}, "gate": {"residual": "gate"}, "embedding": {"residual": "embedding"},
           "passes": {"residual": "passes"}, "differential": {"differential": True}}
each_option = pytest.mark.parametrize("option", OPTIONS)


def made(option, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    model = BDH(BDHConfig(3, 12, 2, 5, vocab_size=30, dropout=dropout, **OPTIONS[option])).double()
    with torch.no_grad():
        for parameter in model.parameters():  # learned numbers that begin at 0 or 1 are others later
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gradients_of(model, form, tiling=None):
    torch.manual_seed(5)
    inputs, targets = torch.randint(0, 30, (2, 3, 70))
    model.form, model.tiling = form, tiling
    model.zero_grad()
    loss = summed_nats(model.features(inputs)[0], model.unembedding, targets)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@each_option
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_parallel_tiled_and_recurrent_form_agree(option, dropout):
    """Guards: an option that one form does not have, or has otherwise; a factor missing in one gradient."""
    model = made(option, dropout)
    model.progress = 0.5
    expected = gradients_of(model, "parallel")
    for tiling in (None, Tiling(2, 8, 32), Tiling(1, 30, 13)):
        for name, found in gradients_of(model, "tiled", tiling).items():
            assert float((found - expected[name]).norm()) <= 1e-10 * float(expected[name].norm()), name
    model.eval()
    model.form, inputs = "parallel", torch.randint(0, 30, (2, 700))
    with torch.no_grad():
        expected = model.features(inputs)[0]
        model.form, state, pieces = "tiled", model.initial_state(2), []
        for piece in inputs.split([1, 1, 300, 1, 390, 7], dim=1):
            features, state = model.features(piece, state)
            pieces.append(features)
        for found in (torch.cat(pieces, 1), model.features(inputs)[0]):
            assert float((found - expected).norm()) <= 1e-9 * float(expected.norm())


@each_option
def test_a_mask_of_stories_keeps_each_as_it_is_alone(option):
    """Guards: an option that looks across the beginning of a story, in one form or from a state."""
    model = made(option).eval()
    one, two = torch.randint(1, 30, (1, 40)), torch.randint(1, 30, (1, 300))
    one[0, 0] = two[0, 0] = 0
    expected = model.features(two)[0]
    model.story_start = 0
    for form in ("parallel", "tiled"):
        model.form = form
        found = model.features(torch.cat((one, two), 1))[0][:, 40:]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        state = model.features(one, model.initial_state(1))[1]
        torch.testing.assert_close(model.features(two, state)[0], expected, rtol=1e-9, atol=1e-9)


@each_option
def test_gradcheck_passes(option):
    """Guards: a backward pass of the tiled form that is right only against the parallel one."""
    torch.manual_seed(0)
    model = made(option, dropout=0.25)
    names, parameters = zip(*model.named_parameters(), strict=True)
    inputs = torch.randint(0, 30, (2, 5))

    def features(*values):
        torch.manual_seed(1)  # dropout
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (inputs,))

    assert torch.autograd.gradcheck(features, tuple(p.detach().requires_grad_() for p in parameters), fast_mode=True)


@each_option
def test_no_feature_depends_on_a_later_token(option):
    """Guards: an option that looks ahead."""
    model = made(option)
    inputs = torch.arange(20)[None]
    for form in ("parallel", "tiled"):
        model.form = form
        model.zero_grad()
        (model.features(inputs)[0][0, 9] * torch.arange(12)).sum().backward()
        reach = model.embed.weight.grad.abs().sum(1)[:20]
        assert not reach[10:].any() and bool(reach[1:10].all())


@each_option
def test_parameters_and_flops_are_counted(option):
    """Guards: a table of a comparison that has the budget of another model."""
    model = made(option)
    config, inputs = model.config, torch.randint(0, 30, (2, 24))
    assert config.params == sum(p.numel() for p in model.parameters())
    tables = model.embed.weight.numel() + (model.lm_head.numel() if "lm_head" in dict(model.named_parameters()) else 0)
    assert config.core_params == config.params - tables
    model.form = "parallel"
    counted = []
    for step in range(6):
        model.progress = progress_of(step, TrainingConfig(24, 2, 2, 6, 1e-3))
        with FlopCounterMode(display=False) as counter:
            model(inputs).square().sum().backward()
        counted.append(counter.get_total_flops() / inputs.numel())
    assert sum(counted) / 6 == pytest.approx(config.training_flops_per_token(24), rel=1e-9)
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    assert counter.get_total_flops() == inputs.numel() * config.flops_per_token(24)


@each_option
def test_a_run_that_stops_and_continues_ends_with_the_same_bits(option, token_files, tmp_path):
    """Guards: a schedule of an option that starts anew, or learned numbers that no checkpoint holds."""
    shape = {"n_layer": 3, "n_embd": 16, "n_head": 2, "mlp_internal_dim_multiplier": 8, "dropout": 0.1}
    training = TrainingConfig(24, 2, 2, 6, 3e-3, warmup_steps=1, log_interval=1, eval_interval=6, eval_tokens=100,
                              checkpoint_interval=1, keep_every=1, device="cpu")
    recipe = Recipe("small", "bdh", DataConfig("bpe:400"), training, shape | OPTIONS[option])
    weights = []
    for from_step in (None, 4):
        train_run(recipe, token_files["train"], token_files["val"], tmp_path / "run", from_step=from_step)
        weights.append(dict(load_run(tmp_path / "run", "latest").model.named_parameters()))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@each_option
def test_without_the_option_the_model_is_the_published_one(option):
    """Guards: a default that is on; an option that has no effect."""
    inputs = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    model = made(option)
    off = {f.name: f.default for f in dataclasses.fields(BDHConfig) if f.name in OPTIONS[option]}
    plain = BDH(dataclasses.replace(model.config, **off)).double()
    published = plain.state_dict()
    assert set(published) == {"decoder", "encoder", "encoder_v", "embed.weight", "lm_head"}
    if {k: v.shape for k, v in published.items()} == {k: v.shape for k, v in model.state_dict().items()}:
        plain.load_state_dict(model.state_dict())
        model.progress = plain.progress = 0.4
        assert not torch.allclose(model(inputs), plain(inputs))


def test_a_curriculum_ends_in_the_models_depth_and_scores_use_all_of_it():
    """Guards: passes that training never used; a validation loss of a shallower model."""
    model, inputs = made("depth_curriculum"), torch.randint(0, 30, (1, 9))
    deep = model.eval()(inputs)
    model.train()
    for progress, is_deep in ((0.0, False), (0.66, False), (0.67, True), (1.0, True), (1.2, True)):
        model.progress = progress
        assert torch.equal(model(inputs), deep) is is_deep
    model.progress = 0.0
    assert torch.equal(model.eval()(inputs), deep)
    config = TrainingConfig(8, 1, 1, 10, 1e-3, schedule_minutes=10.0)
    assert progress_of(2, config, 0.0) == 0.2 and progress_of(2, config, 300.0) == 0.5


def test_the_initial_scale_is_that_of_the_three_matrices():
    """Guards: a scale that also reaches embeddings and head, which have another effect."""
    torch.manual_seed(0)
    model = BDH(BDHConfig(1, 64, 2, 4, vocab_size=64, init_std=0.5))
    for name, parameter in model.named_parameters():
        expected = 0.02 if name in ("embed.weight", "lm_head") else 0.5
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_a_decay_by_hand():
    """Guards: slopes that grow from head to head; a distance that is off by one."""
    decays = powers(BDH(BDHConfig(1, 16, 4, 2, decay=0.8)).decay, 3, torch.float64)
    expected = [[math.exp(-slope * distance) for distance in range(4)] for slope in (0.8, 0.4, 0.2, 0.1)]
    torch.testing.assert_close(decays, torch.tensor(expected, dtype=torch.float64))


def test_factors_of_passes_and_differences_by_hand():
    """Guards: a pass that begins with another input than the published one, or sees a later one; signs by halves."""
    model = BDH(BDHConfig(2, 4, 2, 4, residual="passes", differential=True))
    factors = model._residual()[..., 0].detach()
    assert factors.tolist() == [[1, 0, 1], [0, 1, 1]]  # on v before passes 1 and 2, and on what the pass computed
    with torch.no_grad():
        model.mix.copy_(torch.arange(1, 6).repeat_interleave(4))
    assert model._residual()[..., 0].tolist() == [[2, 0, 3], [3, 5, 6]]
    signs = model._signs()  # (passes, H, N)
    assert signs.shape == (2, 2, 8)
    torch.testing.assert_close(signs[1, 1], torch.tensor([1, 1, -0.2, -0.2] * 2))


def test_options_that_exclude_each_other_are_refused():
    """Guards: passes whose weights have never been trained."""
    with pytest.raises(UserError, match="weights_per_pass and depth_curriculum exclude each other"):
        load_recipe("tiny", "bdh", ["weights_per_pass=true", "depth_curriculum=1:2"])


@pytest.mark.parametrize("wrong", ["2:1", "1:3", "0:2", "a:2", "1,2", "1::2", ":"])
def test_impossible_options_are_refused_all_at_once(wrong):
    """Guards: a traceback in the middle of training; one complaint at a time."""
    with pytest.raises(UserError, match=r"n_head = 0 must be .*; init_std = nan must be .*; decay = -1.0 must .*; "
                       r"residual = x must .*; depth_curriculum = .* end in n_layer = 2\.$"):
        load_recipe("tiny", "bdh", [f"depth_curriculum={wrong}", "n_head=0", "init_std=nan", "decay=-1", "residual=x"])
