import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plotarmour.cli import UserError
from plotarmour.data import stories
from plotarmour.data.stories import PARTS, normalise, parse_split, parts_of, pieces, story_hash


@given(st.text(st.characters(max_codepoint=127)))
def test_the_quick_way_for_ascii_is_the_rule_itself(story):
    """Guards: two normalisations, by which an ASCII story and its copy with one accent could part."""
    assert normalise(story) == " ".join(re.sub(r"[^\w\s]|_", "", story.lower()).split())


ODD = ["é", "a", "\u3000", " ", "\n", "\x1c", "。", "it's", "7", "<|endoftext|>", "\x00", "😀", "Σ"]


@given(st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=9)), max_size=60).map("".join), st.integers(1, 20))
def test_a_long_story_has_the_hash_of_the_whole_and_pieces_that_join_to_it(story, size):
    """Guards: a long story whose part depends on where it was cut; text lost at a cut; a run that hides a later cut."""
    cut = list(pieces(story, size))
    assert "".join(cut) == story
    places = {i for i in range(1, len(story)) if story[i] == " " and not story[i - 1].isspace()}
    begin = 0
    for piece in cut[:-1]:
        end = begin + len(piece)
        within = {i for i in places if begin < i <= begin + size}
        assert end == (max(within) if within else min(i for i in places if i > begin))
        begin = end
    with pytest.MonkeyPatch.context() as patch:
        expected = story_hash(story)
        patch.setattr(stories, "PIECE", size)
        assert story_hash(story) == expected


def side(story, shares):
    return PARTS[int(parts_of(np.array([story_hash(story)], np.uint64), shares)[0])]


def test_normalised_copies_are_in_the_same_part():
    """Guards: a copy with another comma in train and test. Shares are kept to a few percent."""
    shares = parse_split("80:10:10")
    assert normalise('"Hello,"  said\nTom.') == "hello said tom"
    names = [f"Story {i}, of Tom!" for i in range(3000)]
    assert all(side(s, shares) == side(s.lower().replace(",", ""), shares) for s in names)
    assert sum(side(s, shares) == "train" for s in names) / 3000 == pytest.approx(0.8, abs=0.03)


def test_parts_by_hand():
    """Guards: shares that are off by one. Shares 2, 1, 1: hashes 0 to 3 are in train, train, val, test, and again."""
    hashes = np.array([0, 1, 2, 3, 4, 5, 6, 7, 2**64 - 1], np.uint64)
    assert parts_of(hashes, (2, 1, 1)).tolist() == [0, 0, 1, 2, 0, 0, 1, 2, 2]
    assert parts_of(hashes[:4], (1, 0, 1)).tolist() == [0, 2, 0, 2]


def test_the_part_of_a_story_is_pinned():
    """Guards: a changed hash, which would put test stories of published results into train."""
    assert [side(f"Story {i}", (80, 10, 10)) for i in range(8)] == PINNED


PINNED = ["val", "train", "train", "train", "train", "train", "val", "train"]


@pytest.mark.parametrize("split", ["90:10", "a:b:c", "0:5:5", "90:-5:15", ""])
def test_wrong_splits_are_refused(split):
    """Guards: a split that silently leaves no training text."""
    with pytest.raises(UserError, match="train:val:test"):
        parse_split(split)
