import json
import random
import struct
import zlib

import numpy as np
import pytest

from plotarmour.cli import UserError
from plotarmour.data import token_file
from plotarmour.data.batches import tokenize_in_memory
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.readers import Source, read_whole
from plotarmour.data.stories import PARTS, normalise, parts_of, story_hash
from plotarmour.data.token_file import HEADER_BYTES, TokenFile, TokenFileWriter, header_block
from plotarmour.data.tokenizer import make_tokenizer


@pytest.fixture
def small(tmp_path):
    """Two stories in bytes: "ab" and "c"."""
    text = tmp_path / "t.txt"
    text.write_text("ab\n<|endoftext|>\n\n<|endoftext|>c\n")
    [path] = pre_tokenize([text], "bytes", tmp_path / "t.bin")
    return path


def test_the_layout_is_the_documented_one(small):
    """Guards: a format that drifts from its description. Read here with struct and NumPy alone."""
    raw = small.read_bytes()
    magic, version, length = struct.unpack_from("<8sII", raw)
    header = json.loads(raw[16:16 + length])
    assert (magic, version) == (b"PLOTARM\x01", 1)
    assert (header["n_tokens"], header["n_stories"], header["n_empty_dropped"]) == (5, 2, 1)
    end = header["end_of_text_id"]
    ids = {c: make_tokenizer("bytes").encode(c)[0] for c in "abc"}
    tokens = np.frombuffer(raw, "<u2", count=5, offset=HEADER_BYTES)
    assert tokens.tolist() == [ids["a"], ids["b"], end, ids["c"], end]
    offset, size = header["sections"]["offsets"]
    assert np.frombuffer(raw[offset:offset + size], "<u8").tolist() == [0, 3]
    offset, size = header["sections"]["lengths"]
    assert np.frombuffer(raw[offset:offset + size], "<u4").tolist() == [2, 1]


def test_stories_and_tokenizer_come_back(small):
    """Guards: an off-by-one in the index, a tokenizer that does not travel."""
    data = TokenFile.open(small)
    tokenizer = data.tokenizer()
    assert [tokenizer.decode(data.story(i)) for i in range(2)] == ["ab", "c"]
    assert data.tokens.flags.writeable is False
    data.verify()


def test_parts_hold_every_story_once_and_share_none(shared, tmp_path):
    """Guards: leaks between train and test; bpe:N learning from held-out text. Real TinyStories, 1 MiB."""
    text = tmp_path / "stories.txt"
    text.write_bytes((shared / "data" / "tinystories" / "stories_b.txt").read_bytes()[:2**20])
    paths = pre_tokenize([text], "bpe:600", tmp_path / "x.bin", "80:10:10")
    parts = []
    for path in paths:
        data = TokenFile.open(path)
        tokenizer = data.tokenizer()
        parts.append({normalise(tokenizer.decode(data.story(i))) for i in range(data.n_stories)})
    whole = {normalise(s) for chunk in read_whole(Source(text, text.name)) for s in chunk.texts}
    assert parts[0] | parts[1] | parts[2] == whole
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_stories_that_stand_in_another_text_are_excluded_and_counted(shared, tmp_path):
    """Guards: a second test set that was trained on. The eight normalised copies are lower-cased, unpunctuated."""
    folder = shared / "data" / "tinystories"
    [path] = pre_tokenize([folder / "stories_b.txt"], "bytes", tmp_path / "b.bin", exclude=[folder / "stories_a.txt"])
    header = TokenFile.open(path).header
    assert (header["n_excluded"], header["n_stories"]) == (8, 2317 - 8)


