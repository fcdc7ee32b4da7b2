"""The tiled form against the published formula: same numbers, none of its memory."""

import random

import pytest
import torch
from watch import LargestTensor

from plotarmour.loss import summed_nats
from plotarmour.models import tiled
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.dropout import CounterDropout
from plotarmour.models.rotary import Rotation
from plotarmour.models.tiled import Passes, Setting, Tiling, Weights


def made(n_layer=2, n_embd=12, n_head=2, multiplier=5, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    model = BDH(BDHConfig(n_layer, n_embd, n_head, multiplier, vocab_size=30, dropout=dropout)).to(dtype)
    model.encoder.data.mul_(5.0)
    return model


def everything(model, form, inputs, targets, tiling=None, loss_scale=1.0):
    """Loss, features and every gradient; dropout from one seed."""
    torch.manual_seed(7)
    model.form, model.tiling = form, tiling
    model.zero_grad()
    features = model.features(inputs)[0]
    loss = summed_nats(features, model.unembedding, targets) / targets.numel()
    (loss * loss_scale).backward()
    return {"loss": loss.detach(), "features": features.detach()} | {
        name: p.grad / loss_scale for name, p in model.named_parameters()}


def assert_same(found, expected, within):
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= within * float(value.norm()), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("T", [1, 2, 3, 7, 13, 64, 127, 128, 129, 251, 256, 383, 512, 599, 600])
def test_tiled_is_parallel_in_float64(T, dropout):
    """Guards: a tile or block too many at an edge, a mask that depends on the tiling, a factor in one gradient.

    N = 30; tilings drawn anew for every T: of neurons 2 to 34, none divides N but by chance.
    """
    draw = random.Random(T)
    model = made(dropout=dropout)
    inputs, targets = torch.randint(0, 30, (2, 3, T))
    expected = everything(model, "parallel", inputs, targets)
    for _ in range(3):
        tiling = Tiling(draw.randint(1, 4), 2 * draw.randint(1, 17), draw.choice([1, 5, 32, 128, 1000]) if T < 100
                        else draw.choice([37, 128, 1000]))
        assert_same(everything(model, "tiled", inputs, targets, tiling), expected, 1e-10)
    assert_same(everything(model, "tiled", inputs, targets), expected, 1e-10)


def test_gradcheck_passes():
    """Guards: an own backward pass that is right only against itself."""
    torch.manual_seed(0)
    B, T, D, H, N = 2, 5, 4, 2, 6
    setting = Setting(Rotation(N).table(0, T, torch.device("cpu"), torch.float64),
                      CounterDropout(0.25, 11, N, torch.device("cpu")), Tiling(1, 4, 2))
    shapes = (B, T, D), (H, D, N), (H, D, N), (H * N, D)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: Passes.apply(*t, None, None, 2, torch.float64, setting), tensors)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_tensor_of_batch_heads_time_and_neurons_lives(dropout):
    """Guards: one convenient product over all heads, which at batch 16 × context 1,024 takes 2 GB each time."""
    B, T, H = 3, 100, 4
    model = made(n_embd=16, n_head=H, multiplier=64, dropout=dropout, dtype=torch.float32)
    N = model.config.neurons_per_head
    inputs, targets = torch.randint(0, 30, (2, B, T))
    sizes = {}
    for form in ("parallel", "tiled"):
        with LargestTensor() as largest:
            everything(model, form, inputs, targets)
        sizes[form] = largest.elements
    assert sizes["parallel"] >= B * H * T * N  # the watch sees it where it is
    assert sizes["tiled"] <= max(T * N, H * T * T * B, H * N * 16)


def test_a_scale_on_the_scores_changes_nothing(monkeypatch):
    """Guards: a scale without its share in LN's epsilon. In float64, where the scale is not needed."""
    model = made()
    model.encoder.data.div_(200.0)  # small scores, so that epsilon counts
    inputs, targets = torch.randint(0, 30, (2, 2, 40))
    expected = everything(model, "parallel", inputs, targets)
    monkeypatch.setattr(Weights, "score_scale", 2.0**-6)
    assert_same(everything(model, "tiled", inputs, targets), expected, 1e-10)
    monkeypatch.setattr(tiled, "EPS", 1e-3)  # and epsilon does count
    assert abs(float(everything(model, "tiled", inputs, targets)["loss"] - expected["loss"])) > 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_half_precision_follows_float32_where_plain_scores_overflow(dtype, dropout):
    """Guards: inf - inf in the scores; sums over tiles in half precision. Scores here reach 5·10^5, float16 65,504."""
    model = made(n_embd=32, multiplier=16, dropout=dropout, dtype=torch.float32)
    model.encoder.data.mul_(100.0)
    inputs, targets = torch.randint(0, 30, (2, 2, 100))
    exact = everything(model, "tiled", inputs, targets)
    x = torch.relu(torch.nn.functional.layer_norm(model.embed(inputs), (32,)).unsqueeze(1) @ model.encoder)
    assert float((x @ x.mT).detach().max()) > 4e5
    with torch.autocast("cpu", dtype=dtype):
        half = everything(model, "tiled", inputs, targets, Tiling(1, 50, 32), loss_scale=2.0**14)  # as GradScaler does
    assert all(t.dtype == torch.float32 for t in half.values())
    assert_same(half, exact, {torch.float16: 0.02, torch.bfloat16: 0.15}[dtype])


def test_the_loop_draws_the_same_dropout_again_for_a_seed_and_another_for_the_next():
    """Guards: one mask for a whole run, or one that a resumed run cannot draw again."""
    model, inputs = made(dropout=0.5), torch.randint(0, 30, (2, 20))

    def features(seed):
        torch.manual_seed(seed)
        return model.features(inputs)[0].detach()

    assert torch.equal(features(1), features(1))
    assert not torch.allclose(features(1), features(2))
    model.eval()
    assert torch.equal(features(1), features(2))
