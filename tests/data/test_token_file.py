import hashlib
import json
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from in_memory import data as in_memory

from plotarmour.cli import UserError
from plotarmour.data import token_file
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.readers import Source, read_whole
from plotarmour.data.stories import PARTS, normalise, parts_of, story_hash
from plotarmour.data.token_file import FIXED, HEADER_BYTES, TokenFile, story_blocks
from plotarmour.data.token_writer import TokenFileWriter, header_block
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


@pytest.mark.parametrize("change, found", [({"dtype": "int8"}, "dtype is 'int8', expected uint16"),
                                           (b"\x00\x00\x00\x01", "format 16777216"),
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


def forged(path, change, **sections):
    """Write a token file anew with another header or other sections and checksums that are right again."""
    raw = path.read_bytes()
    header = TokenFile.open(path).header
    at = {name: raw[begin:begin + size] for name, (begin, size) in header["sections"].items()} | sections
    gap = bytes(-len(at["tokens"]) % 8)
    index = at["offsets"] + at["lengths"]
    at["checks"] = struct.pack("<2I", zlib.crc32(at["tokens"]), zlib.crc32(index))
    payload = at["tokens"] + gap + index + at["checks"] + at["tokenizer"]
    header |= {"payload_sha256": hashlib.sha256(payload).hexdigest(), "checks_crc32": zlib.crc32(at["checks"])}
    text = json.dumps(change(header)).encode().ljust(HEADER_BYTES - FIXED.size - 4)
    block = FIXED.pack(b"PLOTARM\x01", 1, len(text)) + text
    path.write_bytes(block + struct.pack("<I", zlib.crc32(block)) + payload)


def changed(section, place, value):
    def change(header):
        header["sections"][section][place] = value
        return header

    return change


IMPOSSIBLE = {
    "list": lambda header: [header], "number": lambda header: 7, "empty": lambda header: {},
    **{f"no {key}": lambda header, key=key: {k: v for k, v in header.items() if k != key} for key in (
        "dtype", "n_tokens", "n_stories", "sections", "vocab_size", "end_of_text_id", "tokenizer", "source",
        "payload_sha256", "checks_crc32")},
    **{f"{key} {value}": lambda header, key=key, value=value: {**header, key: value} for key, value in (
        ("dtype", ["uint16"]), ("n_tokens", 10**18), ("n_tokens", 5.0), ("n_tokens", True), ("n_stories", 10**18),
        ("n_stories", -1), ("n_stories", "2"), ("vocab_size", 10**12), ("end_of_text_id", 257), ("end_of_text_id", -1),
        ("tokenizer", "bytes"), ("tokenizer", {"kind": 1, "sha256": "a"}), ("source", {}), ("source", [{"name": "a"}]),
        ("payload_sha256", 1), ("checks_crc32", None), ("sections", []), ("sections", {}), ("part", []), ("split", 1),
        ("n_excluded", "many"))},
    "aligned otherwise": changed("offsets", 0, 4108), "overlapping": changed("lengths", 0, 4112),
    "outside": changed("tokenizer", 0, 10**9), "too long": changed("tokenizer", 1, 10**9),
    "no number": changed("tokens", 0, 4096.0), "negative": changed("tokenizer", 1, -1),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_header_that_cannot_be_is_refused_in_one_line(small, case):
    """Guards: 10^18 stories that --verify calls whole; a traceback for a list; a map beyond the end of the file."""
    forged(small, IMPOSSIBLE[case])
    with pytest.raises(UserError, match="expected|header says") as refused:
        TokenFile.open(small)
    assert "\n" not in str(refused.value) and str(small) in str(refused.value)


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=5)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner,
                                                                                         max_size=3)), max_leaves=6)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_a_header_says_is_refused_in_one_line_or_whole(small, data):
    """Guards: tracebacks and memory without bound for fields that nobody thought of. Checksums are right."""
    raw = small.read_bytes()
    place = data.draw(st.sampled_from(["header", "tokenizer", "sections", "source"]))

    def change(header):
        target = {"header": header, "source": header["source"][0]}.get(place, header.get(place))
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
        return header

    try:
        forged(small, change)
        found = TokenFile.open(small)
        found.verify()
        assert [found.tokenizer().decode(found.story(i)) for i in range(found.n_stories)] == ["ab", "c"]
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        small.write_bytes(raw)


