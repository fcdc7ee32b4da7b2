"""Token files (`*.bin`): the tokens of a text, self-describing and memory-mapped; reading and writing.

    bytes      what
    0..4096    magic "PLOTARM\\x01", format version (uint32), length of the JSON header (uint32), the header padded
               with blanks, CRC-32 of bytes 0..4092 (uint32)
    4096..     tokens: per story its ids, then one end-of-text id (uint16 while every id fits, else uint32)
    offsets    uint64 per story: where its ids begin, counted in tokens
    lengths    uint32 per story: its UTF-8 bytes
    checks     uint32 CRC-32 per 4 MiB block of the tokens, then of offsets and lengths together
    tokenizer  its own JSON: the file can be decoded with nothing else at hand

All numbers are little-endian. `sections` in the header gives offset and bytes of each section; `payload_sha256` covers
everything after the first 4,096 bytes. A file appears under its name only complete.
"""

import hashlib
import json
import os
import struct
import zlib
from functools import cached_property
from pathlib import Path

import numpy as np

import plotarmour
from plotarmour.cli import UserError
from plotarmour.data.tokenizer import Tokenizer, make_tokenizer
from plotarmour.files import publish, unfinished

MAGIC = b"PLOTARM\x01"
FORMAT_VERSION = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HEADER_BYTES = 4096
CRC_BLOCK = 4 * 2**20
_FIXED = struct.Struct("<8sII")
_AGAIN = "Make it again with tools/pre_tokenize.py."