def test_a_damaged_header_or_length_is_refused(small, tmp_path):
    """Guards: SIGBUS on a truncated map; a header that is believed although it is damaged."""
    raw, copy = small.read_bytes(), tmp_path / "copy.bin"
    bits = [(position, 1 << bit) for position in range(256) for bit in range(8)]
    for position, bit in [*bits, *((position, 0x20) for position in range(256, HEADER_BYTES))]:
        copy.write_bytes(raw[:position] + bytes([raw[position] ^ bit]) + raw[position + 1:])
        with pytest.raises(UserError):
            TokenFile.open(copy)
    for length in {0, 5, HEADER_BYTES - 1, HEADER_BYTES, *range(len(raw) - 1, 0, -len(raw) // 200)}:
        copy.write_bytes(raw[:length])
        with pytest.raises(UserError):
            TokenFile.open(copy)


def test_a_flipped_bit_in_the_payload_is_found_by_verify(small, tmp_path):
    """Guards: silent corruption. 1,000 random bits."""
    raw, copy, draw = small.read_bytes(), tmp_path / "copy.bin", random.Random(0)
    for _ in range(1000):
        position = draw.randrange(HEADER_BYTES, len(raw))
        copy.write_bytes(raw[:position] + bytes([raw[position] ^ (1 << draw.randrange(8))]) + raw[position + 1:])
        with pytest.raises(UserError, match="damaged"):
            TokenFile.open(copy).verify()


def test_a_damaged_index_is_found_when_it_is_first_read(small, tmp_path):
    """Guards: stories cut at wrong places by an index that nobody looked at; `open` must stay quick and not read it."""
    raw, copy = bytearray(small.read_bytes()), tmp_path / "copy.bin"
    raw[TokenFile.open(small).header["sections"]["offsets"][0] + 8] ^= 1
    copy.write_bytes(raw)
    data = TokenFile.open(copy)
    with pytest.raises(UserError, match="index of stories"):
        data.story(0)


@pytest.mark.parametrize("change, found", [({"dtype": "int8"}, "holds int8"), (b"\x00\x00\x00\x01", "format 16777216"),
                                           (b"\x09\x00\x00\x00", "format 9")])
def test_a_file_of_another_version_dtype_or_byte_order_is_refused(small, tmp_path, change, found):
    """Guards: tokens read in the wrong width or order, which look like tokens."""
    raw, copy = small.read_bytes(), tmp_path / "copy.bin"
    if isinstance(change, dict):
        block = header_block({**TokenFile.open(small).header, **change})
    else:
        block = raw[:8] + change + raw[12:HEADER_BYTES - 4]
        block += struct.pack("<I", zlib.crc32(block))
    copy.write_bytes(block + raw[HEADER_BYTES:])
    with pytest.raises(UserError, match=found):
        TokenFile.open(copy)


def test_an_id_outside_the_vocabulary_is_refused_and_leaves_nothing(tmp_path):
    """Guards: `astype` that wraps 70,000 to 4,464."""
    with pytest.raises(UserError, match="70000 is outside"):
        with TokenFileWriter(tmp_path / "x.bin", make_tokenizer("bytes"), {}) as writer:
            writer.add(np.array([1, 70000, 256], np.uint32), np.array([3]), np.array([2]))
    assert list(tmp_path.iterdir()) == []


def test_the_slow_fallback_gives_the_same_tokens_and_warns(token_files):
    """Guards: a fallback that tokenizes something else than the token file holds."""
    tokenizer = TokenFile.open(token_files["train"]).tokenizer()
    with pytest.warns(UserWarning, match="pre_tokenize.py"):
        slow = tokenize_in_memory(token_files["text"], tokenizer)
    fast = TokenFile.open(token_files["test"])
    texts = {tokenizer.decode(slow.story(i)) for i in range(slow.n_stories)}
    assert slow.n_stories == 300
    assert all(tokenizer.decode(fast.story(i)) in texts for i in range(fast.n_stories))


def test_a_bpe_learns_from_the_train_part_only(tmp_path):
    """Guards: a vocabulary that has seen the held-out stories. Only those here contain a certain word, many times."""
    stories = [f"Story number {i} of Tom." for i in range(400)]
    held_out = [f"{s} zyzzyva zyzzyva zyzzyva" for s in stories]
    parts = parts_of(np.array([story_hash(h) for h in held_out], np.uint64), (80, 10, 10))
    told = [h if PARTS[i] != "train" else s for h, s, i in zip(held_out, stories, parts, strict=True)]
    text = tmp_path / "t.txt"
    text.write_text("\n".join(told))
    paths = pre_tokenize([text], "bpe:290", tmp_path / "x.bin", "80:10:10", "line")
    assert "zyzzyva" in text.read_text()
    vocabulary = TokenFile.open(paths[0]).tokenizer().backend.get_vocab()
    assert [token for token in vocabulary if "zy" in token] == []


def test_tokens_are_counted_across_blocks(token_files, monkeypatch):
    """Guards: the last block, or the first token of each, left out."""
    data = TokenFile.open(token_files["val"])
    monkeypatch.setattr(token_file, "CRC_BLOCK", 14)
    assert token_file.token_counts(data).tolist() == np.bincount(data.tokens, minlength=400).tolist()
