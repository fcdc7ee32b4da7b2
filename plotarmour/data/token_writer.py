"""Writing a token file batch by batch: resumable until it is complete, then published under its name.

Tokens go to their final place in an unfinished file; offsets and lengths to files of their own beside it, since nobody
knows their number before the end. `state` says how far all three are, and a later writer goes on from there.
"""

import hashlib
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np

import plotarmour
from plotarmour.cli import UserError
from plotarmour.data.token_file import CRC_BLOCK, HEADER_BYTES, header_block
from plotarmour.data.tokenizer import Tokenizer
from plotarmour.files import publish, unfinished

COPIED = 2**20  # bytes at a time


class Unusable(Exception):
    """What an earlier start left behind is not what it said."""


class TokenFileWriter:
    """Write a token file; it appears under its name only when `publish` succeeds.

    Args:
        path: of the file to make.
        tokenizer: that makes the ids.
        policies: `stories` and `split` policy and the like, for the header.
        folder: for unfinished files, on the same disk, left as it is for a later start; by default one that vanishes
            with the writer.
        state: of an earlier writer, whose files lie in `folder`, to go on from; what lies behind it is cut off.

    Use as a context manager.

    Raises:
        Unusable: the files are not what the state says.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, policies: dict, folder: Path | None = None,
                 state: dict | None = None):
        self.path, self.tokenizer, self.policies = path, tokenizer, policies
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.n_tokens = self.n_stories = self.begun = 0  # begun: tokens of a story that is not yet whole
        self.checks, self.sha256, self.crcs = BlockChecks(), hashlib.sha256(), {".offsets": 0, ".lengths": 0}
        self.temporary_folder = None
        if folder is None:
            folder = self.temporary_folder = unfinished(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.body = folder / path.name
        self.files = {}
        if state:
            try:
                self._go_on(state)
            except BaseException:
                self.close()
                raise
            return
        for name in ("", ".offsets", ".lengths"):
            self.files[name] = self.body.with_name(path.name + name).open("w+b", buffering=0)
        self.files[""].write(bytes(HEADER_BYTES))

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
        if self.temporary_folder:
            shutil.rmtree(self.temporary_folder, ignore_errors=True)

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def add(self, ids: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> None:
        """Append some stories.

        Args:
            ids: unsigned integers (n,), of all stories, each closed by end-of-text.
            counts: integers (m,), ids of each story with its end-of-text.
            sizes: integers (m,), UTF-8 bytes of each story.

        Raises:
            UserError: an id outside the vocabulary.
        """
        row = self._cast(ids)
        ends = np.cumsum(counts, dtype=np.int64)
        self._index(self.n_tokens + ends - counts, sizes)
        self._tokens(row)

    def add_piece(self, ids: np.ndarray) -> None:
        """Append some ids of a story that goes on; `end_story` ends it."""
        self.begun += len(ids)
        self._tokens(self._cast(ids))

    def end_story(self, size: int) -> None:
        """End the story of `add_piece`, whose last id was end-of-text. Args: its UTF-8 bytes."""
        if size >= 2**32:
            raise UserError(f"story {self.n_stories} has {size:,} bytes; expected less than {2**32:,}. Put separators "
                            "into it.")
        self._index(np.array([self.n_tokens - self.begun]), np.array([size]))
        self.begun = 0

    def _cast(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and ids.max() >= self.tokenizer.vocab_size:  # astype would wrap silently
            bad = ids[ids >= self.tokenizer.vocab_size][0]
            raise UserError(f"story {self.n_stories} or one soon after: id {bad} is outside the vocabulary of "
                            f"{self.tokenizer.vocab_size:,} entries; the tokenizer is inconsistent.")
        return ids.astype(self.dtype)

    def _tokens(self, row: np.ndarray) -> None:
        data = row.view("u1").data
        _write(self.files[""], data)
        self.sha256.update(data)
        self.checks.update(data)
        self.n_tokens += len(row)

    def _index(self, offsets: np.ndarray, sizes: np.ndarray) -> None:
        for name, values in ((".offsets", offsets.astype("<u8")), (".lengths", np.asarray(sizes).astype("<u4"))):
            data = values.view("u1").data
            _write(self.files[name], data)
            self.crcs[name] = zlib.crc32(data, self.crcs[name])
        self.n_stories += len(offsets)

    def state(self) -> dict:
        """Return how far the files are: what a later writer needs to go on."""
        return {"n_tokens": self.n_tokens, "n_stories": self.n_stories, "sha256": self.sha256.copy().hexdigest(),
                "crcs": dict(self.crcs)}

    def _go_on(self, state: dict) -> None:
        sizes = {"": HEADER_BYTES + state["n_tokens"] * self.dtype.itemsize, ".offsets": 8 * state["n_stories"],
                 ".lengths": 4 * state["n_stories"]}
        try:
            for name in sizes:
                self.files[name] = self.body.with_name(self.path.name + name).open("r+b", buffering=0)
        except FileNotFoundError as error:
            raise Unusable(f"{Path(error.filename).name} is missing") from None
        for name, size in sizes.items():
            if os.fstat(self.files[name].fileno()).st_size < size:
                raise Unusable(f"{self.path.name}{name} is too short")
            self.files[name].truncate(size)
        self.files[""].seek(HEADER_BYTES)
        while block := self.files[""].read(COPIED):
            self.sha256.update(block)
            self.checks.update(block)
        for name in self.crcs:
            while block := self.files[name].read(COPIED):
                self.crcs[name] = zlib.crc32(block, self.crcs[name])
        if self.sha256.copy().hexdigest() != state["sha256"] or self.crcs != state["crcs"]:
            raise Unusable(f"{self.path.name} holds something else")
        self.n_tokens, self.n_stories = state["n_tokens"], state["n_stories"]

    def complete(self, sources: list[dict], n_empty_dropped: int, n_excluded: int = 0, n_replaced: int = 0) -> None:
        """Add index, checks, tokenizer and header: the file is whole, but not yet under its name."""
        body = self.files[""]
        self.checks.cut()
        token_bytes = self.n_tokens * self.dtype.itemsize
        sections = {"tokens": [HEADER_BYTES, token_bytes]}
        self._append(bytes(-token_bytes % 8))  # offsets begin at a multiple of 8
        for name in ("offsets", "lengths"):
            start, file = body.tell(), self.files[f".{name}"]
            file.seek(0)
            while block := file.read(COPIED):
                self._append(block)
                self.checks.update(block)
            sections[name] = [start, body.tell() - start]
        self.checks.cut()
        checks = struct.pack(f"<{len(self.checks.done)}I", *self.checks.done)
        for name, data in (("checks", checks), ("tokenizer", self.tokenizer.json.encode())):
            sections[name] = [body.tell(), len(data)]
            self._append(data)
        header = {
            "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32", "n_tokens": self.n_tokens,
            "n_stories": self.n_stories, "n_empty_dropped": n_empty_dropped, "n_excluded": n_excluded,
            "n_replaced": n_replaced, "vocab_size": self.tokenizer.vocab_size,
            "end_of_text_id": self.tokenizer.end_of_text_id,
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256}, "source": sources,
            **self.policies, "payload_sha256": self.sha256.hexdigest(), "checks_crc32": zlib.crc32(checks),
            "sections": sections, "program": f"plotarmour {plotarmour.__version__}",
        }
        body.seek(0)
        body.write(header_block(header))
        os.fsync(body.fileno())
        self.close()

    def publish(self, sources: list[dict], n_empty_dropped: int = 0, n_excluded: int = 0) -> None:
        """Complete the file and put it under its name, atomically. The caller checks that there is a story."""
        self.complete(sources, n_empty_dropped, n_excluded)
        publish(self.body, self.path)

    def _append(self, data: bytes) -> None:
        _write(self.files[""], data)
        self.sha256.update(data)


def _write(file: object, data: bytes | memoryview) -> None:
    """Write all of it: an unbuffered file may take only a part."""
    while data:
        data = data[file.write(data):]


class BlockChecks:
    """CRC-32 of every `CRC_BLOCK` bytes of a stream."""

    def __init__(self):
        self.done, self.crc, self.filled = [], 0, 0

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            piece, data = data[:CRC_BLOCK - self.filled], data[CRC_BLOCK - self.filled:]
            self.crc, self.filled = zlib.crc32(piece, self.crc), self.filled + len(piece)
            if self.filled == CRC_BLOCK:
                self.cut()

    def cut(self) -> None:
        if self.filled:
            self.done.append(self.crc)
        self.crc, self.filled = 0, 0