class TokenFile:
    """A token file, mapped read-only. Use `TokenFile.open`.

    Attributes:
        header: as documented in the module.
        tokens: uint16 or uint32 (n_tokens,), read-only memmap.
        offsets: uint64 (n_stories,), token index where each story begins.
        story_bytes: uint32 (n_stories,), UTF-8 bytes of each story.
    """

    def __init__(self, path: Path, header: dict):
        self.path, self.header, self._index_is_checked = path, header, False
        self.n_tokens, self.n_stories = header["n_tokens"], header["n_stories"]
        self.tokens = self._map("tokens", DTYPES[header["dtype"]])

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
            found = "truncated" if size < end else "too long"
            raise UserError(f"{path} is {found}: {size:,} bytes, its header says {end:,}. {_AGAIN}")
        return cls(path, header)

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._map_index("offsets", np.dtype("<u8"))

    @cached_property
    def story_bytes(self) -> np.ndarray:
        return self._map_index("lengths", np.dtype("<u4"))

    def story(self, i: int) -> np.ndarray:
        """Return the ids of story `i`, without its end-of-text id, as stored, after a check against the vocabulary."""
        end = int(self.offsets[i + 1]) if i + 1 < self.n_stories else self.n_tokens
        ids = self.tokens[int(self.offsets[i]):end - 1]
        check_largest_id(self, int(ids.max(initial=0)))
        return ids

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that travels in the file; its bytes must have the hash that the header states."""
        text = bytes(self._map("tokenizer", np.dtype("u1"))).decode()
        if hashlib.sha256(text.encode()).hexdigest() != self.header["tokenizer"]["sha256"]:
            raise UserError(f"{self.path} is damaged: its tokenizer does not have its SHA-256. {_AGAIN}")
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
        damaged = _damaged_block(self.tokens.view("u1"), self._checks()[:self._n_token_blocks])
        found = "its content does" if damaged is None else f"the tokens in block {damaged} (4 MiB each) do"
        raise UserError(f"{self.path} is damaged: {found} not match the hash that the file states. {_AGAIN}")

    @property
    def _n_token_blocks(self) -> int:
        return -(-self.tokens.nbytes // CRC_BLOCK)

    def _checks(self) -> np.ndarray:
        """CRC-32 of each block: first of the tokens, then of the index."""
        stored = self._map("checks", np.dtype("<u4"))
        if zlib.crc32(stored) != self.header["checks_crc32"]:
            raise UserError(f"{self.path} is damaged: its checks do not match their own CRC-32. {_AGAIN}")
        return stored

    def _map_index(self, section: str, dtype: np.dtype) -> np.ndarray:
        """Map offsets or lengths, after one comparison of both (12 bytes a story) with their CRC-32."""
        if self.n_stories and not self._index_is_checked:
            start = self.header["sections"]["offsets"][0]
            index = np.memmap(self.path, mode="r", dtype="u1", offset=start, shape=(12 * self.n_stories,))
            if _damaged_block(index, self._checks()[self._n_token_blocks:]) is not None:
                raise UserError(f"{self.path} is damaged: its index of stories does not match its CRC-32. {_AGAIN}")
            self._index_is_checked = True
        return self._map(section, dtype)

    def _map(self, section: str, dtype: np.dtype) -> np.ndarray:
        offset, length = self.header["sections"][section]
        if not length:  # an empty section cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self.path, mode="r", dtype=dtype, offset=offset, shape=(length // dtype.itemsize,))


def _damaged_block(data: np.ndarray, crcs: np.ndarray) -> int | None:
    """Return the first block of some bytes that does not have its CRC-32."""
    return next((i for i, crc in enumerate(crcs) if zlib.crc32(data[i * CRC_BLOCK:(i + 1) * CRC_BLOCK]) != crc), None)


def check_largest_id(data, largest: int) -> None:
    """Raise `UserError` unless the largest of some ids is in the vocabulary; `TokenFile.open` does not check tokens."""
    size = data.header["vocab_size"]
    if largest >= size:
        raise UserError(f"{data.path} is damaged: found id {largest:,} among its tokens, expected ids in [0, {size:,}"
                        f"). Look with tools/pre_tokenize.py --verify {data.path}, make the file again with "
                        "tools/pre_tokenize.py, and give the same command again.")


def token_counts(data: TokenFile) -> np.ndarray:
    """Return how often each id occurs, int64 (vocab_size,). The tokens are read once, 4 MiB at a time."""
    counts = np.zeros(data.header["vocab_size"], dtype=np.int64)
    step = CRC_BLOCK // data.tokens.itemsize
    for begin in range(0, data.n_tokens, step):
        counts += np.bincount(data.tokens[begin:begin + step], minlength=len(counts))
    return counts


def read_header(path: Path) -> dict:
    """Return the checked header of a token file.

    Raises:
        UserError: missing, a folder, another kind of file, a newer format, or a damaged header.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {found}; expected a token file. Make one with tools/pre_tokenize.py.")
    with path.open("rb") as file:
        block = file.read(HEADER_BYTES)
    if block[:8] != MAGIC:
        raise UserError(f"{path} is not a token file: it begins with {block[:8]!r}, expected {MAGIC!r}. Make one with "
                        "tools/pre_tokenize.py.")
    if len(block) < HEADER_BYTES or zlib.crc32(block[:-4]) != struct.unpack("<I", block[-4:])[0]:
        raise UserError(f"{path}: the header is damaged or truncated (its CRC-32 does not match). {_AGAIN}")
    _, version, length = _FIXED.unpack(block[:_FIXED.size])
    header = json.loads(block[_FIXED.size:_FIXED.size + length]) if version == FORMAT_VERSION else {}
    if header.get("dtype") not in DTYPES:
        raise UserError(f"{path} has format {version} and holds {header.get('dtype')}; this program reads format "
                        f"{FORMAT_VERSION} with {' or '.join(DTYPES)}. Update plotarmour, or make the file again.")
    return header


