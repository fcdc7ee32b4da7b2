"""Rows of several stories with a mask: every story has the features and gradients that it has alone."""

import pytest
import torch

from plotarmour.loss import IGNORE, summed_nats
from plotarmour.models import recurrent
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.hf import HFModel
from plotarmour.models.hf_kinds import GPT2Config
from plotarmour.models.tiled import Tiling

START = 0


def stories(*lengths):
    """Inputs of stories, each of which begins with `START`."""
    return [torch.cat((torch.tensor([START]), torch.randint(1, 30, (n,)))) for n in lengths]


def packed(width=40):
    """A batch (3, width), and its stories as (row, begin, end): packed; one that begins within a story; padded."""
    torch.manual_seed(1)
    inputs, found = torch.full((3, width), START), []
    for row, (at, pieces) in enumerate(((0, stories(7, 0, 11, 9)), (0, [torch.randint(1, 30, (13,)), *stories(21)]),
                                        (width - 19, stories(18)))):
        for piece in pieces:
            inputs[row, at:at + len(piece)] = piece
            found.append((row, at, at := at + len(piece)))
    return inputs, found


def learn(model, inputs, targets):
    """Features of the scored tokens (n, D), and the gradients of their nats."""
    model.zero_grad()
    features = model.features(inputs)[0]
    summed_nats(features, model.unembedding, targets).backward()
    return features[targets != IGNORE].detach(), {n: p.grad.clone() for n, p in model.named_parameters()
                                                  if p.grad is not None}


def together_and_alone(model, width=40):
    inputs, found = packed(width)
    targets = torch.full(inputs.shape, IGNORE)
    for row, begin, end in found:
        targets[row, begin:end] = torch.randint(1, 30, (end - begin,))
    together = learn(model, inputs, targets)
    alone = [learn(model, inputs[row:row + 1, begin:end], targets[row:row + 1, begin:end])
             for row, begin, end in found]
    return together, (torch.cat([features for features, _ in alone]),
                      {name: sum(gradients[name] for _, gradients in alone) for name in together[1]})


def assert_equal(together, alone):
    torch.testing.assert_close(together[0], alone[0], rtol=1e-6, atol=1e-8)
    for name, gradient in alone[1].items():
        torch.testing.assert_close(together[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)


def test_packed_and_masked_stories_are_learned_as_if_alone(small_model):
    """Guards: a mask that is silently off; positions that go on; padding that is read; a state beyond a border."""
    small_model.double().train()
    together, alone = together_and_alone(small_model)
    assert not torch.allclose(together[0], alone[0], rtol=1e-3)
    small_model.story_start = START
    assert_equal(*together_and_alone(small_model))


def test_a_transformers_mask_is_made_once_for_all_heads_and_layers():
    """Guards: a mask for each head, which takes as many times the memory and a tenth of a small model's step."""
    model = HFModel(GPT2Config(n_layer=3, n_embd=8, n_head=4, vocab_size=30, context_length=40))
    model.story_start, masks = START, []
    for block in model.hf.base_model.h:
        block.attn.register_forward_pre_hook(lambda _, args, kwargs: masks.append(kwargs["attention_mask"]),
                                             with_kwargs=True)
    model.features(packed()[0])
    assert [mask.shape for mask in masks] == [(3, 1, 40, 40)] * 3 and len({mask.data_ptr() for mask in masks}) == 1


def bdh():
    torch.manual_seed(0)
    model = BDH(BDHConfig(2, 12, 2, 5, vocab_size=30, dropout=0.0)).double()
    model.encoder.data.mul_(5.0)
    model.story_start = START
    return model


@pytest.mark.parametrize("form", ["parallel", Tiling(2, 4, 7), Tiling(1, 30, 13), None])
def test_each_form_of_bdh_that_learns_masks(form):
    """Guards: a mask by block or tile that is shifted; one in the forward pass only."""
    model = bdh()
    model.form, model.tiling = ("parallel", None) if form == "parallel" else ("tiled", form)
    assert_equal(*together_and_alone(model, width=43))


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("pieces", [None, [60], [1] * 60, [7, 1, 1, 12, 39], [20, 40]])
def test_bdhs_state_is_zero_where_a_story_begins(pieces, needs_gradient, monkeypatch):
    """Guards: a state that goes on into the next story, or is lost for the one that goes on in the next piece or chunk.

    Without a state the recurrent form reads chunk by chunk; with gradients the parallel form carries the state.
    """
    monkeypatch.setattr(recurrent, "CHUNK", 6)
    model = bdh().requires_grad_(needs_gradient)
    inputs, found = packed(width=60)
    state, parts = None if pieces is None else model.initial_state(3), []
    for piece in inputs.split(pieces or [60], dim=1):
        features, state = model.features(piece, state)
        parts.append(features)
    together = torch.cat(parts, 1)
    model.story_start = None
    for row, begin, end in found:
        alone = model.features(inputs[row:row + 1, begin:end])[0]
        torch.testing.assert_close(together[row:row + 1, begin:end], alone, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_a_state_that_cannot_forget_refuses_a_second_story(small_model):
    """Guards: a mask that is silently off where a cache or the state of an LSTM is carried."""
    small_model.eval().story_start = START
    first, second = (story[None] for story in stories(5, 6))
    features, state = small_model.features(first, small_model.initial_state(1))
    torch.testing.assert_close(features, small_model.features(first)[0], rtol=1e-4, atol=1e-5)
    if isinstance(small_model, BDH):
        features, _ = small_model.features(second, state)
        torch.testing.assert_close(features, small_model.features(second)[0], rtol=1e-4, atol=1e-5)
        return
    for inputs, carried in ((second, state), (torch.cat((first, second), 1), small_model.initial_state(1))):
        with pytest.raises(ValueError, match="a story that begins after other tokens of a state"):
            small_model.features(inputs, carried)
