import dataclasses
import itertools
import math

import pytest
import torch
from scipy.stats import chi2_contingency

from plotarmour.cli import UserError
from plotarmour.evaluation.generation import PIECE, blend_logits, generate, next_token_probabilities, stream
from plotarmour.machine import find_machine
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.hf import HFModel
from plotarmour.models.hf_kinds import GPT2Config

CPU = find_machine("cpu")


END = 96


def lively(**shape):
    """A GPT-2 whose greedy stories neither repeat one token (its weights are large) nor end (END's logit is 0)."""
    torch.manual_seed(0)
    model = HFModel(GPT2Config(vocab_size=97, dropout=0.0, **shape)).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "wte" not in name:
            parameter.data.mul_(10.0)
    model.unembedding.data[END] = 0.0
    return model


@pytest.fixture
def gpt2():
    return lively(n_layer=2, n_embd=16, n_head=2, context_length=16)


class Listening:
    """A model that keeps what it was asked to read, and the last features it gave."""

    def __init__(self, model):
        self.model, self.read = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def features(self, inputs, state=None):
        self.read.append(inputs[0].tolist())
        self.last, state = self.model.features(inputs, state)
        return self.last, state


def greedy(model, seen):
    """The most probable token after `seen`, read afresh."""
    return int((model.features(torch.tensor([seen]))[0][0, -1] @ model.unembedding.T).argmax())


def test_the_distribution_to_draw_from():
    """Guards: top-p that drops the token which crosses the limit. p = .5, .3, .2."""
    logits = torch.log(torch.tensor([0.3, 0.5, 0.2]))
    assert next_token_probabilities(logits).tolist() == pytest.approx([0.3, 0.5, 0.2])
    assert next_token_probabilities(logits, top_k=1).tolist() == pytest.approx([0, 1, 0])
    assert next_token_probabilities(logits, top_p=0.6).tolist() == pytest.approx([0.375, 0.625, 0])
    assert next_token_probabilities(logits, temperature=0.5).tolist() == pytest.approx([9 / 38, 25 / 38, 4 / 38])


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.95), (0, 1e-6), (40, 0.8), (5000, 0.999)])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 6.0])
def test_what_is_not_sorted_would_not_have_been_kept(top_k, top_p, sharpness):
    """Guards: the shortcut past sorting a whole vocabulary that drops a token, or breaks ties another way."""
    logits = (sharpness * torch.randn(3000, generator=torch.Generator().manual_seed(1))).round(decimals=1)
    p = torch.softmax(logits, 0)
    order = torch.sort(p, descending=True, stable=True)
    before = order.values.cumsum(0) - order.values
    kept = (torch.arange(3000) < (top_k or 3000)) & ((before < top_p) | (top_p == 1))
    expected = torch.zeros(3000).scatter(0, order.indices, order.values * kept)
    torch.testing.assert_close(next_token_probabilities(logits, 1.0, top_k, top_p), expected / expected.sum())


def test_top_p_1_keeps_all():
    """Guards: rare tokens lost where the running sum reaches 1 in float32 before its end: 1,644 of these 3,000."""
    logits = 6.0 * torch.randn(3000, generator=torch.Generator().manual_seed(1))
    for top_k in (0, 2990, 3000):
        assert next_token_probabilities(logits, top_k=top_k).count_nonzero() == (top_k or 3000)


def test_greedy_generation_equals_running_the_whole_prefix(small_model):
    """Guards: a state that loses a token between prompt and continuation; seeds that do not repeat."""
    small_model.eval()
    new = generate(small_model, [5, 6, 7], 0, CPU, max_new_tokens=20, temperature=0)
    seen = [0, 5, 6, 7]
    for token in new:
        assert greedy(small_model, seen) == token
        seen.append(token)
    first, second = (generate(small_model, [5], 0, CPU, 30, seed=4) for _ in range(2))
    assert first == second


