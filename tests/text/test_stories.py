import pytest

from plotarmour.errors import UserError
from plotarmour.text import stories
from plotarmour.text.stories import Source, normalise, parse_split, part_of, read_stories

TEXT = b"\xef\xbb\xbf \nOne  day,\r\n\tTom ran.\n<|endoftext|>\n\n<|endoftext|>Two: \xc3\xa9t\xc3\xa9\n<|endoftext|>\n"


def read(path, policy="endoftext"):
    source = Source(path)
    return list(read_stories(source, policy)), source


def test_blank_space_around_separators_goes_and_inside_stays(tmp_path):
    """Guards: stories that begin with the line break after a separator; empty ones counted as stories."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    found, source = read(path)
    assert found == ["One  day,\r\n\tTom ran.", "Two: été"]
    assert (source.n_empty, source.n_bytes) == (1, len(TEXT))
    assert read(path, "line")[0] == ["One  day,", "Tom ran.", "<|endoftext|>", "<|endoftext|>Two: été", "<|endoftext|>"]
    assert len(read(path, "file")[0]) == 1


@pytest.mark.parametrize("block", [1, 2, 3, 5, 13, 14, 1000])
def test_stories_do_not_depend_on_the_size_of_blocks_read(tmp_path, monkeypatch, block):
    """Guards: a separator or a character cut by the edge of a block."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT * 3)
    expected, source = read(path)
    monkeypatch.setattr(stories, "BLOCK", block)
    found, again = read(path)
    assert found == expected and again.sha256.hexdigest() == source.sha256.hexdigest()
    assert again.n_empty == source.n_empty


def test_text_that_is_not_utf8_is_refused_with_offset_and_line(tmp_path):
    """Guards: replacement characters that slip into training."""
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\n<|endoftext|>\ntwo\nthr\xe9e\n")
    with pytest.raises(UserError, match="byte 0xe9 at offset 25, line 4"):
        read(path)


def test_near_copies_land_on_the_same_side():
    """Guards: a copy with another comma in train and test. Shares are kept to a few percent."""
    shares = parse_split("80:10:10")
    assert normalise('"Hello,"  said\nTom.') == "hello said tom"
    names = [f"Story {i}, of Tom!" for i in range(3000)]
    assert all(part_of(s, shares) == part_of(s.lower().replace(",", ""), shares) for s in names)
    assert sum(part_of(s, shares) == "train" for s in names) / 3000 == pytest.approx(0.8, abs=0.03)


def test_the_part_of_a_story_is_pinned():
    """Guards: a changed hash, which would put test stories of published results into train."""
    assert [part_of(f"Story {i}", (80, 10, 10)) for i in range(8)] == PINNED


PINNED = ["val", "train", "train", "train", "train", "train", "val", "train"]


@pytest.mark.parametrize("split", ["90:10", "a:b:c", "0:5:5", "90:-5:15", ""])
def test_wrong_splits_are_refused(split):
    """Guards: a split that silently leaves no training text."""
    with pytest.raises(UserError, match="train:val:test"):
        parse_split(split)
