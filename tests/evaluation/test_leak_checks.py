"""Models and files that would make a comparison worthless are refused by name."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from in_memory import data
from torch import nn

from plotarmour.cli import UserError
from plotarmour.evaluation.leak_checks import check_run, check_stories, require
from plotarmour.evaluation.scoring import score_stories
from plotarmour.machine import find_machine
from plotarmour.models.bdh import BDH, BDHConfig

CPU = find_machine("cpu")
V = 50


class SeesOneAhead(nn.Module):
    """Adds up what it has read, one token of the future included: a mask, or a shift, that is off by one."""

    context_length = 64

    def __init__(self, honest: bool):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.unembedding, self.honest = torch.randn(V, 16), torch.randn(V, 16), honest

    def features(self, inputs, state=None):
        seen = self.table[inputs].cumsum(1)
        ahead = torch.roll(inputs, -1, 1)
        return (0.1 * seen if self.honest else 0.1 * seen + self.unembedding[ahead]), None


class SeesOneAheadLate(SeesOneAhead):
    """Sees one token ahead from its 26th place on only, as behind the edge of a tile."""

    def features(self, inputs, state=None):
        honest = 0.1 * self.table[inputs].cumsum(1)
        ahead = self.unembedding[torch.roll(inputs, -1, 1)]
        return honest + ahead * (torch.arange(inputs.shape[1]) > 25)[None, :, None], None


class SeesOneAheadUnbounded(SeesOneAhead):
    """Sees one token ahead, in stories of any length."""

    context_length = None

    def initial_state(self, batch_size):
        return None


class IsNotANumber(SeesOneAhead):
    """Overflows, as float16 may."""

    def features(self, inputs, state=None):
        return super().features(inputs)[0] * torch.nan, None


class SeesTheWholeBatch(SeesOneAhead):
    """Its features carry a mean over all rows and places: stories cost something else among others."""

    def features(self, inputs, state=None):
        return super().features(inputs)[0] + 3 * self.table[inputs].mean((0, 1)), None


class SeesItsWholeStory(SeesOneAhead):
    """Its features carry a mean over all places of a row."""

    def features(self, inputs, state=None):
        return super().features(inputs)[0] + self.table[inputs].mean(1, keepdim=True), None


@pytest.fixture
def small_bdh():
    """A model without a context length."""
    torch.manual_seed(0)
    return BDH(BDHConfig(2, 16, 2, 8, vocab_size=V, dropout=0.0))


def run_of(model, context_length=64, byte_level=True):
    sizes = np.full(V, 2)
    sizes[0] = 0
    return SimpleNamespace(model=model.eval(), name="cheat", context_length=context_length, machine=CPU,
                           tokenizer=SimpleNamespace(token_bytes=sizes if byte_level else None))


@pytest.fixture
def stories():
    random = np.random.default_rng(3)
    return data(*(random.integers(1, V, n) for n in (5, 40, 12, 30, 9, 25, 100)), vocab_size=V)


def scored(run, stories, context_length="run's"):
    context_length = run.context_length if context_length == "run's" else context_length
    rows = [(i, len(nats), stories.story_bytes[i], nats.sum(dtype=np.float64)) for i, nats in
            score_stories(run.model, stories, context_length, CPU, name=None)]
    return pd.DataFrame(rows, columns=["story", "tokens", "bytes", "nats"]).sort_values("story", ignore_index=True)


def failed(run, stories, scores, **options):
    checks = check_run(run, stories, scores, **options)
    return set(checks.loc[~checks["passed"], "check"])


def test_honest_models_pass(small_model, stories):
    """Guards: checks that refuse everybody."""
    for model in (small_model, SeesOneAhead(honest=True)):
        run = run_of(model)
        assert failed(run, stories, scored(run, stories)) == set()
    assert check_stories(data([1, 2], vocab_size=V), stories)["passed"].all()


def test_a_model_that_sees_one_token_ahead_is_refused_by_name(stories):
    """Guards: the earlier pipeline's GPT-2 without a causal mask; targets shifted by none."""
    run = run_of(SeesOneAhead(honest=False))
    scores = scored(run, stories)
    assert scores["nats"].sum() / scores["tokens"].sum() < 1, "it cheats well"
    assert "sum of probabilities" in failed(run, stories, scores)
    with pytest.raises(UserError, match="leak checks failed: cheat, sum of probabilities: found [0-9.]+, expected"):
        require(check_run(run, stories, scores))


