import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plotarmour.cli import UserError
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.tokenizer import (
    END_OF_TEXT,
    Tokenizer,
    byte_characters,
    load_tokenizer,
    make_tokenizer,
    vocab_size_of,
)

BYTES = make_tokenizer("bytes")
LEARNED = make_tokenizer("bpe:270", ["the cat sat on the mat. the cat ran. the mat"] * 3)
VERSE = "In the beginning, God said: 'Été?'\t\n  </s> <?> <> <|endoftext|> \u3000 😀 don't 42"
VERSES = make_tokenizer("words:41", [VERSE])


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_comes_back_and_never_makes_an_end_of_text(text):
    """Guards: unknown tokens, and a literal <|endoftext|> in a story that ends it."""
    for tokenizer in (BYTES, LEARNED):
        ids = tokenizer.encode(text + END_OF_TEXT)
        assert tokenizer.end_of_text_id not in ids
        assert tokenizer.decode(ids) == text + END_OF_TEXT
        assert tokenizer.token_bytes[ids].sum() == len((text + END_OF_TEXT).encode())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(VERSES.backend.decode_batch([[i] for i in range(4, 41)]))), st.text())
def test_words_come_back_while_they_are_known_and_unknown_ones_claim_no_bytes(words, other):
    """Guards: blank space or punctuation lost between words; a literal </s> that ends a story; bytes of <?> counted."""
    assert [VERSES.backend.id_to_token(i) for i in range(4)] == ["<?>", "<s>", "</s>", "<>"]
    assert (VERSES.end_of_text_id, VERSES.unknown_id, VERSES.drops_unknown) == (2, 0, True)
    assert (VERSES.decode(VERSES.encode(VERSE)), VERSES.token_bytes[VERSES.encode(VERSE)].sum()) == (
        VERSE, len(VERSE.encode()))
    ids = VERSES.encode(" ".join([*words, other]))
    assert not {1, 2, 3} & set(ids) and 0 not in VERSES.encode(" ".join(words))
    assert VERSES.token_bytes[ids].sum() == len(VERSES.decode(i for i in ids if i).encode())


def changed(**settings):
    made = json.loads(LEARNED.json)
    for key, value in settings.items():
        made[key] = {**(made[key] or {}), **value}
    return Tokenizer(json.dumps(made), "file")


@pytest.mark.parametrize(("settings", "exact"), [
    ({}, True), ({"pre_tokenizer": {"add_prefix_space": True}}, False), ({"normalizer": {"type": "Lowercase"}}, False),
    ({"decoder": {"type": "Fuse"}}, False), ({"model": {"vocab": {"a": 0}, "merges": [], "unk_token": "a"}}, False)])
def test_ids_have_a_number_of_bytes_only_where_the_text_is_encoded_as_it_is(settings, exact):
    """Guards: a space put before every story counted as its own byte: 9 for "the cat?", and comparisons refused."""
    tokenizer = changed(**settings)
    assert (tokenizer.token_bytes is not None) == exact
    if exact:
        assert tokenizer.token_bytes[tokenizer.encode("the cat?")].sum() == 8


def without(*bytes_):
    """The byte tokenizer without some bytes, as JSON."""
    made = json.loads(BYTES.json)
    kept = [c for byte, c in enumerate(byte_characters()) if byte not in bytes_]
    made["model"]["vocab"] = {c: i for i, c in enumerate(kept)}
    made["added_tokens"][0]["id"] = len(kept)
    return made


@pytest.mark.parametrize(("change", "found"), [
    (lambda made: made["model"].update(dropout=0.5), "has BPE dropout 0.5: it gives other ids at every start"),
    (lambda made: made["model"]["vocab"].update(a=10**6), "an entry with id 1,000,000, beyond its 257 entries"),
    (lambda made: made["model"]["vocab"].update(a=5), "has two entries with id 5"),
    (lambda made: made.update(without(0x33)), "without an entry for 1 of the bytes, such as 0x33"),
    (lambda made: made.update(version="x"), "cannot be read")])
def test_a_tokenizer_that_cannot_be_relied_on_is_refused_when_it_is_loaded(change, found):
    """Guards: other ids or texts at every start; an IndexError in training; characters that vanish without a word."""
    made = json.loads(BYTES.json)
    change(made)
    with pytest.raises(UserError, match=found) as refused:
        Tokenizer(json.dumps(made), "file")
    assert "\n" not in str(refused.value)


def test_a_vocabulary_that_begins_at_1_and_lacks_end_of_text_is_refused(tmp_path):
    """Guards: the library gives end-of-text the id of the last entry: a token file that its own check refuses."""
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(byte_characters(), start=1)}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="has two entries with id 256"):
        load_tokenizer(tmp_path)


