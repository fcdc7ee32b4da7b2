#!/usr/bin/env python3
"""How well the check of a draft finds a broken fact: ROC AUC by fact, distance, run and score.

With --tales, stories of the built-in grammar: one states its hero, place, animal, object and who holds the object, and
goes on with events that do not name the fact in question, until the distance is reached. The draft is an event that
names it. With --stories, held-out stories of a token file: a sentence that names a person or a thing again is the
draft, and what stands before it the story; the distance is that to the last place that names it.

Each pair of drafts differs in the fact alone: one keeps it, one breaks it by another word of the same kind. Both words
are drawn alike (from the grammar's own frequencies, or from those in the stories), so a rare word is no hint. A draft's
score is the largest over its words. AUC is the probability that of two drafts the broken one has the higher score; 0.5
is chance, and what the majority or the words' frequency reach. Intervals are 95 % of bootstrap draws of the stories.
"""

import argparse
import csv
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Of each fact of the tales: events that do not name it, and the event of the draft.
FILLERS = {"hero": ("Soon", "Suddenly", "Everyone", "From", "Meanwhile"),
           "place": ("Then", "After", "Later", "Next", "Meanwhile"), "animal": ("Then", "Later", "Outside", "Next"),
           "object": ("Soon", "Suddenly", "After", "Outside", "Everyone", "From"),
           "holder": ("Soon", "Suddenly", "After", "Later", "Outside", "Everyone", "From", "Next", "Meanwhile")}
DRAFTS = {"hero": "After", "place": "Outside", "animal": "Soon", "object": "Later"}
NAMES = ("Lily Tom Max Mia Sara Ben Anna Tim Sam Lucy Jack Emma Bob Sue Amy Jill Mary John Jane Timmy Sarah Molly "
         "Billy Spot Fluffy Bella Daisy Ella Leo Joe Jim Tommy Sally Annie Polly Rex Buddy Kitty").split()
THINGS = ("ball dog cat bird car doll box toy boat hat book tree frog fish bear bunny rabbit duck mouse truck kite "
          "cake apple cookie flower house bike train ring key stone stick shell drum bee ant fox pig cow horse").split()
BINS = (32, 64, 128, 256)  # of distances in held-out stories
SCORES = {"misfit": lambda word: word.misfit, "nats": lambda word: word.nats,
          "nats - entropy": lambda word: word.nats - word.entropy,
          "nats / (1 + entropy)": lambda word: word.nats / (1 + word.entropy),
          "nats - nats alone": lambda word: word.nats - word.nats_alone}


def tale(fact: str, distance: int, seed: int, index: int, tokenizer) -> tuple[str, str, str]:
    """Return a story of the grammar, a draft that keeps the fact, and one that breaks it.

    Args:
        fact: a key of `FILLERS`.
        distance: least tokens between the last sentence that names the fact and the draft.
        seed, index: of the story.
        tokenizer: counts the tokens.
    """
    from plotarmour.data.tales import EVENTS, OPENINGS, POOLS, Writer

    writer = Writer(seed, index)
    pick = writer.pick
    gender = pick(POOLS["gender"])
    pools = {"hero": gender, "place": "place", "animal": "animal", "object": "object", "friend": "friend"}
    facts = {name: pick(POOLS[pool]) for name, pool in pools.items()}
    broken = dict(facts)
    while fact != "holder" and broken[fact] == facts[fact]:  # both anew, so that neither is the rarer one
        facts[fact], broken[fact] = pick(POOLS[pools[fact]]), pick(POOLS[pools[fact]])

    def event(name: str) -> str:
        line = re.sub(r"<(\w+):\w+>", r"{\1}", name + EVENTS.get(name, ""))
        return re.sub(r"\[(\w+)\]", lambda match: pick(POOLS[match[1]]), line)

    story = event("Once upon a time there was a [trait]" + OPENINGS[gender]).format_map(facts)
    drafts = ["Finally" + EVENTS["Finally"], event("Then")]  # the second one only if the hero holds the object
    if fact == "holder":
        story += event("Kindly").format_map(facts)
        if index % 2:
            story += event("Finally").format_map(facts)
            drafts.reverse()
        drafts = [draft.format_map(facts) for draft in drafts]
    else:
        draft = event(DRAFTS[fact])
        drafts = [draft.format_map(each) for each in (facts, broken)]
    named = len(story)
    while len(tokenizer.encode(story[named:])) < distance:
        story += event(FILLERS[fact][int(writer.bits.random_raw()) % len(FILLERS[fact])]).format_map(facts)
    return story, *(draft.strip() for draft in drafts)