def test_greedy_stories_of_gpt2_are_those_of_transformers():
    """Guards: positions, cache or mask used otherwise than by `transformers`' own generation. 60 tokens."""
    model, prompt = lively(n_layer=3, n_embd=32, n_head=4, context_length=80), [11, 5, 60]

    def expected(end, **options):
        whole = torch.tensor([[end, *prompt]])
        told = model.hf.generate(whole, attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=60,
                                 **options)
        return told[0, 4:].tolist()

    story = expected(END)
    assert len(story) == 60 and len(set(story)) > 15 and END not in story  # a story worth comparing
    assert generate(model, prompt, END, CPU, 60, temperature=0) == story
    end = max(set(story), key=story.count)
    story = expected(end, eos_token_id=end, pad_token_id=end)
    assert 1 < len(story) < 60 and [*generate(model, prompt, end, CPU, 60, temperature=0), end] == story


@pytest.mark.parametrize("slide_to", [None, 1, 5, 15])
def test_beyond_its_positions_a_model_reads_the_last_tokens_afresh(gpt2, slide_to, warned):
    """Guards: GPT-2 failing at its 17th token; a window of another size than asked for, or one that is not said."""
    listening, keep = Listening(gpt2), 8 if slide_to is None else slide_to
    with warned() as said:
        new = generate(listening, [1, 2, 3], END, CPU, 40, temperature=0, slide_to=slide_to)
    assert said == ["Token 17 needs more than the model's 16 positions: from here on "
                                              f"the context is the last {keep} to 16 tokens."]
    seen, begin, reread = [END, 1, 2, 3], 0, []
    for token in new:
        if len(seen) - begin > 16:
            begin = len(seen) - keep
            reread.append(seen[begin:])
        assert greedy(gpt2, seen[begin:]) == token
        seen.append(token)
    assert len(new) == 40 and [ids for ids in listening.read if len(ids) > 1] == [[END, 1, 2, 3]] + (
        reread if keep > 1 else [])


def test_slide_to_0_stops_at_the_last_position(gpt2, warned):
    """Guards: a story cut short without a word, or one token before its time.

    16 positions: END and 15 tokens; the sixteenth is drawn from them.
    """
    with warned() as said:
        new = generate(gpt2, [1, 2, 3], END, CPU, 40, temperature=0, slide_to=0)
    assert len(new) == 13 and said == [
        "Token 17 needs more than the model's 16 positions: generation stops after 13 of 40 new tokens; set slide_to "
        "above 0 to continue."]
    with warned() as said:
        assert generate(gpt2, [1, 2, 3], END, CPU, 13, temperature=0, slide_to=0) == new
        assert generate(gpt2, [1, 2, 3], END, CPU, 13, temperature=0) == new
    assert not said  # none was cut


def test_a_prompt_longer_than_the_context_follows_the_same_rule(gpt2, warned):
    """Guards: the beginning of a long prompt dropped without a word."""
    prompt = torch.randint(0, 96, (30,)).tolist()
    listening = Listening(gpt2)
    with warned("Token 31 needs more .* the context is the last 6 to 16 tokens"):
        [first] = generate(listening, prompt, END, CPU, 1, temperature=0, slide_to=6)
    assert listening.read == [prompt[-6:]] and first == greedy(gpt2, prompt[-6:])
    with pytest.raises(UserError, match="the prompt has 30 tokens; expected at most 15 with slide_to 0"):
        generate(gpt2, prompt, END, CPU, slide_to=0)
    assert len(generate(gpt2, prompt[:15], END, CPU, 1, temperature=0, slide_to=0)) == 1


@pytest.mark.parametrize("slide_to", [-1, 16, 100])
def test_windows_that_cannot_be_are_refused(gpt2, slide_to):
    """Guards: a negative slice that keeps the wrong end; a window without room for one new token."""
    with pytest.raises(UserError, match=f"slide_to {slide_to} must be at least 0 and below the model's 16 positions"):
        generate(gpt2, [1], END, CPU, slide_to=slide_to)