def looks_like_token_file(path: Path) -> bool:
    """Whether the file begins with the magic of a token file."""
    with path.open("rb") as file:
        return file.read(8) == MAGIC


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer of a token file (`*.bin`), or `make_tokenizer(spec)` for any other name."""
    return TokenFile.open(spec).tokenizer() if str(spec).endswith(".bin") else make_tokenizer(str(spec))


class TokenFileWriter:
    """Write a token file batch by batch; it appears under its name only when `publish` succeeds.

    Args:
        path: of the file.
        tokenizer: whose ids are written.
        policies: more entries of the header, such as `stories` and `split`.
        saved: what `save` of an earlier writer of this path returned, or (0, 0): this one continues behind it, writes
            to the path itself, and leaves it as it is after an error.

    Use as a context manager.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, policies: dict, saved: tuple[int, int] | None = None):
        self.path, self.tokenizer, self.policies, self.is_kept = path, tokenizer, policies, saved is not None
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.n_tokens, self.n_stories = saved or (0, 0)
        self.n_indexed = self.n_tokens  # tokens of the stories in the index
        self.sha256, self.crcs, self.crc, self.filled = hashlib.sha256(), [], 0, 0  # of whole blocks; of the last one
        # The index comes behind the tokens, whose number is known only at the end.
        temporary = path if self.is_kept else unfinished(path)
        parts = {temporary: HEADER_BYTES + self.n_tokens * self.dtype.itemsize,
                 temporary.with_name(f"{temporary.name}.offsets"): 8 * self.n_stories,
                 temporary.with_name(f"{temporary.name}.lengths"): 4 * self.n_stories}
        for part, size in parts.items():
            part.touch()
            if self.n_stories and part.stat().st_size < size:
                raise UserError(f"{part} is truncated; expected what an earlier start has saved. Give the same command "
                                "again: it starts over.")
            os.truncate(part, size)  # what was written after the last save goes
        self.files = [part.open("r+b") for part in parts]
        self.body, self.offsets, self.lengths = self.files
        self.body.seek(HEADER_BYTES)
        while block := self.body.read(CRC_BLOCK):
            self._count(block)
        for file in self.files:
            file.seek(0, os.SEEK_END)

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        for file in self.files:
            file.close()
            if not self.is_kept:
                Path(file.name).unlink(missing_ok=True)

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

    def publish(self, sources: list[dict], n_empty_dropped: int = 0, n_excluded: int = 0, n_replaced: int = 0) -> None:
        """Add index, checks, tokenizer and header, and put the file under its name, atomically.

        Args:
            sources: name, bytes and hashes of the texts, for the header.
            n_empty_dropped, n_excluded: stories of the whole text that no part holds.
            n_replaced: U+FFFD put in.
        """
        self._end_block()
        sections = {"tokens": [HEADER_BYTES, self.n_tokens * self.dtype.itemsize]}
        self._append(bytes(-self.body.tell() % 8), checked=False)  # offsets begin at a multiple of 8
        for name, file in (("offsets", self.offsets), ("lengths", self.lengths)):
            start = self.body.tell()
            file.seek(0)
            while block := file.read(2**20):
                self._append(block)
            sections[name] = [start, self.body.tell() - start]
        self._end_block()
        checks = struct.pack(f"<{len(self.crcs)}I", *self.crcs)
        for name, data in (("checks", checks), ("tokenizer", self.tokenizer.json.encode())):
            sections[name] = [self.body.tell(), len(data)]
            self._append(data, checked=False)
        self.body.seek(0)
        self.body.write(header_block({
            "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32", "n_tokens": self.n_tokens,
            "n_stories": self.n_stories, "n_empty_dropped": n_empty_dropped, "n_excluded": n_excluded,
            "n_replaced": n_replaced, "vocab_size": self.tokenizer.vocab_size,
            "end_of_text_id": self.tokenizer.end_of_text_id,
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256}, "source": sources,
            **self.policies, "payload_sha256": self.sha256.hexdigest(), "checks_crc32": zlib.crc32(checks),
            "sections": sections, "program": f"plotarmour {plotarmour.__version__}"}))
        self.save()
        self.files.remove(self.body)
        self.body.close()
        publish(Path(self.body.name), self.path)

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
    room = HEADER_BYTES - _FIXED.size - 4
    if len(text) > room:
        raise UserError(f"the header needs {len(text)} bytes, {room} fit; join the source files into one.")
    block = _FIXED.pack(MAGIC, FORMAT_VERSION, len(text)) + text.ljust(room)
    return block + struct.pack("<I", zlib.crc32(block))
