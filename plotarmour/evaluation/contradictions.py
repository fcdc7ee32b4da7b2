"""Contradictions: how well the check of a draft tells drafts that keep a fact of the story from drafts that break it.

The drafts of a pair differ in one fact; both words are drawn alike, so that a rare word is no hint. Tales come from the
built-in grammar, which knows its facts: a tale states them and goes on with events that do not name the one in
question, until a distance is reached. Swaps come from held-out stories: a sentence that names a person or a thing again
is the draft, what stands before it is the story, and another name or thing breaks it.

A draft's score is the largest over its words. The ROC AUC is the probability that, of a draft that keeps its fact and
one that breaks its own, the second has the higher score: 0.5 is chance, and what a majority reaches.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from plotarmour.data.tales import ENDING, EVENTS, OPENINGS, POOLS, STOP, Writer
from plotarmour.data.token_file import Tokens
from plotarmour.evaluation.ngrams import probabilities
from plotarmour.evaluation.surprise import Memory, sentences

# Of each fact of a tale: events that do not name it, and the line of the draft.
FILLERS = {"hero": ("Soon", "Suddenly", "Everyone", "From", "Meanwhile"),
           "place": ("Then", "After", "Later", "Next", "Meanwhile"), "animal": ("Then", "Later", "Outside", "Next"),
           "object": ("Soon", "Suddenly", "After", "Outside", "Everyone", "From"),
           "holder": ("Soon", "Suddenly", "After", "Later", "Outside", "Everyone", "From", "Next", "Meanwhile")}
DRAFTS = {"hero": "After", "place": "Outside", "animal": "Soon", "object": "Later", "holder": STOP}
LINES = EVENTS | {STOP: ENDING[:ENDING.index(". ") + 2]}
# Of held-out stories in English.
SWAPPED = {
    "name": "Lily Tom Max Mia Sara Ben Anna Tim Sam Lucy Jack Emma Bob Sue Amy Jill Mary John Jane Timmy Sarah Molly "
            "Billy Spot Bella Daisy Ella Leo Joe Jim Tommy Sally Annie Polly Rex Buddy Kitty".split(),
    "thing": "ball dog cat bird car doll box toy boat hat book tree frog fish bear bunny rabbit duck mouse truck kite "
             "cake apple cookie flower house bike train ring key stone stick shell drum bee ant fox".split()}
# Of a word, and of the same word in the draft without the story.
SCORES = {"misfit": lambda word, alone: word.misfit, "nats": lambda word, alone: word.nats,
          "nats - nats without story": lambda word, alone: word.nats - alone.nats,
          "(nats - nats without story) / (1 + entropy)":
              lambda word, alone: (word.nats - alone.nats) / (1 + word.entropy)}


@dataclass(frozen=True)
class Pair:
    """A story with two drafts that continue it."""

    fact: str
    distance: int  # tokens between the last place that names the fact and the draft; of tales, at least
    story: str
    kept: str
    broken: str


def tale(fact: str, distance: int, seed: int, index: int, tokenizer, rounds: int = 1,
         also: Sequence[str] = ()) -> Pair:
    """Return a tale with its two drafts: a pure function of its arguments.

    Args:
        fact: a key of `FILLERS`.
        distance: least tokens between the last sentence that names the fact and the draft.
        seed, index: of the tale.
        tokenizer: counts the tokens.
        rounds: how many times the fact is named after that distance; the last time is the draft.
        also: other facts, named as far back, and again before the fact: with them, a training text asks for more.
    """
    writer = Writer(seed, index)
    gender = writer.pick(POOLS["gender"])
    pools = {"hero": gender} | {name: name for name in ("place", "animal", "object", "friend")}
    facts = {name: writer.pick(POOLS[pool]) for name, pool in pools.items()}
    # Whoever got the object last: its friend, or the hero, to whom the friend gave it back.
    names = facts["friend"], facts["hero"]
    facts["holder"], other = names[::-1] if index % 2 else names
    broken = facts | {"holder": other}
    fillers = [event for event in FILLERS[fact] if all(event in FILLERS[each] for each in also)]
    while fact != "holder" and broken[fact] == facts[fact]:  # both anew, so that neither is the rarer one
        facts[fact], broken[fact] = (writer.pick(POOLS[pools[fact]]) for _ in range(2))

    def sentence(begin: str, line: str = "") -> str:
        line = re.sub(r"<(\w+):\w+>", r"{\1}", begin + (line or LINES[begin]))
        return re.sub(r"\[(\w+)\]", lambda match: writer.pick(POOLS[match[1]]), line)

    def events_without_fact() -> str:
        text, tokens = "", 0
        while tokens < distance:
            event = fillers[int(writer.bits.random_raw()) % len(fillers)]
            text += (line := sentence(event).format_map(facts))
            tokens += len(tokenizer.encode(line))
        return text + "".join(sentence(DRAFTS[each]).format_map(facts) for each in also)

    def drafts() -> list[str]:
        draft = sentence(DRAFTS[fact])
        return [draft.format_map(each) for each in (facts, broken)]

    story = sentence("Once upon a time there was a [trait]", OPENINGS[gender])
    if fact == "holder":
        story += "".join(map(sentence, ("Kindly", "Finally")[:1 + index % 2]))
    story = story.format_map(facts)
    for _ in range(rounds - 1):
        story += events_without_fact() + drafts()[0]
    return Pair(fact, distance, story + events_without_fact(), *(draft.strip() for draft in drafts()))


def swaps(data: Tokens, tokenizer) -> Iterator[Pair]:
    """Yield, of held-out stories, the last sentence that names a name or thing again, and the same with another one."""
    rng, texts = np.random.default_rng(0), [tokenizer.decode(data.story(i)) for i in range(data.n_stories)]
    for kind, words in SWAPPED.items():
        found = []
        for text in texts:
            for begin, end in reversed(sentences(text)[1:]):
                again = [word for word in re.findall(r"\w+", text[begin:end])
                         if word in words and re.search(rf"\b{word}\b", text[:begin])]
                if again:
                    found.append((text[:begin].rstrip(), text[begin:end], again[0]))
                    break
        counts = Counter(word for _, _, word in found)
        for story, draft, word in found:
            others = [other for other in counts if other != word and not re.search(rf"\b{other}\b", story)]
            if others:
                weights = np.array([counts[other] for other in others])
                other = others[rng.choice(len(others), p=weights / weights.sum())]
                last = max(match.end() for match in re.finditer(rf"\b{word}\b", story))
                yield Pair(kind, len(tokenizer.encode(story[last:])), story, draft,
                           re.sub(rf"\b{word}\b", other, draft))


def measure(runs: Sequence[Any], pairs: Sequence[Pair], train: Tokens | None = None) -> pd.DataFrame:
    """Measure how well runs tell the drafts of pairs apart.

    Args:
        runs: `plotarmour.run.Run` of one tokenizer.
        pairs: pairs; those of one fact and distance form a row.
        train: training tokens of the runs; adds trigrams, which see two tokens back, as rows.

    Returns:
        A row per run, fact, distance and score: run, fact, distance, score, pairs, auc, low, high; the last two are
        the 95 % interval over stories.
    """
    values: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))  # of kept and broken drafts
    for run in runs:
        alone = Memory.of(run, "")
        for pair in pairs:
            memory = Memory.of(run, pair.story)
            for side, draft in enumerate((pair.kept, pair.broken)):
                words, words_alone = memory.words(draft), alone.words(draft)
                for name, score in SCORES.items():
                    values[run.name, pair.fact, pair.distance, name][side].append(max(map(score, words, words_alone)))
    if train is not None:
        drafts = [(pair, side, draft) for pair in pairs for side, draft in enumerate((pair.kept, pair.broken))]
        encode, triples = runs[0].tokenizer.encode, []
        for pair, _, draft in drafts:
            ids = [*encode(pair.story[-200:])[-2:], *encode(f" {draft}")]
            triples.append(np.stack([ids[:-2], ids[1:-1], ids[2:]]))
        p = probabilities(train, *np.concatenate(triples, axis=1))["trigram"]
        ends = np.cumsum([triple.shape[1] for triple in triples])
        for (pair, side, _), own in zip(drafts, np.split(p, ends[:-1]), strict=True):
            values["trigram baseline", pair.fact, pair.distance, "nats"][side].append(-np.log(own.min()))
    rows = [[*key, len(kept), *auc(kept, broken)] for key, (kept, broken) in values.items()]
    return pd.DataFrame(rows, columns=["run", "fact", "distance", "score", "pairs", "auc", "low", "high"])


def auc(kept: Sequence[float], broken: Sequence[float]) -> tuple[float, float, float]:
    """Return the ROC AUC and the ends of its 95 % interval; a bootstrap draw takes the same stories for both drafts."""
    wins = np.subtract.outer(np.asarray(broken), np.asarray(kept))
    wins = (wins > 0) + 0.5 * (wins == 0)
    drawn = np.random.default_rng(0).integers(0, len(kept), (1000, len(kept)))
    return float(wins.mean()), *map(float, np.quantile([wins[np.ix_(rows, rows)].mean() for rows in drawn],
                                                       [0.025, 0.975]))
