"""What both models owe: causality, a state that continues, dropout that can be turned off."""

import pytest
import torch

from plotarmour.loss import summed_nats


def test_no_feature_depends_on_a_later_token_by_gradient(small_model):
    """Guards: a GPT-2 without a causal mask; attention that includes the present token's own value twice."""
    small_model.double()
    table = (small_model.embed if hasattr(small_model, "embed") else small_model.hf.transformer.wte).weight
    inputs = torch.arange(12)[None]  # every position its own token, so its table row stands for the position
    for position in (0, 5, 10):
        small_model.zero_grad()
        features = small_model.features(inputs)[0][0, position]
        (features * torch.arange(16)).sum().backward()  # a plain sum over a layer norm is constant
        reach = table.grad.abs().sum(dim=1)[:12]
        assert torch.all(reach[position + 1:] == 0.0)
        assert torch.all(reach[1:position + 1] > 0.0)


def test_features_are_unchanged_by_later_tokens(small_model):
    """Guards: leaks through padding or normalisation over time."""
    small_model.eval()
    inputs = torch.randint(0, 50, (2, 30))
    other = inputs.clone()
    other[:, 20:] = (other[:, 20:] + 7) % 50
    torch.testing.assert_close(small_model.features(inputs)[0][:, :20], small_model.features(other)[0][:, :20])
    torch.testing.assert_close(small_model.features(inputs)[0][:, :20], small_model.features(inputs[:, :20])[0])


@torch.no_grad()
def test_a_state_carried_in_pieces_gives_the_features_of_the_whole(small_model):
    """Guards: positions that start anew, a present token read before it is written."""
    small_model.eval()
    inputs, pieces = torch.randint(0, 50, (3, 40)), []
    state = small_model.initial_state(3)
    for begin, end in ((0, 1), (1, 2), (2, 9), (9, 40)):
        features, state = small_model.features(inputs[:, begin:end], state)
        pieces.append(features)
    torch.testing.assert_close(torch.cat(pieces, dim=1), small_model.features(inputs)[0], rtol=1e-4, atol=1e-5)


def test_non_embedding_parameters_are_what_the_config_says(small_model):
    """Guards: a comparison of 19 M against 106 M parameters."""
    outside = ("embed", "lm_head", "wte", "wpe")
    counted = sum(p.numel() for name, p in small_model.named_parameters() if not any(o in name for o in outside))
    assert counted == small_model.config.non_embedding_params


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_float32(small_model, dtype):
    """Guards: scores that overflow float16 (a large encoder makes large ones), a loss that is summed in half."""
    if hasattr(small_model, "encoder"):
        small_model.encoder.data.mul_(1500.0)
    inputs = torch.randint(0, 50, (2, 60))
    exact = summed_nats(small_model.features(inputs[:, :-1])[0], small_model.unembedding, inputs[:, 1:])
    with torch.autocast("cpu", dtype=dtype):
        half = summed_nats(small_model.features(inputs[:, :-1])[0], small_model.unembedding, inputs[:, 1:])
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(float(exact.detach()), rel=0.03)
    half.backward()
    assert all(torch.isfinite(p.grad).all() for p in small_model.parameters())
