"""Runs side by side: every test story under every run and floor, on exactly the same tokens.

One rule: add nats, count tokens, divide once, exponentiate once. Loss is nats / tokens (tokens = ids + 1 per story,
the closing end-of-text included), perplexity exp(loss), bits per byte nats / ln 2 / bytes of the stories' text.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from plotarmour.errors import UserError
from plotarmour.evaluation.floors import count_floors
from plotarmour.evaluation.scoring import StoryScore, score_stories
from plotarmour.text.grammar import Story
from plotarmour.text.stories import story_hash

STORY_COLUMNS = ["story", "tokens", "bytes", "nats"]


@dataclass(frozen=True)
class CorpusFacts:
    """What the built-in corpus knows about a story: its exact nats, and the byte ranges of the recalled facts."""

    nats: float
    recalls: list[tuple[int, int]]


def totals(tokens: int, n_bytes: int, nats: float) -> dict[str, float]:
    """Loss, perplexity and bits per byte of summed nats.

    Example:
        16 tokens of 32 bytes that cost 16·ln 4 nats: loss ln 4, perplexity 4, 1 bit per byte.
    """
    loss = nats / tokens
    return {"tokens": tokens, "bytes": n_bytes, "nats": nats, "loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / n_bytes}


def evaluate_run(run, data, facts: dict[int, CorpusFacts] | None = None, stride: int | None = None) -> pd.DataFrame:
    """Score every story of a token file under a run.

    Args:
        run: a `plotarmour.runs.Run`.
        data: a `TokenFile` of the run's tokenizer.
        facts: by story hash, for stories of the built-in corpus.
        stride: of sliding windows, in tokens; half a context by default.

    Returns:
        One row per story in order: story, tokens, bytes, nats; with facts also recall_tokens and recall_nats (tokens
        that overlap a recalled word) and corpus_nats.
    """
    sizes = run.tokenizer.token_bytes
    rows = []
    for score in score_stories(run.model, data, run.context_length, run.machine, stride, name=run.name):
        row = [score.story, score.tokens, score.bytes, score.nats]
        if facts:
            known = facts.get(story_hash(run.tokenizer.decode(data.story(score.story))))
            if known is None:
                raise UserError(f"story {score.story} of {data.path} is not in the facts file; expected the "
                                ".facts.jsonl that was written with this text.")
            row += _recall_columns(score, data, sizes, known)
        rows.append(row)
    columns = STORY_COLUMNS + (["recall_tokens", "recall_nats", "corpus_nats"] if facts else [])
    return pd.DataFrame(rows, columns=columns).sort_values("story", ignore_index=True)


def evaluate_floors(train_data, data) -> dict[str, pd.DataFrame]:
    """Score every story under the floors of the training tokens; columns as for runs.

    Returns:
        By name: uniform, unigram, bigram, trigram.
    """
    floors = count_floors(train_data, data)
    lengths = np.diff(np.append(data.offsets, data.n_tokens).astype(np.int64))
    facts = {"story": np.arange(data.n_stories), "tokens": lengths, "bytes": data.story_bytes.astype(np.int64)}
    return {name: pd.DataFrame(facts | {"nats": nats}) for name, nats in floors.story_nats(data).items()}


def comparison_table(scores: dict[str, pd.DataFrame], budgets: dict[str, dict]) -> pd.DataFrame:
    """Put totals of runs and floors into one table, best loss first.

    Args:
        scores: by name, the stories' rows.
        budgets: by name, what a run cost: columns of its own, such as params and seconds.

    Returns:
        One row per name.

    Raises:
        UserError: the rows do not cover the same tokens.
    """
    first = next(iter(scores.values()))
    for name, frame in scores.items():
        if not frame[["story", "tokens", "bytes"]].equals(first[["story", "tokens", "bytes"]]):
            raise UserError(f"{name} was scored on other tokens than {next(iter(scores))}; score all on one file.")
    rows = []
    for name, frame in scores.items():
        sums = totals(int(frame["tokens"].sum()), int(frame["bytes"].sum()), float(frame["nats"].sum()))
        row = {"name": name, **budgets.get(name, {}), "stories": len(frame), **sums}
        if "corpus_nats" in frame:
            recalled, count = float(frame["recall_nats"].sum()), int(frame["recall_tokens"].sum())
            row |= {"over_corpus": sums["nats"] / float(frame["corpus_nats"].sum()) - 1.0,
                    "recall_tokens": count, "recall_loss": recalled / count,
                    "other_loss": (sums["nats"] - recalled) / (sums["tokens"] - count)}
        rows.append(row)
    if "corpus_nats" in first:
        sums = totals(int(first["tokens"].sum()), int(first["bytes"].sum()), float(first["corpus_nats"].sum()))
        recalls = int(first["recall_tokens"].sum())
        rows.append({"name": "the corpus itself", "stories": len(first), **sums, "over_corpus": 0.0,
                     "recall_tokens": recalls, "recall_loss": 0.0,
                     "other_loss": sums["nats"] / (sums["tokens"] - recalls)})
    table = pd.DataFrame(rows).sort_values("loss", ignore_index=True)
    for column in ("params", "params_non_embedding", "train_tokens", "steps", "checkpoint_step", "recall_tokens"):
        if column in table:
            table[column] = table[column].astype("Int64")  # floors have none: empty, not 0
    return table


def budget_of(run) -> dict:
    """Return what a run cost, from its folder: parameters, training tokens, seconds, memory, hardware.

    Tokens, steps and seconds are those of the whole run; `checkpoint_step` is the step that was scored.
    """
    final = next((json.loads((run.folder / name).read_text(encoding="utf-8"))
                  for name in ("DONE.json", "STOPPED.json") if (run.folder / name).exists()), {})
    return {"model": run.config.model, "params": run.info["params"],
            "params_non_embedding": run.info["params_non_embedding"], "train_tokens": final.get("tokens_seen"),
            "steps": final.get("step"), "checkpoint_step": run.step, "train_s": final.get("elapsed_s"),
            "peak_memory_mib": final.get("peak_memory_mib"), "hardware": run.info["hardware"],
            "ended": final.get("reason", "unfinished")}


def differences(runs: list) -> list[str]:
    """Say what makes a comparison of these runs unequal, one line each; empty where nothing does."""
    looked_at = {"training text": lambda run: run.info["train"]["payload_sha256"][:12],
                 "seed": lambda run: run.config.training.seed, "context": lambda run: run.context_length,
                 "rows per step": lambda run: run.config.training.rows_per_step,
                 "windows": lambda run: run.config.training.windows,
                 "tokens": lambda run: budget_of(run)["train_tokens"], "end": lambda run: budget_of(run)["ended"]}
    found = []
    for what, value in looked_at.items():
        values = {run.name: value(run) for run in runs}
        if len(set(values.values())) > 1:
            found.append(f"{what}: " + ", ".join(f"{name} {v}" for name, v in values.items()))
    return found


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
    with path.open(encoding="utf-8") as file:
        entries = (json.loads(line) for line in file)
        return {e["hash"]: CorpusFacts(e["nats"], [tuple(r) for r in e["recalls"]]) for e in entries}


def _recall_columns(score: StoryScore, data, sizes: np.ndarray, facts: CorpusFacts) -> list[float]:
    ends = np.cumsum(sizes[np.asarray(data.story(score.story))])
    starts = np.append(0, ends[:-1])
    recalled = np.zeros(score.tokens, dtype=bool)  # the last one, end-of-text, never is
    for begin, end in facts.recalls:
        recalled[:-1] |= (starts < end) & (ends > begin)
    return [int(recalled.sum()), float(score.token_nats[recalled].sum(dtype=np.float64)), facts.nats]
