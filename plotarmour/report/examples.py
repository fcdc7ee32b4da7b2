"""What numbers cannot show: stories on which two models differ most, and what each of them writes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.generation import generate
from plotarmour.run import Run

EACH_WAY = 3  # stories
WORDS = 6  # that are named per story
MOST_CHARACTERS = 5_000  # of a story that are shown
PROMPT = "Once upon a time"
BEGINNINGS = 2  # of test stories, as prompts
BEGINNING_TOKENS = 16
SAMPLE_TOKENS, TEMPERATURE, TOP_P, SEED = 120, 0.8, 0.95, 1
COLUMNS = ["story", "tokens", "a", "b", "nats_a", "nats_b", "better", "words", "text"]


def different_stories(names: Sequence[str], scores: dict[str, pd.DataFrame], token_nats: dict[str, list[np.ndarray]],
                      data: TokenFile, tokenizer) -> pd.DataFrame:
    """Find the stories whose nats per token differ most between two runs, and the words that make the difference.

    Args:
        names: of the two runs.
        scores: by run name, the stories' rows.
        token_nats: by run name, for every story the nats of its tokens.
        data: that was scored.
        tokenizer: of the token file.

    Returns:
        A row per story: its number, tokens, both runs and their nats, which is better, the words that cost the other
        one most more (word, and by how many nats), and its text.
    """
    frames = [scores[name] for name in names]
    gap = ((frames[0]["nats"] - frames[1]["nats"]) / frames[0]["tokens"]).to_numpy()
    order = np.argsort(gap, kind="stable")
    count = min(EACH_WAY, len(gap) // 2)
    rows = []
    for i in map(int, (*order[:count], *order[len(order) - count:][::-1])):
        more = token_nats[names[0]][i] - token_nats[names[1]][i]  # nats that the first run pays more
        sign = -1.0 if gap[i] < 0 else 1.0  # of the worse one
        words = sorted(_words(tokenizer, data.story(i), sign * more), key=lambda word: -word[1])[:WORDS]
        rows.append([i, int(frames[0]["tokens"].iat[i]), *names, *(float(frame["nats"].iat[i]) for frame in frames),
                     names[0] if gap[i] < 0 else names[1], ", ".join(f"{word} {nats:+.1f}" for word, nats in words),
                     _cut(tokenizer.decode(data.story(i)))])
    return pd.DataFrame(rows, columns=COLUMNS)


def samples_of(run: Run, arm: str, data: TokenFile) -> pd.DataFrame:
    """Let a run continue some prompts: the same ones, with the same seed, for every run.

    Args:
        run: with its model.
        arm: name of its arm.
        data: whose stories' beginnings are prompts.

    Returns:
        A row per prompt: prompt, arm, seed, text (the continuation alone).
    """
    spread = np.linspace(0, data.n_stories - 1, BEGINNINGS + 2).astype(int)[1:-1]
    prompts = [run.tokenizer.encode(PROMPT)]
    prompts += [[int(t) for t in data.story(int(i))[:BEGINNING_TOKENS]] for i in spread]
    rows = []
    for ids in prompts:
        room = run.context_length - 1 - len(ids)
        new = generate(run.model, ids, run.tokenizer.end_of_text_id, run.machine, top_p=TOP_P,
                       temperature=TEMPERATURE, seed=SEED, max_new_tokens=max(1, min(SAMPLE_TOKENS, room)))
        rows.append([run.tokenizer.decode(ids), arm, SEED, run.tokenizer.decode(new)])
    return pd.DataFrame(rows, columns=["prompt", "arm", "seed", "text"])


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."


def _words(tokenizer, ids: np.ndarray, values: np.ndarray) -> list[tuple[str, float]]:
    """Words of a story, each with the sum over its tokens; a word begins with a blank or after one."""
    words: list[list] = []
    for token, value in zip([*ids, None], values, strict=True):
        piece = "<|endoftext|>" if token is None else tokenizer.decode([int(token)])
        if not words or token is None or piece[:1].isspace() or words[-1][0][-1:].isspace():
            words.append(["", 0.0])
        words[-1][0] += piece
        words[-1][1] += float(value)
    return [(word.strip() or repr(word), total) for word, total in words]
