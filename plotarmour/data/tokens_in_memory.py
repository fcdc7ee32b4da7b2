"""The slow fallback for training without a token file."""

import warnings
from itertools import islice
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.chunks import Reading, read_stories
from plotarmour.data.readers import Source, check_text
from plotarmour.data.token_file import TokenFile
from plotarmour.data.tokenizer import Tokenizer

BATCH = 1000  # stories


class TokensInMemory:
    """A text, tokenized anew at every start and held in memory.

    Has what batches and scoring use of a `TokenFile`: `tokens`, `offsets`, `story_bytes`, `n_tokens`, `n_stories`,
    `header`, `story`, `tokenizer`.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, stories: str = "endoftext"):
        warnings.warn(f"{path} is not a token file: tokenizing it on the fly, in memory, at every start. "
                      f"Make a token file once with: python tools/pre_tokenize.py {path} --tokenizer "
                      f"{tokenizer.kind} --out {path.stem}.bin", stacklevel=2)
        check_text(path)
        source, rows, sizes = Source.of(path), [], []
        told = read_stories(source, Reading(stories, in_pieces=tokenizer.takes_pieces))
        while batch := list(islice(told, BATCH)):
            for story, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                rows.append(np.array([*ids, tokenizer.end_of_text_id], dtype=np.uint32))
                sizes.append(len(story.encode()))
        if not rows:
            raise UserError(f"{path} holds no story; expected at least one.")
        self.path, self._tokenizer = path, tokenizer
        self.tokens = np.concatenate(rows)
        self.offsets = np.cumsum([0, *map(len, rows[:-1])]).astype(np.uint64)
        self.story_bytes = np.array(sizes, dtype=np.uint32)
        sha256 = source.sha256()
        self.header = {"n_tokens": len(self.tokens), "n_stories": len(rows),
                       "source": [{**source.fingerprint(), "sha256": sha256}],
                       "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
                       "vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id,
                       "payload_sha256": sha256, "stories": stories}

    n_tokens, n_stories, story = TokenFile.n_tokens, TokenFile.n_stories, TokenFile.story

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer
