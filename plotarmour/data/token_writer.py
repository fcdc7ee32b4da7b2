"""Write token files, whose layout `token_file` describes, batch by batch."""

import hashlib
import json
import os
import struct
import zlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import plotarmour
from plotarmour.cli import UserError
from plotarmour.data.token_file import CRC_BLOCK, DTYPES, FIXED, FORMAT_VERSION, HEADER_BYTES, MAGIC, layout
from plotarmour.data.tokenizer import Tokenizer


class TokenFileWriter(ExitStack):
    """Write a token file batch by batch, in a folder of unfinished work; `complete` makes it one.

    Args:
        path: of the file; two more, which begin with its name, grow beside it.
        tokenizer: whose ids are written.
        policies: more entries of the header, such as `stories` and `split`.
        saved: what `save` of an earlier writer of this path returned: this one continues behind it.

    Use as a context manager. After an error the files stay as they are.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, policies: dict, saved: tuple[int, int] = (0, 0)):
        super().__init__()
        self.tokenizer, self.policies = tokenizer, policies
        self.dtype = DTYPES["uint16" if tokenizer.vocab_size <= 2**16 else "uint32"]
        self.n_tokens, self.n_stories = saved
        self.n_indexed = self.n_tokens  # tokens of the stories in the index
        self.sha256, self.crcs, self.crc, self.filled = hashlib.sha256(), [], 0, 0  # of whole blocks; of the last one
        # The index comes behind the tokens, whose number is known only at the end.
        parts = {path: HEADER_BYTES + self.n_tokens * self.dtype.itemsize,
                 path.with_name(f"{path.name}.offsets"): 8 * self.n_stories,
                 path.with_name(f"{path.name}.lengths"): 4 * self.n_stories}
        for part, size in parts.items():
            part.touch()
            if self.n_stories and part.stat().st_size < size:
                raise UserError(f"{part} is truncated; expected what an earlier start has saved. Give the same command "
                                "again: it starts over.")
            os.truncate(part, size)  # what was written after the last save goes
        self.files = [self.enter_context(part.open("r+b")) for part in parts]
        self.body, self.offsets, self.lengths = self.files
        self.body.seek(HEADER_BYTES)
        while block := self.body.read(CRC_BLOCK):
            self._count(block)
        for file in self.files:
            file.seek(0, os.SEEK_END)

    def add(self, ids: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> None:
        """Append ids, and the stories that end in them. Further calls may continue the last story.

        Args:
            ids: unsigned integers (n,); each story ends with end-of-text.
            counts: integers (m,): ids of each story, end-of-text and ids of earlier calls included.
            sizes: integers (m,): UTF-8 bytes of each story.

        Raises:
            UserError: an id outside the vocabulary, or a story of 4 GiB or more.

        Example:
            `add([5, 6, 0, 7], [3], [2])`, then `add([8, 0], [3], [4])`: the stories 5 6 0 of 2 bytes, 7 8 0 of 4.
        """
        ids, counts, sizes = np.asarray(ids), np.asarray(counts, np.int64), np.asarray(sizes, np.int64)
        if ids.max(initial=0) >= self.tokenizer.vocab_size:  # astype would wrap silently
            bad = ids[ids >= self.tokenizer.vocab_size][0]
            raise UserError(f"story {self.n_stories} or one soon after: id {bad} is outside the vocabulary of "
                            f"{self.tokenizer.vocab_size:,} entries; the tokenizer is inconsistent.")
        if sizes.max(initial=0) >= 2**32:
            raise UserError(f"story {self.n_stories} or one soon after has {sizes.max():,} bytes; expected less than "
                            f"{2**32:,}. Put separators into it.")
        ends = self.n_indexed + np.cumsum(counts)
        self.offsets.write((ends - counts).astype("<u8").data)
        self.lengths.write(sizes.astype("<u4").data)
        self.n_indexed, self.n_stories = self.n_indexed + int(counts.sum()), self.n_stories + len(counts)
        self._append(ids.astype(self.dtype).view("u1").data)
        self.n_tokens += len(ids)

    def save(self) -> tuple[int, int]:
        """fsync what was added, whole stories, and return the numbers of tokens and stories."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        return self.n_tokens, self.n_stories

    def complete(self, sources: list[dict], n_empty_dropped: int = 0, n_excluded: int = 0, n_replaced: int = 0) -> None:
        """Add index, checks, tokenizer and header.

        Args:
            sources: name, bytes and hashes of the texts, for the header.
            n_empty_dropped, n_excluded: stories of the whole text that no part holds.
            n_replaced: U+FFFD put in.
        """
        self._end_block()
        self._append(bytes(-self.body.tell() % 8), checked=False)  # offsets begin at a multiple of 8
        for file in (self.offsets, self.lengths):
            file.seek(0)
            while block := file.read(2**20):
                self._append(block)
        self._end_block()
        checks, tokenizer = struct.pack(f"<{len(self.crcs)}I", *self.crcs), self.tokenizer.json.encode()
        self._append(checks + tokenizer, checked=False)
        self.body.seek(0)
        self.body.write(header_block({
            "dtype": self.dtype.name, "n_tokens": self.n_tokens, "n_stories": self.n_stories,
            "n_empty_dropped": n_empty_dropped, "n_excluded": n_excluded, "n_replaced": n_replaced,
            "vocab_size": self.tokenizer.vocab_size, "end_of_text_id": self.tokenizer.end_of_text_id,
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256}, "source": sources,
            **self.policies, "payload_sha256": self.sha256.hexdigest(), "checks_crc32": zlib.crc32(checks),
            "sections": layout(self.dtype.name, self.n_tokens, self.n_stories, len(tokenizer)),
            "program": f"plotarmour {plotarmour.__version__}"}))
        self.save()

    def _append(self, data: bytes | memoryview, checked: bool = True) -> None:
        self.body.write(data)
        self._count(data, checked)

    def _count(self, data: bytes | memoryview, checked: bool = True) -> None:
        """Update the SHA-256 of the payload and the CRC-32 of each block."""
        self.sha256.update(data)
        data = memoryview(data)
        while checked and data:
            part, data = data[:CRC_BLOCK - self.filled], data[CRC_BLOCK - self.filled:]
            self.crc, self.filled = zlib.crc32(part, self.crc), self.filled + len(part)
            if self.filled == CRC_BLOCK:
                self._end_block()

    def _end_block(self) -> None:
        if self.filled:
            self.crcs.append(self.crc)
        self.crc, self.filled = 0, 0


def header_block(header: dict) -> bytes:
    """Return the first 4,096 bytes of a token file."""
    text = json.dumps(header, ensure_ascii=False).encode()
    block = (FIXED.pack(MAGIC, FORMAT_VERSION, len(text)) + text).ljust(HEADER_BYTES - 4)
    assert len(block) == HEADER_BYTES - 4, "`pipeline.described` shortens what may be long"
    return block + struct.pack("<I", zlib.crc32(block))
