from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from in_memory import data

from plotarmour.cli import UserError
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.evaluation.surprise import Memory, Word, causes, sentences, threshold_of
from plotarmour.machine import find_machine
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.hf import HFModel
from plotarmour.models.hf_kinds import GPT2Config

STORY, DRAFT = "Kim had a kite. \"It is mine!\" said Kim. She ran home.", "Then Käte\u2009took the 🪁 kite."


@pytest.fixture(params=["bdh", "gpt2"])
def run(request):
    """A model of bytes with large weights; GPT-2 has 40 positions, fewer than the story."""
    torch.manual_seed(0)
    if request.param == "bdh":
        model = BDH(BDHConfig(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=257))
    else:
        model = HFModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=257, dropout=0.0, context_length=40))
    for parameter in model.parameters():
        parameter.data.mul_(5.0)
    return SimpleNamespace(model=model.eval(), machine=find_machine("cpu"), tokenizer=make_tokenizer("bytes"),
                           name="run")


def nats_of(model, ids, n):
    """Nats and entropy of the last `n` ids, read in one piece."""
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]]))[0, -n:].log_softmax(-1)
    return F.nll_loss(log_p, torch.tensor(ids[-n:]), reduction="none"), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("piece", [512, 7])
def test_a_draft_has_the_nats_of_story_and_draft_in_one_piece(run, monkeypatch, piece):
    """Guards: a state that forgets or is cut; a draft that changes what the next draft is scored against."""
    monkeypatch.setattr("plotarmour.evaluation.surprise.PIECE", piece)
    end, encode = run.tokenizer.end_of_text_id, run.tokenizer.encode
    memory, draft = Memory.of(run, STORY + "  \n"), encode(" Then he ran.")
    whole = [end, *encode(STORY), *draft]
    if limit := run.model.context_length:
        whole = whole[-limit - 1:]  # all positions of GPT-2, as the draft is short
    for _ in range(2):
        for found, expected in zip(memory.score(draft), nats_of(run.model, whole, len(draft)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert len(memory.score(encode(" word" * 50))[0]) == 250  # longer than the positions of GPT-2


def test_what_a_run_remembers_can_be_saved(run, tmp_path):
    """Guards: a saved state that scores otherwise, or is taken for that of other weights; a file that is no state."""
    path, draft = tmp_path / "story.safetensors", run.tokenizer.encode(" Then he ran.")
    memory = Memory.of(run, STORY)
    memory.save(path)
    loaded = Memory.load(run, path)
    assert loaded.story == STORY
    for found, expected in zip(loaded.score(draft), memory.score(draft), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(FileNotFoundError):
        Memory.load(run, tmp_path / "nowhere")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole.replace(b'"weights"', b'"heights"'), b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not what run remembers of a story: it is of other weights, or damaged"):
            Memory.load(run, path)
    path.write_bytes(whole)
    next(run.model.parameters()).data.flatten()[0] += 1e-3
    with pytest.raises(UserError, match="other weights"):
        Memory.load(run, path)


def test_words_have_the_nats_of_their_tokens(run):
    """Guards: nats that fall between two words, or on the word before; characters of several bytes."""
    memory = Memory.of(run, STORY)
    words = memory.words(DRAFT)
    assert [DRAFT[word.begin:word.end] for word in words] == DRAFT.split()
    nats, entropy = memory.score(run.tokenizer.encode(" " + DRAFT))
    assert sum(word.nats for word in words) == pytest.approx(nats.sum(), rel=1e-5)
    assert sum(word.entropy for word in words) == pytest.approx(entropy.sum(), rel=1e-5)
    size = len(b" Then")
    assert words[0].nats == pytest.approx(nats[:size].sum(), rel=1e-5)
    assert words[1].nats == pytest.approx(nats[size:size + len(" Käte".encode())].sum(), rel=1e-5)
    assert Word(0, 1, 5.0, 2.0).misfit == 3.0 and Word(1, 9, 5.0, 2.0).of(" “don't!” he") == "don't"
    for draft in ("", " \n"):
        with pytest.raises(UserError, match="the draft is empty"):
            memory.words(draft)


def test_a_share_of_the_words_that_fit_is_above_the_threshold(run):
    """Guards: a threshold over stories instead of words, or the share turned around."""
    texts = [f"Kim had {i} kites. Then Kim lost {i % 7} of the {i} kites again." for i in range(30)]
    held_out = data(*(run.tokenizer.encode(text) for text in texts), vocab_size=257, end=256)
    held_out.tokenizer = lambda: run.tokenizer
    threshold = threshold_of(run, held_out, 30, 0.1)
    misfits = [word.misfit for text in texts for word in
               Memory.of(run, text.split(". ")[0] + ".").words(text.split(". ")[1])]
    assert np.mean(np.array(misfits) > threshold) == pytest.approx(0.1, abs=0.01)


def test_the_sentence_that_a_misfit_comes_from_is_found(run):
    """Guards: sentences numbered otherwise than they stand; a fall with the wrong sign."""
    spans = sentences(STORY)
    assert [STORY[begin:end] for begin, end in spans] == ["Kim had a kite.", '"It is mine!" said Kim.', "She ran home."]
    assert [len(sentences(text)) for text in ("One\nTwo. three 3.5 Four!", "", "a")] == [2, 0, 1]
    def misfits(story):
        return np.array([word.misfit for word in Memory.of(run, story).words(DRAFT)])

    for most, story in ((20, STORY), (2, STORY[spans[1][0]:])):
        falls = causes(run, STORY, DRAFT, most)
        assert [sentence for sentence, _ in falls] == [STORY[begin:end] for begin, end in spans[-most:]]
        for sentence, fall in falls:
            np.testing.assert_allclose(fall, misfits(story) - misfits(story.replace(sentence, "")), atol=1e-4)
    assert list(causes(run, "", DRAFT)) == []