def test_bdh_never_slides(warned):
    """Guards: a state thrown away by a rule that is not BDH's; a setting that is ignored without a word."""
    torch.manual_seed(0)
    model = Listening(BDH(BDHConfig(1, 16, 2, 4, vocab_size=97, dropout=0.0)).eval())
    plain = generate(model, [1, 2, 3], END, CPU, 100, temperature=0)
    assert sum(map(len, model.read)) == 4 + len(plain) - 1
    with warned("slide_to 0 is ignored: the context of this model is not limited"):
        assert generate(model, [1, 2, 3], END, CPU, 100, temperature=0, slide_to=0) == plain
    with pytest.raises(UserError, match="slide_to -1 must be at least 0"):
        generate(model, [1], END, CPU, slide_to=-1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bdh", "gpt2"])
def test_a_long_prompt_is_read_in_pieces_that_change_nothing(kind, warned):
    """Guards: memory that grows with the prompt, and a token lost or read twice where two pieces meet."""
    torch.manual_seed(0)
    inner = (BDH(BDHConfig(2, 16, 2, 8, vocab_size=50, dropout=0.0)) if kind == "bdh" else
             HFModel(GPT2Config(1, 16, 2, vocab_size=50, context_length=6000, dropout=0.0))).eval()
    model, prompt = Listening(inner), torch.randint(1, 50, (5000,)).tolist()
    with warned() as said:
        new = generate(model, prompt, 0, CPU, 1, temperature=0)
    assert [len(ids) for ids in model.read] == [PIECE, 5001 - PIECE] and sum(model.read, []) == [0, *prompt]
    assert not said
    whole = inner.features(torch.tensor([[0, *prompt]]))[0]
    torch.testing.assert_close(model.last[0, -1], whole[0, -1], rtol=1e-4, atol=1e-4)
    assert new == [greedy(inner, [0, *prompt])] or new == []


@pytest.mark.parametrize("options", [{"temperature": math.nan}, {"temperature": math.inf}, {"temperature": -1.0},
                                     {"seed": -1}, {"seed": 10**20}, {"top_p": math.nan}, {"top_k": -1}])
def test_odd_settings_are_refused(gpt2, options):
    """Guards: a traceback out of torch about a probability tensor or an overflow."""
    with pytest.raises(UserError, match=next(iter(options))):
        generate(gpt2, [1], END, CPU, **options)


def test_a_tiny_temperature_is_as_good_as_none(gpt2):
    """Guards: logits that overflow when they are divided by it."""
    greedy_story = generate(gpt2, [1, 2], END, CPU, 10, temperature=0)
    for temperature in (1e-40, 1e-9, 1e-6):
        assert generate(gpt2, [1, 2], END, CPU, 10, temperature=temperature) == greedy_story


@pytest.fixture
def pair(gpt2):
    """A BDH with large weights and a GPT-2 with the same vocabulary."""
    torch.manual_seed(1)
    bdh = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=97)).eval()
    for parameter in bdh.parameters():
        parameter.data.mul_(6.0)
    return [bdh, gpt2]


@pytest.mark.parametrize("blend", ["linear", "logarithmic"])
def test_the_ends_of_a_blend_are_the_models_alone(pair, blend):
    """Guards: a slider whose end is not the model: states that mix, or rounding in the blend. 50 seeds."""
    for seed in range(50):
        options = {"seed": seed, "top_p": 0.9, "repetition_penalty": 1.2}
        alone = [generate(model, [5, 6], END, CPU, 8, **options) for model in pair]
        ends = [[token.id for token in stream(pair, shares, [5, 6], END, CPU, 8, blend=blend, **options)]
                for shares in ([1.0, 0.0], [0.0, 1.0])]
        assert ends == alone


