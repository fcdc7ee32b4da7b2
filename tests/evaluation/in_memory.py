"""Token files that are no files."""

from types import SimpleNamespace

import numpy as np


def data(*stories, vocab_size=50, end=0):
    """Stories as ids, two bytes per id, each closed by `end`, like a token file."""
    rows = [[*ids, end] for ids in stories]
    tokens = np.array(sum(rows, []), dtype=np.uint16)
    offsets = np.cumsum([0, *map(len, rows[:-1])]).astype(np.uint64)
    return SimpleNamespace(tokens=tokens, offsets=offsets, n_tokens=len(tokens), n_stories=len(rows),
                           story=lambda i: tokens[int(offsets[i]):int(offsets[i]) + len(rows[i]) - 1],
                           story_bytes=np.array([2 * len(s) for s in stories], dtype=np.uint32),
                           header={"end_of_text_id": end, "vocab_size": vocab_size})


def draw_stories(*lengths):
    return [np.random.default_rng(n).integers(1, 50, n).tolist() for n in lengths]
