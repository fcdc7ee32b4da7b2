"""Examples of a comparison: stories on which two models differ most, and continuations of prompts by each arm."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.generation import generate
from plotarmour.run import Run

STORIES_PER_SIDE = 3
WORDS = 6  # words named per story
MAX_CHARACTERS = 5_000  # shown of a story
PROMPT = "Once upon a time"
BEGINNINGS, BEGINNING_TOKENS = 2, 16  # test stories whose first tokens are further prompts
SAMPLE_TOKENS, TEMPERATURE, TOP_P, SEED = 120, 0.8, 0.95, 1


def different_stories(names: Sequence[str], scores: dict[str, pd.DataFrame], token_nats: dict[str, list[np.ndarray]],
                      data: TokenFile) -> pd.DataFrame:
    """Return the stories with the largest differences in nats per token between two runs.

    Args:
        names: names of the two runs.
        scores: by run name, a row per story with tokens and nats.
        token_nats: by run name, the nats of the tokens of each story.
        data: the token file that was scored.

    Returns:
        A row per story: its index, tokens, both runs and their nats, the better run, the words with the largest
        additional nats under the worse run (word and nats), and its text.
    """
    a, b = (scores[name] for name in names)
    difference = ((a["nats"] - b["nats"]) / a["tokens"]).to_numpy()
    order = np.argsort(difference, kind="stable")
    count, tokenizer, rows = min(STORIES_PER_SIDE, len(order) // 2), data.tokenizer(), []
    for i in map(int, (*order[:count], *order[len(order) - count:][::-1])):
        worse, better = (1, 0) if difference[i] < 0 else (0, 1)
        ids, text = data.story(i), tokenizer.decode(data.story(i))
        additional = token_nats[names[worse]][i] - token_nats[names[better]][i]
        words = sorted(_words(tokenizer, ids, additional), key=lambda word: -word[1])[:WORDS]
        rows.append([i, int(a["tokens"].iat[i]), *names, float(a["nats"].iat[i]), float(b["nats"].iat[i]),
                     names[better], ", ".join(f"{word} {nats:+.1f}" for word, nats in words),
                     text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."])
    return pd.DataFrame(rows, columns=["story", "tokens", "a", "b", "nats_a", "nats_b", "better", "words", "text"])


def samples_of(run: Run, arm: str, data: TokenFile) -> pd.DataFrame:
    """Return continuations of prompts by a run, with the same prompts and seed for every run.

    Args:
        run: the run, with its model.
        arm: name of its arm.
        data: token file whose stories' first tokens are prompts.

    Returns:
        A row per prompt: prompt, arm, seed, text (without the prompt).
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


def _words(tokenizer, ids: np.ndarray, values: np.ndarray) -> list[tuple[str, float]]:
    """Return the words of a story with the sum of `values` over their tokens; white space separates words."""
    words: list[list] = []
    for token, value in zip([*ids, None], values, strict=True):
        piece = "<|endoftext|>" if token is None else tokenizer.decode([int(token)])
        if not words or token is None or piece[:1].isspace() or words[-1][0][-1:].isspace():
            words.append(["", 0.0])
        words[-1][0] += piece
        words[-1][1] += float(value)
    return [(word.strip() or repr(word), total) for word, total in words]
