import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from plotarmour.models.bdh import BDH, BDHConfig

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


def test_official_weights_give_the_official_logits_loss_and_gradients(reference):
    """Guards: any drift from the published formula. Reference: pathwaycom/bdh, commit 714bc80, float32."""
    model, tensors = reference
    assert relative(model(tensors["inputs"]).detach(), tensors["logits"]) < 1e-4
    loss = cross_entropy(model, tensors)
    assert float(loss.detach()) == pytest.approx(float(tensors["loss"]), rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, tensors[f"grad.{name}"]) < 1e-4, name


def test_five_updates_follow_the_official_losses(reference):
    """Guards: gradients that are right once, then drift. Losses before each AdamW(1e-3, weight_decay 0.1) update."""
    model, tensors = reference
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = cross_entropy(model, tensors)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(tensors["train_losses"].tolist(), rel=1e-5)


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
    model = BDH(BDHConfig(1, 8, 1, 8, 10, 0.0))
    cos, _ = model._rotation(1_000_000, 1, torch.device("cpu"))
    position, frequency = 1_000_000, 1.0 / (2 * torch.pi)  # the fastest pair turns by one radian per token
    cycles = torch.tensor(frequency, dtype=torch.float32).double() * position
    assert float(cos[0, 0]) == pytest.approx(float(torch.cos(cycles % 1.0 * 2 * torch.pi)), abs=1e-6)


@pytest.mark.parametrize("wrong", [{"n_layer": 0}, {"n_embd": 6, "n_head": 4, "mlp_internal_dim_multiplier": 1},
                                   {"dropout": 1.0}])
def test_impossible_shapes_are_refused_by_name(wrong):
    """Guards: an odd number of neurons per head, which fails deep inside the rotation."""
    with pytest.raises(ValueError, match="BDH: "):
        BDHConfig(**wrong)
