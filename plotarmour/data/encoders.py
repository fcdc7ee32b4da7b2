"""Texts to ids in batches: by `fastokens` where it is installed, checked against `tokenizers` on the user's own text.

`tokenizers` (Hugging Face) is the reference. `fastokens` (Apache-2.0; one wheel per system for Linux, macOS and Windows
and any Python from 3.9) gives the same ids about a hundred times faster, for GPT-2's vocabulary and for learned ones.
benchmarks/pretokenize.py measures both, and `tokie`, which is half as fast as fastokens.
"""

import json
import os
from itertools import chain

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.tokenizer import END_OF_TEXT, Tokenizer, cut_place
from plotarmour.limits import cores

BACKENDS = ("auto", "fastokens", "tokenizers")
CHECKED_SHARE = 0.005  # of the characters that fastokens encodes are encoded by tokenizers as well, at most
CHECKED_CHARACTERS = 2048  # of one text, at most
WORTHWHILE = 2**20  # bytes of text: below, the reference has finished before fastokens is loaded


class Differs(Exception):
    """fastokens gave other ids than `tokenizers`: none of its ids can be trusted."""


class ReferenceEncoder:
    """Encode by `tokenizers`."""

    name = "tokenizers"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode some texts.

        Returns:
            All ids, uint32 (n,), each text followed by end-of-text; and how many ids each text has, end-of-text
            included, int64 (len(texts),).
        """
        end = [self.tokenizer.end_of_text_id]
        rows = [row + end for row in self.tokenizer.encode_batch(texts)]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.uint32, int(counts.sum())), counts


class FastEncoder:
    """Encode by `fastokens`; compare the first texts, then one of every batch, with `tokenizers`.

    Raises:
        ImportError: fastokens is not installed.
        ValueError: it cannot read this tokenizer.
    """

    name = "fastokens"

    def __init__(self, tokenizer: Tokenizer):
        os.environ.setdefault("FASTOKENS_BPE_THREADS", str(max(1, cores() - 1)))  # one core reads and writes
        import fastokens

        closing = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}]
        template = {"type": "TemplateProcessing", "single": closing, "pair": closing, "special_tokens": {
            END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.end_of_text_id], "tokens": [END_OF_TEXT]}}}
        settings = json.loads(tokenizer.json)
        if "merges" in settings["model"]:
            settings["model"].setdefault("type", "BPE")  # missing in GPT-2's own file
        try:
            self.backend = fastokens.Tokenizer.from_json_str(
                json.dumps({**settings, "post_processor": template, "truncation": None, "padding": None}))
            self._encode(["a"])  # an older release lacks the option
        except Exception as error:  # of any kind: the reference can read this tokenizer
            raise ValueError(str(error)) from None
        self.tokenizer = tokenizer
        self.n_seen = self.n_checked = self.n_calls = 0  # characters, characters, calls

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode some texts; see `ReferenceEncoder.encode`.

        Raises:
            Differs: ids that are not the reference's.
        """
        ids, offsets = self._encode(texts)
        ids, offsets = np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)
        self._check(texts, ids, offsets)
        return ids, np.diff(offsets)

    def _encode(self, texts: list[str]) -> tuple[bytes, bytes]:
        return self.backend.encode_batch_flat(texts, add_special_tokens=True, split_special_tokens=True)

    def _check(self, texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> None:
        end = self.tokenizer.end_of_text_id
        if len(offsets) != len(texts) + 1 or (ids[offsets[1:] - 1] != end).any() or (ids == end).sum() != len(texts):
            raise Differs("fastokens does not end every text with one end-of-text, as tokenizers does")
        self.n_seen += sum(map(len, texts))
        self.n_calls += 1
        first = self.n_calls * 7919 % max(1, len(texts))
        for i in range(len(texts)) if self.n_calls == 1 else range(first, min(first + 1, len(texts))):
            sample = self._sample(texts[i])
            if self.n_checked + len(sample) > CHECKED_SHARE * self.n_seen:
                return
            self.n_checked += len(sample)
            expected = self.tokenizer.encode(sample)
            actual = ids[offsets[i]:offsets[i + 1] - 1]
            if actual[:None if sample == texts[i] else len(expected)].tolist() != expected:
                raise Differs(f"fastokens gives other ids than tokenizers for {sample[:60]!r}")

    def _sample(self, text: str) -> str:
        """A text, or the beginning of a long one whose ids are the first ids of the text; "" if there is none."""
        if len(text) <= CHECKED_CHARACTERS:
            return text
        start = text[:CHECKED_CHARACTERS].encode()
        return start[:cut_place(start, len(start))].decode() if self.tokenizer.takes_pieces else ""


Encoder = ReferenceEncoder | FastEncoder


def make_encoder(tokenizer: Tokenizer, backend: str, n_bytes: int) -> Encoder:
    """Choose what encodes a text.

    Args:
        tokenizer: the reference.
        backend: "auto" takes fastokens if it is installed, can read the tokenizer and the text is long enough.
        n_bytes: size of the text.

    Raises:
        UserError: an unknown backend, or "fastokens" where it cannot be used.
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
