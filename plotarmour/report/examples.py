"""What numbers cannot show: stories on which two models differ most, and what each of them writes."""

from pathlib import Path

import numpy as np
import pandas as pd

from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.arms import Arm, pairs_of
from plotarmour.evaluation.generation import generate
from plotarmour.evaluation.scoring import score_stories
from plotarmour.run import Run, load_run

EACH_WAY = 3  # stories
WORDS = 6  # that are named per story
MOST_CHARACTERS = 5_000  # of a story that are shown
PROMPT = "Once upon a time"
BEGINNINGS = 2  # of test stories, as prompts
BEGINNING_TOKENS = 16
SAMPLE_TOKENS, TEMPERATURE, TOP_P, SEED = 120, 0.8, 0.95, 1
COLUMNS = ["story", "tokens", "a", "b", "nats_a", "nats_b", "better", "words", "text"]


def different_stories(arms: list[Arm], scores: dict[str, pd.DataFrame], data: TokenFile, which: str, device: str,
                      folders: list[Path], stride: int | None = None) -> pd.DataFrame:
    """Find the stories whose nats per token differ most between the first runs of the first pair, and why

    Args:
        arms: of the comparison.
        scores: by run name, the stories' rows.
        data: that was scored.
        which, device: as in `load_run`.
        folders: of the runs.
        stride: of sliding windows, as in `scores`.

    Returns:
        A row per story: its number, tokens, both runs and their nats, which is better, the words that cost the other
        one most more (word, and by how many nats), and its text.
    """
    pairs = pairs_of(arms)
    if not pairs:
        return pd.DataFrame(columns=COLUMNS)
    names = (pairs[0][0].runs[0], pairs[0][1].runs[0])
    frames = [scores[name] for name in names]
    gap = ((frames[0]["nats"] - frames[1]["nats"]) / frames[0]["tokens"]).to_numpy()
    order = np.argsort(gap, kind="stable")
    count = min(EACH_WAY, len(gap) // 2)
    chosen = [int(i) for i in (*order[:count], *order[len(order) - count:][::-1])]
    runs = [load_run(next(folder for folder in folders if folder.name == name), which, device) for name in names]
    token_nats = [{score.story: score.token_nats for score in
                   score_stories(run.model, data, run.context_length, run.machine, stride, chosen, name=None)}
                  for run in runs]
    rows = []
    for i in chosen:
        more = token_nats[0][i] - token_nats[1][i]  # what a pays more
        sign = -1.0 if gap[i] < 0 else 1.0  # of the worse one
        words = sorted(_words(runs[0], data.story(i), sign * more), key=lambda word: -word[1])[:WORDS]
        rows.append([i, int(frames[0]["tokens"].iat[i]), *names, *(float(frame["nats"].iat[i]) for frame in frames),
                     names[0] if gap[i] < 0 else names[1], ", ".join(f"{word} {nats:+.1f}" for word, nats in words),
                     _cut(runs[0].tokenizer.decode(data.story(i)))])
    return pd.DataFrame(rows, columns=COLUMNS)


def samples(arms: list[Arm], folders: list[Path], which: str, device: str, data: TokenFile) -> pd.DataFrame:
    """Let the first run of every arm continue the same prompts with the same seed.

    Returns:
        A row per prompt and arm: prompt, arm, seed, text (the continuation alone).
    """
    rows, prompts = [], None
    for arm in arms:
        run = load_run(next(folder for folder in folders if folder.name == arm.runs[0]), which, device)
        if prompts is None:
            spread = np.linspace(0, data.n_stories - 1, BEGINNINGS + 2).astype(int)[1:-1]
            prompts = [run.tokenizer.encode(PROMPT)]
            prompts += [[int(t) for t in data.story(int(i))[:BEGINNING_TOKENS]] for i in spread]
        for ids in prompts:
            room = run.context_length - 1 - len(ids)
            new = generate(run.model, ids, run.tokenizer.end_of_text_id, run.machine, top_p=TOP_P,
                           temperature=TEMPERATURE, seed=SEED, max_new_tokens=max(1, min(SAMPLE_TOKENS, room)))
            rows.append([run.tokenizer.decode(ids), arm.name, SEED, run.tokenizer.decode(new)])
    return pd.DataFrame(rows, columns=["prompt", "arm", "seed", "text"])


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."


def _words(run: Run, ids: np.ndarray, values: np.ndarray) -> list[tuple[str, float]]:
    """Words of a story, each with the sum over its tokens; a word begins with a blank or after one."""
    words: list[list] = []
    for token, value in zip([*ids, None], values, strict=True):
        piece = "<|endoftext|>" if token is None else run.tokenizer.decode([int(token)])
        if not words or token is None or piece[:1].isspace() or words[-1][0][-1:].isspace():
            words.append(["", 0.0])
        words[-1][0] += piece
        words[-1][1] += float(value)
    return [(word.strip() or repr(word), total) for word, total in words]
