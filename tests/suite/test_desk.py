import html
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from in_memory import data

from plotarmour.cli import UserError
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.evaluation.blending import blend_losses, blend_texts
from plotarmour.evaluation.generation import NewToken
from plotarmour.evaluation.scoring import score_stories
from plotarmour.evaluation.surprise import Word
from plotarmour.machine import find_machine
from plotarmour.models.bdh import BDH, BDHConfig
from plotarmour.models.hf import HFModel
from plotarmour.models.hf_kinds import GPT2Config
from plotarmour.run import Run
from plotarmour.suite.desk import Pair, Piece, desk_strip, draft_html, pieces_of, tint_of, writing_desk

BYTES = make_tokenizer("bytes")


def run_of(kind, tokenizer=BYTES):
    torch.manual_seed(0)
    if kind == "bdh":
        model = BDH(BDHConfig(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=257))
    else:
        model = HFModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=257, dropout=0.0, context_length=4096))
    config = SimpleNamespace(model=kind, training=SimpleNamespace(context_length=64))
    return Run(Path(kind), model.eval(), tokenizer, config, {}, 0, find_machine("cpu"))


@pytest.fixture
def pair():
    return Pair(run_of("bdh"), run_of("gpt2"))


def parts_of(desk):
    """The widgets of a desk by what they are for."""
    percent, _, prompt, row, texts, story, draft, check, marked = desk.children
    write, stop, seed, length = row.children
    return SimpleNamespace(**{name: value for name, value in locals().items() if name != "desk"})


def click(button, buttons):
    button.click()
    until = time.monotonic() + 60
    while any(other.disabled for other in buttons) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(other.disabled for other in buttons)


def test_what_is_typed_is_text(pair):
    """Guards: a prompt or draft that becomes a part of the page."""
    evil = '<script>alert(1)</script> & "quotes" <|endoftext|> שלום 🪁'
    page = desk_strip(pair, evil, (0, 50), max_new_tokens=3)
    marked = draft_html(evil, [Word(0, 8, 9.0, 0.0)], 1.0, {0: evil}, evil)
    for shown in (page, marked):
        assert "<script>" not in shown and html.escape(evil)[-20:] in shown
    assert "&lt;script&gt;alert(1)" in page and "שלום 🪁" in page and page.count('class="side"') == 2
    assert marked.count("<mark") == 1


def test_pieces_join_to_the_text_that_the_tokens_stand_for():
    """Guards: half a character shown as �, and its other half again."""
    text = "Käte 🪁 flew. שלום"
    prompt, ids = BYTES.encode("Once "), BYTES.encode(text)
    pieces = list(pieces_of(BYTES, prompt, (NewToken(i, (0.5, 0.5)) for i in ids)))
    assert "".join(piece.text for piece in pieces) == text and not any("\ufffd" in piece.text for piece in pieces)


def test_a_tint_says_which_model_gave_more():
    """Guards: colours the wrong way round; a division by 0."""
    assert tint_of((0.5, 0.5)).endswith(",0.00)") and tint_of((1.0, 0.0)) == "rgba(0,114,178,0.50)"
    assert tint_of((0.01, 0.1)) == "rgba(230,159,0,0.25)"


def test_a_pair_that_cannot_be_and_a_share_beyond_the_slider_are_refused(pair):
    """Guards: two vocabularies blended id by id."""
    with pytest.raises(UserError, match="different tokenizers; expected one for both"):
        Pair(run_of("bdh"), run_of("gpt2", SimpleNamespace(sha256="another")))
    for percent in (-1, 101):
        with pytest.raises(UserError, match="expected 0 to 100 %"):
            pair.stream("a", percent)


def test_the_desk_writes_three_texts_and_marks_words(pair):
    """Guards: buttons that stay disabled; texts that are those of other positions of the slider."""
    desk = parts_of(writing_desk(pair, -1e9, "Once", "Kim ran.", "Kim sat."))
    buttons, desk.length.value, desk.percent.value = (desk.write, desk.check), 12, 30
    click(desk.write, buttons)
    titles = re.findall("<h4>(.*?)</h4>", desk.texts.value)
    assert titles == ["BDH", "blend, 30 % logic", "GPT-2"] and desk.texts.value.count('title="BDH ') > 10
    assert desk.stop.disabled
    desk.percent.value = 100
    click(desk.write, buttons)
    assert re.findall("<h4>(.*?)</h4>", desk.texts.value) == ["BDH", "GPT-2"]
    click(desk.check, buttons)
    assert "2 of 2 words do not fit" in desk.marked.value and desk.marked.value.count("<mark") == 2


