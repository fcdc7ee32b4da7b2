import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_memory import data, draw_stories

from plotarmour.evaluation.scoring import score_stories, windows_of
from plotarmour.machine import find_machine

CPU = find_machine("cpu")


def test_nats_are_those_of_each_story_alone_with_its_closing_token(small_model):
    """Guards: context of another story, padding that is seen or scored, n instead of n + 1 tokens."""
    small_model.eval()
    stories = draw_stories(9, 1, 30, 17, 30)
    found = dict(score_stories(small_model, data(*stories), 64, CPU))
    assert sorted(found) == list(range(5))
    for i, ids in enumerate(stories):
        logits = small_model(torch.tensor([[0, *ids]]))[0]
        expected = F.cross_entropy(logits, torch.tensor([*ids, 0]), reduction="none").detach()
        assert len(found[i]) == len(ids) + 1 and found[i].sum() == pytest.approx(float(expected.sum()), rel=1e-5)
        np.testing.assert_allclose(found[i], expected.numpy(), rtol=1e-3, atol=1e-5)


def test_long_stories_slide_by_the_stated_stride(small_model):
    """Guards: tokens scored twice or never at the edges of windows. Context 16, stride 4."""
    small_model.eval()
    [ids] = draw_stories(45)
    [(_, nats)] = score_stories(small_model, data(ids), 16, CPU, stride=4)
    inputs, targets = torch.tensor([0, *ids]), torch.tensor([*ids, 0])
    expected = []
    for begin, end, first in windows_of(46, 16, 4):
        logits = small_model(inputs[None, begin:end])[0]
        expected += F.cross_entropy(logits, targets[begin:end], reduction="none")[first:].tolist()
    assert len(nats) == len(expected) == 46
    assert nats.sum() == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("piece", [4096, 7])
def test_without_a_context_length_every_token_is_given_its_whole_story(small_model, monkeypatch, piece):
    """Guards: a "state of any length" that forgets, or is cut at the pieces that it is read in."""
    monkeypatch.setattr("plotarmour.evaluation.scoring.PIECE", piece)
    monkeypatch.setattr("plotarmour.evaluation.scoring.TOKENS_PER_BATCH", piece)
    small_model.eval()
    stories = draw_stories(45, 3, 60, 6)
    found = dict(score_stories(small_model, data(*stories), None, CPU))
    for i, ids in enumerate(stories):
        logits = small_model(torch.tensor([[0, *ids]]))[0]
        expected = F.cross_entropy(logits, torch.tensor([*ids, 0]), reduction="none").detach()
        np.testing.assert_allclose(found[i], expected.numpy(), rtol=1e-3, atol=1e-5)


def test_chosen_stories_are_scored_alone(small_model):
    """Guards: numbers of stories that are their places in the choice."""
    small_model.eval()
    stories = data(*draw_stories(9, 30, 17, 5))
    every = dict(score_stories(small_model, stories, 64, CPU))
    some = dict(score_stories(small_model, stories, 64, CPU, stories=[2, 0], name=None))
    assert sorted(some) == [0, 2]
    for i, nats in some.items():
        np.testing.assert_allclose(nats, every[i], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("n", "context", "stride"),
                         [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 8), (50, 8, 1), (23, 7, 3)])
def test_windows_score_every_target_once(n, context, stride):
    """Guards: gaps and overlaps."""
    scored = [t for begin, end, first in windows_of(n, context, stride) for t in range(begin + first, end)]
    assert scored == list(range(n))
    assert all(end - begin <= context for begin, end, _ in windows_of(n, context, stride))
