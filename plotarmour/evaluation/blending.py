"""Blends measured: the loss of two runs together against the share of each, and what they write at each share."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from plotarmour.data.token_file import Tokens
from plotarmour.evaluation.generation import BLENDS, blend_logits
from plotarmour.evaluation.statistics import compare_losses
from plotarmour.evaluation.surprise import last_misfits


@torch.no_grad()
def blend_losses(runs: Sequence[Any], data: Tokens, shares: Sequence[float], stories: int = 200) -> pd.DataFrame:
    """Score held-out stories under blends of two runs.

    Args:
        runs: two `plotarmour.run.Run` of one tokenizer.
        data: held-out stories; of each, the tokens that fit into the shorter context are scored.
        shares: of the first run, 0 to 1.
        stories: how many, from the first on.

    Returns:
        A row per kind of blend and share: blend, share, loss (nats per token), and difference: that to the better of
        the two runs alone, with low and high, its 95 % interval over stories. Below 0, the pair is better than either.
    """
    end, limit = data.header["end_of_text_id"], min(run.context_length for run in runs)
    nats, counts = {(blend, share): [] for blend in BLENDS for share in {0, 1, *shares}}, []  # by story
    for i in range(min(stories, data.n_stories)):
        ids = torch.tensor([end, *map(int, data.story(i)), end])[:limit + 1]
        counts.append(len(ids) - 1)
        logits = []
        for run in runs:
            with run.machine.autocast:
                features, _ = run.model.features(ids[None, :-1].to(run.machine.device))
            logits.append((features[0].float() @ run.model.unembedding.float().T).cpu())
        for (blend, share), sums in nats.items():
            log_p = blend_logits(logits, [share, 1 - share], blend).log_softmax(-1)
            sums.append(-float(log_p.gather(1, ids[1:, None]).double().sum()))
    counts, nats = np.array(counts), {key: np.array(sums) for key, sums in nats.items()}
    alone, rows = min((nats["linear", share] for share in (0, 1)), key=np.sum), []
    for blend in BLENDS:
        for share in shares:
            difference = compare_losses(counts, nats[blend, share], alone).difference
            rows.append([blend, share, nats[blend, share].sum() / counts.sum(), *difference])
    return pd.DataFrame(rows, columns=["blend", "share", "loss", "difference", "low", "high"])


def blend_texts(runs: Sequence[Any], prompts: Sequence[str], shares: Sequence[float], threshold: float,
                max_new_tokens: int = 60, **options) -> pd.DataFrame:
    """Measure what two runs write together.

    Args:
        runs: two `plotarmour.run.Run` of one tokenizer; the first one looks for contradictions.
        prompts: a text of each is written with each share, prompt i with seed i.
        shares: of the first run, 0 to 1.
        threshold: misfit above which a word contradicts the sentences before it (`surprise.threshold_of`).
        max_new_tokens, options: see `plotarmour.evaluation.generation.stream`.

    Returns:
        A row per share: share, texts, distinct_2 (different pairs of tokens that follow each other, over all such
        pairs, of all texts), repetition (share of tokens that end a sequence of four tokens that the text has already),
        contradictions (share of the words of the last sentence of a text that are above the threshold).
    """
    tokenizer, rows = runs[0].tokenizer, []
    for share in shares:
        pairs, repeated, n_fours, marked, n_words = Counter(), 0, 0, 0, 0
        for seed, prompt in enumerate(prompts):
            ids = tokenizer.encode(prompt)
            new = [token.id for token in runs[0].stream(ids, runs[1], share, max_new_tokens=max_new_tokens, seed=seed,
                                                        **options)]
            pairs.update(zip(new, new[1:], strict=False))
            fours = list(zip(*(new[i:] for i in range(4)), strict=False))
            repeated, n_fours = repeated + len(fours) - len(set(fours)), n_fours + len(fours)
            misfits = last_misfits(runs[0], tokenizer.decode([*ids, *new]))
            marked, n_words = marked + sum(misfit > threshold for misfit in misfits), n_words + len(misfits)
        rows.append([share, len(prompts), len(pairs) / max(1, pairs.total()), repeated / max(1, n_fours),
                     marked / max(1, n_words)])
    return pd.DataFrame(rows, columns=["share", "texts", "distinct_2", "repetition", "contradictions"])
