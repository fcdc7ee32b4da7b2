"""What the built-in corpus knows about its stories: their exact nats, and which words the story so far determines."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.stories import story_hash
from plotarmour.data.tales import Story

FACT_COLUMNS = ["recall_tokens", "recall_nats", "corpus_nats"]


@dataclass(frozen=True)
class CorpusFacts:
    """What the built-in corpus knows about a story: its exact nats, and the byte ranges of the recalled facts."""

    nats: float
    recalls: list[tuple[int, int]]


def write_facts(path: Path, stories: Iterable[Story]) -> Iterable[str]:
    """Yield the texts of built-in stories while writing what the corpus knows about each to a JSON-lines file."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for story in stories:
            file.write(json.dumps({"hash": story_hash(story.text), "nats": story.nats, "recalls": story.recalls,
                                   "facts": story.facts}) + "\n")
            yield story.text


def read_facts(path: Path) -> dict[int, CorpusFacts]:
    """Read what `write_facts` wrote, by story hash."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected the .facts.jsonl beside a text of tools/tell_stories.py.")
    try:
        with path.open(encoding="utf-8") as file:
            entries = (json.loads(line) for line in file)
            return {e["hash"]: CorpusFacts(e["nats"], [tuple(r) for r in e["recalls"]]) for e in entries}
    except (ValueError, KeyError, TypeError):  # no UTF-8, no JSON, or of something else
        raise UserError(f"{path} does not hold facts; expected the .facts.jsonl beside a text of "
                        "tools/tell_stories.py.") from None


def fact_columns(score, data, sizes: np.ndarray, facts: CorpusFacts) -> list[float]:
    """Return FACT_COLUMNS of a story score: tokens that overlap a recalled word, their nats, the corpus's own nats."""
    ends = np.cumsum(sizes[np.asarray(data.story(score.story))])
    starts = np.append(0, ends[:-1])
    recalled = np.zeros(score.tokens, dtype=bool)  # the last one, end-of-text, never is
    for begin, end in facts.recalls:
        recalled[:-1] |= (starts < end) & (ends > begin)
    return [int(recalled.sum()), float(score.token_nats[recalled].sum(dtype=np.float64)), facts.nats]