def test_a_model_whose_nats_depend_on_the_batch_is_refused(stories):
    """Guards: padding or other stories that are seen."""
    run = run_of(SeesTheWholeBatch(honest=True))
    assert "alone or in a batch" in failed(run, stories, scored(run, stories))


@pytest.mark.parametrize(("kind", "context_length"), [(SeesOneAhead, 16), (SeesOneAheadLate, 64)])
def test_a_leak_at_any_place_and_in_a_short_context_is_seen(stories, kind, context_length):
    """Guards: checks that look at the first tokens of a long window only."""
    run = run_of(kind(honest=False), context_length)
    assert "sum of probabilities" in failed(run, stories, scored(run, stories))


def test_what_is_not_a_number_passes_no_check(stories):
    """Guards: a maximum that passes over NaN."""
    run = run_of(IsNotANumber(honest=True))
    assert {"later tokens", "sum of probabilities", "alone or in a batch"} <= failed(run, stories, scored(run, stories))


def test_bytes_are_not_counted_with_tokenizers_whose_ids_do_not_tell(small_model, stories):
    """Guards: an honest comparison that is refused for a tokenizer that marks words instead of spelling blanks."""
    run = run_of(small_model, byte_level=False)
    checks = check_run(run, stories, scored(run, stories))
    assert checks.set_index("check").loc["bytes", "found"].startswith("not checked")
    assert checks["passed"].isna().sum() == 1
    require(checks)
    assert checks["passed"].sum() == len(checks) - 1  # a check that is not made has not passed


@pytest.mark.parametrize(("honest", "failing"), [(True, set()), (False, {"sum of probabilities"})])
def test_unbounded_scoring_is_checked_too(small_bdh, stories, honest, failing):
    """Guards: a row of a comparison that no check has read; a cheat that passes where it sees its whole story."""
    run = run_of(small_bdh if honest else SeesOneAheadUnbounded(honest=False))
    checks = check_run(run, stories, scored(run, stories, None), unbounded=True)
    assert len(checks) == 3 and set(checks["run"]) == {"cheat unbounded"}
    assert failing <= set(checks.loc[~checks["passed"], "check"]) and checks["passed"].all() == honest


def test_a_model_without_a_causal_mask_is_refused(stories):
    """Guards: a later token that changes an earlier one's nats."""
    run = run_of(SeesItsWholeStory(honest=True))
    assert "later tokens" in failed(run, stories, scored(run, stories))


def test_a_wrong_byte_count_is_refused(small_model, stories):
    """Guards: bits per byte over the wrong denominator."""
    run = run_of(small_model)
    scores = scored(run, stories)
    scores.loc[2, "bytes"] += 1
    assert failed(run, stories, scores) == {"bytes"}


def test_stories_of_the_training_text_are_counted(stories):
    """Guards: a verdict on stories that were learned by heart, whole or but for one token."""
    changed = stories.story(6).copy()
    changed[50] = changed[50] % 49 + 1
    checks = check_stories(data(stories.story(1), [7, 8], changed, vocab_size=V), stories)
    assert checks["found"].tolist() == ["1 stories of 7", "2 stories of 7 (28.6%)"] and not checks["passed"].any()
    with pytest.raises(UserError, match="failed: all runs, held out: found 1 stories of 7, expected 0 stories. Do not"):
        require(checks)
    require(checks[1:])  # a long overlap is for the verdict
