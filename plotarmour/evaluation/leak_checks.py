"""Leak checks: conditions that must hold before a comparison shows any number.

The first three checks use the same scoring as the comparison, so they find a leak in the model, in its mask, in the
shift of targets and in the batches.

    later tokens          changing a token does not change the nats of earlier tokens
    sum of probabilities  the probabilities of different tokens at one place have a sum of at most 1. A model that sees
                          the token it must predict gives each of them a high probability. The check tries the tokens
                          that the model finds most probable, near the start, the middle and the end of a window
    alone or in a batch   a story has the same nats alone and among other stories
    bytes                 the token file states the byte lengths of its tokens
    held out              no story occurs in the training text
"""

import math

import numpy as np
import pandas as pd
import torch

from plotarmour.cli import UserError
from plotarmour.data.duplicates import disjoint_by_construction, overlapping_stories
from plotarmour.evaluation.scoring import UNBOUNDED, score_stories

STORIES = 4  # stories of different lengths that are checked
MAX_TOKENS = 1024  # tokens of a story that are checked if the context is not limited
EARLY, EARLY_ALTERNATIVES = 24, 512  # place near the start of a window, and number of tokens tried there
LATE_ALTERNATIVES = 48  # tokens tried in the middle and at the end, where each costs a whole window
BLOCK = 2**20  # tokens whose bytes are counted at once
# Tolerances in nats of one token, and in nats per token of a story; in half precision, and in float32.
TOLERANCES = {True: (5e-2, 5e-3), False: (2e-3, 2e-4)}
COLUMNS = ["check", "run", "expected", "found", "passed"]


class Stories:
    """Stories in memory, with the attributes of a `TokenFile` that scoring uses.

    Args:
        ids: int arrays, one per story.
        header: header of their token file.
    """

    def __init__(self, ids: list[np.ndarray], header: dict):
        lengths = np.array([len(story) + 1 for story in ids], dtype=np.int64)
        self.ids, self.header, self.n_stories, self.n_tokens = ids, header, len(ids), int(lengths.sum())
        self.offsets, self.story_bytes = np.cumsum(lengths) - lengths, np.zeros(len(ids), dtype=np.int64)

    def story(self, i: int) -> np.ndarray:
        return self.ids[i]


def check_run(run, data, scores: pd.DataFrame, train_data=None, stride: int | None = None,
              unbounded: bool = False) -> pd.DataFrame:
    """Check a run and the stories that it was scored on.

    Args:
        run: a `plotarmour.run.Run`.
        data: the `TokenFile` that was scored.
        scores: a row per story, from scoring `data` with `run`.
        train_data: the `TokenFile` that the run was trained on; None skips the check "held out".
        stride: stride of the sliding windows of `scores`, in tokens.
        unbounded: whether each token of `scores` had its whole story as context.

    Returns:
        A row per check: check, run, expected, found, passed ("boolean"; missing if the check is not possible).
    """
    context = None if unbounded else run.context_length
    of_token, of_story = TOLERANCES[run.machine.dtype.itemsize < 4]
    lengths = scores["tokens"].to_numpy()
    spread = np.argsort(lengths, kind="stable")[np.linspace(0, len(lengths) - 1, STORIES + 1).astype(int)[1:]]
    chosen = [np.asarray(data.story(int(i)), dtype=np.int64) for i in spread]
    rows = [("later tokens", f"at most {of_token:g} nats", *_later_tokens(run, data, chosen, context, of_token)),
            ("sum of probabilities", "at most 1", *_probabilities(run, data, chosen, context, of_token)),
            ("alone or in a batch", f"at most {of_story:g} nats a token",
             *_alone(run, data, scores, spread, context, stride, of_story))]
    if not unbounded:
        rows.append(("bytes", "those of the tokens", *_bytes(run, data, scores)))
        if train_data is not None:
            rows.append(("held out", "0 stories", *_held_out(train_data, data)))
    name = run.name + UNBOUNDED * unbounded
    checks = pd.DataFrame([(check, name, *values) for check, *values in rows], columns=COLUMNS)
    return checks.astype({"passed": "boolean"})


def require(checks: pd.DataFrame) -> None:
    """Raise `UserError` with the names of failed checks and their runs."""
    failed = checks[~checks["passed"].fillna(True)]
    if len(failed):
        complaints = "; ".join(f"{row.run}, {row.check}: found {row.found}, expected {row.expected}"
                               for row in failed.itertuples())
        raise UserError(f"no comparison, because leak checks failed: {complaints}. Do not use these runs' scores.")


