import json
import math

import pytest
import torch
import torch.nn.functional as F
from published_bdh import PublishedBDH
from safetensors.torch import load_file

from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.rotary import Rotation, rotate

CASES = ("small", "wide", "deep")


@pytest.fixture(params=CASES)
def reference(request, shared):
    cases = json.loads((shared / "reference" / "cases.json").read_text())
    case = next(c for c in cases if c["name"] == request.param)
    tensors = load_file(shared / "reference" / f"bdh_{request.param}.safetensors")
    model = BDH(BDHConfig(case["n_layer"], case["n_embd"], case["n_head"], case["mlp_internal_dim_multiplier"],
                          case["vocab_size"], dropout=0.0))
    weights = {name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")}
    model.load_state_dict(weights, strict=True)
    return model, tensors


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def cross_entropy(model, tensors):
    return F.cross_entropy(model(tensors["inputs"]).flatten(0, 1), tensors["targets"].flatten())


@pytest.mark.parametrize("form", ["parallel", "tiled"])
@pytest.mark.parametrize(("n_layer", "n_embd", "n_head", "multiplier"), [(2, 16, 2, 8), (3, 12, 1, 4), (1, 16, 4, 16)])
def test_random_weights_give_the_published_logits_loss_and_gradients(form, n_layer, n_embd, n_head, multiplier):
    """Guards: any drift from the published formula, in a clone without the official reference tensors."""
    torch.manual_seed(0)
    model = BDH(BDHConfig(n_layer, n_embd, n_head, multiplier, vocab_size=40, dropout=0.0))
    model.form = form
    published = PublishedBDH(n_layer, n_embd, n_head, multiplier, vocab_size=40)
    published.load_state_dict(model.state_dict(), strict=True)
    tensors = dict(zip(("inputs", "targets"), torch.randint(0, 40, (2, 2, 70)), strict=True))
    assert relative(model(tensors["inputs"]).detach(), published(tensors["inputs"]).detach()) < 1e-4
    losses = [cross_entropy(each, tensors) for each in (model, published)]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-5)
    for loss in losses:
        loss.backward()
    expected = dict(published.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[name].grad) < 1e-4, name


@pytest.mark.parametrize("form", ["parallel", "tiled"])
def test_official_weights_give_the_official_logits_loss_and_gradients(reference, form):
    """Guards: any drift from the published formula. Reference: pathwaycom/bdh, commit 714bc80, float32."""
    model, tensors = reference
    model.form = form
    assert relative(model(tensors["inputs"]).detach(), tensors["logits"]) < 1e-4
    loss = cross_entropy(model, tensors)
    assert float(loss.detach()) == pytest.approx(float(tensors["loss"]), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, tensors[f"grad.{name}"]) < 1e-5, name


@torch.no_grad()
def test_official_weights_give_the_official_logits_from_the_state(reference):
    """Guards: a recurrent form that agrees with our own formula only."""
    model, tensors = reference
    inputs = tensors["inputs"]
    state, logits = model.initial_state(len(inputs)), []
    for token in inputs.split(1, dim=1):
        features, state = model.features(token, state)
        logits.append(features @ model.unembedding.T)
    assert relative(torch.cat(logits, 1), tensors["logits"]) < 1e-4


@pytest.mark.parametrize("form", ["parallel", "tiled"])
def test_five_updates_follow_the_official_losses(reference, form):
    """Guards: gradients that are right once, then drift. Losses before each AdamW(1e-3, weight_decay 0.1) update.

    In float64: AdamW gives a gradient that is near zero by chance a full step by its sign, so rounding in float32
    alone comes to 2e-5 of the loss within five updates of the deep case, 1e-7 in float64.
    """
    model, tensors = reference
    model.form = form
    model.double()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = cross_entropy(model, tensors)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(tensors["train_losses"].tolist(), rel=1e-6)


@torch.no_grad()
def test_greedy_continuations_from_the_state_are_the_official_ones(reference):
    """Guards: a recurrent form that drifts over 40 tokens. A flip is excused only where two logits lie within 1e-4."""
    model, tensors = reference
    greedy = tensors["greedy"]
    features, state = model.features(greedy[:, :8], model.initial_state(len(greedy)))
    for position in range(8, greedy.shape[1]):
        logits = features[:, -1] @ model.unembedding.T
        best, expected = logits.max(dim=-1).values, logits.gather(1, greedy[:, position:position + 1])[:, 0]
        assert torch.all(best - expected < 1e-4)
        features, state = model.features(greedy[:, position:position + 1], state)


def test_official_checkpoints_with_their_frequency_buffer_load():
    """Guards: an upstream state dict that is refused for its extra `attn.freqs`."""
    model = BDH(BDHConfig(1, 8, 1, 2, 10, 0.0))
    state = model.state_dict() | {"attn.freqs": torch.zeros(1, 1, 1, 16)}
    model.load_state_dict(state, strict=True)
    assert set(model.state_dict()) == {"decoder", "encoder", "encoder_v", "embed.weight", "lm_head"}


def test_positions_far_out_rotate_as_exactly_as_near_ones():
    """Guards: phases multiplied in float32, which are off by 1e-2 cycles at position 10^6."""
    cpu, rotation = torch.device("cpu"), Rotation(64)
    frequency = torch.tensor(1.0 / (2 * torch.pi), dtype=torch.float32).double()  # the fastest pair: a radian per token
    for start, length in ((1_000_000, 1), (999_700, 301)):
        factors = rotation.table(start, length, cpu, torch.float32)
        angle = frequency * 1_000_000 % 1.0 * 2 * torch.pi
        assert complex(factors[-1, 0]) == pytest.approx(complex(torch.cos(angle), torch.sin(angle)), abs=1e-6)


def test_a_table_is_made_once_for_each_precision():
    """Guards: cosines of 4 million numbers at every pass; a float64 table handed to a float32 model."""
    rotation, cpu = Rotation(16), torch.device("cpu")
    for dtype, exact in ((torch.float64, torch.complex128), (torch.float32, torch.complex64)):
        table = rotation.table(0, 20, cpu, dtype)
        assert table.dtype == exact and table.shape == (20, 8)
        assert rotation.table(0, 256, cpu, dtype).data_ptr() == table.data_ptr()


def test_a_rotation_turns_pairs_by_the_published_frequencies():
    """Guards: pairs that are not adjacent, theta other than 2^16.

    Position 3, neurons (2, 3) of 8: 3 · (2^16)^(-2 / 8) = 3 / 16 radians.
    """
    factors = Rotation(8).table(0, 4, torch.device("cpu"), torch.float64)
    turned = rotate(torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64), factors)[3]
    expected = [0, 0, math.cos(3 / 16), math.sin(3 / 16), 0, 0, 0, 0]
    torch.testing.assert_close(turned, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"n_layer": 0, "n_head": -1, "dropout": 1.0},
     r"n_layer = 0 must be at least 1; n_head = -1 must be at least 1; dropout = 1.0 must be in \[0, 1\)"),
    ({"n_embd": 6, "n_head": 4, "mlp_internal_dim_multiplier": 1}, "= 6 must be divisible by 2 · n_head = 8")])
def test_impossible_shapes_are_refused_by_name(wrong, message):
    """Guards: an odd number of neurons per head, which fails deep inside the rotation; one complaint at a time."""
    with pytest.raises(ValueError, match=message):
        BDHConfig(**wrong)