def test_a_mistake_is_a_sentence_on_the_page(pair, monkeypatch):
    """Guards: a thread that dies with a stack trace nobody sees, and buttons that hang."""
    desk = parts_of(writing_desk(pair, 0.0, " ", "", "x"))
    buttons = desk.write, desk.check
    for prompt, message in ((" ", "The prompt is empty"), ("a" * 10**6, "1,000,000 char"), ("a\udce9", "surrogate")):
        desk.prompt.value = prompt
        click(desk.write, buttons)
        assert message in desk.texts.value
    click(desk.check, buttons)
    assert "The story is empty" in desk.marked.value
    desk.story.value, desk.draft.value = "Kim ran.", " \n"
    click(desk.check, buttons)
    assert "The draft is empty" in desk.marked.value
    monkeypatch.setattr(Run, "stream", lambda *args, **options: 1 / 0)
    desk.prompt.value = "Once"
    click(desk.write, buttons)
    assert "This went wrong (ZeroDivisionError" in desk.texts.value


def test_stop_ends_a_text(pair, monkeypatch):
    """Guards: a stop button that waits for the end, which these texts do not have; a page drawn for every token."""
    def endless(*_, **__):
        while True:
            time.sleep(0.001)
            yield Piece("a", (0.5, 0.5))

    monkeypatch.setattr(Pair, "stream", endless)
    desk = parts_of(writing_desk(pair, 0.0, "Once"))
    drawn = []
    desk.texts.observe(lambda _: drawn.append(time.monotonic()), "value")
    desk.write.click()
    while len(drawn) < 4:
        time.sleep(0.01)
    assert drawn[3] - drawn[0] > 0.29  # at most ten times a second
    click(desk.stop, (desk.write, desk.check))
    assert "Stopped." in desk.texts.value


def test_marks_are_shown_before_their_reasons_and_stop_ends_the_search(pair, monkeypatch):
    """Guards: half a minute without a word while a long draft is checked, with a stop button that does nothing."""
    desk, looked = parts_of(writing_desk(pair, -1e9, "", "Kim ran.", "Kim sat.")), threading.Event()

    def endless(*_):
        while True:
            yield "Kim ran.", [1.0, 1.0]
            looked.set()
            time.sleep(0.001)

    monkeypatch.setattr("plotarmour.suite.desk.causes", endless)
    desk.check.click()
    assert looked.wait(60)
    assert desk.marked.value.count("<mark") == 2 and "Looking for the reasons" in desk.marked.value
    click(desk.stop, (desk.write, desk.check))
    assert desk.marked.value.count("“Kim ran.”") == 2 and "Looking" not in desk.marked.value


def test_the_loss_of_a_blend_is_that_of_the_models_at_its_ends(pair):
    """Guards: shares turned around; tokens counted twice; a blend that is no probability. Jensen holds in between."""
    stories = data(*(BYTES.encode(f"Kim had {i} kites.") for i in range(6)), vocab_size=257, end=256)
    runs = pair.logic, pair.creativity
    losses = blend_losses(runs, stories, [0, 0.5, 1], 6).set_index(["blend", "share"])["loss"]
    for run, share in zip(runs, (1, 0), strict=True):
        scored = dict(score_stories(run.model, stories, 64, run.machine, name=None))
        own = sum(map(sum, scored.values())) / sum(map(len, scored.values()))
        for blend in ("linear", "logarithmic"):
            assert losses[blend, share] == pytest.approx(own, rel=1e-5)
    assert losses["linear", 0.5] <= (losses["linear", 0] + losses["linear", 1]) / 2
    texts = blend_texts(runs, ["Kim ran. Then "] * 3, [0, 1], 0.0, 20)
    assert list(texts["share"]) == [0, 1] and texts.drop(columns=["share", "texts"]).stack().between(0, 1).all()
