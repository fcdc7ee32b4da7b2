import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plotarmour.cli import UserError
from plotarmour.data import chunks
from plotarmour.data.chunks import Reading, read_chunks, read_stories
from plotarmour.data.readers import HashingReader, Source
from plotarmour.data.stories import BLANK, story_hash
from plotarmour.data.tokenizer import Tokenizer, load_tokenizer

TEXT = b"\xef\xbb\xbf \nOne  day,\r\n\tTom ran.\n<|endoftext|>\n\n<|endoftext|>Two: \xc3\xa9t\xc3\xa9\n<|endoftext|>\n"

ODD = ["é", "a", "\u3000", " ", "\n", "\x1c", "。", "it's", "7", "<|endoftext|>", "\x00", "😀"]


def read(path, policy="endoftext", **kinds):
    """Stories, dropped empty ones, and the SHA-256 of the file."""
    found, sha256 = chunks_of(path, Reading(policy, **kinds))
    assert [c for c in found if c.piece] == []
    return [t for c in found for t in c.texts], sum(c.n_empty for c in found), sha256


def chunks_of(path, reading, position=0):
    source = Source(path, path.name)
    with HashingReader(source) as reader:
        return list(read_chunks(source, reader, reading, position)), reader.finish()


def test_blank_space_around_separators_goes_and_inside_stays(tmp_path):
    """Guards: stories that begin with the line break after a separator; empty ones counted as stories."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    assert read(path)[:2] == (["One  day,\r\n\tTom ran.", "Two: été"], 1)
    assert read(path, "line")[0] == ["One  day,", "Tom ran.", "<|endoftext|>", "<|endoftext|>Two: été", "<|endoftext|>"]
    assert len(read(path, "file")[0]) == 1


@pytest.mark.parametrize("block", [1, 2, 3, 5, 13, 14, 1000])
@pytest.mark.parametrize("policy", ["endoftext", "line", "file"])
def test_stories_do_not_depend_on_the_size_of_blocks_read(tmp_path, block, policy):
    """Guards: a separator, a character or a byte order mark cut by the edge of a block."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT * 3)
    assert read(path, policy, block=block) == read(path, policy)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(ODD), min_size=20, max_size=300), st.integers(1, 60))
def test_long_stories_come_in_the_same_pieces_for_any_block_and_join_to_the_whole(tmp_path_factory, parts, block):
    """Guards: pieces that depend on what happened to be read; text lost or doubled at a cut; a run that is refused or
    not as the block has it. `PIECE` is 40 bytes here."""
    path = tmp_path_factory.getbasetemp() / "long.txt"
    path.write_text("".join(parts), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "PIECE", 40)

        def pieces(size):
            try:
                found, _ = chunks_of(path, Reading(hashed=True, block=size))
            except UserError as error:
                assert "unbroken run" in str(error)
                return "refused", []
            return ([(t, c.piece) for c in found for t in c.texts], [h for c in found for h in c.hashes or []])

        told, hashes = pieces(10**6)
        assert pieces(block) == (told, hashes)
        if told == "refused":
            return
        joined = list(read_stories(Source(path, "long.txt")))
    whole = "".join(parts).split("<|endoftext|>")
    assert joined == [s for t in whole if (s := t.strip(BLANK))]
    assert hashes == list(map(story_hash, joined))


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


def test_only_byte_level_tokenizers_take_pieces(shared):
    """Guards: a tokenizer that marks a text's beginning, given a story in two."""
    made = json.loads(load_tokenizer(shared / "gpt2").json)
    assert Tokenizer(json.dumps(made), "file").takes_pieces
    prefixed = {**made["pre_tokenizer"], "add_prefix_space": True}
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": prefixed}, {"pre_tokenizer": None}):
        assert not Tokenizer(json.dumps({**made, **change}), "file").takes_pieces


def test_an_unbroken_run_is_refused_and_a_million_empty_stories_are_counted(tmp_path):
    """Guards: memory without bound for a file that is no text; empty stories that become end-of-text alone."""
    path = tmp_path / "a.txt"
    path.write_text("x" * (2**20 + 2))
    with pytest.raises(UserError, match="unbroken run of more than 1 MiB at byte 0"):
        list(read_stories(Source(path, "a.txt")))
    path.write_text("y " * 10 + "x" * (2**20 - 1) + " z")
    [story] = read_stories(Source(path, "a.txt"))
    assert len(story) == 20 + 2**20 - 1 + 2
    path.write_text("<|endoftext|>\n" * 10**6 + "end")
    assert read(path)[:2] == (["end"], 10**6)


@pytest.mark.parametrize("block", [3, 10**6])
def test_text_that_is_not_utf8_is_refused_with_offset_and_line_or_replaced_and_counted(tmp_path, block):
    """Guards: replacement characters that slip into training."""
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\n<|endoftext|>\ntwo\nthr\xe9e\n<|endoftext|>\xef\xbf\xbd")
    with pytest.raises(UserError, match="byte 0xe9 at offset 25, line 4"):
        read(path, block=block)
    found, _ = chunks_of(path, Reading(errors="replace", block=block))
    assert [t for c in found for t in c.texts] == ["one", "two\nthr\ufffde", "\ufffd"]
    assert sum(c.n_replaced for c in found) == 1
    assert [s for c in found for s in c.sizes] == [3, 11, 3]


def test_text_with_lone_surrogates_is_refused(tmp_path):
    """Guards: text that no tokenizer can give back."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a \xed\xa0\x80 b")
    with pytest.raises(UserError, match="not UTF-8: byte 0xed at offset 2, line 1"):
        read(path)


def test_reading_goes_on_at_any_chunk(tmp_path):
    """Guards: a resumed start that skips or repeats a story, or hashes another file."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT * 20)
    reading = Reading(block=50)
    whole, sha256 = chunks_of(path, reading)
    for i in range(len(whole) - 1):
        rest, again = chunks_of(path, reading, whole[i].position)
        assert [t for c in rest for t in c.texts] == [t for c in whole[i + 1:] for t in c.texts]
        assert again == sha256
