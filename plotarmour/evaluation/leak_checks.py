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
    long overlap          few stories have half of their tokens, in one piece, in one story of the training text; more
                          of them are no error, but the first sentence of the verdict

The last two need the training text, and are about the stories, not about a run. What a token file's header says of its
split does not count.
"""

import math

import numpy as np
import pandas as pd
import torch

from plotarmour.cli import UserError
from plotarmour.data.duplicates import long_overlaps, overlapping_stories
from plotarmour.data.token_file import Tokens, TokensInMemory, counted_bytes
from plotarmour.evaluation.scoring import UNBOUNDED, score_stories

LONG_OVERLAP = "long overlap"
STORIES = 4  # stories of different lengths that are checked
MAX_TOKENS = 1024  # tokens of a story that are checked if the context is not limited
EARLY, EARLY_ALTERNATIVES = 24, 512  # place near the start of a window, and number of tokens tried there
LATE_ALTERNATIVES = 48  # tokens tried in the middle and at the end, where each costs a whole window
MOST_OVERLAPS = 0.1  # share of stories with a long overlap; more stand in the verdict
# Tolerances in nats of one token, and in nats per token of a story; in half precision, and in float32.
TOLERANCES = {True: (5e-2, 5e-3), False: (2e-3, 2e-4)}


def check_run(run, data: Tokens, scores: pd.DataFrame, stride: int | None = None,
              unbounded: bool = False) -> pd.DataFrame:
    """Check a run and the stories that it was scored on.

    Args:
        run: a `plotarmour.run.Run`.
        data: the stories that were scored.
        scores: a row per story, from scoring `data` with `run`.
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
    rows = [("later tokens", f"at most {of_token:g} nats",
             *_result(_later_tokens(run, data, chosen, context), of_token, "{:.2g}")),
            ("sum of probabilities", "at most 1",
             *_result(_probabilities(run, data, chosen[len(chosen) // 2], context), 1 + of_token, "{:.4g}")),
            ("alone or in a batch", f"at most {of_story:g} nats a token",
             *_result(_alone(run, data, scores, spread, context, stride), of_story, "{:.2g}"))]
    if not unbounded:
        rows.append(("bytes", "those of the tokens", *_bytes(run, data, scores)))
    return _table(rows, run.name + UNBOUNDED * unbounded)


def check_stories(train_data: Tokens, data: Tokens) -> pd.DataFrame:
    """Check that stories are not those of the training text; return rows as `check_run` does, about all runs."""
    copies, overlaps = len(overlapping_stories(train_data, data)), len(long_overlaps(train_data, data))
    share = overlaps / data.n_stories
    return _table([("held out", "0 stories", f"{copies:,} stories of {data.n_stories:,}", copies == 0),
                   (LONG_OVERLAP, f"at most {MOST_OVERLAPS:.0%} of the stories",
                    f"{overlaps:,} stories of {data.n_stories:,} ({share:.1%})", share <= MOST_OVERLAPS)], "all runs")


def require(checks: pd.DataFrame) -> None:
    """Raise `UserError` with the names of failed checks and their runs; a long overlap is left to the verdict."""
    failed = checks[~checks["passed"].fillna(True) & (checks["check"] != LONG_OVERLAP)]
    if len(failed):
        complaints = "; ".join(f"{row.run}, {row.check}: found {row.found}, expected {row.expected}"
                               for row in failed.itertuples())
        raise UserError(f"no comparison, because leak checks failed: {complaints}. Do not use these runs' scores.")


def passed_checks(checks: pd.DataFrame) -> str:
    """Return how many of the checks that were possible passed, and which did not."""
    failed = checks.loc[checks["passed"].eq(False), "check"]
    return (f"{checks['passed'].sum()} of {checks['passed'].count()} leak checks passed"
            + f"; {', '.join(failed)} did not" * bool(len(failed)))


def _table(rows: list[tuple], name: str) -> pd.DataFrame:
    """Return the rows of checks.csv."""
    checks = pd.DataFrame(rows, columns=["check", "expected", "found", "passed"]).astype({"passed": "boolean"})
    checks.insert(1, "run", name)
    return checks


def _nats(run, ids: list[np.ndarray], header: dict, context: int | None) -> list[np.ndarray]:
    """Return the nats of every token of each story."""
    data = TokensInMemory([np.append(story, header["end_of_text_id"]) for story in ids], header, [0] * len(ids))
    nats = dict(score_stories(run.model, data, context, run.machine, name=None))
    return [nats[i] for i in range(len(ids))]


def _later_tokens(run, data: Tokens, chosen: list[np.ndarray], context: int | None) -> list[float]:
    """Return by how much the nats of earlier tokens change when random ones replace the tokens from some place on."""
    V, random, differences = data.header["vocab_size"], np.random.default_rng(0), []
    for ids in chosen:
        ids = ids[:MAX_TOKENS] if context is None else ids[:context - 1]
        places = sorted({len(ids) // 3, len(ids) // 2, len(ids) - 1} - {0, -1})
        changed = [np.append(ids[:k], random.integers(0, V, len(ids) - k)) for k in places]
        before, *after = _nats(run, [ids, *changed], data.header, context)
        differences += [float(np.abs(nats[:k] - before[:k]).max()) for k, nats in zip(places, after, strict=True)]
    return differences


def _probabilities(run, data: Tokens, ids: np.ndarray, context: int | None) -> list[float]:
    """Return the sum of the probabilities of many tokens near the start, the middle and the end of a story."""
    sums, last = [], min(len(ids), MAX_TOKENS, (context or math.inf) - 2)  # the window must hold the tried token, too
    for k, count in ((min(EARLY, last), EARLY_ALTERNATIVES), (last // 2, LATE_ALTERNATIVES), (last, LATE_ALTERNATIVES)):
        if k >= 0:
            stories = [np.append(ids[:k], token) for token in _most_probable(run, data, ids[:k], count)]
            nats = np.array([each[k] for each in _nats(run, stories, data.header, context)], dtype=np.float64)
            sums.append(float(np.exp(-nats).sum()))
    return sums


@torch.no_grad()
def _most_probable(run, data: Tokens, ids: np.ndarray, count: int) -> np.ndarray:
    """Return the `count` tokens that the model finds most probable after some ids."""
    inputs = torch.from_numpy(np.append(data.header["end_of_text_id"], ids).astype(np.int64))[None]
    features = run.model.features(inputs.to(run.machine.device))[0][0, -1]
    scores = (run.model.unembedding.float() @ features.float()).nan_to_num(nan=0.0)
    return scores.topk(min(count, len(scores))).indices.cpu().numpy()


def _alone(run, data: Tokens, scores: pd.DataFrame, spread: np.ndarray, context: int | None,
           stride: int | None) -> list[float]:
    """Return by how much the nats per token of stories change when each is scored alone."""
    differences = []
    for i in map(int, spread):
        [(_, nats)] = score_stories(run.model, data, context, run.machine, stride, [i], name=None)
        differences.append(abs(float(nats.sum(dtype=np.float64)) - scores["nats"].iat[i]) / len(nats))
    return differences


def _bytes(run, data: Tokens, scores: pd.DataFrame) -> tuple[str, bool | None]:
    """Compare the bytes that the token file states with those of its tokens."""
    if run.tokenizer.token_bytes is None:
        return "not checked: a token of this tokenizer has no fixed number of bytes", None
    counted = counted_bytes(data, run.tokenizer.token_bytes)
    wrong = int((counted != scores["bytes"].to_numpy()).sum())
    return (f"{wrong:,} stories with other bytes" if wrong else f"{int(counted.sum()):,} bytes"), wrong == 0


def _result(values: list[float], limit: float, form: str) -> tuple[str, bool]:
    """Return the largest value as text, and whether all values are finite and at most `limit`."""
    if not values:
        return "nothing to check: all stories have one token", True
    largest = float(np.max(values))  # NaN if any value is NaN
    return form.format(largest), math.isfinite(largest) and largest <= limit
