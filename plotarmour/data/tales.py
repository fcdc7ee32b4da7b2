"""The built-in corpus: stories told by a small probabilistic grammar, each with its exact log-probability.

A story is a sequence of free choices; everything else is fixed text, or repeats ("recalls") an earlier choice. The
alternatives of a choice differ in their first word, so a text determines its choices. It has exactly one derivation
(the tests parse stories to check it), and

    nats(story) = - sum over its choices of ln(weight of the chosen alternative / sum of the weights of all).

No model can be better than that on average: it is the entropy of the source. `write_facts` stores these nats and the
positions of the recalled words beside a text, and scoring reads them.

The grammar can be learned in minutes (measured, see `recipes/tiny.toml`) because facts are named early, recalled soon,
often after a fixed cue word ("the *old* park", "the *dear* kite"), and drawn from skewed distributions.
"""

import json
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.random import Philox

from plotarmour.cli import UserError
from plotarmour.data.stories import story_hash


@dataclass(frozen=True)
class Pool:
    """Alternatives of one choice, with their cumulative probabilities."""

    options: tuple[str, ...]
    cumulative: tuple[float, ...]

    def probability(self, i: int) -> float:
        return self.cumulative[i] - (self.cumulative[i - 1] if i else 0.0)


def pool(words: str, exponent: float = 0.0) -> Pool:
    """Return a pool with weights 1/rank**exponent: 0 is uniform, 1.2 is skewed like the names of real stories."""
    options = tuple(words.split())
    cumulative = list(accumulate(1.0 / (rank + 1) ** exponent for rank in range(len(options))))
    return Pool(options, tuple(c / cumulative[-1] for c in cumulative))


SKEW = 1.2
POOLS = {
    "gender": pool("girl boy"),
    # Facts: skewed, recalled later in the story.
    "girl": pool("Lily Mia Sara Anna Emma Zoe Lucy Ella Ruby Nora Ivy Jane Rose Clara Hazel Tina Maya Wendy Olga Freya",
                 SKEW),
    "boy": pool("Tom Ben Max Sam Leo Jack Tim Finn Noah Oscar Peter Hugo Felix Milo Adam Ralph Toby Karl Igor Bruno",
                SKEW),
    "friend": pool("Grandma Grandpa Uncle Auntie Kim Pat Robin Alex Sky Jo Charlie Drew", SKEW),
    "place": pool("park mill farm bridge castle barn lake well tower garden market forest school harbor church cave "
                  "station meadow bakery windmill lighthouse orchard library island valley museum factory temple",
                  SKEW),
    "animal": pool("dog cat bird rabbit frog duck mouse pony fox goat turtle pig owl squirrel lamb hen snail hedgehog "
                   "beetle parrot monkey donkey otter lizard goose puppy", SKEW),
    "object": pool("ball kite doll drum book boat hat bell car lamp ring box coin flute key mirror shell train cup "
                   "crown whistle puppet basket candle necklace puzzle marble compass teapot violin", SKEW),
    # Free words: uniform, never recalled.
    "trait": pool("brave kind shy clever funny quiet gentle curious lazy proud happy silly polite stubborn honest "
                  "cheerful careful lonely noisy sleepy patient playful grumpy hopeful"),
    "look": pool("big small tall tiny huge round long short wide narrow heavy smooth rough shiny dusty wooden golden "
                 "silver broken crooked hollow flat sharp soft"),
    "color": pool("red blue green yellow pink purple orange brown black white gray striped spotted bright dark pale"),
    "taste": pool("sweet sour warm cold fresh salty sticky crunchy spicy juicy creamy bitter frozen yummy plain hot"),
    "food": pool("soup cake bread cheese honey rice jam pie corn beans apples berries carrots cookies noodles pancakes "
                 "plums nuts cherries grapes pears butter pudding salad"),
    "stranger": pool("giant witch king queen dragon fairy pirate robot wizard knight prince princess clown ghost troll "
                     "wolf bear lion tiger snake"),
    "person": pool("baker farmer doctor teacher sailor painter driver nurse singer tailor gardener hunter miller "
                   "dancer cook judge"),
    "thing": pool("chair table stone leaf blanket bench ladder pillow log bush fence wheel carpet bucket rug barrel "
                  "shelf wagon tent branch"),
    "verb": pool("jumped danced ran slept sang played rolled hopped waited rested laughed climbed crawled sneezed "
                 "wandered dug swam trembled barked giggled"),
    "adverb": pool("slowly quickly loudly softly happily sadly gladly calmly wildly nicely bravely quietly again alone "
                   "outside together"),
    "weather": pool("raining snowing windy sunny cloudy foggy stormy freezing misty thundering"),
    "sound": pool("splash bang knock song shout bark whisper crash roar buzz creak thud rumble squeak"),
    "mood": pool("glad tired excited scared surprised bored angry hungry calm thankful worried sorry thirsty dizzy "
                 "jealous relieved"),
    "greeting": pool("Hello Wow Hooray Oh Look Please Hurry Listen Goodness Welcome"),
    "time": pool("morning evening afternoon night summer winter spring autumn Monday Sunday"),
    "lesson": pool("share listen help forgive wait smile learn try care trust dream rest"),
}
# In a line, <fact:pool> chooses a fact, {fact} recalls it, [pool] is a free choice; the rest is fixed text.
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
# Which events are possible depends on who holds the dear object: only its holder can put it away or give it away.
POSSIBLE = {"hero": tuple(e for e in EVENTS if e != "Finally"),
            "friend": tuple(e for e in EVENTS if e not in ("Then", "Kindly"))}
DEFAULT_EVENTS = (2, 4)
TOKENS_PER_STORY = 62  # on average without events, in BPE of 1,024; an event has 14