def test_a_wrong_vocab_json_is_one_line(tmp_path):
    """Guards: a traceback of the library for vocab.json and merges.txt; tokenizer.json has its message."""
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    (tmp_path / "merges.txt").write_text("a b")
    with pytest.raises(UserError, match="cannot be read .Error while"):
        make_tokenizer(str(tmp_path))


def test_bytes_that_utf8_never_has_may_be_missing():
    """Guards: a released tokenizer refused for the lack of what no text holds."""
    assert Tokenizer(json.dumps(without(0xC0, 0xFF)), "file").token_bytes is None


def test_a_panic_of_the_library_is_one_line():
    """Guards: 221 lines of Rust for a normalizer whose regular expression gives up on the text."""
    backtracking = {"type": "Replace", "pattern": {"Regex": r"(x+x+)+(?<!q)y\1"}, "content": ""}
    tokenizer = Tokenizer(json.dumps({**json.loads(BYTES.json), "normalizer": backtracking}), "file")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="the file tokenizer cannot encode") as refused:
            encode("x" * 4000)
        assert "\n" not in str(refused.value)


WORDS = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
         "pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "added_tokens": [
             {"id": 0, "content": END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}],
         "model": {"type": "WordLevel", "unk_token": "?", "vocab": {END_OF_TEXT: 0, "?": 1, "the": 2, "dog": 3}}}
LOWER = {**json.loads(BYTES.json), "normalizer": {"type": "Lowercase"}}


def test_a_tokenizer_that_does_not_give_the_text_back_is_refused_or_said(tmp_path, capsys):
    """Guards: a model that predicts [UNK] with perplexity 1.00, and nothing is said."""
    text, words, lower = tmp_path / "t.txt", tmp_path / "words.json", tmp_path / "lower.json"
    words.write_text(json.dumps(WORDS))
    lower.write_text(json.dumps(LOWER))
    text.write_text("\n".join(f"кот спал {i}" for i in range(50)), encoding="utf-8")
    with pytest.raises(UserError, match=r"give the text back: \d+.\d% of .* lost, 100.0% of the tokens are its unk"):
        pre_tokenize([text], str(words), tmp_path / "x.bin", stories="line")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lower.json", "t.txt", "words.json"]
    text.write_text("The dog ran home.")
    pre_tokenize([text], str(lower), tmp_path / "x.bin")
    assert "5.9% of 17 characters looked at are lost (as in 'The dog ran home.')" in capsys.readouterr().err
    pre_tokenize([text], "bytes", tmp_path / "y.bin")
    assert "lost" not in capsys.readouterr().err


def test_stories_behind_the_first_are_looked_at_too(tmp_path):
    """Guards: a text whose first stories are English, and whose others are lost."""
    text, words = tmp_path / "t.txt", tmp_path / "words.json"
    words.write_text(json.dumps(WORDS))
    text.write_text("\n".join(["the dog"] * 100 + ["кот спал"] * 1900), encoding="utf-8")
    with pytest.raises(UserError, match="does not give the text back"):
        pre_tokenize([text], str(words), tmp_path / "x.bin", stories="line", block=500)


def test_bytes_are_bytes():
    """Guards: a byte tokenizer that is not one token per byte."""
    assert BYTES.vocab_size == 257
    assert len(BYTES.encode("é!")) == 3


def test_a_learned_vocabulary_merges_what_recurs():
    """Guards: training on nothing."""
    assert LEARNED.vocab_size == 270
    assert len(LEARNED.encode("the cat")) < 7


def test_a_text_too_poor_for_the_vocabulary_warns(warned):
    """Guards: a recipe that says 4,096 and means 300."""
    with warned("yields only"):
        make_tokenizer("bpe:4000", ["a few words only"])


def test_gpt2_from_a_folder_has_the_known_ids(shared, tmp_path):
    """Guards: `transformers` 5 loading a one-entry vocabulary without a word. Known: "Hello world" is 15496, 995."""
    by_json = load_tokenizer(shared / "gpt2")
    assert by_json.encode("Hello world") == [15496, 995]
    assert (by_json.vocab_size, by_json.end_of_text_id, by_json.kind) == (50257, 50256, "gpt2")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((shared / "gpt2" / name).read_bytes())
    by_parts = load_tokenizer(tmp_path)
    text = (shared / "data" / "tinystories" / "stories_b.txt").read_text(encoding="utf-8")[:200_000]
    assert by_parts.encode(text) == by_json.encode(text)
    assert np.array_equal(by_parts.token_bytes, by_json.token_bytes)