@pytest.mark.parametrize("blend", ["linear", "logarithmic"])
def test_the_slider_moves_steadily_from_one_model_to_the_other(blend):
    """Guards: a blend that leaves the way between its ends: total variation to either end is monotone."""
    logits = 3 * torch.randn(2, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.stack([blend_logits(logits, [i / 100, 1 - i / 100], blend).softmax(-1) for i in range(101)])
    for end, sign in ((0, 1), (100, -1)):
        distance = (p - p[end]).abs().sum(1) / 2
        assert (sign * distance.diff() > 0).all()


def test_a_linear_blend_is_a_model_chosen_at_each_token():
    """Guards: shares applied to logits instead of probabilities: .9 and .1 blend to .5 at equal shares."""
    logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    assert blend_logits(logits, [0.5, 0.5]).exp().tolist() == pytest.approx([0.5, 0.5])
    assert blend_logits(logits, [0.25, 0.75]).exp().tolist() == pytest.approx([0.3, 0.7])
    assert blend_logits(logits, [0.25, 0.75], "logarithmic").softmax(0).tolist() == pytest.approx([0.25, 0.75])


def test_a_blend_draws_as_a_coin_between_the_models_does():
    """Guards: sampling that is not from the mixture. A coin chooses the model of each of 4,000 tokens; chi-square."""
    random = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, 40, generator=random)
    coins = torch.rand(4000, generator=random) < 0.3
    of_coin = torch.stack([torch.multinomial(logits[int(not coin)].softmax(-1), 1, generator=random) for coin in coins])
    p = next_token_probabilities(blend_logits(logits, [0.3, 0.7]))
    of_blend = torch.multinomial(p, 4000, replacement=True, generator=random)
    counts = torch.stack([draws.flatten().bincount(minlength=40) for draws in (of_coin, of_blend)])
    assert chi2_contingency(counts[:, counts.sum(0) > 10]).pvalue > 1e-3


def test_a_mixture_never_needs_more_nats_than_the_mean_of_its_models():
    """Guards: a blend that is not normalised. Jensen: nats of the mixture <= the mean of the nats."""
    logits = 3 * torch.randn(2, 50, 97, generator=torch.Generator().manual_seed(2))
    for share in (0.1, 0.5, 0.9):
        shares = torch.tensor([share, 1 - share])
        nats = -blend_logits(logits, shares.tolist()).log_softmax(-1)
        assert (nats <= (shares[:, None, None] * -logits.log_softmax(-1)).sum(0) + 1e-5).all()


def test_each_new_token_comes_with_the_probability_of_each_model(pair):
    """Guards: colours of the blend, or of the tempered distribution, shown as those of a model."""
    seen = [END, 5, 6]
    for token in stream(pair, [0.5, 0.5], [5, 6], END, CPU, 12, temperature=0.5, top_k=5):
        with torch.no_grad():
            own = [(model.features(torch.tensor([seen]))[0][0, -1] @ model.unembedding.T).softmax(-1) for model in pair]
        assert token.probabilities == pytest.approx([float(p[token.id]) for p in own], rel=1e-4)
        seen.append(token.id)


def test_a_repetition_penalty_makes_repetition_rare(pair):
    """Guards: a penalty that helps the repeated token, as multiplying a positive logit does."""
    plain, penalised = (generate(pair[0], [5], END, CPU, 60, temperature=0.7, repetition_penalty=penalty)
                        for penalty in (1.0, 2.0))
    assert len(set(penalised)) / len(penalised) > len(set(plain)) / len(plain)


@pytest.mark.parametrize("options", [{"shares": [0.5, 0.6]}, {"shares": [1.5, -0.5]}, {"blend": "cubic"},
                                     {"repetition_penalty": 0.5}])
def test_a_blend_that_cannot_be_is_refused(pair, options):
    """Guards: a distribution that is none, drawn from in silence."""
    with pytest.raises(UserError, match="must"):
        next(stream(pair, options.pop("shares", [0.5, 0.5]), [5], END, CPU, **options))


def test_streams_take_turns_in_half_precision(pair):
    """Guards: autocast of a stream that waits, on for its caller, or switched off by another stream that ends first."""
    machine = dataclasses.replace(CPU, dtype=torch.bfloat16)
    def streams():
        return [stream([model], [1.0], [5], END, machine, n) for model, n in zip(pair, (4, 9), strict=True)]

    alone, texts = [[token.id for token in new] for new in streams()], [[], []]
    waiting = streams()
    for _ in range(9):
        for text, new in zip(texts, waiting, strict=True):
            text += [token.id for token in itertools.islice(new, 1)]
            assert not torch.is_autocast_enabled("cpu")
    assert texts == alone
