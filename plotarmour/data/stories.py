"""What a story is, and which part it belongs to.

What makes a story is a policy: text between literal `<|endoftext|>` separators, one per line, or the whole file. The
blank space around a separator is not part of a story; inside a story every byte counts; empty stories are dropped
and counted. A hash of the normalised text alone decides the part (train, val, test) of a story, so normalised copies
are always in the same part, and the order of reading does not matter.
"""

import hashlib
import re
from collections.abc import Iterator

import numpy as np

from plotarmour.cli import UserError

SEPARATOR = b"<|endoftext|>"
SEPARATORS = {"endoftext": SEPARATOR, "line": b"\n", "file": b""}  # by what makes a story
PARTS = ("train", "val", "test")
BLANK = " \t\r\n\x0b\x0c"
PIECE = 2**20  # characters of a long story that are hashed or encoded at once

# `_normalised` for ASCII, as two tables of bytes.translate: ten times faster, and most stories are ASCII.
_SPACES = b" \t\r\n\x0b\x0c\x1c\x1d\x1e\x1f"
_KEPT = bytes(range(ord("0"), ord("9") + 1)) + bytes(range(ord("a"), ord("z") + 1)) + bytes(
    range(ord("A"), ord("Z") + 1)) + _SPACES
_DROPPED = bytes(set(range(128)) - set(_KEPT))
_FOLDED = bytes(32 if i in _SPACES else i + 32 if 65 <= i <= 90 else i for i in range(256))


def normalise(story: str) -> str:
    """Lower-case, drop punctuation, fold blank space: normalised copies of a story become equal.

    Example:
        >>> normalise('"Hello,"  said Tom.')
        'hello said tom'
    """
    return _normalised(story).decode()


def _normalised(story: str) -> bytes:
    if not story.isascii():
        return " ".join(re.sub(r"[^\w\s]|_", "", story.lower()).split()).encode()
    folded = story.encode().translate(_FOLDED, _DROPPED)
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    return folded.strip(b" ")


def story_hash(story: str) -> int:
    """Return the first 64 bits of the SHA-256 of the normalised story: equal for normalised copies."""
    if len(story) <= PIECE:
        return int.from_bytes(hashlib.sha256(_normalised(story)).digest()[:8], "little")
    sha256 = hashlib.sha256()
    for i, normalised in enumerate(filter(None, map(_normalised, pieces(story, PIECE)))):  # bounds memory
        sha256.update(b" " + normalised if i else normalised)
    return int.from_bytes(sha256.digest()[:8], "little")


def story_hashes(stories: list[str]) -> np.ndarray:
    """Return `story_hash` of each story, uint64 (n,)."""
    return np.fromiter(map(story_hash, stories), np.uint64, len(stories))


def pieces(story: str, size: int = PIECE) -> Iterator[str]:
    """Cut a story where a space follows a character that is not blank: byte-level BPE has no token across such a place.

    A piece ends at the last such place within `size` characters, or at the next one if there is none within.

    Example:
        >>> list(pieces("Tom ran.  Home", 10))
        ['Tom ran.', '  Home']
    """
    place = r"(?:\Z|(?<=\S)(?= ))"
    yield from (match[0] for match in re.finditer(rf"(?s).{{1,{size}}}{place}|.+?{place}", story))


def parse_split(text: str) -> tuple[int, int, int]:
    """Parse "90:5:5" into the shares of train, val and test; raise `UserError` unless the first is positive."""
    if not re.fullmatch(r"0*[1-9]\d*:\d+:\d+", text):
        raise UserError(f"--split {text!r} is not a split; expected train:val:test in whole numbers, e.g. 90:5:5.")
    return tuple(map(int, text.split(":")))


def parts_of(hashes: np.ndarray, shares: tuple[int, int, int]) -> np.ndarray:
    """Return the part of each story: a pure function of its hash and the shares.

    Args:
        hashes: uint64 (n,), `story_hash` of each story.
        shares: of train, val and test.

    Returns:
        int64 (n,): index into `PARTS`.

    Example (shares 2, 1, 1):
        hashes 0, 1, 2, 3 are in train, train, val, test, and so are 4, 5, 6, 7.
    """
    return np.searchsorted(np.cumsum(shares).astype(np.uint64), hashes % np.uint64(sum(shares)), side="right")
