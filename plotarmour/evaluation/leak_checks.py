"""Leak checks: what must hold before any number of a comparison is believed.

All but the last two go through the scoring that the numbers come from, so that a leak anywhere on the way is found: in
the model, in a mask, in the shift of targets, in the batches.

    later tokens          a changed token leaves the nats of all earlier ones as they were
    sum of probabilities  those of different tokens at one place add up to no more than 1: whoever sees the token that
                          is to be foreseen gives a high probability to each of them. Tried are the tokens that the
                          model itself finds most probable there, early in a window, in its middle and at its end
    alone or in a batch   a story costs the same alone as among others
    bytes                 those that the token file states are those of its tokens
    held out              no story stands in the training text
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from plotarmour.cli import UserError
from plotarmour.data.duplicates import disjoint_by_construction, overlapping_stories
from plotarmour.evaluation.arms import UNBOUNDED
from plotarmour.evaluation.scoring import score_stories

STORIES = 4  # that are looked at, spread over the lengths
MANY = 1024  # tokens of a story at most, where the context has no end
EARLY, ALTERNATIVES = 24, 512  # a place in a story, and how many tokens are tried there
LATE_ALTERNATIVES = 48  # in the middle and at the end of a window, where each costs a whole one
BLOCK = 2**20  # tokens whose bytes are counted at once
# Nats of one token, and nats per token of a story; in half precision, in float32.
TOLERANCES = {True: (5e-2, 5e-3), False: (2e-3, 2e-4)}
COLUMNS = ["check", "run", "expected", "found", "passed"]


@dataclass(frozen=True, eq=False)
class Stories:
    """Stories as ids, with what scoring wants of a token file.

    Args:
        ids: int arrays, one per story.
        header: of the token file they come from.
    """

    ids: list
    header: dict

    @property
    def n_stories(self) -> int:
        return len(self.ids)

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids)) + len(self.ids)

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum([0, *(len(ids) + 1 for ids in self.ids[:-1])])

    @property
    def story_bytes(self) -> np.ndarray:
        return np.zeros(len(self.ids), dtype=np.int64)

    def story(self, i: int) -> np.ndarray:
        return self.ids[i]


def check_run(run, data, scores: pd.DataFrame, train_data=None, stride: int | None = None,
              unbounded: bool = False) -> pd.DataFrame:
    """Check one run on the stories it was scored on.

    Args:
        run: a `plotarmour.run.Run`.
        data: the `TokenFile` that was scored.
        scores: its stories' rows under this run.
        train_data: the `TokenFile` that the run was trained on; None: whether stories are held out is not checked.
        stride: of sliding windows, as in `scores`.
        unbounded: whether each token was given its whole story, as in `scores`.

    Returns:
        A row per check: check, run, expected, found, passed ("boolean"; missing where a check cannot be made).
    """
    context = None if unbounded else run.context_length
    once, mean = TOLERANCES[run.machine.dtype.itemsize < 4]
    lengths = scores["tokens"].to_numpy()
    spread = np.argsort(lengths, kind="stable")[np.linspace(0, len(lengths) - 1, STORIES + 1).astype(int)[1:]]
    chosen = [np.asarray(data.story(int(i)), dtype=np.int64) for i in spread]
    rows = [("later tokens", f"at most {once:g} nats", *_later_tokens(run, data, chosen, context, once)),
            ("sum of probabilities", "at most 1", *_probabilities(run, data, chosen, context, once)),
            ("alone or in a batch", f"at most {mean:g} nats a token",
             *_alone(run, data, scores, spread, context, stride, mean))]
    if not unbounded:
        rows.append(("bytes", "as the tokens have", *_bytes(run, data, scores)))
        if train_data is not None:
            rows.append(("held out", "0 stories", *_held_out(train_data, data)))
    name = run.name + UNBOUNDED * unbounded
    checks = pd.DataFrame([(check, name, *rest) for check, *rest in rows], columns=COLUMNS)
    return checks.astype({"passed": "boolean"})


def require(checks: pd.DataFrame) -> None:
    """Raise `UserError` naming the checks that have failed, and whose they are."""
    failed = checks[~checks["passed"].fillna(True)]
    if len(failed):
        told = "; ".join(f"{row.run}, {row.check}: found {row.found}, expected {row.expected}"
                         for row in failed.itertuples())
        raise UserError(f"no comparison is made, for it would be wrong: {told}.")


def _nats(run, ids: list[np.ndarray], header: dict, context: int | None) -> list[np.ndarray]:
    """Nats of every token of stories, by number."""
    found = score_stories(run.model, Stories(ids, header), context, run.machine, name=None)
    return [score.token_nats for score in sorted(found, key=lambda score: score.story)]


def _later_tokens(run, data, chosen: list[np.ndarray], context: int | None, tolerance: float) -> tuple[str, bool]:
    V, random, gaps = data.header["vocab_size"], np.random.default_rng(0), []
    for ids in chosen:
        ids = ids[:MANY] if context is None else ids[:context - 1]
        places = sorted({len(ids) // 3, len(ids) // 2, len(ids) - 1} - {0, -1})
        changed = [np.append(ids[:k], random.integers(0, V, len(ids) - k)) for k in places]
        before, *after = _nats(run, [ids, *changed], data.header, context)
        gaps += [float(np.abs(nats[:k] - before[:k]).max()) for k, nats in zip(places, after, strict=True)]
    return _judged(gaps, tolerance, "{:.2g}")


def _probabilities(run, data, chosen: list[np.ndarray], context: int | None, tolerance: float) -> tuple[str, bool]:
    sums = []
    ids = chosen[len(chosen) // 2]
    last = len(ids) if context is None else min(len(ids), context - 2)  # the token that is tried must be in the window
    last = min(last, MANY)
    for k, count in ((min(EARLY, last), ALTERNATIVES), (last // 2, LATE_ALTERNATIVES), (last, LATE_ALTERNATIVES)):
        if k >= 0:
            stories = [np.append(ids[:k], token) for token in _most_probable(run, data, ids[:k], count)]
            nats = np.array([each[k] for each in _nats(run, stories, data.header, context)], dtype=np.float64)
            sums.append(float(np.exp(-nats).sum()))
    return _judged(sums, 1 + tolerance, "{:.4g}")


@torch.no_grad()
def _most_probable(run, data, ids: np.ndarray, count: int) -> np.ndarray:
    """The tokens that the model finds most probable behind some ids."""
    inputs = torch.from_numpy(np.append(data.header["end_of_text_id"], ids).astype(np.int64))[None]
    features = run.model.features(inputs.to(run.machine.device))[0][0, -1]
    scores = (run.model.unembedding.float() @ features.float()).nan_to_num(nan=0.0)
    return scores.topk(min(count, len(scores))).indices.cpu().numpy()


def _alone(run, data, scores: pd.DataFrame, spread: np.ndarray, context: int | None, stride: int | None,
           tolerance: float) -> tuple[str, bool]:
    gaps = []
    for i in map(int, spread):
        [alone] = score_stories(run.model, data, context, run.machine, None if context is None else stride, [i], None)
        gaps.append(abs(alone.nats - scores["nats"].iat[i]) / alone.tokens)
    return _judged(gaps, tolerance, "{:.2g}")


def _bytes(run, data, scores: pd.DataFrame) -> tuple[str, bool | None]:
    if run.tokenizer.token_bytes is None:
        return "not checked: an id of this tokenizer has no fixed number of bytes", None
    sizes, stated, wrong, begin = run.tokenizer.token_bytes.astype(np.int64), scores["bytes"].to_numpy(), 0, 0
    starts = np.append(np.asarray(data.offsets), data.n_tokens).astype(np.int64)
    while begin < len(stated):
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + BLOCK, side="right")) - 1)
        block = starts[begin:end + 1]
        counted = np.add.reduceat(sizes[np.asarray(data.tokens[block[0]:block[-1]])], block[:-1] - block[0])
        wrong, begin = wrong + int((counted != stated[begin:end]).sum()), end
    return (f"{wrong:,} stories of other sizes" if wrong else f"{int(stated.sum()):,} bytes"), wrong == 0


def _judged(found: list[float], most: float, form: str) -> tuple[str, bool]:
    """The worst of some numbers, and whether all of them are numbers and none is larger than `most`."""
    if not found:
        return "nothing to look at: stories of one token", True
    worst = float(np.max(found))  # NaN where there is one
    return form.format(worst), math.isfinite(worst) and worst <= most


def _held_out(train_data, data) -> tuple[str, bool]:
    if disjoint_by_construction(train_data.header, data.header):
        return "0 stories, by the split", True
    found = overlapping_stories(train_data, data)
    return f"{found.n_stories:,} stories of {data.n_stories:,}", found.n_stories == 0
