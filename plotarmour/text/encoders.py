"""Texts to ids, fast and checked: `fastokens` where it is installed, compared with `tokenizers` on the user's own text.

`tokenizers` (Hugging Face) is the reference and the fallback. `fastokens` (Apache-2.0; one wheel per system for Linux,
macOS and Windows and any Python from 3.9; released monthly) gives the same ids a hundred times faster, for GPT-2's
vocabulary and for one's own; `tokie`, as fast, has wheels for each Python apart and reads its vocabulary only from a
file. Both are measured by benchmarks/pretokenize.py.
"""

import json
import os
from itertools import chain

import numpy as np

from plotarmour.errors import UserError
from plotarmour.text.chunks import PIECE
from plotarmour.text.tokenizers import END_OF_TEXT, Tokenizer

BACKENDS = ("auto", "fastokens", "tokenizers")
CHECKED_SHARE = 0.005  # of the bytes, at most
WORTHWHILE = 2**20  # bytes of text: below, the reference alone is done before a second library has loaded
PREFIX = 4096  # characters of a long text that are compared


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
        # One core is left for reading and writing, which go on meanwhile; on two cores that is 1.3 times as fast.
        os.environ.setdefault("FASTOKENS_BPE_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
        import fastokens

        closing = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": closing, "pair": closing, "special_tokens": {
            END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.end_of_text_id], "tokens": [END_OF_TEXT]}}}
        try:
            self.backend = fastokens.Tokenizer.from_json_str(
                json.dumps({**json.loads(tokenizer.json), "post_processor": template}))
        except Exception as error:  # whatever it says, the reference can read it
            raise ValueError(str(error)) from None
        self.tokenizer = tokenizer
        self.n_seen = self.n_checked = self.n_calls = 0  # bytes, bytes, calls

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode some texts; see `ReferenceEncoder.encode`.

        Raises:
            Differs: from the reference.
        """
        ids, offsets = self.backend.encode_batch_flat(texts, add_special_tokens=True, split_special_tokens=True)
        ids, offsets = np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)
        self._check(texts, ids, offsets)
        return ids, np.diff(offsets)

    def _check(self, texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> None:
        self.n_seen += sum(map(len, texts))  # characters: no more than bytes, so the share holds
        self.n_calls += 1
        i = 0 if self.n_calls == 1 else self.n_calls * 7919 % max(1, len(texts))  # from the beginning, then anywhere
        end = len(texts) if self.n_calls == 1 else min(i + 1, len(texts))
        for i in range(i, end):
            sample = texts[i]
            if len(sample) > PREFIX:
                cut = sample.rfind(" ", 1, PREFIX)
                while cut > 0 and sample[cut - 1].isspace():
                    cut = sample.rfind(" ", 1, cut)
                if cut <= 0 or not self.tokenizer.takes_pieces:
                    continue
                sample = sample[:cut]
            size = len(sample.encode())
            if self.n_checked + size > CHECKED_SHARE * self.n_seen:
                return
            self.n_checked += size
            found, expected = ids[offsets[i]:offsets[i + 1]].tolist(), self.tokenizer.encode(sample)
            if sample is texts[i]:
                expected = [*expected, self.tokenizer.end_of_text_id]
            if found[:len(expected)] != expected or (sample is texts[i] and len(found) != len(expected)):
                raise Differs(f"fastokens gives other ids than tokenizers for {sample[:60]!r}")


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
