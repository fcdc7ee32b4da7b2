from types import SimpleNamespace

import numpy as np
import pytest

from plotarmour.data import overlap
from plotarmour.data.overlap import disjoint_by_construction, overlapping_stories, story_keys


def data(*stories, end=0):
    """Stories as ids, each closed by `end`, like a token file."""
    rows = [[*ids, end] for ids in stories]
    tokens = np.array(sum(rows, []), dtype=np.uint16)
    return SimpleNamespace(tokens=tokens, n_tokens=len(tokens), n_stories=len(rows), header={"vocab_size": 50},
                           offsets=np.cumsum([0, *map(len, rows[:-1])]).astype(np.uint64),
                           story=lambda i: np.array(stories[i]))


def test_a_shared_story_is_found_and_a_beginning_is_not():
    """Guards: an overlap by chance of prefixes, or one that is missed. The docstring's integers."""
    found = overlapping_stories(data([5, 6, 7], [8, 9]), data([8, 9], [5, 6]))
    assert (found.n_stories, found.first, found.first_in_other) == (1, 0, 1)
    nothing = overlapping_stories(data([5, 6, 7]), data([6, 5, 7], [5, 6]))
    assert (nothing.n_stories, nothing.first, nothing.first_in_other) == (0, None, None)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_the_answer_does_not_depend_on_the_size_of_blocks(monkeypatch, block):
    """Guards: stories that lie across the edge of a block."""
    random = np.random.default_rng(0)
    stories = [random.integers(1, 3, random.integers(1, 12)).tolist() for _ in range(300)]
    train, val = data(*stories[:200]), data(*stories[200:])
    keys = story_keys(train)
    monkeypatch.setattr(overlap, "BLOCK", block)
    assert story_keys(train).tolist() == keys.tolist()
    known = {tuple(ids) for ids in stories[:200]}
    assert len(set(keys.tolist())) == len(known)
    assert overlapping_stories(train, val).n_stories == sum(tuple(ids) in known for ids in stories[200:])


def test_equal_keys_of_different_stories_do_not_count(monkeypatch):
    """Guards: a run refused because of two hashes that meet; a copy hidden behind such a story."""
    monkeypatch.setattr(overlap, "story_keys", lambda data: np.zeros(data.n_stories, dtype=np.uint64))
    found = overlapping_stories(data([1, 2], [3], [4]), data([5], [4], [3]))
    assert (found.n_stories, found.first, found.first_in_other) == (2, 1, 2)


def header(**changes):
    return {"source": [{"sha256": "a"}], "split": "90:5:5", "stories": "line", "part": "train",
            "tokenizer": {"sha256": "t"}} | changes


@pytest.mark.parametrize(("changes", "disjoint"), [
    ({"part": "val"}, True), ({}, False), ({"part": "val", "split": "80:10:10"}, False),
    ({"part": "val", "source": [{"sha256": "b"}]}, False), ({"part": "val", "stories": "file"}, False),
    ({"part": "val", "tokenizer": {"sha256": "u"}}, False), ({"part": "val", "split": None}, False),
])
def test_only_parts_of_one_split_are_disjoint_by_construction(changes, disjoint):
    """Guards: a scan that is left out although the parts were cut differently."""
    assert disjoint_by_construction(header(), header(**changes)) is disjoint


def test_whole_files_are_not_disjoint_by_construction():
    """Guards: two headers without a split taken for parts; headers of texts, which name no part."""
    assert not disjoint_by_construction(header(split=None), header(split=None, part="val"))
    texts = [{k: v for k, v in header().items() if k not in ("part", "split")} for _ in range(2)]
    assert not disjoint_by_construction(*texts)
