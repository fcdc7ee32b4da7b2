"""Token files (`*.bin`): the tokens of a text, self-describing and memory-mapped; `token_writer` writes them.

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
import struct
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from plotarmour.cli import AnyPath, UserError, as_path
from plotarmour.data.tokenizer import Tokenizer, make_tokenizer
from plotarmour.files import check_types, map_file

MAGIC = b"PLOTARM\x01"
FORMAT_VERSION = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HEADER_BYTES = 4096
CRC_BLOCK = 4 * 2**20
BLOCK_TOKENS = 2**20  # that are checked or counted at once
FIXED = struct.Struct("<8sII")
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
        self.path, self.header = path, header
        self.n_tokens, self.n_stories = header["n_tokens"], header["n_stories"]
        self.tokens = self._map("tokens", DTYPES[header["dtype"]])

    @classmethod
    def open(cls, path: AnyPath) -> "TokenFile":
        """Check header and sizes, then map the file, in milliseconds.

        Raises:
            UserError: no token file, a damaged, truncated or impossible one, or one of a newer format.
        """
        path = as_path(path)
        return cls(path, _read_header(path))

    @property
    def offsets(self) -> np.ndarray:
        return self._index[0]

    @property
    def story_bytes(self) -> np.ndarray:
        return self._index[1]

    def story(self, i: int) -> np.ndarray:
        """Return the ids of story `i`, without its end-of-text id, as stored, after a check against the vocabulary."""
        end = int(self.offsets[i + 1]) if i + 1 < self.n_stories else self.n_tokens
        ids = self.tokens[int(self.offsets[i]):end - 1]
        check_largest_id(self, int(ids.max(initial=0)))
        return ids

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that travels in the file; hash and vocabulary must be those that the header states."""
        raw, header = bytes(self._map("tokenizer", np.dtype("u1"))), self.header
        if hashlib.sha256(raw).hexdigest() != header["tokenizer"]["sha256"]:
            raise self._damaged("its tokenizer does not have its SHA-256")
        try:
            tokenizer = Tokenizer(raw.decode("utf-8", "replace"), header["tokenizer"]["kind"])
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        if (tokenizer.vocab_size, tokenizer.end_of_text_id) != (header["vocab_size"], header["end_of_text_id"]):
            raise self._damaged("its tokenizer has another vocabulary than its header says")
        return tokenizer

    def verify(self) -> None:
        """Read everything: compare it with its hash, then offsets, end-of-text ids, byte lengths and tokenizer.

        Byte lengths are compared where the tokenizer has `token_bytes`; others may lose text, and so bytes.

        Raises:
            UserError: which 4 MiB block is damaged, or what is wrong.
        """
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != self.header["payload_sha256"]:
            damaged = _damaged_block(self.tokens.view("u1"), self._checks()[0])
            found = "its content does" if damaged is None else f"the tokens in block {damaged} (4 MiB each) do"
            raise self._damaged(f"{found} not match the hash that the file states")
        bounds = story_bounds(self)
        if bounds[0] or (np.diff(bounds) <= 0).any():
            raise self._damaged("its offsets do not ascend from 0 to the number of tokens")
        for block in story_blocks(self, BLOCK_TOKENS):
            ids = self.tokens[block[0]:block[-1]]
            check_largest_id(self, int(ids.max()))
            if not np.array_equal(np.flatnonzero(ids == self.header["end_of_text_id"]), block[1:] - 1 - block[0]):
                raise self._damaged("end-of-text is elsewhere than at the end of each story")
        if (token_bytes := self.tokenizer().token_bytes) is not None:
            n_bytes = counted_bytes(self, token_bytes)
            if len(wrong := np.flatnonzero(n_bytes != self.story_bytes)):
                raise self._damaged(f"story {wrong[0]} has {n_bytes[wrong[0]]:,} bytes and its index says "
                                    f"{self.story_bytes[wrong[0]]:,}")

    def _damaged(self, found: str) -> UserError:
        return UserError(f"{self.path} is damaged: {found}. {_AGAIN}")

    def _checks(self) -> list[np.ndarray]:
        """CRC-32 of each block of the tokens, and of each block of the index."""
        stored = self._map("checks", np.dtype("<u4"))
        if zlib.crc32(stored) != self.header["checks_crc32"]:
            raise self._damaged("its checks do not match their own CRC-32")
        return np.split(stored, [-(-self.tokens.nbytes // CRC_BLOCK)])

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Map offsets and lengths, after a comparison of both (12 bytes a story) with their CRC-32."""
        index = map_file(self.path, "u1", self.header["sections"]["offsets"][0], (12 * self.n_stories,))
        if _damaged_block(index, self._checks()[1]) is not None:
            raise self._damaged("its index of stories does not match its CRC-32")
        return self._map("offsets", np.dtype("<u8")), self._map("lengths", np.dtype("<u4"))

    def _map(self, section: str, dtype: np.dtype) -> np.ndarray:
        offset, length = self.header["sections"][section]
        return map_file(self.path, dtype, offset, (length // dtype.itemsize,))


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
    """Return how often each id occurs, int64 (vocab_size,). The tokens are read once."""
    counts = np.zeros(data.header["vocab_size"], dtype=np.int64)
    for begin in range(0, data.n_tokens, BLOCK_TOKENS):
        counts += np.bincount(data.tokens[begin:begin + BLOCK_TOKENS], minlength=len(counts))
    return counts


def unknown_words(data) -> str:
    """Return a sentence that says how much of a text a word-level tokenizer does not know; "" for other tokenizers."""
    tokenizer, n_bytes = data.tokenizer(), data.header.get("n_unknown_bytes")
    if not tokenizer.drops_unknown:
        return ""
    if not (n := int(token_counts(data)[tokenizer.unknown_id])):
        return "Every word is in the vocabulary."
    share = "" if n_bytes is None else f", {n_bytes:,} bytes ({n_bytes / (n_bytes + data.story_bytes.sum()):.1%})"
    return (f"{n:,} of {data.n_tokens:,} tokens ({n / data.n_tokens:.1%}{share}) are words that the tokenizer does not "
            "know: the loss takes each for one token <?>, and bits per byte count the bytes of the other words only.")


def layout(dtype: str, n_tokens: int, n_stories: int, tokenizer_bytes: int) -> dict[str, list[int]]:
    """Return offset and bytes of each section of a token file with these numbers."""
    sizes = {"tokens": n_tokens * DTYPES[dtype].itemsize, "offsets": 8 * n_stories, "lengths": 4 * n_stories}
    n_blocks = -(-sizes["tokens"] // CRC_BLOCK) - (-12 * n_stories // CRC_BLOCK)
    sizes |= {"checks": 4 * n_blocks, "tokenizer": tokenizer_bytes}
    sections, place = {}, HEADER_BYTES
    for name, size in sizes.items():
        place += -place % 8 if name == "offsets" else 0
        sections[name], place = [place, size], place + size
    return sections


# The types of a header's entries; more must hold of them, see `_read_header`.
HEADER = {"dtype": str, "n_tokens": int, "n_stories": int, "sections": {"tokenizer": list}, "vocab_size": int,
          "end_of_text_id": int, "tokenizer": {"kind": str, "sha256": str}, "source": list, "payload_sha256": str,
          "checks_crc32": int, **dict.fromkeys(("n_empty_dropped", "n_excluded", "n_replaced", "n_unknown_bytes"),
                                               int | None), **dict.fromkeys(("stories", "split", "part"), str | None)}


class TokensInMemory:
    """Stories whose ids are in memory, without a tokenizer.

    Args:
        stories: ids of each story, unsigned integers, with its end-of-text id.
        header: entries of a token file's header that the user of the stories needs; their numbers are added.
        story_bytes: UTF-8 bytes of each story.
    """

    story, path = TokenFile.story, None

    def __init__(self, stories: list[np.ndarray], header: dict, story_bytes: list[int]):
        self.tokens = np.concatenate(stories)
        self.offsets = np.cumsum([0, *map(len, stories[:-1])]).astype(np.uint64)
        self.story_bytes = np.array(story_bytes, dtype=np.uint32)
        self.n_tokens, self.n_stories = len(self.tokens), len(stories)
        self.header = header | {"n_tokens": self.n_tokens, "n_stories": self.n_stories}

    def tokenizer(self) -> None:
        return None


Tokens = TokenFile | TokensInMemory  # the tokens of some stories, as training and scoring read them


def story_bounds(data: Tokens) -> np.ndarray:
    """Return where each story begins, counted in tokens, and at last the number of tokens; int64 (n_stories + 1,)."""
    return np.append(data.offsets.astype(np.int64), data.n_tokens)


def story_blocks(data: Tokens, size: int) -> Iterator[np.ndarray]:
    """Yield the bounds, int64 (n + 1,), of blocks of n whole stories that have at most `size` tokens, or of one story.

    Example:
        Of stories with 3, 4 and 2 tokens, blocks of at most 7 tokens have the bounds 0 3 7 and 7 9.
    """
    bounds, first = story_bounds(data), 0
    while first < data.n_stories:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + size, side="right")) - 1)
        yield bounds[first:last + 1]
        first = last


def counted_bytes(data: Tokens, token_bytes: np.ndarray) -> np.ndarray:
    """Return the bytes of each story by its tokens, int64 (n_stories,); see `Tokenizer.token_bytes`."""
    return np.concatenate([np.add.reduceat(token_bytes[data.tokens[block[0]:block[-1]]], block[:-1] - block[0],
                                           dtype=np.int64) for block in story_blocks(data, BLOCK_TOKENS)])


def _read_header(path: Path) -> dict:
    """Return the checked header of a token file."""
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
    _, version, length = FIXED.unpack(block[:FIXED.size])
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}; this program reads format {FORMAT_VERSION}. Update plotarmour, "
                        "or make the file again.")
    try:
        header = json.loads(block[FIXED.size:FIXED.size + length])
        check_types(header, HEADER, "header")
        for source in header["source"]:
            check_types(source, {"name": str, "bytes": int, "sha256": str}, "source")
        if header["dtype"] not in DTYPES:
            raise ValueError(f"dtype is {header['dtype']!r}, expected {' or '.join(DTYPES)}")
        sections, size = header["sections"], header["vocab_size"]
        expected = layout(header["dtype"], header["n_tokens"], header["n_stories"], sections["tokenizer"][1])
        # As text, in which 4096.0 is not 4096; an entry of the vocabulary takes a byte of the tokenizer or more.
        if not (json.dumps(sections) == json.dumps(expected) and size <= sections["tokenizer"][1]
                and 0 <= header["end_of_text_id"] < size and 0 < header["n_stories"] <= header["n_tokens"]):
            raise ValueError("its sections and ids are not those that its numbers give, expected one behind the other")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has an impossible header: {error}. {_AGAIN}") from None
    size, expected = path.stat().st_size, sum(header["sections"]["tokenizer"])
    if size != expected:  # reading past the end of a truncated mapped file kills the process
        found = "truncated" if size < expected else "too long"
        raise UserError(f"{path} is {found}: {size:,} bytes, its header says {expected:,}. {_AGAIN}")
    return header


def looks_like_token_file(path: Path) -> bool:
    """Whether the file begins with the magic of a token file."""
    with path.open("rb") as file:
        return file.read(8) == MAGIC


def open_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer of a token file (`*.bin`), or `make_tokenizer(spec)` for any other name."""
    return TokenFile.open(spec).tokenizer() if str(spec).endswith(".bin") else make_tokenizer(str(spec))
