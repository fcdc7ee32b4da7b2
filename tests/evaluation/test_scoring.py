import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from plotarmour.errors import UserError
from plotarmour.evaluation.comparison import comparison_table, evaluate_floors, totals
from plotarmour.evaluation.floors import count_floors
from plotarmour.evaluation.scoring import score_stories, windows_of
from plotarmour.machine import find_machine

CPU = find_machine("cpu")


def data(*stories, vocab_size=50, end=0):
    """Stories as ids, two bytes per id, each closed by `end`, like a token file."""
    rows = [[*ids, end] for ids in stories]
    tokens = np.array(sum(rows, []), dtype=np.uint16)
    offsets = np.cumsum([0, *map(len, rows[:-1])]).astype(np.uint64)
    return SimpleNamespace(tokens=tokens, offsets=offsets, n_tokens=len(tokens), n_stories=len(rows),
                           story=lambda i: tokens[int(offsets[i]):int(offsets[i]) + len(rows[i]) - 1],
                           story_bytes=np.array([2 * len(s) for s in stories], dtype=np.uint32),
                           header={"end_of_text_id": end, "vocab_size": vocab_size})


def draw_stories(*lengths):
    return [np.random.default_rng(n).integers(1, 50, n).tolist() for n in lengths]


def test_nats_are_those_of_each_story_alone_with_its_closing_token(small_model):
    """Guards: context of another story, padding that is seen or scored, n instead of n + 1 tokens."""
    small_model.eval()
    stories = draw_stories(9, 1, 30, 17, 30)
    found = {s.story: s for s in score_stories(small_model, data(*stories), 64, CPU)}
    assert sorted(found) == list(range(5))
    for i, ids in enumerate(stories):
        logits = small_model(torch.tensor([[0, *ids]]))[0]
        expected = F.cross_entropy(logits, torch.tensor([*ids, 0]), reduction="none").detach()
        assert (found[i].tokens, found[i].bytes) == (len(ids) + 1, 2 * len(ids))
        assert found[i].nats == pytest.approx(float(expected.sum()), rel=1e-5)
        np.testing.assert_allclose(found[i].token_nats, expected.numpy(), rtol=1e-3, atol=1e-5)


def test_long_stories_slide_by_the_stated_stride(small_model):
    """Guards: tokens scored twice or never at the edges of windows. Context 16, stride 4."""
    small_model.eval()
    [ids] = draw_stories(45)
    [score] = score_stories(small_model, data(ids), 16, CPU, stride=4)
    inputs, targets = torch.tensor([0, *ids]), torch.tensor([*ids, 0])
    expected = []
    for begin, end, first in windows_of(46, 16, 4):
        logits = small_model(inputs[None, begin:end])[0]
        expected += F.cross_entropy(logits, targets[begin:end], reduction="none")[first:].tolist()
    assert score.tokens == len(expected) == 46
    assert score.nats == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize(("n", "context", "stride"),
                         [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 8), (50, 8, 1), (23, 7, 3)])
def test_windows_score_every_target_once(n, context, stride):
    """Guards: gaps and overlaps."""
    scored = [t for begin, end, first in windows_of(n, context, stride) for t in range(begin + first, end)]
    assert scored == list(range(n))
    assert all(end - begin <= context for begin, end, _ in windows_of(n, context, stride))


def test_totals_by_hand():
    """Guards: bits per byte over tokens, perplexity of a mean of perplexities.

    Three stories: 3 + 5 + 8 = 16 tokens, 6 + 10 + 16 = 32 bytes. Each token costs ln 4 nats, so the loss is ln 4, the
    perplexity 4, and 16 · 2 bits over 32 bytes are 1 bit per byte.
    """
    found = totals(16, 32, 16 * math.log(4))
    assert (found["loss"], found["perplexity"], found["bits_per_byte"]) == pytest.approx((math.log(4), 4.0, 1.0))


def test_floors_by_hand():
    """Guards: floors that are no probabilities, or counted across story borders the wrong way.

    Train on one story "1 2 1", vocabulary 0..3, 0 ends: tokens 1 2 1 0, N = 4, three types. Unigram of 1:
    (2 + 3/4) / (4 + 3). Bigrams 0→1, 1→2, 2→1, 1→0: P(2|1) = (1 + 2·P(2)) / (2 + 2), P(2) = (1 + 3/4) / 7 = 1/4.
    """
    floors = count_floors(data([1, 2, 1], vocab_size=4))
    assert floors.unigram.tolist() == pytest.approx([0.25, 2.75 / 7, 0.25, 0.75 / 7])
    assert float(floors.bigram(np.array([1]), np.array([2]))[0]) == pytest.approx((1 + 2 * 0.25) / 4)
    assert float(floors.bigram(np.array([3]), np.array([2]))[0]) == pytest.approx(0.25)  # history never seen
    for history in range(4):
        assert floors.bigram(np.full(4, history), np.arange(4)).sum() == pytest.approx(1.0)
    scores = evaluate_floors(data([1, 2, 1], vocab_size=4), data([1, 3], vocab_size=4))
    assert float(scores["uniform"]["nats"].sum()) == pytest.approx(3 * math.log(4))


def test_floors_do_not_depend_on_the_block_size(monkeypatch):
    """Guards: a pair lost between two blocks of counting."""
    stories = data(*draw_stories(40, 3, 77, 12))
    whole = count_floors(stories)
    monkeypatch.setattr("plotarmour.evaluation.floors.BLOCK", 7)
    parts = count_floors(stories)
    for name in ("unigram", "pairs", "pair_counts", "history_counts", "history_types"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_a_comparison_on_other_tokens_is_refused():
    """Guards: perplexities of two tokenizers side by side."""
    a = pd.DataFrame({"story": [0], "tokens": [3], "bytes": [9], "nats": [2.0]})
    with pytest.raises(UserError, match="other tokens"):
        comparison_table({"a": a, "b": a.assign(tokens=4)}, {})
