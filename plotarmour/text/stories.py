"""Text files to stories, and stories to parts.

What makes a story is a policy: text between literal `<|endoftext|>` separators, one per line, or the whole file. The
blank space around a separator is not part of a story; inside a story every byte counts; empty stories are dropped
and counted. Which part (train, val, test) a story belongs to follows from a hash of its normalised text alone, so
copies, also near-copies, always land on the same side and the result does not depend on the order of reading.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from plotarmour.errors import UserError

SEPARATOR = b"<|endoftext|>"
POLICIES = ("endoftext", "line", "file")
PARTS = ("train", "val", "test")
BLOCK = 2**20
BLANK = b" \t\r\n\x0b\x0c"


@dataclass
class Source:
    """One text file as it was read: what a token file's header says of it."""

    path: Path
    n_bytes: int = 0
    n_empty: int = 0
    head: bytes = b""
    tail: bytes = b""
    sha256: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def update(self, block: bytes) -> None:
        self.sha256.update(block)
        self.n_bytes += len(block)
        self.head = self.head if len(self.head) >= BLOCK else (self.head + block)[:BLOCK]
        self.tail = (self.tail + block)[-BLOCK:]

    def describe(self) -> dict:
        return {"name": self.path.name, "bytes": self.n_bytes, "sha256": self.sha256.hexdigest(),
                "sha256_first_mib": hashlib.sha256(self.head).hexdigest(),
                "sha256_last_mib": hashlib.sha256(self.tail).hexdigest()}


def check_text(path: Path) -> None:
    """Raise `UserError` unless `path` is a readable file with something in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a text file. Name the file, e.g. {path}/stories.txt.")
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a UTF-8 text file. Check the path.")
    try:
        with path.open("rb") as file:
            start = file.read(7)
            if not start:
                raise UserError(f"{path} is empty (0 bytes); expected stories as UTF-8 text.")
            if start == b"PLOTARM":
                raise UserError(f"{path} is a token file; expected the text it was made from.")
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied. Allow reading it, or copy it.") from None


def read_stories(source: Source, policy: str = "endoftext",
                 progress: Callable[[int], object] | None = None) -> Iterator[str]:
    """Stream the stories of one text file.

    Args:
        source: the file; its counts and hashes are complete when the iteration ends.
        policy: "endoftext", "line" or "file".
        progress: called with the number of bytes just read.

    Yields:
        Stories, without the blank space around them, none empty.

    Raises:
        UserError: no such file, a folder, an empty file, text that is not UTF-8 (with byte offset and line).
    """
    check_text(source.path)
    with source.path.open("rb") as file:
        for start, raw in _pieces(file, source, policy, progress):
            if raw.startswith(b"\xef\xbb\xbf") and start == 0:
                start, raw = 3, raw[3:]
            story = raw.strip(BLANK)
            if not story:
                source.n_empty += 1
                continue
            try:
                yield story.decode("utf-8")
            except UnicodeDecodeError as error:
                offset = start + raw.index(story) + error.start
                raise UserError(_not_utf8(source.path, offset, raw[offset - start])) from None


def _pieces(file: BinaryIO, source: Source, policy: str,
            progress: Callable[[int], object] | None) -> Iterator[tuple[int, bytes]]:
    """Yield (byte offset, raw bytes) of what stands between separators. The last piece may be empty: not a story."""
    separator = {"endoftext": SEPARATOR, "line": b"\n", "file": None}[policy]
    start, waiting, edge = 0, [], b""  # blocks without a separator wait, so that one long story is joined once
    while block := file.read(BLOCK):
        source.update(block)
        if progress:
            progress(len(block))
        if separator is None:
            waiting.append(block)
            continue
        seen = edge + block  # a separator can stand across the edges of blocks
        if separator not in seen:
            waiting.append(block)
            edge = seen[max(0, len(seen) - len(separator) + 1):]
            continue
        *pieces, rest = (b"".join(waiting) + block).split(separator)
        for piece in pieces:
            yield start, piece
            start += len(piece) + len(separator)
        waiting, edge = [rest], rest[max(0, len(rest) - len(separator) + 1):]
    last = b"".join(waiting)
    if last.strip(BLANK):
        yield start, last


def _not_utf8(path: Path, offset: int, byte: int) -> str:
    with path.open("rb") as file:
        line = 1
        for position in range(0, offset, BLOCK):
            line += file.read(min(BLOCK, offset - position)).count(b"\n")
    return (f"{path} is not UTF-8: byte 0x{byte:02x} at offset {offset:,}, line {line:,}. "
            f"Save it as UTF-8, e.g. with: iconv -f latin1 -t utf-8 {path.name} > utf8.txt")


def normalise(story: str) -> str:
    """Lower-case, drop punctuation, fold blank space: near-copies of a story become equal.

    Example:
        >>> normalise('"Hello,"  said Tom.')
        'hello said tom'
    """
    return " ".join(re.sub(r"[^\w\s]|_", "", story.lower()).split())


def story_hash(story: str) -> int:
    """Return the first 64 bits of the SHA-256 of the normalised story: equal for near-copies."""
    return int.from_bytes(hashlib.sha256(normalise(story).encode()).digest()[:8], "little")


def parse_split(text: str) -> tuple[int, int, int]:
    """Parse "90:5:5" into the shares of train, val and test.

    Raises:
        UserError: not three whole numbers of which the first is positive.
    """
    try:
        shares = tuple(int(share) for share in text.split(":"))
        if len(shares) != 3 or shares[0] < 1 or min(shares) < 0:
            raise ValueError
    except ValueError:
        raise UserError(f"--split {text!r} is not a split; expected train:val:test in whole numbers, "
                        "e.g. 90:5:5.") from None
    return shares


def part_of(story: str, shares: tuple[int, int, int]) -> str:
    """Return "train", "val" or "test": a pure function of the normalised story and the shares."""
    place = story_hash(story) % sum(shares)
    return PARTS[0] if place < shares[0] else PARTS[1] if place < shares[0] + shares[1] else PARTS[2]