@cache
def _parts(line: str) -> tuple[str, ...]:
    return tuple(part for part in re.split(r"([<{\[][^>}\]]*[>}\]])", line) if part)


@cache
def _event_pool(holder: str, n_events: int, low: int, high: int) -> Pool:
    """Return the choice of the next event or the ending, such that the number of events is uniform in low..high."""
    stop = 0.0 if n_events < low else 1.0 / (high - n_events + 1)
    events = POSSIBLE[holder]
    cumulative = list(accumulate([(1.0 - stop) / len(events)] * len(events), initial=stop))
    return Pool((STOP, *events), (*cumulative[:-1], 1.0))


def derive(walker: "Writer", low: int, high: int) -> dict[str, str]:
    """Walk through the grammar for one story of `low` to `high` events; return its facts.

    The walker makes each choice (`pick`) and receives the text (`say`, `recall`); the tests have one that parses.
    """
    facts: dict[str, str] = {}

    def line(text: str) -> None:
        for part in _parts(text):
            if part[0] == "<":
                fact, name = part[1:-1].split(":")
                facts[fact] = walker.pick(POOLS[name])
                walker.say(facts[fact])
            elif part[0] == "{":
                walker.recall(facts[part[1:-1]])
            elif part[0] == "[":
                walker.say(walker.pick(POOLS[part[1:-1]]))
            else:
                walker.say(part)

    line("Once upon a time there was a [trait]")
    facts["gender"] = walker.pick(POOLS["gender"])
    line(OPENINGS[facts["gender"]])
    facts["holder"], facts["friend"] = facts["hero"], ""
    for n_events in range(high + 1):
        holder = "hero" if facts["holder"] == facts["hero"] else "friend"
        event = walker.pick(_event_pool(holder, n_events, low, high))
        walker.say(event)
        if event == STOP:
            break
        line(EVENTS[event])
        if event in ("Kindly", "Finally"):
            facts["holder"] = facts["friend" if event == "Kindly" else "hero"]
    line(ENDING)
    return facts


@dataclass(frozen=True)
class Story:
    """A story of the corpus."""

    text: str  # ASCII
    nats: float  # exact negative log-probability under the grammar, with the end of the story
    facts: dict[str, str]  # final state: hero, place, animal, object, and who holds the object at the end
    recalls: list[tuple[int, int]]  # [start, end) of each word that repeats an earlier choice, in bytes


class Writer:
    """Draws the choices from raw Philox words (stable across NumPy versions) and collects the text."""

    def __init__(self, seed: int, index: int):
        self.bits = Philox(key=np.array([seed, index], dtype=np.uint64))
        self.text, self.nats = "", 0.0
        self.recalls: list[tuple[int, int]] = []

    def pick(self, choices: Pool) -> str:
        u = (int(self.bits.random_raw()) >> 11) * 2.0**-53
        i = bisect_right(choices.cumulative, u)
        self.nats -= math.log(choices.probability(i))
        return choices.options[i]

    def say(self, text: str) -> None:
        self.text += text

    def recall(self, word: str) -> None:
        """Add a word that the story so far determines."""
        self.recalls.append((len(self.text), len(self.text) + len(word)))
        self.say(word)


def tell_story(seed: int, index: int, events: tuple[int, int] = DEFAULT_EVENTS) -> Story:
    """Return story `index` of the corpus with this seed: a pure function of its arguments.

    Args:
        seed: of the corpus, 0 or more.
        index: of the story, 0 or more.
        events: least and most events; the number is uniform between them. `events_for_tokens` gives the tokens.

    Example:
        >>> tell_story(0, 0).text[:29]
        'Once upon a time there was a '
    """
    writer = Writer(seed, index)
    facts = derive(writer, *events)
    return Story(writer.text, writer.nats, facts, writer.recalls)


def tell_stories(n: int, seed: int = 0, events: tuple[int, int] = DEFAULT_EVENTS) -> Iterator[Story]:
    """Yield the first `n` stories of the corpus with this seed."""
    return (tell_story(seed, i, events) for i in range(n))


def events_for_tokens(tokens: int) -> int:
    """Return the number of events of a story of about this many tokens in BPE of 1,024 (60 or more)."""
    return max(0, round((tokens - TOKENS_PER_STORY) / 14))


def write_facts(path: Path, stories: Iterable[Story]) -> Iterator[str]:
    """Yield the texts of stories, and write what the corpus knows about each to a JSON-lines file."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for story in stories:
            file.write(json.dumps({"hash": story_hash(story.text), "nats": story.nats, "recalls": story.recalls,
                                   "facts": story.facts}) + "\n")
            yield story.text


def read_facts(path: Path) -> dict[int, tuple[float, list]]:
    """Read a file of `write_facts`: by story hash, the story's exact nats and the [start, end) of recalled words."""
    try:
        with path.open(encoding="utf-8") as file:
            return {entry["hash"]: (entry["nats"], entry["recalls"]) for entry in map(json.loads, file)}
    except (ValueError, KeyError, TypeError):  # not UTF-8, not JSON, or JSON of something else
        raise UserError(f"{path} does not hold facts; expected the .facts.jsonl beside a text of "
                        "tools/tell_stories.py.") from None


def recalled_tokens(sizes: np.ndarray, recalls: list[tuple[int, int]]) -> np.ndarray:
    """Return which tokens of a story overlap a recalled word, bool (n,); `sizes` has the bytes of each token, (n,)."""
    ends = np.cumsum(sizes)
    recalled = np.zeros(len(sizes), dtype=bool)
    for begin, end in recalls:
        recalled |= (ends - sizes < end) & (ends > begin)
    return recalled
