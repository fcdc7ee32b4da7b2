"""Nats of every token of every story, given only its own story so far.

The context of a story starts at the end-of-text token, and its closing end-of-text token is scored too: a story of n
ids costs n + 1 tokens. Its bytes are those of its text alone. Stories longer than the context are scored by sliding
windows: each window after the first sees context_length - stride tokens of the past and scores the next `stride`. A
model that carries a state of any length (BDH) can also be scored *unbounded*: every token given its whole story.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from plotarmour.cli import UserError
from plotarmour.data.stories import story_hash
from plotarmour.data.tales import FACT_COLUMNS, CorpusFacts, fact_columns
from plotarmour.evaluation.metrics import totals
from plotarmour.loss import IGNORE, token_nats
from plotarmour.machine import Machine

TOKENS_PER_BATCH = 4096
PIECE = 4096  # tokens that are read at once where there is no context length: memory does not grow with the story
STORY_COLUMNS = ["story", "tokens", "bytes", "nats"]
WHOLE_NUMBERS = ("params", "params_non_embedding", "params_per_token", "train_tokens", "steps", "checkpoint_step",
                 "seed", "recall_tokens")


@dataclass(frozen=True)
class StoryScore:
    """One story under one model.

    Attributes:
        story: its number in the token file.
        tokens: ids + 1.
        bytes: UTF-8 bytes of its text.
        nats: sum over its tokens.
        token_nats: float32 (tokens,).
    """

    story: int
    tokens: int
    bytes: int
    nats: float
    token_nats: np.ndarray


@dataclass(frozen=True)
class Scores:
    """All stories of a token file under one model.

    Attributes:
        stories: a row per story, in order: story, tokens, bytes, nats; with facts also recall_tokens, recall_nats
            (tokens that overlap a recalled word) and corpus_nats.
        positions: a row per place in a story: position (0 is a story's first token), tokens (stories that have it),
            nats (their sum).
        token_nats: for every story, float32 (tokens,): the nats of its tokens.
    """

    stories: pd.DataFrame
    positions: pd.DataFrame
    token_nats: list[np.ndarray]


def score_stories(model: nn.Module, data, context_length: int | None, machine: Machine, stride: int | None = None,
                  stories: Sequence[int] | None = None, name: str | None = "model") -> Iterator[StoryScore]:
    """Score the stories of a token file, in batches of similar length.

    Args:
        model: with `features` and `unembedding`, on the machine's device.
        data: a `TokenFile` (or `TokensInMemory`) of the model's tokenizer.
        context_length: tokens a model sees at once; None: all of a story, through the model's state.
        machine: device and dtype.
        stride: of sliding windows, in tokens; half a context by default.
        stories: score only these, by number.
        name: for the progress bar; None: no bar.

    Yields:
        A `StoryScore` per story; not in order. A few words of memory per story, and one batch, are held.

    Raises:
        UserError: a stride outside 1..context_length.
    """
    check_stride(stride, context_length)
    lengths = story_tokens(data)
    chosen = np.arange(data.n_stories) if stories is None else np.asarray(stories, dtype=np.int64)
    order = chosen[np.argsort(lengths[chosen], kind="stable")]
    waiting: dict[int, list] = {}  # stories with windows still to come
    with tqdm(total=int(lengths[chosen].sum()), desc=f"score {name}", unit="token", unit_scale=True,
              mininterval=1.0, disable=name is None) as bar:
        for batch in _batches(data, order, context_length, stride):
            for i, first, nats, last in _score_batch(model, batch, machine, data.header["end_of_text_id"]):
                waiting.setdefault(i, []).append(nats[first:])
                if last:
                    whole = np.concatenate(waiting.pop(i))
                    bar.update(len(whole))
                    yield StoryScore(i, len(whole), int(data.story_bytes[i]), float(whole.sum(dtype=np.float64)),
                                     whole)


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
    nats, count, token_nats = np.zeros(longest), np.zeros(longest, dtype=np.int64), [np.empty(0)] * n
    sizes = run.tokenizer.token_bytes if facts else None
    if facts and sizes is None:
        raise UserError(f"{run.name} was trained with a tokenizer that is not byte-level; expected bpe:N, gpt2 or "
                        "bytes to count nats on facts. Compare without --facts.")
    for score in score_stories(run.model, data, None if unbounded else run.context_length, run.machine,
                               None if unbounded else stride, name=run.name + (" unbounded" if unbounded else "")):
        table[score.story, :4] = score.story, score.tokens, score.bytes, score.nats
        nats[:score.tokens] += score.token_nats
        count[:score.tokens] += 1
        token_nats[score.story] = score.token_nats
        if facts:
            known = facts.get(story_hash(run.tokenizer.decode(data.story(score.story))))
            if known is None:
                raise UserError(f"story {score.story} of {data.path} is not in the facts file; expected the "
                                ".facts.jsonl that was written with this text.")
            table[score.story, 4:] = fact_columns(score, data, sizes, known)
    stories = pd.DataFrame(table, columns=columns)
    stories = stories.astype({name: "int64" for name in ("story", "tokens", "bytes", "recall_tokens")
                              if name in stories})
    return Scores(stories, pd.DataFrame({"position": np.arange(longest), "tokens": count, "nats": nats}), token_nats)


def comparison_table(scores: dict[str, pd.DataFrame], budgets: dict[str, dict]) -> pd.DataFrame:
    """Put totals of runs and baselines into one table, best loss first.

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
        sums = _sums(frame, "nats")
        row = {"name": name, **budgets.get(name, {}), "stories": len(frame), **sums}
        if "corpus_nats" in frame:
            recalled, count = float(frame["recall_nats"].sum()), int(frame["recall_tokens"].sum())
            row |= {"over_corpus": sums["nats"] / float(frame["corpus_nats"].sum()) - 1.0,
                    "recall_tokens": count, "recall_loss": recalled / count if count else math.nan,
                    "other_loss": (sums["nats"] - recalled) / (sums["tokens"] - count)}
        rows.append(row)
    if "corpus_nats" in first:
        sums = _sums(first, "corpus_nats")
        recalls = int(first["recall_tokens"].sum())
        rows.append({"name": "the corpus itself", "stories": len(first), **sums, "over_corpus": 0.0,
                     "recall_tokens": recalls, "recall_loss": 0.0,
                     "other_loss": sums["nats"] / (sums["tokens"] - recalls)})
    table = pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")
    for column in WHOLE_NUMBERS:
        if column in table:
            table[column] = table[column].astype("Int64")  # baselines have none: empty, not 0
    return table


def _sums(stories: pd.DataFrame, column: str) -> dict[str, float]:
    """Sum the tokens, bytes and nats of some stories, and divide."""
    tokens, n_bytes, nats = int(stories["tokens"].sum()), int(stories["bytes"].sum()), float(stories[column].sum())
    return {"tokens": tokens, "bytes": n_bytes, "nats": nats} | totals(nats, tokens, n_bytes)


def story_tokens(data) -> np.ndarray:
    """Return the tokens of every story of a token file, its closing end-of-text included; int64 (n_stories,)."""
    return np.diff(np.append(data.offsets, data.n_tokens).astype(np.int64))


def check_stride(stride: int | None, context_length: int | None) -> None:
    """Raise `UserError` unless sliding windows can go on by this stride."""
    if stride is not None and not 1 <= stride <= (context_length or 0):
        raise UserError(f"stride {stride} must be between 1 and the context length {context_length}.")


def windows_of(n_targets: int, context_length: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a story into (begin, end, first scored): windows over its targets that score each exactly once.

    Example:
        >>> windows_of(10, 6, 2)
        [(0, 6, 0), (2, 8, 4), (4, 10, 4)]
    """
    rows, done = [], 0
    while done < n_targets:
        end = min(n_targets, context_length if not rows else done + stride)
        begin = max(0, end - context_length)
        rows.append((begin, end, done - begin))
        done = end
    return rows


def _batches(data, order: np.ndarray, context_length: int | None, stride: int | None) -> Iterator[list[tuple]]:
    """Rows (story, first scored, inputs, targets, last window), short ones together, about TOKENS_PER_BATCH each."""
    end_of_text = data.header["end_of_text_id"]
    batch, longest = [], 0
    for i in order:
        ids = np.asarray(data.story(int(i)), dtype=np.int64)
        inputs, targets = np.append(end_of_text, ids), np.append(ids, end_of_text)
        T = context_length or len(targets)
        rows = windows_of(len(targets), T, stride or max(1, T // 2))
        for begin, end, first in rows:
            if batch and max(longest, end - begin) * (len(batch) + 1) > TOKENS_PER_BATCH:
                yield batch
                batch, longest = [], 0
            batch.append((int(i), first, inputs[begin:end], targets[begin:end], end == len(targets)))
            longest = max(longest, end - begin)
    if batch:
        yield batch


@torch.no_grad()
def _score_batch(model: nn.Module, batch: list[tuple], machine: Machine, pad: int) -> Iterator[tuple]:
    T = max(len(inputs) for _, _, inputs, _, _ in batch)
    inputs = torch.full((len(batch), T), pad)  # padding stands behind: causal models never see it
    targets = torch.full((len(batch), T), IGNORE)
    for row, (_, first, x, y, _) in enumerate(batch):  # what another window scores costs nothing here
        inputs[row, :len(x)], targets[row, first:len(y)] = torch.from_numpy(x), torch.from_numpy(y[first:])
    inputs, targets = inputs.to(machine.device), targets.to(machine.device)
    size = PIECE if len(batch) == 1 else T  # only a story on its own can be that long
    state, pieces = model.initial_state(1) if T > size else None, []
    with machine.autocast:
        for begin in range(0, T, size):
            features, state = model.features(inputs[:, begin:begin + size], state)
            nats = token_nats(features, model.unembedding, targets[:, begin:begin + size])
            pieces.append(nats.float().cpu().numpy())
    nats = np.concatenate(pieces, axis=1)
    for row, (i, first, x, _, last) in enumerate(batch):
        yield i, first, nats[row, :len(x)], last
