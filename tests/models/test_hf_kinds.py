"""The transformers behind one adapter: each is its class of `transformers`, with the stated size, tied or untied."""

import pytest
import torch

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.loss import summed_nats
from plotarmour.machine import Machine
from plotarmour.models import KINDS, build_model, model_config
from plotarmour.models.hf import HFModel
from plotarmour.models.hf_kinds import GPT2RopeConfig, MoEConfig
from plotarmour.training.step import accumulate

SMALL = {"n_layer": 2, "n_embd": 16, "n_head": 2}
HF_KINDS = {"gpt2": SMALL | {"dropout": 0.0}, "gpt2_rope": SMALL | {"dropout": 0.0},
            "llama": SMALL | {"intermediate_size": 24}, "modern": SMALL,
            "moe": SMALL | {"intermediate_size": 12, "n_experts": 4}}


def small(kind, **changes):
    return build_model(kind, model_config(kind, HF_KINDS[kind] | changes, vocab_size=50, context_length=64), seed=0)


@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("kind", HF_KINDS)
def test_the_loss_is_that_of_the_class_of_transformers(kind, tied_head):
    """Guards: targets shifted twice; a cap on logits that `features @ unembedding` leaves out; another head."""
    model, ids = small(kind, tied_head=tied_head).eval(), torch.randint(0, 50, (3, 40))
    model.hf.loss_type = "ForCausalLM"
    expected = model.hf(input_ids=ids, labels=ids).loss
    found = summed_nats(model.features(ids[:, :-1])[0], model.unembedding, ids[:, 1:]) / (3 * 39)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    is_tied = model.unembedding is model.hf.get_input_embeddings().weight
    assert is_tied is tied_head and model.config.params == sum(p.numel() for p in model.parameters())


def test_the_recipe_laptop_gives_all_kinds_the_core_parameters_of_bdh():
    """Guards: a comparison of unequal models. By hand, with D = 128:

    GPT-2, with learned or rotary positions: 4 · (12·128² + 13·128) + 2·128. Llama: 4 · (4·128² + 3·128·341 + 2·128) +
    128. Modern: 4 · 12·128². A mixture, for one token: 4 · (4·128² + 2·3·128·170 + 8·128 + 2·128) + 128. LSTM: 4·230 ·
    (128 + 230) + 4·230 · (230 + 230) + 230·128 + 2 · 8·230.
    """
    configs = {kind: load_recipe("laptop", kind).model_config(4096) for kind in KINDS}
    core = {kind: config.core_params for kind, config in configs.items()}
    assert core == {"bdh": 786_432, "bdh_plus": 2 * 3 * 8 * 128**2 + 4, "gpt2": 793_344, "gpt2_rope": 793_344,
                    "llama": 787_072, "modern": 786_432, "moe": 2_356_352, "lstm": 785_680}
    assert configs["moe"].weights_per_token == 789_632 == core["moe"] - 4 * 6 * 3 * 128 * 170
    assert configs["modern"].params == configs["bdh"].params == 786_432 + 2 * 4096 * 128


@torch.no_grad()
@pytest.mark.parametrize("kind", HF_KINDS)
def test_decay_weakens_attention_by_distance(kind):
    """Guards: a decay that a class ignores, or counts from the wrong token with a cache."""
    model, plain, ids = small(kind, decay=0.5).eval(), small(kind).eval(), torch.randint(0, 50, (3, 40))
    features = model.features(ids)[0]
    assert float((features - plain.features(ids)[0])[:, 1:].abs().max()) > 1e-3
    state, pieces = model.initial_state(3), []
    for piece in ids.split([7, 1, 32], dim=1):
        part, state = model.features(piece, state)
        pieces.append(part)
    torch.testing.assert_close(torch.cat(pieces, 1), features, rtol=1e-4, atol=1e-5)
    alone, other = small(kind, decay=1000.0).eval(), (ids + 1) % 50  # e^-500 is no weight: a token sees itself only
    other[:, -1] = ids[:, -1]
    torch.testing.assert_close(alone.features(ids)[0][:, -1], alone.features(other)[0][:, -1])


@pytest.mark.parametrize("kind", HF_KINDS)
def test_every_row_of_the_embedding_is_trained(kind):
    """Guards: a class of `transformers` that takes an id for padding, and never trains its row."""
    model, ids = small(kind, tied_head=False), torch.arange(50)[None]
    model.features(ids)[0].square().sum().backward() if kind != "modern" else (
        model.features(ids)[0] * torch.arange(16)).sum().backward()  # the squares of a plain RMSNorm are constant
    weight = model.hf.get_input_embeddings().weight
    assert bool((weight.detach().abs().sum(1) > 0).all()) and bool((weight.grad.abs().sum(1) > 0).all())