@pytest.mark.parametrize(("spec", "message"), [
    ("bpe:100", "at least 257"), ("bpe:x", "no usable size"), ("word", "unknown tokenizer"), ("words:all", "no usable"),
    ("words:4", "at least 5 .<.>, <s>, </s>, <> and a word"), ("bpe:300", "learns from text")])
def test_wrong_tokenizers_are_refused(spec, message):
    """Guards: a tokenizer name that falls through to a default."""
    with pytest.raises(UserError, match=message):
        make_tokenizer(spec)


def test_a_tokenizer_of_gpt2s_size_is_not_gpt2(shared):
    """Guards: a token file of another vocabulary taken for GPT-2's, because both have 50,257 entries."""
    made = json.loads(load_tokenizer(shared / "gpt2").json)
    vocab = made["model"]["vocab"]
    vocab["Ġthe"], vocab["Ġdog"] = vocab["Ġdog"], vocab["Ġthe"]
    assert Tokenizer(json.dumps(made), "file").kind == "file"


def test_gpt2_nowhere_to_be_had_names_the_ways(monkeypatch, tmp_path):
    """Guards: a stack trace of the hub's client."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("plotarmour.data.tokenizer.ROOT", tmp_path)
    with pytest.raises(UserError, match="data/gpt2.*--tokenizer FOLDER.*bpe:4096"):
        make_tokenizer("gpt2")


def test_gpt2_comes_from_the_hub_where_no_folder_has_it(shared, root, tmp_path):
    """Guards: a download that was never tried. A local server stands for the hub: metadata by HEAD, the file by GET."""
    content, asked = (shared / "gpt2" / "tokenizer.json").read_bytes(), []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()
            self.wfile.write(content)

        def answer(self):
            asked.append(f"{self.command} {self.path}")
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", '"' + hashlib.sha1(content).hexdigest() + '"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()

        def log_message(self, *args):
            pass

    if (root / "data" / "gpt2").exists():
        pytest.skip("data/gpt2 is there: the hub would not be asked")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = ("from plotarmour.data.tokenizer import make_tokenizer; t = make_tokenizer('gpt2'); "
                "print(t.kind, t.encode('Hello'))")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                              env=os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME":
                                                str(tmp_path / "hf"), "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "0",
                                                "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"})
        server.shutdown()
    assert done.stdout.strip() == "gpt2 [15496]", done.stderr
    assert asked[-1] == "GET /openai-community/gpt2/resolve/main/tokenizer.json"


def test_a_vocabulary_is_known_before_it_is_made():
    """Guards: memory planned for another vocabulary than the one trained with."""
    assert vocab_size_of("bytes") == make_tokenizer("bytes").vocab_size
    assert (vocab_size_of("bpe:4096"), vocab_size_of("gpt2")) == (4096, 50257)
    with pytest.raises(UserError, match="--vocab-size"):
        vocab_size_of("some/folder")


def test_only_byte_level_tokenizers_take_pieces(shared):
    """Guards: a tokenizer that marks a text's beginning, given a story in two."""
    made = json.loads(load_tokenizer(shared / "gpt2").json)
    assert Tokenizer(json.dumps(made), "file").takes_pieces
    prefixed = {**made["pre_tokenizer"], "add_prefix_space": True}
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": prefixed}, {"pre_tokenizer": None}):
        assert not Tokenizer(json.dumps({**made, **change}), "file").takes_pieces


def test_ids_do_not_change_where_a_long_story_is_cut(shared):
    """Guards: a cut inside a token. 3,000 cuts of the Bible, CRLF and odd blank space put in."""
    tokenizer, draw = load_tokenizer(shared / "gpt2"), random.Random(0)
    text = (shared / "data" / "kjv" / "kjv.tsv.txt").read_text()
    odd = [" ", "  ", "\r\n ", "\u3000 ", " \u3000", "\xa0 ", "\x1c ", "\x00 ", "é ", "。 ", "'s ", "\t", "\x85 "]
    for _ in range(300):
        start = draw.randrange(len(text) - 2000)
        words = text[start:start + 2000].split(" ")
        story = "".join(word + (draw.choice(odd) if draw.random() < 0.3 else " ") for word in words)
        cuts = [i for i in range(1, len(story)) if story[i] == " " and not story[i - 1].isspace()]
        whole = tokenizer.encode(story)
        for cut in draw.sample(cuts, min(10, len(cuts))):
            assert tokenizer.encode(story[:cut]) + tokenizer.encode(story[cut:]) == whole
