import math

import pytest
import torch
import torch.nn.functional as F

import plotarmour.loss
from plotarmour.loss import IGNORE, _SummedNats, summed_nats, token_nats


@pytest.fixture
def case():
    torch.manual_seed(0)
    features = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    unembedding = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (3, 7))
    targets[0, 4:] = IGNORE
    return features, unembedding, targets


@pytest.mark.parametrize("chunk", [1, 4 * 11, 2**25])
def test_value_and_gradients_equal_cross_entropy_in_any_chunking(case, chunk, monkeypatch):
    """Guards: padding that costs nats, a gradient that forgets a chunk."""
    monkeypatch.setattr(plotarmour.loss, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(plotarmour.loss, "SMALL_CHUNK_LOGITS", chunk)
    features, unembedding, targets = case
    expected = F.cross_entropy((features @ unembedding.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                               reduction="sum")
    wanted = torch.autograd.grad(expected * 0.3, (features, unembedding))
    found = summed_nats(features, unembedding, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found * 0.3, (features, unembedding)), wanted)
    torch.testing.assert_close(token_nats(features, unembedding, targets).sum(), expected.detach())


def test_rows_that_cost_nothing_are_masked_as_they_are_left_out(case):
    """Guards: a GPU, which masks padded rows, and a CPU, which leaves them out, that train differently."""
    features, unembedding, targets = case
    with torch.no_grad():
        features[0, 5] = torch.inf  # of padding: nobody reads it
    left_out = summed_nats(features, unembedding, targets)
    masked = _SummedNats.apply(features.flatten(0, 1), unembedding, targets.flatten(), True, True)
    torch.testing.assert_close(masked, left_out)
    torch.testing.assert_close(torch.autograd.grad(masked, (features, unembedding)),
                               torch.autograd.grad(left_out, (features, unembedding)))


def test_padding_alone_costs_nothing_and_teaches_nothing(case):
    """Guards: a batch without a single target that is an error."""
    features, unembedding, targets = case
    nothing = summed_nats(features, unembedding, targets.fill_(IGNORE))
    assert nothing.item() == 0
    assert all(not grad.any() for grad in torch.autograd.grad(nothing, (features, unembedding)))
    assert not token_nats(features, unembedding, targets).any()


def test_gradcheck_passes(case):
    """Guards: a hand-written backward pass that is wrong where nobody looks."""
    features, unembedding, targets = case
    assert torch.autograd.gradcheck(lambda f, u: summed_nats(f, u, targets), (features, unembedding))


def test_equal_logits_cost_ln_of_the_vocabulary_each():
    """Guards: base 2 taken for base e."""
    nats = summed_nats(torch.zeros(1, 3, 4), torch.ones(8, 4), torch.tensor([[1, 2, IGNORE]]))
    assert float(nats) == pytest.approx(2 * math.log(8))
