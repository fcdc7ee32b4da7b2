import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plotarmour.cli import UserError
from plotarmour.data import encoders
from plotarmour.data.encoders import Differs, FastEncoder, ReferenceEncoder, make_encoder
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import TokenFile
from plotarmour.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer

pytest.importorskip("fastokens")
ODD = ["é", "e\u0301", "😀", "\r\n", "\x00", "<|endoftext|>", " ", "  ", "\u3000", "'s", "don't", "42", "\t", "ǅ", "。",
       "مرحبا"]
TEXT = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=8)), max_size=40).map("".join)


@pytest.fixture(scope="session")
def tokenizers(shared):
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()[:200_000]
    own = make_tokenizer("bpe:600", [text, "Once upon a time, <|endoftext|> don't! été 😀 مرحبا " * 50])
    return [(t, FastEncoder(t)) for t in (load_tokenizer(shared / "gpt2"), own, make_tokenizer("bytes"))]


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6))
def test_the_fast_ids_are_the_reference_ids(tokenizers, texts):
    """Guards: a backend that is quick and wrong: emoji, CRLF, NUL, combining marks, a literal end-of-text."""
    for tokenizer, fast in tokenizers:
        ids, counts = ReferenceEncoder(tokenizer).encode(texts)
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


def test_a_difference_is_noticed_said_and_mended(shared, tmp_path, monkeypatch):
    """Guards: wrong ids taken on trust. Here the fast backend goes wrong in the middle of a text only."""
    class Wrong(FastEncoder):
        def encode(self, texts):
            backend = self.backend
            if self.n_calls > 3:
                class Swapped:
                    def encode_batch_flat(self, texts, **options):
                        return backend.encode_batch_flat([t.replace("e", "a") for t in texts], **options)
                self.backend = Swapped()
            try:
                return super().encode(texts)
            finally:
                self.backend = backend

    monkeypatch.setattr(encoders, "FastEncoder", Wrong)
    text = shared / "data" / "tinystories" / "stories_b.txt"
    with pytest.warns(UserWarning, match="other ids than tokenizers .* starting over"):
        [path] = pre_tokenize([text], str(shared / "gpt2"), tmp_path / "x.bin", block=2**16)
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
    ids, counts = FastEncoder(tokenizer).encode(texts)
    assert counts.tolist() == ReferenceEncoder(tokenizer).encode(texts)[1].tolist() == [7001, 6]


def test_what_goes_wrong_after_a_difference_leaves_nothing_either(shared, tmp_path, monkeypatch):
    """Guards: a work folder left behind by the second try."""
    monkeypatch.setattr(FastEncoder, "_check", lambda *args: (_ for _ in ()).throw(Differs("other ids")))
    text = tmp_path / "t.txt"
    text.write_bytes((shared / "data" / "tinystories" / "stories_b.txt").read_bytes() + b"\xff")
    with pytest.warns(UserWarning, match="starting over"), pytest.raises(UserError, match="not UTF-8"):
        pre_tokenize([text], "bytes", tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == [text]


def test_at_most_half_a_percent_is_compared_from_the_beginning_on(shared):
    """Guards: a check that costs more than it saves, or that never looks behind the first texts."""
    encoder = FastEncoder(load_tokenizer(shared / "gpt2"))
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
    tokenizer = make_tokenizer("bytes")
    assert make_encoder(tokenizer, "auto", 1000).name == "tokenizers"
    assert make_encoder(tokenizer, "auto", 2**30).name == "fastokens"
    with monkeypatch.context() as patch:  # as in release 0.3.1
        patch.setattr(FastEncoder, "_encode", lambda *args: (_ for _ in ()).throw(TypeError("no such option")))
        assert make_encoder(tokenizer, "auto", 2**30).name == "tokenizers"
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert make_encoder(tokenizer, "auto", 2**30).name == "tokenizers"
    with pytest.raises(UserError, match="pip install fastokens"):
        make_encoder(tokenizer, "fastokens", 1000)
    with pytest.raises(UserError, match="expected one of"):
        make_encoder(tokenizer, "quick", 1000)


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
