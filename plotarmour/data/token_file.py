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
import tempfile
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
        self.path, self.header, self._index_is_checked = path, header, False
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
            raise UserError(f"{path} is {'truncated' if size < end else 'too long'}: {size:,} bytes, its header says "
                            f"{end:,}. Make it again with tools/pre_tokenize.py.")
        return cls(path, header)

    @cached_property
    def offsets(self) -> np.ndarray:
        return self._map_index("offsets", np.dtype("<u8"))

    @cached_property
    def story_bytes(self) -> np.ndarray:
        return self._map_index("lengths", np.dtype("<u4"))

    @property
    def n_tokens(self) -> int:
        return self.header["n_tokens"]

    @property
    def n_stories(self) -> int:
        return self.header["n_stories"]

    def story(self, i: int) -> np.ndarray:
        """Return the ids of story `i`, without its end-of-text id, as stored (uint16 or uint32).

        Raises:
            UserError: an id outside the vocabulary: the file is damaged.
        """
        end = int(self.offsets[i + 1]) if i + 1 < self.n_stories else self.n_tokens
        ids = self.tokens[int(self.offsets[i]):end - 1]
        check_largest_id(self, int(ids.max(initial=0)))
        return ids

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
        crcs = self._checks()
        for i in range(-(-self.tokens.nbytes // CRC_BLOCK)):
            if zlib.crc32(self.tokens.view("u1")[i * CRC_BLOCK:(i + 1) * CRC_BLOCK]) != crcs[i]:
                raise UserError(f"{self.path} is damaged: tokens in block {i} (4 MiB each) do not match their CRC-32. "
                                "Make it again with tools/pre_tokenize.py.")
        raise UserError(f"{self.path} is damaged: its content does not have the SHA-256 that the header states. "
                        "Make it again with tools/pre_tokenize.py.")

    def _checks(self) -> np.ndarray:
        """CRC-32 of each block: first of the tokens, then of the index."""
        stored = self._map("checks", np.dtype("<u4"))
        if zlib.crc32(stored) != self.header["checks_crc32"]:
            raise UserError(f"{self.path} is damaged: its checks do not match their own CRC-32. Make it again with "
                            "tools/pre_tokenize.py.")
        return stored

    def _map_index(self, section: str, dtype: np.dtype) -> np.ndarray:
        """Map offsets or lengths, after one comparison of both (12 bytes a story) with their CRC-32."""
        if self.n_stories and not self._index_is_checked:
            crcs = self._checks()[-(-self.tokens.nbytes // CRC_BLOCK):]
            start = self.header["sections"]["offsets"][0]
            index = np.memmap(self.path, mode="r", dtype="u1", offset=start, shape=(12 * self.n_stories,))
            for i, crc in enumerate(crcs):
                if zlib.crc32(index[i * CRC_BLOCK:(i + 1) * CRC_BLOCK]) != crc:
                    raise UserError(f"{self.path} is damaged: its index of stories does not match its CRC-32. Make it "
                                    "again with tools/pre_tokenize.py.")
            self._index_is_checked = True
        return self._map(section, dtype)

    def _map(self, section: str, dtype: np.dtype) -> np.ndarray:
        offset, length = self.header["sections"][section]
        if not length:  # an empty section cannot be mapped
            return np.zeros(0, dtype)
        return np.memmap(self.path, mode="r", dtype=dtype, offset=offset, shape=(length // dtype.itemsize,))


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
    if version == int.from_bytes(FORMAT_VERSION.to_bytes(4, "little"), "big"):
        raise UserError(f"{path} is big-endian; this program reads little-endian token files. Make the file again.")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}; this program reads {FORMAT_VERSION}. Update plotarmour, or "
                        "make the file again.")
    header = json.loads(block[_FIXED.size:_FIXED.size + length])
    if header.get("dtype") not in DTYPES:
        raise UserError(f"{path} holds {header.get('dtype')}; this program reads {' or '.join(DTYPES)}. Make the file "
                        "again.")
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

    Use as a context manager.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, policies: dict):
        self.path, self.tokenizer, self.policies = path, tokenizer, policies
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.n_tokens = self.n_stories = self.n_indexed = 0  # n_indexed: tokens of the stories in the index
        self.sha256, self.crcs = hashlib.sha256(), BlockCRCs()
        self.temporary = unfinished(path)
        self.body = self.temporary.open("w+b", buffering=0)
        self.body.write(bytes(HEADER_BYTES))
        # The index comes behind the tokens, whose number is known only at the end.
        self.index = {name: tempfile.TemporaryFile(dir=path.parent) for name in ("offsets", "lengths")}

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        for file in (self.body, *self.index.values()):
            file.close()
        self.temporary.unlink(missing_ok=True)

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
        self.index["offsets"].write((ends - counts).astype("<u8").data)
        self.index["lengths"].write(sizes.astype("<u4").data)
        self.n_indexed, self.n_stories = self.n_indexed + int(counts.sum()), self.n_stories + len(counts)
        self._append(ids.astype(self.dtype).view("u1").data, checked=True)
        self.n_tokens += len(ids)

    def publish(self, sources: list[dict], n_empty_dropped: int = 0, n_excluded: int = 0, n_replaced: int = 0) -> None:
        """Add index, checks, tokenizer and header, and put the file under its name, atomically.

        Args:
            sources: name, bytes and hashes of the texts, for the header.
            n_empty_dropped, n_excluded: stories of the whole text that no part holds.
            n_replaced: U+FFFD put in.
        """
        self.crcs.end_block()
        sections = {"tokens": [HEADER_BYTES, self.n_tokens * self.dtype.itemsize]}
        self._append(bytes(-self.body.tell() % 8))  # offsets begin at a multiple of 8
        for name, file in self.index.items():
            start = self.body.tell()
            file.seek(0)
            while block := file.read(2**20):
                self._append(block, checked=True)
            sections[name] = [start, self.body.tell() - start]
        self.crcs.end_block()
        checks = struct.pack(f"<{len(self.crcs.done)}I", *self.crcs.done)
        for name, data in (("checks", checks), ("tokenizer", self.tokenizer.json.encode())):
            sections[name] = [self.body.tell(), len(data)]
            self._append(data)
        self.body.seek(0)
        self.body.write(header_block({
            "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32", "n_tokens": self.n_tokens,
            "n_stories": self.n_stories, "n_empty_dropped": n_empty_dropped, "n_excluded": n_excluded,
            "n_replaced": n_replaced, "vocab_size": self.tokenizer.vocab_size,
            "end_of_text_id": self.tokenizer.end_of_text_id,
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256}, "source": sources,
            **self.policies, "payload_sha256": self.sha256.hexdigest(), "checks_crc32": zlib.crc32(checks),
            "sections": sections, "program": f"plotarmour {plotarmour.__version__}"}))
        os.fsync(self.body.fileno())
        self.body.close()
        publish(self.temporary, self.path)

    def _append(self, data: bytes | memoryview, checked: bool = False) -> None:
        self.sha256.update(data)
        if checked:
            self.crcs.update(data)
        while data:
            data = data[self.body.write(data):]  # an unbuffered file may take only a part


class BlockCRCs:
    """CRC-32 of every `CRC_BLOCK` bytes of a stream."""

    def __init__(self):
        self.done, self.crc, self.filled = [], 0, 0

    def update(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            piece, data = data[:CRC_BLOCK - self.filled], data[CRC_BLOCK - self.filled:]
            self.crc, self.filled = zlib.crc32(piece, self.crc), self.filled + len(piece)
            if self.filled == CRC_BLOCK:
                self.end_block()

    def end_block(self) -> None:
        if self.filled:
            self.done.append(self.crc)
        self.crc, self.filled = 0, 0


def header_block(header: dict) -> bytes:
    """Return the first 4,096 bytes of a token file."""
    text = json.dumps(header, ensure_ascii=False).encode()
    room = HEADER_BYTES - _FIXED.size - 4
    if len(text) > room:
        raise UserError(f"the header needs {len(text)} bytes, {room} fit; join the source files into one.")
    block = _FIXED.pack(MAGIC, FORMAT_VERSION, len(text)) + text.ljust(room)
    return block + struct.pack("<I", zlib.crc32(block))
