"""What every model owes: causality, a state that continues, branches and is saved, inputs that are refused by name."""

import dataclasses
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from plotarmour.loss import summed_nats
from plotarmour.models import check_ids


def draw(*shape):
    return torch.randint(0, 50, shape)


def embedding(model):
    """The table that token ids are looked up in."""
    return (model.embed if hasattr(model, "embed") else model.hf.get_input_embeddings()).weight


def read(model, inputs):
    """The state after `inputs`."""
    return model.features(inputs, model.initial_state(len(inputs)))[1]


def another(model, **changes):
    """An untrained model of the same kind and another shape."""
    return type(model)(dataclasses.replace(model.config, **changes))


def test_no_feature_depends_on_a_later_token_by_gradient(small_model):
    """Guards: a GPT-2 without a causal mask; attention that includes the present token's own value twice."""
    small_model.double()
    table = embedding(small_model)
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


@torch.no_grad()
def test_branches_of_a_story_continue_apart(small_model):
    """Guards: a copy that shares tensors with its origin, so that one branch writes into the other."""
    small_model.eval()
    begin, one, other = draw(2, 9), draw(2, 7), draw(2, 8)
    trunk = read(small_model, begin)
    branch = trunk.copy()
    assert branch.position == trunk.position == 9
    for state, rest in ((trunk, one), (branch, other)):
        for i in range(rest.shape[1]):
            features, state = small_model.features(rest[:, i:i + 1], state)
        whole = small_model.features(torch.cat((begin, rest), dim=1))[0]
        torch.testing.assert_close(features[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)
        assert state.position == 9 + rest.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("n_read", [0, 9])
def test_a_saved_state_goes_on_as_if_it_had_never_been_saved(small_model, n_read, tmp_path):
    """Guards: a forgotten position; tensors that share memory (safetensors refuses them); an empty state lost."""
    small_model.eval()
    state, rest = small_model.initial_state(2), draw(2, 6)
    if n_read:
        _, state = small_model.features(draw(2, n_read), state)
    save_file(state.tensors(), tmp_path / "state.safetensors")
    loaded = type(state).from_tensors(load_file(tmp_path / "state.safetensors"))
    assert loaded.position == state.position == n_read
    for tokens in (rest[:, :1], rest[:, 1:]):
        (found, loaded), (expected, state) = small_model.features(tokens, loaded), small_model.features(tokens, state)
        assert torch.equal(found, expected)


def test_a_detached_state_ends_the_gradient(small_model):
    """Guards: training by pieces whose memory grows with the text; a state whose history is lost unasked."""
    table = embedding(small_model)
    first, second = torch.arange(0, 10)[None], torch.arange(10, 20)[None]
    for detached in (False, True):
        small_model.zero_grad()
        state = read(small_model, first)
        values = {name: t.detach().clone() for name, t in state.tensors().items()}
        state = state.detach() if detached else state
        assert all(torch.equal(t, values[name]) for name, t in state.tensors().items())
        features, _ = small_model.features(second, state)
        (features * torch.arange(16)).sum().backward()  # a plain sum over a layer norm is constant
        assert bool(table.grad[:10].any()) is not detached and bool(table.grad[10:20].all())


@pytest.mark.parametrize(("inputs", "message"), [
    (torch.tensor([[3, 50]]), r"found id 50, expected ids in \[0, 50\)"),
    (torch.tensor([[3, -1]]), r"found id -1, expected ids in \[0, 50\)"),
    (torch.tensor([[3]], dtype=torch.int32), "found int32"),
    (torch.tensor([3]), r"expected int64 \(B, T\)"),
    (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
])
def test_inputs_that_are_no_ids_are_refused_by_name(small_model, inputs, message):
    """Guards: an index error, on a GPU a dead process, for tokens of another tokenizer."""
    small_model.eval()
    for state in (None, small_model.initial_state(1)):
        with pytest.raises(ValueError, match=message):
            small_model.features(inputs, state)


def test_values_of_ids_are_not_checked_in_training(small_model, monkeypatch):
    """Guards: a CPU that waits for the GPU in every micro-batch; a GPU process that ends at an id during scoring.

    A meta tensor stands for one on a GPU: its values cannot be fetched.
    """
    ids, called = torch.zeros(2, 3, dtype=torch.int64, device="meta"), []
    check_ids(ids, 50, in_training=True)
    with pytest.raises(NotImplementedError, match="no data"):
        check_ids(ids, 50)
    for wrong in (ids[0], ids.int()):  # shape and dtype are always checked
        with pytest.raises(ValueError, match="expected int64"):
            check_ids(wrong, 50, in_training=True)
    with pytest.raises(IndexError):  # on a CPU, torch's embedding checks ids itself
        small_model.train().features(torch.tensor([[3, 50]]))
    module = sys.modules[type(small_model).__module__]
    monkeypatch.setattr(module, "check_ids", lambda *args: called.append(args[1:]))
    for mode in (True, False):
        small_model.train(mode).features(draw(1, 2))
    assert called == [(50, True), (50, False)]


@torch.no_grad()
@pytest.mark.parametrize(("case", "message"), [
    ("another kind", "found dict, expected (BDH|Cache|LSTM)State .*; use a state of this model"),
    ("more layers", r"found (BDHState 3 .*, expected BDHState 2 |CacheState \(2, 3, .*expected CacheState \(2, 2, |"
                    r"LSTMState \(3, 2, 20\) .*expected LSTMState \(2, 2, 20\))"),
    ("another width", r"\((2, 2, 4, 4|2, 4, 32, 16|2, 2, 24)\).*expected .*\((2, 2, 2, 8|2, 2, 64, 16|2, 2, 20)\)"),
    ("another batch", r"\((2, 3|3), 2, .*expected .*\((2, 2|2), 2, .*batch size|\(2, 3, 20\).*expected .*\(2, 2, 20\)"),
    ("another dtype", r"\) torch.float64 cpu, expected .*\) torch.float32 cpu;"),
    ("another device", r"\) torch.float32 meta, expected .*\) torch.float32 cpu;"),
])
@pytest.mark.parametrize("n_read", [0, 5])
def test_a_state_that_does_not_fit_is_refused_by_name(small_model, case, message, n_read):
    """Guards: a broadcast that answers for the wrong story; half of the layers written when the first fault shows."""
    small_model.eval()
    width = {"n_head": 4} if hasattr(small_model.config, "n_head") else {"hidden_size": 24}
    made_for = {"more layers": another(small_model, n_layer=3), "another width": another(small_model, **width)}
    maker, batch = made_for.get(case, small_model).eval(), 3 if case == "another batch" else 2
    state = read(maker, draw(batch, n_read)) if n_read else maker.initial_state(batch)
    tensors = state.tensors()
    if case == "another kind":
        state = tensors
    elif case.startswith("another d"):
        change = {"dtype": torch.float64} if case == "another dtype" else {"device": "meta"}
        floats = {name: t.to(**change) for name, t in tensors.items() if t.is_floating_point()}
        if not floats:  # a cache that holds nothing yet has neither: it is as good as this model's own
            assert small_model.features(draw(2, 1), state)[1].position == 1
            return
        state = type(state).from_tensors(tensors | floats)
    with pytest.raises(ValueError, match=message) as refused:
        small_model.features(draw(2, 1), state)
    assert "\n" not in str(refused.value)
    if case in ("more layers", "another width", "another batch"):  # it is as good as before
        assert state.position == n_read
        assert all(torch.equal(t, tensors[name]) for name, t in state.tensors().items())


def test_core_parameters_are_what_the_config_says(small_model):
    """Guards: a comparison of 19 M against 106 M parameters."""
    outside = ("embed", "lm_head", "wte", "wpe")
    counted = sum(p.numel() for name, p in small_model.named_parameters() if not any(o in name for o in outside))
    assert counted == small_model.config.core_params


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_to_float32(small_model, dtype):
    """Guards: scores that overflow float16 (a large encoder makes large ones), a loss that is summed in half."""
    if hasattr(small_model, "encoder"):
        small_model.encoder.data.mul_(30.0 / float(small_model.encoder.detach().std()))
    inputs = torch.randint(0, 50, (2, 60))
    exact = summed_nats(small_model.features(inputs[:, :-1])[0], small_model.unembedding, inputs[:, 1:])
    with torch.autocast("cpu", dtype=dtype):
        half = summed_nats(small_model.features(inputs[:, :-1])[0], small_model.unembedding, inputs[:, 1:])
    assert half.dtype == torch.float32
    assert float(half.detach()) == pytest.approx(float(exact.detach()), rel=0.03)
    half.backward()
    assert all(torch.isfinite(p.grad).all() for p in small_model.parameters())
