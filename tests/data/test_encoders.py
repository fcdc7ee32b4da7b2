import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plotarmour.cli import UserError
from plotarmour.data import pipeline
from plotarmour.data.pipeline import Differs, Encoder
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import TokenFile
from plotarmour.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

pytest.importorskip("fastokens")
BYTES = make_tokenizer("bytes")
ODD = ["é", "e\u0301", "😀", "\r\n", "\x00", "<|endoftext|>", " ", "  ", "\u3000", "'s", "don't", "42", "\t", "ǅ", "。",
       "مرحبا"]
TEXT = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=8)), max_size=40).map("".join)


def reference(tokenizer):
    return Encoder(tokenizer, "tokenizers", 0)


@pytest.fixture(scope="session")
def tokenizers(shared):
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()[:200_000]
    own = make_tokenizer("bpe:600", [text, "Once upon a time, <|endoftext|> don't! été 😀 مرحبا " * 50])
    return [(t, Encoder(t, "fastokens", 0)) for t in (load_tokenizer(shared / "gpt2"), own, make_tokenizer("bytes"))]


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6))
def test_the_fast_ids_are_the_reference_ids(tokenizers, texts):
    """Guards: a backend that is quick and wrong: emoji, CRLF, NUL, combining marks, a literal end-of-text."""
    for tokenizer, fast in tokenizers:
        ids, counts = reference(tokenizer).encode(texts)
        fast_ids, fast_counts = fast.encode(texts)
        assert ids.tolist() == fast_ids.tolist() and counts.tolist() == fast_counts.tolist()
        ends = ids[np.cumsum(counts) - 1]
        assert (ends == tokenizer.end_of_text_id).all() and (ids == tokenizer.end_of_text_id).sum() == len(texts)


@pytest.mark.parametrize("name", ["tinystories/stories_b.txt", "tinyshakespeare/input.txt", "kjv/kjv.tsv.txt"])
def test_both_give_the_same_file_of_real_text(shared, tmp_path, name):
    """Guards: differences that only real text shows; the Bible is one story in pieces."""
    made = [pre_tokenize([shared / "data" / name], str(shared / "gpt2"), tmp_path / f"{b}.bin", backend=b)[0]
            for b in ("fastokens", "tokenizers")]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_a_difference_is_noticed_said_and_mended(shared, tmp_path, monkeypatch, warned):
    """Guards: wrong ids taken on trust. Here the fast backend goes wrong in the middle of a text only."""
    encode, calls = Encoder.encode, []

    def wrong(encoder, texts):
        calls.append(1)
        if len(calls) == 5:
            fast = encoder._fast
            encoder._fast = lambda texts: fast([t.replace("e", "a") for t in texts])
        return encode(encoder, texts)

    monkeypatch.setattr(Encoder, "encode", wrong)
    text = shared / "data" / "tinystories" / "stories_b.txt"
    with warned("other ids than tokenizers .* starting over"):
        [path] = pre_tokenize([text], str(shared / "gpt2"), tmp_path / "x.bin", block=2**16, save_bytes=2**16)
    [expected] = pre_tokenize([text], str(shared / "gpt2"), tmp_path / "y.bin", backend="tokenizers")
    assert path.read_bytes() == expected.read_bytes()


def test_truncation_and_padding_of_a_tokenizer_json_do_not_count(tmp_path):
    """Guards: long stories cut off without a word by one backend only."""
    made = json.loads(make_tokenizer("bytes").json)
    made["truncation"] = {"direction": "Right", "max_length": 5000, "strategy": "LongestFirst", "stride": 0}
    made["padding"] = {"strategy": {"Fixed": 20}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                       "pad_type_id": 0, "pad_token": "a"}
    tokenizer = Tokenizer(json.dumps(made), "file")
    texts = ["a word " * 1000, "short"]
    ids, counts = Encoder(tokenizer, "fastokens", 0).encode(texts)
    assert counts.tolist() == reference(tokenizer).encode(texts)[1].tolist() == [7001, 6]


