"""Texts to ids, fast and checked: `fastokens` where it is installed, compared with `tokenizers` on the user's own text.

`tokenizers` (Hugging Face) is the reference and the fallback. `fastokens` (Apache-2.0; one wheel per system for Linux,
macOS and Windows and any Python from 3.9) gives the same ids a hundred times faster, for GPT-2's vocabulary and for
one's own; `tokie`, half as fast, has wheels for each Python apart and reads its vocabulary only from a file. All three
are measured by benchmarks/pretokenize.py.
"""

import json
import os
from itertools import chain

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.chunks import PIECE
from plotarmour.data.tokenizer import END_OF_TEXT, Tokenizer
from plotarmour.limits import cores

BACKENDS = ("auto", "fastokens", "tokenizers")
CHECKED_SHARE = 0.005  # of the bytes, at most
WORTHWHILE = 2**20  # bytes of text: below, the reference alone is done before a second library has loaded
SAMPLED = 2048  # characters at each end of a long text that are compared


class Differs(Exception):
    """The fast ids are not the reference's: nothing that they gave can be trusted."""


class ReferenceEncoder:
    """Ids by `tokenizers`."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode some texts.

        Returns:
            All ids, uint32 (n,), each text closed by end-of-text; and the number of ids of each text with it, int64
            (len(texts),).
        """
        end = [self.tokenizer.end_of_text_id]
        rows = [row + end for row in self.tokenizer.encode_batch(texts)]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.uint32, int(counts.sum())), counts


class FastEncoder:
    """Ids by `fastokens`, some of them compared with `tokenizers`: the first texts, then some of every chunk.

    Raises:
        ImportError: fastokens is not installed.
        ValueError: it cannot read this tokenizer.
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer):
        # One core is left for reading and writing, which go on meanwhile.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", str(max(1, cores() - 1)))
        import fastokens

        closing = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": closing, "pair": closing, "special_tokens": {
            END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.end_of_text_id], "tokens": [END_OF_TEXT]}}}
        made = json.loads(tokenizer.json)
        if "merges" in made["model"]:
            made["model"].setdefault("type", "BPE")  # GPT-2's own file leaves it out, and older releases need it
        try:
            self.backend = fastokens.Tokenizer.from_json_str(
                json.dumps({**made, "post_processor": template, "truncation": None, "padding": None}))
            self._flat(["a"])  # an older release lacks the option
        except Exception as error:  # whatever it says, the reference can read it
            raise ValueError(str(error)) from None
        self.tokenizer = tokenizer
        self.n_seen = self.n_checked = self.n_calls = 0  # bytes, bytes, calls

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode some texts; see `ReferenceEncoder.encode`.

        Raises:
            Differs: from the reference.
        """
        ids, offsets = self._flat(texts)
        ids, offsets = np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)
        self._check(texts, ids, offsets)
        return ids, np.diff(offsets)

    def _flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        return self.backend.encode_batch_flat(texts, add_special_tokens=True, split_special_tokens=True)

    def _check(self, texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> None:
        end = self.tokenizer.end_of_text_id
        if len(offsets) != len(texts) + 1 or (ids[offsets[1:] - 1] != end).any() or (ids == end).sum() != len(texts):
            raise Differs("fastokens does not close every text by one end-of-text, as tokenizers does")
        self.n_seen += sum(map(len, texts))  # characters: no more than bytes, so the share holds
        self.n_calls += 1
        i = 0 if self.n_calls == 1 else self.n_calls * 7919 % max(1, len(texts))  # from the beginning, then anywhere
        for i in range(i, len(texts) if self.n_calls == 1 else min(i + 1, len(texts))):
            found = ids[offsets[i]:offsets[i + 1] - 1].tolist()
            for sample, at_end in self._samples(texts[i]):
                size = len(sample.encode())
                if self.n_checked + size > CHECKED_SHARE * self.n_seen:
                    return
                self.n_checked += size
                expected = self.tokenizer.encode(sample)
                same = found == expected if sample is texts[i] else (
                    found[len(found) - len(expected):] if at_end else found[:len(expected)]) == expected
                if not same:
                    raise Differs(f"fastokens gives other ids than tokenizers for {sample[:60]!r}")

    def _samples(self, text: str) -> list[tuple[str, bool]]:
        """A text, or beginning and end of a long one; with each, whether it is the end."""
        if len(text) <= SAMPLED:
            return [(text, False)]
        if not self.tokenizer.takes_pieces:
            return []
        cuts = [cut for cut in (_cut(text, 1, SAMPLED), _cut(text, len(text) - SAMPLED, len(text))) if cut]
        return [(text[:cuts[0]], False), (text[cuts[-1]:], True)] if cuts else []


def _cut(text: str, start: int, end: int) -> int:
    """The last place between `start` and `end` where a space follows a character that is not blank; 0: none."""
    while (end := text.rfind(" ", start, end)) > 0:
        if not text[end - 1].isspace():
            return end
    return 0


Encoder = ReferenceEncoder | FastEncoder


def make_encoder(tokenizer: Tokenizer, backend: str = "auto", n_bytes: int = PIECE) -> Encoder:
    """Choose what encodes a text.

    Args:
        tokenizer: the reference.
        backend: "auto" takes fastokens where it is installed, can read the tokenizer and pays.
        n_bytes: of the text.

    Raises:
        UserError: an unknown backend, or fastokens asked for and not to be had.
    """
    if backend not in BACKENDS:
        raise UserError(f"--backend {backend!r} is unknown; expected one of {', '.join(BACKENDS)}.")
    if backend == "tokenizers" or (backend == "auto" and n_bytes < WORTHWHILE):
        return ReferenceEncoder(tokenizer)
    try:
        return FastEncoder(tokenizer)
    except (ImportError, ValueError) as error:
        if backend == "fastokens":
            raise UserError(f"fastokens cannot be used ({error}); expected it for --backend fastokens. Install it with "
                            "pip install fastokens, or use --backend auto.") from None
        return ReferenceEncoder(tokenizer)
