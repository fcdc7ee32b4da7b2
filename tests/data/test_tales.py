import math
from collections import Counter

import numpy as np
import pytest

from plotarmour.data.tales import DEFAULT_EVENTS, POOLS, Pool, derive, events_for_tokens, tell_stories, tell_story


class Reader:
    """Compares a text with the story of given choices; raises where the choices end or the text differs."""

    def __init__(self, text: str, choices: tuple[int, ...]):
        self.text, self.choices, self.position, self.nats, self.n_made = text, choices, 0, 0.0, 0

    def pick(self, choices: Pool) -> str:
        if self.n_made == len(self.choices):
            raise _ChoicesEnd(len(choices.options))
        i = self.choices[self.n_made]
        self.n_made += 1
        if choices.probability(i) <= 0.0:
            raise _TextDiffers
        self.nats -= math.log(choices.probability(i))
        return choices.options[i]

    def say(self, text: str) -> None:
        if not self.text.startswith(text, self.position):
            raise _TextDiffers
        self.position += len(text)

    recall = say


class _ChoicesEnd(Exception):
    """The next choice is open; the argument is the number of its alternatives."""


class _TextDiffers(Exception):
    """The text is not that of these choices."""


def parse(text: str, events: tuple[int, int] = DEFAULT_EVENTS) -> list[float]:
    """Return the nats of every derivation of a text: one for a story of this grammar, none for any other text.

    Args:
        text: a story.
        events: least and most events, as in `tell_story`.
    """
    derivations, open_choices = [], [()]
    while open_choices:
        choices = open_choices.pop()
        reader = Reader(text, choices)
        try:
            derive(reader, *events)
        except _ChoicesEnd as end:
            open_choices += [(*choices, i) for i in range(end.args[0])]
        except _TextDiffers:
            continue
        else:
            if reader.position == len(text):
                derivations.append(reader.nats)
    return derivations


def test_every_story_has_one_derivation_and_its_stated_nats():
    """Guards: choices that cannot be told apart, whose nats would exceed the story's true cost."""
    for story in tell_stories(60, seed=3, events=(0, 5)):
        derivations = parse(story.text, (0, 5))
        assert len(derivations) == 1
        assert derivations[0] == pytest.approx(story.nats, rel=1e-12)


def test_other_texts_have_no_derivation():
    """Guards: a parser that accepts anything."""
    story = tell_story(0, 0)
    assert parse(story.text + " The end.") == [] and parse(story.text[:-2]) == []


def test_choices_are_drawn_with_the_probabilities_that_are_charged():
    """Guards: nats computed from other weights than those drawn from. 20,000 draws, 4 standard errors."""
    stories = list(tell_stories(20_000, seed=1))
    count = Counter(story.facts["place"] for story in stories)
    for i, place in enumerate(POOLS["place"].options):
        p = POOLS["place"].probability(i)
        assert abs(count[place] / 20_000 - p) < 4 * math.sqrt(p * (1 - p) / 20_000)
    assert len({story.text for story in stories}) > 0.999 * 20_000  # under 0.1 % duplicates


def test_a_story_is_a_function_of_seed_and_index():
    """Guards: a generator whose stories depend on how many were told before. Pinned to notice any change."""
    first, alone = list(tell_stories(6, seed=7))[5], tell_story(7, 5)
    assert first == alone != tell_story(8, 5)
    assert alone.text.startswith("Once upon a time there was a ")


def test_recalled_words_and_facts_stand_in_the_text():
    """Guards: spans that are off by one, so that fact nats are counted on the wrong tokens."""
    for story in tell_stories(50, seed=2, events=(3, 8)):
        assert len(story.recalls) >= 8
        assert all(story.text.count(fact) >= 2 for name, fact in story.facts.items() if fact and name != "gender")
        for begin, end in story.recalls:
            assert story.text[begin:end].isalpha()
            assert story.text[begin:end] in story.text[:begin]


def test_lengths_from_60_to_10_000_tokens_on_request():
    """Guards: stories that cannot be longer than a context. Words and punctuation are about one token each."""
    for wanted in (60, 10_000):
        events = events_for_tokens(wanted)
        lengths = [len(s.text.replace(".", " .").split()) for s in tell_stories(5, 0, (events, events))]
        assert np.mean(lengths) == pytest.approx(wanted, rel=0.15)