def test_what_goes_wrong_after_a_difference_leaves_nothing_either(shared, tmp_path, monkeypatch, warned):
    """Guards: a work folder left behind by the second try."""
    monkeypatch.setattr(Encoder, "_check", lambda *args: (_ for _ in ()).throw(Differs("other ids")))
    text = tmp_path / "t.txt"
    text.write_bytes((shared / "data" / "tinystories" / "stories_b.txt").read_bytes() + b"\xff")
    with warned("starting over"), pytest.raises(UserError, match="not UTF-8"):
        pre_tokenize([text], "bytes", tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == [text]


def test_at_most_half_a_percent_is_compared_from_the_beginning_on(shared):
    """Guards: a check that costs more than it saves, or that never looks behind the first texts."""
    encoder = Encoder(load_tokenizer(shared / "gpt2"), "fastokens", 0)
    texts = (shared / "data" / "tinystories" / "stories_a.txt").read_text().split("<|endoftext|>")
    compared, shares = [], []
    encode = encoder.tokenizer.encode
    encoder.tokenizer.encode = lambda text: compared.append(text) or encode(text)
    for start in range(0, len(texts), 500):
        encoder.encode(texts[start:start + 500])
        shares.append(encoder.n_checked / encoder.n_seen)
    assert compared[0] == texts[0] and texts.index(compared[-1]) > 5000
    assert 0 < max(shares) <= 0.005


def test_small_texts_and_tokenizers_that_it_cannot_read_go_to_the_reference(monkeypatch):
    """Guards: a start-up longer than the work; a crash where only the quick way is missing."""
    assert Encoder(BYTES, "auto", 1000).name == "tokenizers"
    assert Encoder(BYTES, "auto", 2**30).name == "fastokens"
    with monkeypatch.context() as patch:  # as in release 0.3.1
        patch.setattr("fastokens.Tokenizer", object)
        assert Encoder(BYTES, "auto", 2**30).name == "tokenizers"
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert Encoder(BYTES, "auto", 2**30).name == "tokenizers"
    with pytest.raises(UserError, match="pip install fastokens"):
        Encoder(BYTES, "fastokens", 1000)


@pytest.mark.parametrize("backend", ["fastokens", "tokenizers"])
def test_a_long_story_is_encoded_in_pieces_to_the_ids_of_the_whole(shared, monkeypatch, backend):
    """Guards: an end-of-text inside a story; counts of pieces; stories after a long one lost."""
    encoder, whole = Encoder(load_tokenizer(shared / "gpt2"), backend, 0), reference(load_tokenizer(shared / "gpt2"))
    texts = ["Tom ran.", "Tom saw a dog  and ran home. " * 30, "é" * 200, "The end. " * 9]
    monkeypatch.setattr(pipeline, "PIECE", 40)
    batches = list(encoder.encode_stories(texts, "t.txt"))
    assert len(batches) > len(texts)
    expected = whole.encode(texts)
    for got, wanted in zip(zip(*batches, strict=True), expected, strict=True):
        assert np.concatenate(got).tolist() == wanted.tolist()


def test_what_cannot_be_cut_is_refused_above_a_limit(shared, monkeypatch):
    """Guards: memory without bound for a file that is no text, or for a tokenizer that takes no pieces."""
    monkeypatch.setattr(pipeline, "PIECE", 40)
    monkeypatch.setattr(pipeline, "UNCUT", 100)
    encoder = Encoder(BYTES, "tokenizers", 0)
    with pytest.raises(UserError, match="t.txt: an unbroken run of 101 characters, which begins ' xxx.*at most 100"):
        list(encoder.encode_stories(["Is " * 50 + "x" * 100 + " text?"], "t.txt"))
    encoder.tokenizer.__dict__["takes_pieces"] = False
    with pytest.raises(UserError, match="run of 120 characters"):
        list(encoder.encode_stories(["Is " * 40], "t.txt"))
    encoder.tokenizer.__dict__.pop("takes_pieces")


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=20), st.sampled_from(["endoftext", "line", "file"]))
def test_the_file_is_the_same_for_any_block_size_and_backend(tmp_path_factory, stories, policy):
    """Guards: tokens that depend on how the text was read. 25 texts, 6 sizes of block; benchmarks/ has 500 and 12."""
    folder = tmp_path_factory.mktemp("same")
    text, name = folder / "t.txt", folder / "tokenizer.bin"
    text.write_bytes("\n<|endoftext|>\n".join(["end", *stories]).encode())
    pre_tokenize([text], "bytes", name, force=True)
    made = set()
    for backend in ("tokenizers", "fastokens"):
        for block in (1, 7, 64, 1000, 2**20):
            [path] = pre_tokenize([text], str(name), folder / "x.bin", stories=policy, force=True, backend=backend,
                                  block=block)
            made.add(path.read_bytes())
    assert len(made) == 1
    assert TokenFile.open(path).n_stories >= 1
