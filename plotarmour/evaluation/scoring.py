"""Nats of every token of every story, given only its own story so far.

The context of a story starts at the end-of-text token, and its closing end-of-text token is scored too: a story of n
ids costs n + 1 tokens. Its bytes are those of its text alone. Stories longer than the context are scored by sliding
windows: each window after the first sees context_length - stride tokens of the past and scores the next `stride`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from plotarmour.errors import UserError
from plotarmour.loss import IGNORE, token_nats
from plotarmour.machine import Machine

TOKENS_PER_BATCH = 4096


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


def score_stories(model: nn.Module, data, context_length: int, machine: Machine, stride: int | None = None,
                  stories: int | None = None, name: str = "model") -> Iterator[StoryScore]:
    """Score the stories of a token file, in batches of similar length.

    Args:
        model: with `features` and `unembedding`, on the machine's device.
        data: a `TokenFile` (or `TokensInMemory`) of the model's tokenizer.
        context_length: tokens a model sees at once.
        machine: device and dtype.
        stride: of sliding windows, in tokens; half a context by default.
        stories: score only the first so many.
        name: for the progress bar.

    Yields:
        A `StoryScore` per story; not in order.

    Raises:
        UserError: a stride outside 1..context_length.
    """
    stride = max(1, context_length // 2) if stride is None else stride
    if not 1 <= stride <= context_length:
        raise UserError(f"stride {stride} must be between 1 and the context length {context_length}.")
    n = data.n_stories if stories is None else min(stories, data.n_stories)
    ends = np.append(data.offsets[1:], data.n_tokens)
    order = np.argsort((ends - data.offsets)[:n].astype(np.int64), kind="stable")
    waiting: dict[int, list] = {}  # stories with windows still to come
    with tqdm(total=n, desc=f"score {name}", unit="story", mininterval=1.0) as bar:
        for batch in _batches(data, order, context_length, stride):
            for i, first, nats, last in _score_batch(model, batch, machine, data.header["end_of_text_id"]):
                waiting.setdefault(i, []).append(nats[first:])
                if last:
                    whole = np.concatenate(waiting.pop(i))
                    bar.update()
                    yield StoryScore(i, len(whole), int(data.story_bytes[i]), float(whole.sum(dtype=np.float64)),
                                     whole)


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


def _batches(data, order: np.ndarray, context_length: int, stride: int) -> Iterator[list[tuple]]:
    """Rows (story, first scored, inputs, targets, last window), short ones together, about TOKENS_PER_BATCH each."""
    end_of_text = data.header["end_of_text_id"]
    batch, longest = [], 0
    for i in order:
        ids = np.asarray(data.story(int(i)), dtype=np.int64)
        inputs, targets = np.append(end_of_text, ids), np.append(ids, end_of_text)
        rows = windows_of(len(targets), context_length, stride)
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
    for row, (_, _, x, y, _) in enumerate(batch):
        inputs[row, :len(x)], targets[row, :len(y)] = torch.from_numpy(x), torch.from_numpy(y)
    with machine.autocast:
        features = model.features(inputs.to(machine.device))[0]
        nats = token_nats(features, model.unembedding, targets.to(machine.device)).float().cpu().numpy()
    for row, (i, first, x, _, last) in enumerate(batch):
        yield i, first, nats[row, :len(x)], last
