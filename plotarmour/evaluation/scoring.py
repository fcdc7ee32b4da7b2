"""Scoring: the nats of every token of every story, with only its own story as context.

The context of a story starts with the end-of-text token. Its closing end-of-text token is scored as well, so a story of
n ids has n + 1 tokens. Its bytes are those of its text only. Stories longer than the context are scored with sliding
windows: each window after the first has context_length - stride tokens of context and scores the next `stride`. A model
with a state of any length (BDH) can also be scored *unbounded*: every token has its whole story as context.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from plotarmour.cli import UserError, progress
from plotarmour.data.stories import story_hash
from plotarmour.data.tales import recalled_tokens
from plotarmour.data.token_file import Tokens, story_bounds
from plotarmour.evaluation.metrics import totals
from plotarmour.loss import IGNORE, token_nats
from plotarmour.machine import Machine

TOKENS_PER_BATCH = 4096
PIECE = 4096  # tokens per forward pass if the context is not limited: memory does not grow with the story
UNBOUNDED = " unbounded"  # suffix of a run's name in rows where each token has its whole story as context
BASELINE = " baseline"  # suffix of the name of an n-gram order
CORPUS = "the corpus itself"
STORY_COLUMNS = ["story", "tokens", "bytes", "nats"]
FACT_COLUMNS = ["recall_tokens", "recall_nats", "corpus_nats"]  # tokens of recalled words and their nats, exact nats
WHOLE_NUMBERS = ("params", "core_params", "params_per_token", "train_tokens", "steps", "checkpoint_step",
                 "seed", "recall_tokens")


def score_stories(model: nn.Module, data: Tokens, context_length: int | None, machine: Machine,
                  stride: int | None = None, stories: Sequence[int] | None = None,
                  name: str | None = "model") -> Iterator[tuple[int, np.ndarray]]:
    """Score stories of a token file, in batches of similar length.

    Args:
        model: a `plotarmour.models.LanguageModel` in evaluation mode, on the machine's device.
        data: stories in ids of the model's tokenizer.
        context_length: maximum number of tokens in a window; None: the whole story, through the model's state.
        machine: device and dtype.
        stride: stride of sliding windows, in tokens; None: half of `context_length`.
        stories: indices of the stories to score; None: all.
        name: label of the progress bar; None: no bar.

    Yields:
        Per story, not in order: its index, and the nats of its tokens, float32 (ids + 1,). Memory holds one batch and
        the unfinished stories.

    Raises:
        UserError: a stride outside 1..context_length.
    """
    check_stride(stride, context_length)
    lengths = story_tokens(data)
    chosen = np.arange(data.n_stories) if stories is None else np.asarray(stories, dtype=np.int64)
    order = chosen[np.argsort(lengths[chosen], kind="stable")]
    unfinished: dict[int, list] = {}  # nats of stories with more windows to come
    with progress(int(lengths[chosen].sum()), "tokens", f"score {name}", is_shown=name is not None) as bar:
        for batch in _batches(data, order, context_length, stride):
            for i, first, nats, last in _score_batch(model, batch, machine, data.header["end_of_text_id"]):
                unfinished.setdefault(i, []).append(nats[first:])
                if last:
                    nats = np.concatenate(unfinished.pop(i))
                    bar.update(len(nats))
                    yield i, nats


def evaluate_run(run, data: Tokens, facts: dict[int, tuple[float, list]] | None = None, stride: int | None = None,
                 unbounded: bool = False) -> tuple[pd.DataFrame, pd.DataFrame, list[np.ndarray]]:
    """Score every story of a token file under a run.

    Args:
        run: a `plotarmour.run.Run`.
        data: stories in ids of the run's tokenizer.
        facts: of the built-in corpus, from `read_facts`, or None.
        stride: stride of sliding windows, in tokens; None: half a context.
        unbounded: whether each token has its whole story as context, through the model's state, instead of a window.

    Returns:
        A row per story, in order: `STORY_COLUMNS`, and with facts `FACT_COLUMNS`; a row per position in a story, from 0
        on: position, tokens (stories that have it), nats (their sum); and the nats of each story's tokens.

    Raises:
        UserError: facts with a tokenizer that is not byte-level, or without facts of a story.
    """
    sizes = run.tokenizer.token_bytes if facts else None
    if facts and sizes is None:
        raise UserError(f"{run.name} was trained with a tokenizer that is not byte-level; expected bpe:N, gpt2 or "
                        "bytes to count nats on facts. Compare without --facts.")
    longest = int(story_tokens(data).max())
    nats, count = np.zeros(longest), np.zeros(longest, dtype=np.int64)
    rows, token_nats = [[]] * data.n_stories, [np.empty(0)] * data.n_stories
    for i, of_tokens in score_stories(run.model, data, None if unbounded else run.context_length, run.machine,
                                      stride, name=run.name + UNBOUNDED * unbounded):
        rows[i] = [i, len(of_tokens), int(data.story_bytes[i]), float(of_tokens.sum(dtype=np.float64))]
        nats[:len(of_tokens)] += of_tokens
        count[:len(of_tokens)] += 1
        token_nats[i] = of_tokens
        if facts:
            ids = data.story(i)
            if (key := story_hash(run.tokenizer.decode(ids))) not in facts:
                raise UserError(f"story {i} of {data.path} is not in the facts file; expected the .facts.jsonl that "
                                "was written with this text.")
            corpus_nats, recalls = facts[key]
            recalled = of_tokens[:-1][recalled_tokens(sizes[ids], recalls)]
            rows[i] += [len(recalled), float(recalled.sum(dtype=np.float64)), corpus_nats]
    stories = pd.DataFrame(rows, columns=STORY_COLUMNS + (FACT_COLUMNS if facts else []))
    return stories, pd.DataFrame({"position": np.arange(longest), "tokens": count, "nats": nats}), token_nats


def comparison_table(scores: dict[str, pd.DataFrame], budgets: dict[str, dict]) -> pd.DataFrame:
    """Return the totals of runs and baselines as one table, sorted by loss.

    Args:
        scores: by name, a row per story of one token file with tokens, bytes, nats (and the columns of facts).
        budgets: by name, further columns, such as parameters and seconds.

    Returns:
        A row per name, and with facts one for the corpus itself.
    """
    first = next(iter(scores.values()))
    if "corpus_nats" in first:  # the corpus determines recalled words: they cost it nothing
        scores = scores | {CORPUS: first.assign(nats=first["corpus_nats"], recall_nats=0.0)}
    rows = []
    for name, frame in scores.items():
        tokens, n_bytes, nats = int(frame["tokens"].sum()), int(frame["bytes"].sum()), float(frame["nats"].sum())
        row = {"name": name, **budgets.get(name, {}), "stories": len(frame), "tokens": tokens, "bytes": n_bytes,
               "nats": nats, **totals(nats, tokens, n_bytes)}
        if "corpus_nats" in frame:
            recall_nats, count = float(frame["recall_nats"].sum()), int(frame["recall_tokens"].sum())
            row |= {"over_corpus": nats / float(frame["corpus_nats"].sum()) - 1.0,
                    "recall_tokens": count, "recall_loss": recall_nats / count if count else math.nan,
                    "other_loss": (nats - recall_nats) / (tokens - count)}
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")
    return table.astype({column: "Int64" for column in WHOLE_NUMBERS if column in table})  # baselines have no value


def story_tokens(data: Tokens) -> np.ndarray:
    """Return the number of tokens of each story, including its closing end-of-text; int64 (n_stories,)."""
    return np.diff(story_bounds(data))


def check_stride(stride: int | None, context_length: int | None) -> None:
    """Raise `UserError` unless the stride of sliding windows, where there are any, is in 1..context_length."""
    if stride is not None and context_length is not None and not 1 <= stride <= context_length:
        raise UserError(f"stride {stride} must be between 1 and the context length {context_length}.")


def windows_of(n_targets: int, context_length: int, stride: int) -> list[tuple[int, int, int]]:
    """Cut a story into windows (begin, end, first scored target) that score each target exactly once.

    Example:
        >>> windows_of(10, 6, 2)
        [(0, 6, 0), (2, 8, 4), (4, 10, 4)]
    """
    windows, scored = [], 0
    while scored < n_targets:
        end = min(n_targets, context_length if not windows else scored + stride)
        begin = max(0, end - context_length)
        windows.append((begin, end, scored - begin))
        scored = end
    return windows


def _batches(data: Tokens, order: np.ndarray, context_length: int | None, stride: int | None) -> Iterator[list[tuple]]:
    """Yield batches of rows (story, first scored, inputs, targets, is last window), about TOKENS_PER_BATCH each."""
    end_of_text = data.header["end_of_text_id"]
    batch, longest = [], 0
    for i in order:
        ids = np.asarray(data.story(int(i)), dtype=np.int64)
        inputs, targets = np.append(end_of_text, ids), np.append(ids, end_of_text)
        T = context_length or len(targets)
        for begin, end, first in windows_of(len(targets), T, stride or max(1, T // 2)):
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
    inputs = torch.full((len(batch), T), pad)  # padding comes last, so a causal model does not see it
    targets = torch.full((len(batch), T), IGNORE)  # also for tokens that another window scores
    for row, (_, first, x, y, _) in enumerate(batch):
        inputs[row, :len(x)], targets[row, first:len(y)] = torch.from_numpy(x), torch.from_numpy(y[first:])
    inputs, targets = inputs.to(machine.device), targets.to(machine.device)
    size = PIECE if len(batch) == 1 else T  # a batch of several rows is shorter than a piece
    state, pieces = model.initial_state(1) if T > size else None, []
    with machine.autocast:
        for begin in range(0, T, size):
            features, state = model.features(inputs[:, begin:begin + size], state)
            nats = token_nats(features, model.unembedding, targets[:, begin:begin + size])
            pieces.append(nats.float().cpu().numpy())
    nats = np.concatenate(pieces, axis=1)
    for row, (i, first, x, _, last) in enumerate(batch):
        yield i, first, nats[row, :len(x)], last