def ids(*values):
    return np.array(values, "<u2").tobytes()


A, B, C, END = (*make_tokenizer("bytes").encode("abc"), 256)
MEANINGLESS = {  # sections of a file with the tokens a b END c END, and what is found
    "backwards": ({"offsets": np.array([3, 0], "<u8").tobytes()}, "offsets do not ascend"),
    "not from 0": ({"offsets": np.array([1, 3], "<u8").tobytes()}, "offsets do not ascend"),
    "beyond the tokens": ({"offsets": np.array([0, 2**63], "<u8").tobytes()}, "offsets do not ascend"),
    "a story without end": ({"tokens": ids(A, B, C, C, END)}, "end-of-text is elsewhere"),
    "no end at the end": ({"tokens": ids(A, B, END, C, C)}, "end-of-text is elsewhere"),
    "an end inside": ({"tokens": ids(END, B, END, C, END)}, "end-of-text is elsewhere"),
    "ends elsewhere": ({"offsets": np.array([0, 2], "<u8").tobytes()}, "end-of-text is elsewhere"),
    "an id beyond the vocabulary": ({"tokens": ids(A, 300, END, C, END)}, "found id 300"),
    "byte lengths": ({"lengths": np.array([2, 9], "<u4").tobytes()}, "story 1 has 1 bytes and its index says 9"),
    "another tokenizer": ({"tokenizer": b"{}"}, "header|SHA-256"),
}


@pytest.mark.parametrize("block", [1, 2, 2**20])
@pytest.mark.parametrize("case", MEANINGLESS)
def test_verify_reads_what_the_sections_mean(small, monkeypatch, case, block):
    """Guards: "whole" for a file whose checksums are right and whose content is not; stories cut at block edges."""
    TokenFile.open(small).verify()
    sections, found = MEANINGLESS[case]
    if "tokenizer" in sections:
        sections["tokenizer"] = sections["tokenizer"].ljust(TokenFile.open(small).header["sections"]["tokenizer"][1])
    forged(small, lambda header: header, **sections)
    monkeypatch.setattr(TokenFile, "_checks", lambda data: ([], []))
    monkeypatch.setattr(token_file, "_damaged_block", lambda *args: None)
    data = TokenFile.open(small)
    monkeypatch.setattr(token_file, "BLOCK_TOKENS", block)
    with pytest.raises(UserError, match=found) as refused:
        data.verify()
    assert "\n" not in str(refused.value)


def test_verify_passes_a_whole_file_of_many_blocks(token_files, monkeypatch):
    """Guards: a story that lies across blocks counted twice or not at all."""
    data = TokenFile.open(token_files["train"])
    monkeypatch.setattr(token_file, "BLOCK_TOKENS", 100)
    data.verify()


def test_blocks_hold_whole_stories():
    """Guards: a story cut, left out or read twice at the edge of a block; a long story that no block takes."""
    stories = in_memory([1, 2], [1, 2, 3], [1], list(range(1, 12)), [])
    assert [bounds.tolist() for bounds in story_blocks(stories, 7)] == [[0, 3, 7], [7, 9], [9, 21], [21, 22]]


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    """Guards: `astype` that wraps 70,000 to 4,464."""
    with pytest.raises(UserError, match="70000 is outside"):
        with TokenFileWriter(tmp_path / "x.bin", make_tokenizer("bytes"), {}) as writer:
            writer.add(np.array([1, 70000, 256], np.uint32), np.array([3]), np.array([2]))


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
    monkeypatch.setattr(token_file, "BLOCK_TOKENS", 7)
    assert token_file.token_counts(data).tolist() == np.bincount(data.tokens, minlength=400).tolist()
