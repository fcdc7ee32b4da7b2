"""The built-in corpus: tales told by a small probabilistic grammar, each with its exact log-probability.

A story is a sequence of free choices; everything else is fixed text or the recall of an earlier choice. Every
choice can be read off the text in only one way (the alternatives of a choice differ in their first word), so a text
has exactly one derivation and

    nats(story) = - sum over its choices of ln(weight of what was chosen / sum of the weights on offer).

No model can beat that on average: it is the entropy of the source. `parse` finds all derivations of a text, which is
how the tests check both statements.

What makes the grammar learnable in minutes (measured, see `recipes/tiny.toml`): facts are named early, recalled soon
and often behind a fixed cue word ("the *old* park", "the *dear* kite"), and drawn from skewed distributions.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Philox


@dataclass(frozen=True)
class Pool:
    """Alternatives of one choice, with their cumulative probabilities."""

    options: tuple[str, ...]
    cumulative: tuple[float, ...]

    def probability(self, i: int) -> float:
        return self.cumulative[i] - (self.cumulative[i - 1] if i else 0.0)


def pool(words: str | tuple[str, ...], exponent: float = 0.0) -> Pool:
    """Pool with weight 1/rank**exponent: 0 is uniform, 1.2 is skewed like names in real tales."""
    options = tuple(words.split()) if isinstance(words, str) else words
    weights = [1.0 / (rank + 1) ** exponent for rank in range(len(options))]
    cumulative, total = [], 0.0
    for weight in weights:
        total += weight
        cumulative.append(total)
    return Pool(options, tuple(c / total for c in cumulative))


SKEW = 1.2
POOLS = {
    # Facts: skewed, recalled later.
    "girl": pool("Lily Mia Sara Anna Emma Zoe Lucy Ella Ruby Nora Ivy Jane Rose Clara Hazel Tina Maya Wendy Olga Freya",
                 SKEW),
    "boy": pool("Tom Ben Max Sam Leo Jack Tim Finn Noah Oscar Peter Hugo Felix Milo Adam Ralph Toby Karl Igor Bruno",
                SKEW),
    "friend": pool("Grandma Grandpa Uncle Auntie Kim Pat Robin Alex Sky Jo Charlie Drew", SKEW),
    "place": pool("park mill farm bridge castle barn lake well tower garden market forest school harbor "
                  "church cave station meadow bakery windmill lighthouse orchard library island valley "
                  "museum factory temple", SKEW),
    "animal": pool("dog cat bird rabbit frog duck mouse pony fox goat turtle pig owl squirrel lamb hen snail "
                   "hedgehog beetle parrot monkey donkey otter lizard goose puppy", SKEW),
    "object": pool("ball kite doll drum book boat hat bell car lamp ring box coin flute key mirror shell "
                   "train cup crown whistle puppet basket candle necklace puzzle marble compass teapot "
                   "violin", SKEW),
    # Free words: uniform, never recalled.
    "trait": pool("brave kind shy clever funny quiet gentle curious lazy proud happy silly polite stubborn honest "
                  "cheerful careful lonely noisy sleepy patient playful grumpy hopeful"),
    "look": pool("big small tall tiny huge round long short wide narrow heavy smooth rough shiny dusty wooden "
                 "golden silver broken crooked hollow flat sharp soft"),
    "color": pool("red blue green yellow pink purple orange brown black white gray striped spotted bright dark "
                  "pale"),
    "taste": pool("sweet sour warm cold fresh salty sticky crunchy spicy juicy creamy bitter frozen yummy plain "
                  "hot"),
    "food": pool("soup cake bread cheese honey rice jam pie corn beans apples berries carrots cookies noodles "
                 "pancakes plums nuts cherries grapes pears butter pudding salad"),
    "stranger": pool("giant witch king queen dragon fairy pirate robot wizard knight prince princess clown ghost "
                     "troll wolf bear lion tiger snake"),
    "person": pool("baker farmer doctor teacher sailor painter driver nurse singer tailor gardener hunter miller "
                   "dancer cook judge"),
    "thing": pool("chair table stone leaf blanket bench ladder pillow log bush fence wheel carpet bucket rug "
                  "barrel shelf wagon tent branch"),
    "verb": pool("jumped danced ran slept sang played rolled hopped waited rested laughed climbed crawled sneezed "
                 "wandered dug swam trembled barked giggled"),
    "adverb": pool("slowly quickly loudly softly happily sadly gladly calmly wildly nicely bravely quietly again "
                   "alone outside together"),
    "weather": pool("raining snowing windy sunny cloudy foggy stormy freezing misty thundering"),
    "sound": pool("splash bang knock song shout bark whisper crash roar buzz creak thud rumble squeak"),
    "mood": pool("glad tired excited scared surprised bored angry hungry calm thankful worried sorry thirsty dizzy "
                 "jealous relieved"),
    "greeting": pool("Hello Wow Hooray Oh Look Please Hurry Listen Goodness Welcome"),
    "time": pool("morning evening afternoon night summer winter spring autumn Monday Sunday"),
    "lesson": pool("share listen help forgive wait smile learn try care trust dream rest"),
}
# A line's marks: <fact:pool> introduces a fact, {fact} recalls it, [pool] is a free choice, all else is said as it is.
OPENINGS = {
    "girl": " girl named <hero:girl>. {hero} lived near the old <place:place> with a little <animal:animal>. "
            "One [time] she found her dear <object:object> at the old {place}. ",
    "boy": " boy named <hero:boy>. {hero} lived near the old <place:place> with a little <animal:animal>. "
           "One [time] he found his dear <object:object> at the old {place}. ",
}
EVENTS = {
    "Then": " {hero} put the dear {object} on a [look] [thing]. ",
    "Kindly": " {hero} gave the dear {object} to <friend:friend>. ",
    "Finally": " {friend} gave the dear {object} back to {hero}. ",
    "Soon": " the little {animal} [verb] [adverb] near the old {place}. ",
    "Suddenly": " a [color] [stranger] came to the old {place} and saw the little {animal}. ",
    "After": " that {hero} and the little {animal} ate some [taste] [food]. ",
    "Later": " a [trait] [person] asked {hero} about the dear {object}. ",
    "Outside": " the old {place} it was [weather] and {hero} felt [mood]. ",
    "Everyone": " at the old {place} gave the little {animal} some [taste] [food]. ",
    "From": " the old {place} came a [look] [sound] and the little {animal} [verb]. ",
    "Next": " {hero} said, \"[greeting]! The dear {object} is as [color] as a [stranger].\" ",
    "Meanwhile": " the little {animal} looked at the dear {object} and felt [mood]. ",
}
ENDING = (" the end {holder} kept the dear {object} at the old {place}. {hero} and the little {animal} felt [mood] and "
          "learned to [lesson].")
STOP = "In"  # the ending's first word
# What can happen depends on who holds the dear object: nobody puts away or gives away what is not theirs.
POSSIBLE = {"hero": tuple(e for e in EVENTS if e != "Finally"),
            "friend": tuple(e for e in EVENTS if e not in ("Then", "Kindly"))}
DEFAULT_EVENTS = (2, 4)
TOKENS_PER_STORY = 62  # without events, about; an event is 14 more (BPE of 1,024)


@cache
def _parts(line: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"([<{\[][^>}\]]*[>}\]])", line) if part)


@cache
def _event_pool(holder: str, told: int, low: int, high: int) -> Pool:
    """Pool of the next event or the ending, such that the number of events is uniform in low..high."""
    stop = 0.0 if told < low else 1.0 / (high - told + 1)
    names, total, cumulative = (STOP, *POSSIBLE[holder]), stop, [stop]
    for _ in POSSIBLE[holder]:
        total += (1.0 - stop) / len(POSSIBLE[holder])
        cumulative.append(total)
    cumulative[-1] = 1.0
    return Pool(names, tuple(cumulative))


def tell(teller, low: int, high: int) -> dict[str, str]:
    """Tell one story of `low` to `high` events through `teller` (a `Teller` or a `Reader`); return its facts."""
    facts: dict[str, str] = {}

    def line(text: str) -> None:
        for part in _parts(text):
            if part[0] == "<":
                fact, name = part[1:-1].split(":")
                facts[fact] = teller.pick(POOLS[name])
                teller.say(facts[fact])
            elif part[0] == "{":
                teller.recall(facts[part[1:-1]])
            elif part[0] == "[":
                teller.say(teller.pick(POOLS[part[1:-1]]))
            else:
                teller.say(part)

    line("Once upon a time there was a [trait]")
    facts["gender"] = teller.pick(pool(tuple(OPENINGS)))
    line(OPENINGS[facts["gender"]])
    facts["holder"], facts["friend"] = facts["hero"], ""
    for told in range(high + 1):
        event = teller.pick(_event_pool("hero" if facts["holder"] == facts["hero"] else "friend", told, low, high))
        teller.say(event)
        if event == STOP:
            break
        line(EVENTS[event])
        if event in ("Kindly", "Finally"):
            facts["holder"] = facts["friend" if event == "Kindly" else "hero"]
    line(ENDING)
    return facts


@dataclass(frozen=True)
class Story:
    """One tale, what it costs the corpus itself, and what it says.

    `recalls` are [start, end) offsets of the words that repeat an earlier choice (bytes and characters agree: ASCII).
    `facts` holds the last state: who is who, where, and who holds the object in the end.
    """

    text: str
    nats: float
    facts: dict[str, str]
    recalls: list[tuple[int, int]]


class Teller:
    """Makes the choices from raw Philox words (stable across NumPy versions) and writes the text down."""

    def __init__(self, seed: int, index: int):
        self.bits = Philox(key=np.array([seed, index], dtype=np.uint64))
        self.parts: list[str] = []
        self.length = 0
        self.nats = 0.0
        self.recalls: list[tuple[int, int]] = []

    def pick(self, choices: Pool) -> str:
        u = (int(self.bits.random_raw()) >> 11) * 2.0**-53
        i = bisect_right(choices.cumulative, u)
        self.nats -= math.log(choices.probability(i))
        return choices.options[i]

    def say(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)

    def recall(self, word: str) -> None:
        """Say a word that the story so far determines."""
        self.recalls.append((self.length, self.length + len(word)))
        self.say(word)


class Reader:
    """Follows a text with a script of choices; stops where the script ends or the text disagrees."""

    def __init__(self, text: str, script: tuple[int, ...]):
        self.text, self.script, self.position, self.nats, self.at = text, script, 0, 0.0, 0

    def pick(self, choices: Pool) -> str:
        if self.at == len(self.script):
            raise _ScriptEnds(len(choices.options))
        i = self.script[self.at]
        self.at += 1
        if choices.probability(i) <= 0.0:
            raise _Disagrees
        self.nats -= math.log(choices.probability(i))
        return choices.options[i]

    def say(self, text: str) -> None:
        if not self.text.startswith(text, self.position):
            raise _Disagrees
        self.position += len(text)

    recall = say


class _ScriptEnds(Exception):
    pass


class _Disagrees(Exception):
    pass


def parse(text: str, events: tuple[int, int] = DEFAULT_EVENTS) -> list[float]:
    """Find every derivation of a text.

    Args:
        text: a story.
        events: least and most events, as the story was told with.

    Returns:
        The nats of each derivation: one entry for a story of this grammar, none for any other text.
    """
    found, scripts = [], [()]
    while scripts:
        script = scripts.pop()
        reader = Reader(text, script)
        try:
            tell(reader, *events)
        except _ScriptEnds as end:
            scripts += [(*script, i) for i in range(end.args[0])]
        except _Disagrees:
            continue
        else:
            if reader.position == len(text):
                found.append(reader.nats)
    return found


def tell_story(seed: int, index: int, events: tuple[int, int] = DEFAULT_EVENTS) -> Story:
    """Tell story `index` of the corpus with this seed: a pure function of its arguments.

    Args:
        seed: of the corpus, 0 or more.
        index: of the story, 0 or more.
        events: least and most events; about 14 tokens each on top of 62 (see `events_for_tokens`).

    Returns:
        The story, its exact negative log-probability in nats (the end of the story included), facts and recalls.

    Example:
        >>> tell_story(0, 0).text[:29]
        'Once upon a time there was a '
    """
    teller = Teller(seed, index)
    facts = tell(teller, *events)
    return Story("".join(teller.parts), teller.nats, facts, teller.recalls)


def tell_stories(n: int, seed: int = 0, events: tuple[int, int] = DEFAULT_EVENTS) -> Iterator[Story]:
    """Yield the first `n` stories of the corpus with this seed."""
    return (tell_story(seed, i, events) for i in range(n))


def events_for_tokens(tokens: int) -> int:
    """Number of events that makes a story about this many BPE-1,024 tokens long (60 or more)."""
    return max(0, round((tokens - TOKENS_PER_STORY) / 14))