def _nats(run, ids: list[np.ndarray], header: dict, context: int | None) -> list[np.ndarray]:
    """Return the nats of every token of each story."""
    scores = score_stories(run.model, Stories(ids, header), context, run.machine, name=None)
    return [score.token_nats for score in sorted(scores, key=lambda score: score.story)]


def _later_tokens(run, data, chosen: list[np.ndarray], context: int | None, tolerance: float) -> tuple[str, bool]:
    V, random, differences = data.header["vocab_size"], np.random.default_rng(0), []
    for ids in chosen:
        ids = ids[:MAX_TOKENS] if context is None else ids[:context - 1]
        places = sorted({len(ids) // 3, len(ids) // 2, len(ids) - 1} - {0, -1})
        changed = [np.append(ids[:k], random.integers(0, V, len(ids) - k)) for k in places]
        before, *after = _nats(run, [ids, *changed], data.header, context)
        differences += [float(np.abs(nats[:k] - before[:k]).max()) for k, nats in zip(places, after, strict=True)]
    return _result(differences, tolerance, "{:.2g}")


def _probabilities(run, data, chosen: list[np.ndarray], context: int | None, tolerance: float) -> tuple[str, bool]:
    sums = []
    ids = chosen[len(chosen) // 2]
    last = min(len(ids), MAX_TOKENS)
    last = last if context is None else min(last, context - 2)  # the window must hold the tried token, too
    for k, count in ((min(EARLY, last), EARLY_ALTERNATIVES), (last // 2, LATE_ALTERNATIVES), (last, LATE_ALTERNATIVES)):
        if k >= 0:
            stories = [np.append(ids[:k], token) for token in _most_probable(run, data, ids[:k], count)]
            nats = np.array([each[k] for each in _nats(run, stories, data.header, context)], dtype=np.float64)
            sums.append(float(np.exp(-nats).sum()))
    return _result(sums, 1 + tolerance, "{:.4g}")


@torch.no_grad()
def _most_probable(run, data, ids: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` tokens that the model finds most probable after some ids."""
    inputs = torch.from_numpy(np.append(data.header["end_of_text_id"], ids).astype(np.int64))[None]
    features = run.model.features(inputs.to(run.machine.device))[0][0, -1]
    scores = (run.model.unembedding.float() @ features.float()).nan_to_num(nan=0.0)
    return scores.topk(min(count, len(scores))).indices.cpu().numpy()


def _alone(run, data, scores: pd.DataFrame, spread: np.ndarray, context: int | None, stride: int | None,
           tolerance: float) -> tuple[str, bool]:
    differences = []
    for i in map(int, spread):
        [alone] = score_stories(run.model, data, context, run.machine, None if context is None else stride, [i], None)
        differences.append(abs(alone.nats - scores["nats"].iat[i]) / alone.tokens)
    return _result(differences, tolerance, "{:.2g}")


def _bytes(run, data, scores: pd.DataFrame) -> tuple[str, bool | None]:
    if run.tokenizer.token_bytes is None:
        return "not checked: a token of this tokenizer has no fixed number of bytes", None
    sizes, stated, wrong, begin = run.tokenizer.token_bytes.astype(np.int64), scores["bytes"].to_numpy(), 0, 0
    starts = np.append(np.asarray(data.offsets), data.n_tokens).astype(np.int64)
    while begin < len(stated):
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + BLOCK, side="right")) - 1)
        block = starts[begin:end + 1]
        counted = np.add.reduceat(sizes[np.asarray(data.tokens[block[0]:block[-1]])], block[:-1] - block[0])
        wrong, begin = wrong + int((counted != stated[begin:end]).sum()), end
    return (f"{wrong:,} stories with other bytes" if wrong else f"{int(stated.sum()):,} bytes"), wrong == 0


def _result(values: list[float], limit: float, form: str) -> tuple[str, bool]:
    """Return the largest value as text, and whether all values are finite and at most `limit`."""
    if not values:
        return "nothing to check: all stories have one token", True
    largest = float(np.max(values))  # NaN if any value is NaN
    return form.format(largest), math.isfinite(largest) and largest <= limit


def _held_out(train_data, data) -> tuple[str, bool]:
    if disjoint_by_construction(train_data.header, data.header):
        return "0 stories, by the split", True
    overlap = len(overlapping_stories(train_data, data))
    return f"{overlap:,} stories of {data.n_stories:,}", overlap == 0
