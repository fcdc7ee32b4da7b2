"""Token files (`*.bin`): the tokens of a text, self-describing, memory-mapped, published only whole.

    bytes      what
    0..4096    magic "PLOTARM\\x01", format version (uint32), length of the JSON header (uint32), the header padded
               with blanks, CRC-32 of bytes 0..4092 (uint32)
    4096..     tokens: per story its ids, then one end-of-text id (uint16 while every id fits, else uint32)
    offsets    uint64 per story: where its ids begin, counted in tokens
    lengths    uint32 per story: its UTF-8 bytes
    checks     uint32 CRC-32 per 4 MiB block of the tokens, then of offsets and lengths together
    tokenizer  its own JSON: the file can be decoded with nothing else at hand

Little-endian throughout. `sections` in the header gives offset and bytes of each; `payload_sha256` covers everything
after the first 4,096 bytes.
"""

import array
import hashlib
import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np

import plotarmour
from plotarmour.errors import UserError
from plotarmour.files import publish, unfinished
from plotarmour.text.tokenizers import Tokenizer

MAGIC = b"PLOTARM\x01"
FORMAT_VERSION = 1
HEADER_BYTES = 4096
CRC_BLOCK = 4 * 2**20
_FIXED = struct.Struct("<8sII")


class TokenFileWriter:
    """Write a token file story by story; it appears under its name only when `publish` succeeds.

    Args:
        path: of the file to make.
        tokenizer: that makes the ids.
        policies: `stories` and `split` policy and the like, for the header.

    Use as a context manager: leaving it without `publish` removes what was written.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, policies: dict):
        self.path, self.tokenizer, self.policies = path, tokenizer, policies
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.offsets, self.lengths = array.array("Q"), array.array("I")
        self.n_tokens = 0
        self.temporary = unfinished(path)
        self.file = self.temporary.open("w+b")
        self.file.write(bytes(HEADER_BYTES))
        self.checks = _BlockChecks()
        self.sha256 = hashlib.sha256()

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        if not self.file.closed:
            self.file.close()
            self.temporary.unlink(missing_ok=True)

    def add(self, ids: list[int], n_bytes: int) -> None:
        """Append one story: its ids without end-of-text, and its length in UTF-8 bytes.

        Raises:
            UserError: an id outside the vocabulary.
        """
        row = np.array([*ids, self.tokenizer.end_of_text_id], dtype=np.int64)
        if row.min() < 0 or row.max() >= self.tokenizer.vocab_size:  # astype would wrap silently
            raise UserError(f"story {len(self.offsets)}: id {row.max()} is outside the vocabulary of "
                            f"{self.tokenizer.vocab_size} entries; the tokenizer is inconsistent.")
        self.offsets.append(self.n_tokens)
        self.lengths.append(n_bytes)
        self.n_tokens += len(row)
        self._write(row.astype(self.dtype).tobytes())

    def publish(self, sources: list[dict], n_empty_dropped: int, n_excluded: int = 0) -> None:
        """Complete the file and put it under its name, atomically. The caller checks that there is a story."""
        self.checks.cut()
        token_bytes = self.n_tokens * self.dtype.itemsize
        sections = {"tokens": [HEADER_BYTES, token_bytes]}
        self._write(bytes(-token_bytes % 8), checked=False)  # offsets begin at a multiple of 8
        for name, values in (("offsets", self.offsets), ("lengths", self.lengths)):
            if sys.byteorder == "big":
                values.byteswap()
            sections[name] = [self.file.tell(), len(values) * values.itemsize]
            self._write(values.tobytes())
        self.checks.cut()
        checks = struct.pack(f"<{len(self.checks.done)}I", *self.checks.done)
        for name, data in (("checks", checks), ("tokenizer", self.tokenizer.json.encode())):
            sections[name] = [self.file.tell(), len(data)]
            self._write(data, checked=False)
        header = {
            "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32", "n_tokens": self.n_tokens,
            "n_stories": len(self.offsets), "n_empty_dropped": n_empty_dropped, "n_excluded": n_excluded,
            "vocab_size": self.tokenizer.vocab_size, "end_of_text_id": self.tokenizer.end_of_text_id,
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256}, "source": sources,
            **self.policies, "payload_sha256": self.sha256.hexdigest(), "checks_crc32": zlib.crc32(checks),
            "sections": sections, "program": f"plotarmour {plotarmour.__version__}",
        }
        self.file.seek(0)
        self.file.write(_header_block(header))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        publish(self.temporary, self.path)

    def _write(self, data: bytes, checked: bool = True) -> None:
        self.file.write(data)
        self.sha256.update(data)
        if checked:
            self.checks.update(data)


class _BlockChecks:
    """CRC-32 of every `CRC_BLOCK` bytes of a stream."""

    def __init__(self):
        self.done, self.crc, self.filled = [], 0, 0

    def update(self, data: bytes) -> None:
        while data:
            piece, data = data[:CRC_BLOCK - self.filled], data[CRC_BLOCK - self.filled:]
            self.crc, self.filled = zlib.crc32(piece, self.crc), self.filled + len(piece)
            if self.filled == CRC_BLOCK:
                self.cut()

    def cut(self) -> None:
        if self.filled:
            self.done.append(self.crc)
        self.crc, self.filled = 0, 0


def _header_block(header: dict) -> bytes:
    text = json.dumps(header, ensure_ascii=False).encode()
    room = HEADER_BYTES - _FIXED.size - 4
    if len(text) > room:
        raise UserError(f"the header needs {len(text)} bytes, {room} fit; join the source files into one.")
    block = _FIXED.pack(MAGIC, FORMAT_VERSION, len(text)) + text.ljust(room)
    return block + struct.pack("<I", zlib.crc32(block))


class TokenFile:
    """A token file, mapped read-only. Use `TokenFile.open`.

    Attributes:
        path: of the file.
        header: as documented in the module.
        tokens: uint16 or uint32 (n_tokens,), read-only memmap.
        offsets: uint64 (n_stories,), token index where each story begins.
        story_bytes: uint32 (n_stories,), UTF-8 bytes of each story.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.header = path, header
        dtype = np.dtype("<u2" if header["dtype"] == "uint16" else "<u4")
        self.tokens = self._map("tokens", dtype)
        self.offsets = self._map("offsets", np.dtype("<u8"))
        self.story_bytes = self._map("lengths", np.dtype("<u4"))

    @classmethod
    def open(cls, path: str | Path) -> "TokenFile":
        """Check header and sizes, then map the file, in milliseconds.

        Raises:
            UserError: no token file, a damaged or truncated one, or one of a newer format.
        """
        path = Path(path)
        header = read_header(path)
        size = path.stat().st_size
        end = max(offset + length for offset, length in header["sections"].values())
        if size != end:  # reading past the end of a truncated mapped file kills the process
            raise UserError(f"{path} is {'truncated' if size < end else 'too long'}: {size:,} bytes, its header says "
                            f"{end:,}. Make it again with tools/pre_tokenize.py.")
        return cls(path, header)

    @property
    def n_tokens(self) -> int:
        return self.header["n_tokens"]

    @property
    def n_stories(self) -> int:
        return self.header["n_stories"]

    def story(self, i: int) -> np.ndarray:
        """Return the ids of story `i`, without its end-of-text id, as stored (uint16 or uint32)."""
        end = int(self.offsets[i + 1]) if i + 1 < self.n_stories else self.n_tokens
        return self.tokens[int(self.offsets[i]):end - 1]

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that travels in the file.

        Raises:
            UserError: its bytes do not have the hash that the header states.
        """
        text = bytes(self._map("tokenizer", np.dtype("u1"))).decode()
        if hashlib.sha256(text.encode()).hexdigest() != self.header["tokenizer"]["sha256"]:
            raise UserError(f"{self.path}: the tokenizer inside is damaged. Make the file again.")
        return Tokenizer(text, self.header["tokenizer"]["kind"])

    def verify(self) -> None:
        """Read everything and compare it with its hash and checks.

        Raises:
            UserError: which 4 MiB block is damaged, or that another part is.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while block := file.read(CRC_BLOCK):
                digest.update(block)
        if digest.hexdigest() == self.header["payload_sha256"]:
            return
        stored = bytes(self._map("checks", np.dtype("u1")))
        if zlib.crc32(stored) == self.header["checks_crc32"]:
            for i, crc in enumerate(struct.unpack(f"<{len(stored) // 4}I", stored)):
                if i * CRC_BLOCK < self.tokens.nbytes and zlib.crc32(
                        self.tokens.view("u1")[i * CRC_BLOCK:(i + 1) * CRC_BLOCK]) != crc:
                    raise UserError(f"{self.path} is damaged: tokens in block {i} (4 MiB each) do not match their "
                                    "CRC-32. Make it again with tools/pre_tokenize.py.")
        raise UserError(f"{self.path} is damaged: its content does not have the SHA-256 that the header states. "
                        "Make it again with tools/pre_tokenize.py.")

    def _map(self, section: str, dtype: np.dtype) -> np.ndarray:
        offset, length = self.header["sections"][section]
        return np.memmap(self.path, mode="r", dtype=dtype, offset=offset, shape=(length // dtype.itemsize,))


def read_header(path: Path) -> dict:
    """Return the checked header of a token file.

    Raises:
        UserError: missing, a folder, another kind of file, a newer format, or a damaged header.
    """
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a token file. "
                        "Make one with tools/pre_tokenize.py.")
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if block[:8] != MAGIC:
        raise UserError(f"{path} is not a token file: it begins with {block[:8]!r}, expected {MAGIC!r}. "
                        "Make one with tools/pre_tokenize.py.")
    if len(block) < HEADER_BYTES:
        raise UserError(f"{path} is truncated: {len(block)} bytes, a header alone has {HEADER_BYTES}. Make it again.")
    if zlib.crc32(block[:-4]) != struct.unpack("<I", block[-4:])[0]:
        raise UserError(f"{path}: the header is damaged (its CRC-32 does not match). Make the file again.")
    _, version, length = _FIXED.unpack(block[:_FIXED.size])
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}; this program reads {FORMAT_VERSION}. Update plotarmour, or "
                        "make the file again.")
    return json.loads(block[_FIXED.size:_FIXED.size + length])


def looks_like_token_file(path: Path) -> bool:
    """Whether the file begins with the magic of a token file."""
    with path.open("rb") as file:
        return file.read(8) == MAGIC
