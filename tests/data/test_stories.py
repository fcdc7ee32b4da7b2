import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plotarmour.cli import UserError
from plotarmour.data import stories
from plotarmour.data.stories import PARTS, normalise, parse_split, parts_of, pieces, story_hash


def by_the_rule(story):
    """The rule of `normalise`, character by character."""
    words, n_odd = "", 0
    for character in story.lower():
        kind = unicodedata.category(character)
        if character.isspace():
            words += " "
        elif kind[0] in "LMNS" or kind in ("Co", "Cn") or character in "%&*/":
            words += character
            n_odd += 1 if character.isdecimal() else 0 if kind[0] in "LMN" else 3
    words = " ".join(words.split())
    return words if 4 * n_odd < len(words.encode()) else " ".join(story.split())


MIXED = st.text(st.one_of(st.sampled_from("aB7 .,'-+=*\né—राम१"), st.characters(exclude_categories=["Cs"])))


@settings(max_examples=300, deadline=None)
@given(st.one_of(MIXED, st.text(st.characters(max_codepoint=127))))
def test_the_quick_ways_are_the_rule_itself(story):
    """Guards: two normalisations, by which an ASCII story and its copy with one accent could part."""
    assert normalise(story) == by_the_rule(story)


DIFFERENT = {
    "vowel signs of Hindi": ("राम घर गया", "रमा घर गयी"), "Thai": ("ไปไหน", "ไปไหนี่"), "Hebrew": ("שָׁלוֹם", "שׁוּלֵם"),
    "sums": ("1+12=13", "11+2=13"), "differences": ("3-1=2", "31=2"), "fractions": ("1.5 / 3", "15 / 3"),
    "word problems": ("What is 7 + 3?", "What is 7 * 3?"), "Devanagari sums": ("१-१", "११"),
    "code": ("x = a - b", "x = a, b"), "operators": ("x = a * b", "x = a / b"), "names": ("a = A[0]", "A = a[0]"),
    "calls": ("while x < y: x = f(x)", "while x < y: x = F[x]"),
    "bishops and pawns": ("1. e4 d5 2. Bxc3 Nf6", "1. e4 d5 2. bxc3 Nf6"), "chess pieces": ("♞♝♙♗♚", "♗♙♛♞♚"),
    "positions": ("rnbq/pppp/8/8 w KQ 0 1", "RNBQ/PPPP/8/8 w kq 0 1"), "emoji": ("I saw a 🐶.", "I saw a 🐱."),
    "punctuation": ("!!!", "..."), "money": ("It cost $5, he said.", "It cost €5, he said."),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_texts_that_only_signs_distinguish_stay_different(kind):
    """Guards: other words, sums, code and games left out as copies; a text of symbols with one hash for all stories."""
    one, other = DIFFERENT[kind]
    assert story_hash(one) != story_hash(other)


PROSE = ['"Well, it is ten o\'clock," said Tom -- and ran.', "L'été, où l'âme « naïve » s'élève — à côté.",
         "It cost $5, and Mrs. Smith (of No. 12) paid.", "In 1990, on the 2nd of May, they met; nobody knew why!"]


@pytest.mark.parametrize("story", PROSE)
def test_copies_of_prose_are_equal_without_case_punctuation_and_spacing(story):
    """Guards: a copy that differs in a comma taken for a new story, held out from the training text that has it."""
    bare = "".join(c for c in story if not unicodedata.category(c).startswith("P"))
    assert len({story_hash(s) for s in (story, story.upper(), bare, story.replace(" ", " \n "), story + " !")}) == 1


ODD = ["é", "a", "\u3000", " ", "\n", "\x1c", "。", "it's", "7", "<|endoftext|>", "\x00", "😀", "Σ", "=", "ा", "!"]


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
