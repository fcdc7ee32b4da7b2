"""Leak checks: what must hold before any number of a comparison is believed.

All go through the scoring that the numbers come from, so that a leak anywhere on the way is found: in the model, in a
mask, in the shift of targets, in the batches.

    later tokens          a changed token leaves the nats of all earlier ones as they were
    sum of probabilities  those of all tokens at one place add up to no more than 1: whoever sees the token that is to
                          be foreseen gives a high probability to each of them
    alone or in a batch   a story costs the same alone as among others
    bytes                 those that the token file states are those of its tokens
    held out              no story stands in the training text
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from plotarmour.errors import UserError
from plotarmour.evaluation.scoring import score_stories
from plotarmour.text.overlap import disjoint_by_construction, overlapping_stories

STORIES = 4  # that are looked at, spread over the lengths
ALTERNATIVES = 512  # tokens that are tried at one place
BLOCK = 4096  # stories whose bytes are counted at once
LOOSE, TIGHT = 5e-2, 2e-3  # nats per token: half precision, float32
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


def check_run(run, data, scores: pd.DataFrame, train_data=None, stride: int | None = None) -> pd.DataFrame:
    """Check one run on the stories it was scored on.

    Args:
        run: a `plotarmour.runs.Run`.
        data: the `TokenFile` that was scored.
        scores: its stories' rows under this run.
        train_data: the `TokenFile` that the run was trained on; None: whether stories are held out is not checked.
        stride: of sliding windows, as in `scores`.

    Returns:
        A row per check: check, run, expected, found, passed.
    """
    tolerance = LOOSE if run.machine.dtype.itemsize < 4 else TIGHT
    lengths = scores["tokens"].to_numpy()
    spread = np.argsort(lengths, kind="stable")[np.linspace(0, len(lengths) - 1, STORIES + 1).astype(int)[1:]]
    chosen = [np.asarray(data.story(int(i)), dtype=np.int64) for i in spread]
    alone = _alone(run, data, scores, spread, stride, tolerance)
    rows = [("later tokens", f"at most {tolerance:g} nats", *_later_tokens(run, data, chosen, tolerance)),
            ("sum of probabilities", "at most 1", *_probabilities(run, data, chosen, tolerance)),
            ("alone or in a batch", f"at most {tolerance:g} nats a token", *alone),
            ("bytes", "as the tokens have", *_bytes(run, data, scores))]
    if train_data is not None:
        rows.append(("held out", "0 stories", *_held_out(train_data, data)))
    return pd.DataFrame([(check, run.name, *rest) for check, *rest in rows], columns=COLUMNS)


def require(checks: pd.DataFrame) -> None:
    """Raise `UserError` naming the checks that have failed, and whose they are."""
    failed = checks[~checks["passed"]]
    if len(failed):
        told = "; ".join(f"{row.run}, {row.check}: found {row.found}, expected {row.expected}"
                         for row in failed.itertuples())
        raise UserError(f"no comparison is made, for it would be wrong: {told}.")


def _nats(run, ids: list[np.ndarray], header: dict) -> list[np.ndarray]:
    """Nats of every token of stories that are one window long at most, by number."""
    stories = Stories(ids, header)
    found = score_stories(run.model, stories, run.context_length, run.machine, name=None)
    return [score.token_nats for score in sorted(found, key=lambda score: score.story)]


def _later_tokens(run, data, chosen: list[np.ndarray], tolerance: float) -> tuple[str, bool]:
    V, random, worst = data.header["vocab_size"], np.random.default_rng(0), 0.0
    for ids in chosen:
        ids = ids[:run.context_length - 1]
        places = sorted({len(ids) // 3, len(ids) // 2, len(ids) - 1} - {0, -1})
        changed = [np.append(ids[:k], random.integers(0, V, len(ids) - k)) for k in places]
        before, *after = _nats(run, [ids, *changed], data.header)
        for k, nats in zip(places, after, strict=True):
            worst = max(worst, float(np.abs(nats[:k] - before[:k]).max()))
    return f"{worst:.2g}", worst <= tolerance


def _probabilities(run, data, chosen: list[np.ndarray], tolerance: float) -> tuple[str, bool]:
    V, random, worst = data.header["vocab_size"], np.random.default_rng(1), 0.0
    tried = random.permutation(V)[:ALTERNATIVES]
    for ids in chosen[:2]:
        k = min(len(ids), run.context_length - 1, 24)
        nats = _nats(run, [np.append(ids[:k], token) for token in tried], data.header)
        worst = max(worst, float(np.exp(-np.array([each[k] for each in nats], dtype=np.float64)).sum()))
    return f"{worst:.4g}", worst <= 1 + tolerance


def _alone(run, data, scores: pd.DataFrame, spread: np.ndarray, stride: int | None,
           tolerance: float) -> tuple[str, bool]:
    worst = 0.0
    for i in spread:
        [alone] = score_stories(run.model, data, run.context_length, run.machine, stride, [int(i)], name=None)
        worst = max(worst, abs(alone.nats - scores["nats"].iat[int(i)]) / alone.tokens)
    return f"{worst:.2g}", worst <= tolerance


def _bytes(run, data, scores: pd.DataFrame) -> tuple[str, bool]:
    sizes, stated, wrong = run.tokenizer.token_bytes.astype(np.int64), scores["bytes"].to_numpy(), 0
    starts = np.append(np.asarray(data.offsets), data.n_tokens).astype(np.int64)
    for begin in range(0, len(stated), BLOCK):
        block = starts[begin:begin + BLOCK + 1]
        counted = np.add.reduceat(sizes[np.asarray(data.tokens[block[0]:block[-1]])], block[:-1] - block[0])
        wrong += int((counted != stated[begin:begin + BLOCK]).sum())
    return (f"{wrong:,} stories of other sizes" if wrong else f"{int(stated.sum()):,} bytes"), wrong == 0


def _held_out(train_data, data) -> tuple[str, bool]:
    if disjoint_by_construction(train_data.header, data.header):
        return "0 stories, by the split", True
    found = overlapping_stories(train_data, data)
    return f"{found.n_stories:,} stories of {data.n_stories:,}", found.n_stories == 0
