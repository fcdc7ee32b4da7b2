"""What a story is, and which part it belongs to.

What makes a story is a policy: text between literal `<|endoftext|>` separators, one per line, or the whole file. The
blank space around a separator is not part of a story; inside a story every byte counts; empty stories are dropped
and counted. A hash of the normalised text alone decides the part (train, val, test) of a story, so normalised copies
are always in the same part, and the order of reading does not matter.
"""

import hashlib
import re

import numpy as np

from plotarmour.cli import UserError

SEPARATOR = b"<|endoftext|>"
POLICIES = ("endoftext", "line", "file")
PARTS = ("train", "val", "test")
BLANK = " \t\r\n\x0b\x0c"

# `normalise` for ASCII, as two tables of bytes.translate: ten times faster, and most stories are ASCII.
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
    if story.isascii():
        return _normalise_ascii(story.encode()).decode()
    return " ".join(re.sub(r"[^\w\s]|_", "", story.lower()).split())


def _normalise_ascii(story: bytes) -> bytes:
    folded = story.translate(_FOLDED, _DROPPED)
    while b"  " in folded:
        folded = folded.replace(b"  ", b" ")
    return folded.strip(b" ")


class StoryHasher:
    """`story_hash` of a story that comes in pieces, each but the first beginning with blank space."""

    def __init__(self):
        self.sha256, self.begun = hashlib.sha256(), False

    def update(self, piece: str) -> None:
        normalised = normalise(piece).encode()
        if normalised:
            self.sha256.update(b" " + normalised if self.begun else normalised)
            self.begun = True

    def value(self) -> int:
        return int.from_bytes(self.sha256.digest()[:8], "little")


def story_hash(story: str) -> int:
    """Return the first 64 bits of the SHA-256 of the normalised story: equal for normalised copies."""
    normalised = _normalise_ascii(story.encode()) if story.isascii() else normalise(story).encode()
    return int.from_bytes(hashlib.sha256(normalised).digest()[:8], "little")


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