@torch.no_grad()
def test_gpt2_rope_differs_from_gpt2_in_positions_only():
    """Guards: GPT-NeoX's own defaults: parallel residuals, a quarter of rotation, no scaled initialization."""
    model = HFModel(GPT2RopeConfig(8, 64, 4, vocab_size=50, dropout=0.0)).eval()
    hf, inputs = model.hf.config, torch.randint(0, 50, (1, 12))
    assert not hf.use_parallel_residual and hf.rope_parameters["partial_rotary_factor"] == 1.0
    assert model.context_length is None
    layer = model.hf.gpt_neox.layers[0]
    for into_residual, other in ((layer.attention.dense, layer.attention.query_key_value),
                                 (layer.mlp.dense_4h_to_h, layer.mlp.dense_h_to_4h)):
        assert float(into_residual.weight.std()) == pytest.approx(0.02 / 4, rel=0.1)
        assert float(other.weight.std()) == pytest.approx(0.02, rel=0.1)
    at_7 = model.hf.base_model(input_ids=inputs, position_ids=torch.arange(7, 19)[None]).last_hidden_state
    torch.testing.assert_close(at_7, model.features(inputs)[0], rtol=1e-4, atol=1e-5)  # rotary positions are relative


@torch.no_grad()
def test_a_mixture_routes_each_token_by_itself():
    """Guards: experts with a limit of tokens, where a story's features depend on the other rows of its batch."""
    model, inputs = small("moe").eval(), torch.randint(0, 50, (4, 30))
    together = model.features(inputs)[0]
    for i in range(4):
        torch.testing.assert_close(model.features(inputs[i:i + 1])[0][0], together[i], rtol=1e-4, atol=1e-5)


def test_the_balance_of_experts_is_learned_and_not_reported():
    """Guards: experts that are never used; a balance loss that counts as loss, or that two micro-batches halve."""
    inputs, cpu = torch.randint(0, 50, (4, 12)), Machine(torch.device("cpu"), torch.float32, "asked for", "")
    scaler, gradients, losses = torch.amp.GradScaler("cpu", enabled=False), {}, {}
    for weight in (0.0, 0.5):
        model = small("moe", balance_loss=weight)
        losses[weight] = accumulate(model, [(inputs, inputs)], cpu, scaler)
        gradients[weight] = {name: p.grad for name, p in model.named_parameters()}
    assert losses[0.0] == losses[0.5]
    model = small("moe", balance_loss=0.5)
    out = model.hf(input_ids=inputs, output_router_logits=True)
    (0.5 * out.aux_loss).backward()
    for name, parameter in model.named_parameters():
        expected = gradients[0.0][name] + (0.0 if parameter.grad is None else parameter.grad)
        torch.testing.assert_close(gradients[0.5][name], expected, rtol=1e-3, atol=1e-6)
    assert float(model.hf.model.layers[0].mlp.gate.weight.grad.abs().sum()) > 0
    with torch.no_grad():
        model.features(inputs)
        assert model.penalty is None


def test_all_that_is_wrong_with_a_shape_is_said_at_once():
    """Guards: one complaint per start; an option of a kind that does not have it, which is then ignored."""
    with pytest.raises(ValueError, match="n_layer = 0 must be at least 1; n_embd = 15 must be divisible by n_head = 2; "
                                         "active_experts = 9 must be at most n_experts = 8; balance_loss = -1.0 must "):
        MoEConfig(n_layer=0, n_embd=15, n_head=2, active_experts=9, balance_loss=-1.0)
    with pytest.raises(UserError, match=r"--set residual=gain: expected key=value with a known key"):
        load_recipe("tiny", "llama", ["residual=gain"])
    with pytest.raises(UserError, match="tied_head = 'no' is not true or false"):
        load_recipe("tiny", "llama", ["tied_head=no"])
    assert load_recipe("tiny", "llama", ["tied_head=True"]).architecture["tied_head"] is True
    assert load_recipe("tiny", "gpt2", ["tied_head=false"]).architecture["tied_head"] is False


def test_a_transformers_without_the_class_is_refused_by_version(monkeypatch):
    """Guards: an AttributeError inside `transformers` below 5.0, which has no NanoChat."""
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(UserError, match=r"recipe tiny \(modern\): found transformers 4.57.1, expected 5.0 or newer"):
        load_recipe("tiny", "modern").build_model(50)
