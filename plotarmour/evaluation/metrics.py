"""Runs side by side: every test story under every run and floor, on exactly the same tokens.

One rule: add nats, count tokens, divide once, exponentiate once. Loss is nats / tokens (tokens = ids + 1 per story,
the closing end-of-text included), perplexity exp(loss), bits per byte nats / ln 2 / bytes of the stories' text.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from plotarmour.cli import UserError
from plotarmour.data.facts import FACT_COLUMNS, CorpusFacts, fact_columns
from plotarmour.data.stories import story_hash
from plotarmour.evaluation.ngrams import count_floors
from plotarmour.evaluation.scoring import score_stories, story_tokens

STORY_COLUMNS = ["story", "tokens", "bytes", "nats"]
WHOLE_NUMBERS = ("params", "params_non_embedding", "params_per_token", "train_tokens", "steps", "checkpoint_step",
                 "seed", "recall_tokens")


@dataclass(frozen=True)
class Scores:
    """All stories of a token file under one model.

    Attributes:
        stories: a row per story, in order: story, tokens, bytes, nats; with facts also recall_tokens, recall_nats
            (tokens that overlap a recalled word) and corpus_nats.
        positions: a row per place in a story: position (0 is a story's first token), tokens (stories that have it),
            nats (their sum).
    """

    stories: pd.DataFrame
    positions: pd.DataFrame


def totals(tokens: int, n_bytes: int, nats: float) -> dict[str, float]:
    """Loss, perplexity and bits per byte of summed nats.

    Example:
        16 tokens of 32 bytes that cost 16·ln 4 nats: loss ln 4, perplexity 4, 1 bit per byte.
    """
    loss = nats / tokens
    return {"tokens": tokens, "bytes": n_bytes, "nats": nats, "loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": nats / math.log(2) / n_bytes}


def evaluate_run(run, data, facts: dict[int, CorpusFacts] | None = None, stride: int | None = None,
                 unbounded: bool = False) -> Scores:
    """Score every story of a token file under a run.

    Args:
        run: a `plotarmour.run.Run`.
        data: a `TokenFile` of the run's tokenizer.
        facts: by story hash, for stories of the built-in corpus.
        stride: of sliding windows, in tokens; half a context by default.
        unbounded: whether every token is given its whole story, through the model's state, instead of a window.
    """
    n = data.n_stories
    columns = STORY_COLUMNS + (FACT_COLUMNS if facts else [])
    table = np.zeros((n, len(columns)))
    longest = int(story_tokens(data).max())
    nats, count = np.zeros(longest), np.zeros(longest, dtype=np.int64)
    sizes = run.tokenizer.token_bytes if facts else None
    for score in score_stories(run.model, data, None if unbounded else run.context_length, run.machine,
                               None if unbounded else stride, name=run.name + (" unbounded" if unbounded else "")):
        table[score.story, :4] = score.story, score.tokens, score.bytes, score.nats
        nats[:score.tokens] += score.token_nats
        count[:score.tokens] += 1
        if facts:
            known = facts.get(story_hash(run.tokenizer.decode(data.story(score.story))))
            if known is None:
                raise UserError(f"story {score.story} of {data.path} is not in the facts file; expected the "
                                ".facts.jsonl that was written with this text.")
            table[score.story, 4:] = fact_columns(score, data, sizes, known)
    stories = pd.DataFrame(table, columns=columns)
    stories = stories.astype({name: "int64" for name in ("story", "tokens", "bytes", "recall_tokens")
                              if name in stories})
    return Scores(stories, pd.DataFrame({"position": np.arange(longest), "tokens": count, "nats": nats}))


def evaluate_floors(train_data, data) -> dict[str, pd.DataFrame]:
    """Score every story under the floors of the training tokens; columns as for runs.

    Returns:
        By name: uniform, unigram, bigram, trigram.
    """
    floors = count_floors(train_data, data)
    facts = {"story": np.arange(data.n_stories), "tokens": story_tokens(data),
             "bytes": data.story_bytes.astype(np.int64)}
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
                    "recall_tokens": count, "recall_loss": recalled / count if count else math.nan,
                    "other_loss": (sums["nats"] - recalled) / (sums["tokens"] - count)}
        rows.append(row)
    if "corpus_nats" in first:
        sums = totals(int(first["tokens"].sum()), int(first["bytes"].sum()), float(first["corpus_nats"].sum()))
        recalls = int(first["recall_tokens"].sum())
        rows.append({"name": "the corpus itself", "stories": len(first), **sums, "over_corpus": 0.0,
                     "recall_tokens": recalls, "recall_loss": 0.0,
                     "other_loss": sums["nats"] / (sums["tokens"] - recalls)})
    table = pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")
    for column in WHOLE_NUMBERS:
        if column in table:
            table[column] = table[column].astype("Int64")  # floors have none: empty, not 0
    return table
