"""The stories of several token files, numbered through: what is compared across parts."""

from collections.abc import Iterator

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.token_file import TokenFile

BATCH_TOKENS = 2**19


class Corpus:
    """The stories of some token files, numbered through.

    Attributes:
        n: stories of all files.
        parts: names of the files.
        part_of: int16 (n,), index into `parts`.

    Raises:
        UserError: tokenizers that differ.
    """

    def __init__(self, files: dict[str, TokenFile]):
        made = {name: data.header["tokenizer"]["sha256"] for name, data in files.items()}
        if len(set(made.values())) > 1:
            raise UserError("the token files have different tokenizers ("
                            + ", ".join(f"{name} {sha[:12]}" for name, sha in made.items())
                            + "); expected one. Make them again with --tokenizer of the first.")
        self.files, self.parts = list(files.values()), list(files)
        self.sizes = np.array([data.n_stories for data in self.files])
        self.bases = np.cumsum(self.sizes) - self.sizes
        self.n = int(self.sizes.sum())
        self.part_of = np.repeat(np.arange(len(self.files), dtype=np.int16), self.sizes)
        self.tokenizer = self.files[0].tokenizer()
        self.tokens = [np.asarray(data.tokens) for data in self.files]  # slices of a memmap are slow
        self.bounds = [np.append(data.offsets, data.n_tokens).astype(np.int64) for data in self.files]

    def ids(self, i: int) -> np.ndarray:
        """Return the ids of story `i`."""
        part, place = self.place(i)
        return self.tokens[part][self.bounds[part][place]:self.bounds[part][place + 1] - 1]

    def place(self, i: int) -> tuple[int, int]:
        """Return the index of the part, and the story's index in it."""
        part = int(self.part_of[i])
        return part, int(i - self.bases[part])

    def texts(self, stories: np.ndarray) -> list[str]:
        """Return the text of some stories."""
        return self.tokenizer.backend.decode_batch([self.ids(i).tolist() for i in stories], skip_special_tokens=False)

    def batches(self, stories: np.ndarray) -> Iterator[np.ndarray]:
        """Cut story numbers into batches of about `BATCH_TOKENS` tokens."""
        lengths = np.concatenate([np.diff(bounds) for bounds in self.bounds])[stories]
        yield from np.split(stories, np.flatnonzero(np.diff(np.cumsum(lengths) // BATCH_TOKENS)) + 1)


def token_counts(data: TokenFile) -> np.ndarray:
    """Count how often each id stands in a token file: int64 (vocab_size,). Reads the tokens once, in blocks."""
    counts = np.zeros(data.header["vocab_size"], dtype=np.int64)
    for begin in range(0, data.n_tokens, BATCH_TOKENS):
        counts += np.bincount(data.tokens[begin:begin + BATCH_TOKENS], minlength=len(counts))
    return counts