def swaps(data, seed: int = 0):
    """Yield (kind, distance in tokens, story, draft that keeps, draft that breaks) of held-out stories."""
    import numpy as np

    from plotarmour.evaluation.surprise import sentences

    rng, tokenizer = np.random.default_rng(seed), data.tokenizer()
    texts = [tokenizer.decode(data.story(i)) for i in range(data.n_stories)]
    for kind, words in (("name", NAMES), ("thing", THINGS)):
        found = []
        for text in texts:
            spans = sentences(text)
            for begin, end in reversed(spans[1:]):  # the last sentence that names one again
                again = [match[0] for match in re.finditer(r"\b[A-Za-z]+\b", text[begin:end])
                         if match[0] in words and re.search(rf"\b{match[0]}\b", text[:begin])]
                if again:
                    found.append((text[:begin].rstrip(), text[begin:end], again[0]))
                    break
        counts = Counter(word for _, _, word in found)
        kinds, weights = zip(*counts.items(), strict=True)
        weights = np.array(weights) / sum(weights)
        for story, draft, word in found:
            others = np.array([other != word and not re.search(rf"\b{other}\b", story) for other in kinds])
            if not (weights * others).sum():
                continue
            other = kinds[rng.choice(len(kinds), p=weights * others / (weights * others).sum())]
            last = max(match.end() for match in re.finditer(rf"\b{word}\b", story))
            yield (kind, len(tokenizer.encode(story[last:])), story, draft, re.sub(rf"\b{word}\b", other, draft))


def auc(kept, broken, seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
    """Return AUC and the ends of its 95 % interval; a draw takes the same stories for both drafts."""
    import numpy as np

    kept, broken = np.asarray(kept), np.asarray(broken)
    wins = (broken[:, None] > kept) + 0.5 * (broken[:, None] == kept)
    drawn = np.random.default_rng(seed).integers(0, len(kept), (draws, len(kept)))
    return float(wins.mean()), *map(float, np.quantile([wins[np.ix_(rows, rows)].mean() for rows in drawn],
                                                       [0.025, 0.975]))


def trigram_scores(train, cases: list[tuple]) -> list[tuple[float, float]]:
    """Return the largest nats of a token of both drafts of each case under the trigrams of training tokens."""
    import numpy as np

    from plotarmour.evaluation.ngrams import probabilities

    tokenizer, tokens, ends = train.tokenizer(), [], []
    for *_, story, kept, broken in cases:
        for draft in (kept, broken):
            ids = [*tokenizer.encode(story[-200:])[-2:], *tokenizer.encode(f" {draft}")]
            tokens += zip(ids, ids[1:], ids[2:], strict=False)
            ends.append(len(tokens))
    p = probabilities(train, *np.array(tokens, dtype=np.int64).T)["trigram"]
    largest = [float(-np.log(part.min())) for part in np.split(p, ends[:-1])]
    return list(zip(largest[::2], largest[1::2], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of one tokenizer")
    parser.add_argument("--train", type=Path, help="token file of the train part; adds trigrams as a row")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tales", type=int, metavar="N", help="stories of the grammar, for each fact and distance")
    what.add_argument("--stories", type=Path, help="token file of held-out stories")
    parser.add_argument("--distances", default="0,64,256,1024,4096,8192", help="of --tales, in tokens, separated by ,")
    parser.add_argument("--seed", type=int, default=1000, help="of the tales; the corpus of the recipes has 0")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "contradictions.csv")
    args = parser.parse_args()
    from plotarmour.data.token_file import TokenFile
    from plotarmour.evaluation.surprise import Memory
    from plotarmour.run import load_run

    runs = list(map(load_run, args.runs))
    if args.tales:
        cases = [(fact, distance, *tale(fact, distance, args.seed, i, runs[0].tokenizer)) for fact in FILLERS
                 for distance in map(int, args.distances.split(",")) for i in range(args.tales)]
    else:
        cases = [(kind, next((f"< {end}" for end in BINS if distance < end), f"{BINS[-1]} and more"), *rest)
                 for kind, distance, *rest in swaps(TokenFile.open(args.stories))]
    scores = defaultdict(lambda: ([], []))  # of kept and of broken drafts, by run, fact, distance and score
    for run in runs:
        alone = Memory.of(run, "")
        for fact, distance, story, *drafts in cases:
            memory = Memory.of(run, story)
            for side, draft in enumerate(drafts):
                words = memory.words(draft, alone)
                for name, score in SCORES.items():
                    scores[run.name, fact, distance, name][side].append(max(map(score, words)))
    if args.train:
        for (fact, distance, *_), pair in zip(cases, trigram_scores(TokenFile.open(args.train), cases), strict=True):
            for side, value in enumerate(pair):
                scores["trigram baseline", fact, distance, "nats"][side].append(value)
    rows = [[*key, len(kept), *(f"{x:.4f}" for x in auc(kept, broken))] for key, (kept, broken) in scores.items()]
    for row in rows:
        print(*row)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["run", "fact", "distance", "score", "pairs", "auc", "low", "high"], *rows])


if __name__ == "__main__":
    main()
