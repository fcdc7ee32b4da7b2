"""Stories in memory in place of token files."""

from pathlib import Path

import numpy as np

from plotarmour.data.token_file import TokensInMemory


def data(*stories, vocab_size=50, end=0, dtype=np.uint16):
    """Stories as ids, two bytes of text per id, each closed by `end`, like a token file."""
    rows = [np.array([*ids, end], dtype) for ids in stories]
    header = {"end_of_text_id": end, "vocab_size": vocab_size, "source": [], "tokenizer": {"sha256": "x"},
              "payload_sha256": f"{hash(str(rows)):x}"}
    made = TokensInMemory(rows, header, [2 * len(ids) for ids in stories])
    made.path = Path("x.bin")  # for messages
    return made


def draw_stories(*lengths):
    return [np.random.default_rng(n).integers(1, 50, n).tolist() for n in lengths]
