"""Reading from left to right: the formula's numbers at any length, from a state of constant size."""

import pytest
import torch
from watch import LargestTensor

from benchmarks.generation import activity
from plotarmour.loss import summed_nats
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.rotary import Rotation
from plotarmour.models.tiled import Weights, normalize


def made(dtype=torch.float32, dropout=0.0, n_layer=2, n_embd=16, n_head=2, multiplier=8, firing=0.5):
    """A model where about the share `firing` of x is positive."""
    torch.manual_seed(0)
    model = BDH(BDHConfig(n_layer, n_embd, n_head, multiplier, vocab_size=30, dropout=dropout)).to(dtype).eval()
    model.encoder.data.mul_(10.0)
    if firing < 0.5:  # most neurons see a column that no v of this model makes positive
        silent = torch.rand(model.encoder.shape[2], generator=torch.Generator().manual_seed(1)) > 2 * firing
        model.encoder.data[:, :, silent] = 0.0
    return model


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_reading_4096_tokens_is_the_formula(dtype, within):
    """Guards: drift over a long text; a token that reads itself; positions that start anew with every chunk."""
    model = made(dtype)
    inputs = torch.randint(0, 30, (1, 4096))
    model.form = "parallel"
    expected = model.features(inputs)[0]
    model.form = "tiled"
    assert relative(model.features(inputs)[0], expected) < within  # without a state of ours: by chunks all the same
    state, found = model.initial_state(1), []
    for piece in inputs.split([1, 1, 300, 2, 1792, 1500, 499, 1], dim=1):
        features, state = model.features(piece, state)
        found.append(features)
    assert state.position == 4096
    assert relative(torch.cat(found, 1), expected) < within


@torch.no_grad()
def test_token_by_token_is_the_formula_for_each_story_of_a_batch():
    """Guards: stories of a batch that read each other's past; neurons that are silent."""
    for firing in (0.5, 0.05):
        model = made(torch.float64, firing=firing)
        inputs, found = torch.randint(0, 30, (3, 40)), []
        model.form = "parallel"
        expected = model.features(inputs)[0]
        model.form, state = "tiled", model.initial_state(3)
        for token in inputs.split(1, dim=1):
            features, state = model.features(token, state)
            found.append(features)
        assert relative(torch.cat(found, 1), expected) < 1e-12


@torch.no_grad()
def test_new_weights_are_noticed_by_the_kept_copies():
    """Guards: decoding with encoder_v as it was before an update."""
    model, token = made(firing=0.05), torch.tensor([[3]])
    first = model.features(token, model.features(token, model.initial_state(1))[1])[0]
    model.encoder_v.mul_(-1.0)
    second = model.features(token, model.features(token, model.initial_state(1))[1])[0]
    model.form = "parallel"
    torch.testing.assert_close(second, model.features(torch.tensor([[3, 3]]))[0][:, 1:])
    assert not torch.allclose(first, second)


def test_dropout_is_the_same_in_every_form():
    """Guards: masks by order of work instead of by place."""
    model, inputs, found = made(torch.float64, dropout=0.3).train(), torch.randint(0, 30, (2, 700)), {}
    for form in ("parallel", "tiled"):
        model.form = form
        torch.manual_seed(3)
        found[form] = model.features(inputs)[0].detach()
    with torch.no_grad():
        torch.manual_seed(3)
        found["recurrent"], _ = model.features(inputs, model.initial_state(2))
        torch.manual_seed(3)
        found["without a state"], _ = model.features(inputs)
    for form in found:
        assert relative(found[form], found["parallel"]) < 1e-10, form
    later = {}
    for form in ("parallel", "tiled"):  # from a state on, places go on too
        model.form = form
        with torch.no_grad():
            torch.manual_seed(4)
            _, state = model.features(inputs, model.initial_state(2))
            later[form], _ = model.features(inputs[:, :9], state)
    assert relative(later["tiled"], later["parallel"]) < 1e-10


def test_gradients_flow_through_a_state_until_it_is_detached():
    """Guards: training by pieces that silently forgets, or does not stop at the cut."""
    model = made(torch.float64)
    inputs, targets = torch.randint(0, 30, (2, 2, 50))

    def gradient(cut):
        model.zero_grad()
        first, state = model.features(inputs[:, :30], model.initial_state(2))
        second, _ = model.features(inputs[:, 30:], state.detach() if cut else state)
        summed_nats(torch.cat([first, second], 1), model.unembedding, targets).backward()
        return model.encoder.grad.clone()

    through = gradient(cut=False)
    model.zero_grad()
    summed_nats(model.features(inputs)[0], model.unembedding, targets).backward()
    assert relative(through, model.encoder.grad) < 1e-10
    assert relative(gradient(cut=True), through) > 1e-3


@torch.no_grad()
def test_activity_is_what_a_count_by_hand_gives():
    """Guards: a share over the wrong total, a pair counted as two, in the benchmark that counts active neurons."""
    model, inputs = made(n_layer=1, firing=0.2), torch.randint(0, 30, (2, 9))
    v = normalize(model.embed(inputs))[0]
    (found,) = activity(v, Weights(model.encoder, model.encoder_v, model.decoder), 1, Rotation(64))
    x = torch.relu(v.unsqueeze(1) @ model.encoder)
    assert found["x"] == pytest.approx(float((x > 0).float().mean()))
    assert found["pairs"] == pytest.approx(float(((x[..., 0::2] > 0) | (x[..., 1::2] > 0)).float().mean()))
    assert found["xy"] <= min(found["x"], found["y"]) and found["x"] <= found["pairs"] <= 2 * found["x"]
    assert 0.05 < found["x"] < 0.35


@torch.no_grad()
def test_reading_a_long_prompt_holds_no_scores_of_all_its_tokens():
    """Guards: (T, T) scores, 4 GB for 32,768 tokens."""
    model, T = made(), 3000
    for state in (model.initial_state(1), None):
        with LargestTensor() as largest:
            model.features(torch.randint(0, 30, (1, T)), state)
        assert largest.elements <= T * 16  # its features
