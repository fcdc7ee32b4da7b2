"""What a story is, and which part it belongs to.

What makes a story is a policy: text between literal `<|endoftext|>` separators, one per line (or what follows its
first tab), text between blank lines (paragraph), or the whole file. The blank space around a separator is not part of a
story; inside a story every byte counts; empty stories are dropped and counted. A hash of the normalised text alone
decides the part (train, val, test) of a story, so normalised copies are always in the same part, and the order of
reading does not matter.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator

import numpy as np

from plotarmour.cli import UserError

SEPARATOR = b"<|endoftext|>"
SEPARATORS = {"endoftext": SEPARATOR, "line": b"\n", "line_without_prefix": b"\n", "paragraph": b"\n\n",
              "file": b""}  # by what makes a story
PARTS = ("train", "val", "test")
BLANK = " \t\r\n\x0b\x0c"
PIECE = 2**20  # characters of a long story that are hashed or encoded at once

# Two tables of bytes.translate for the ASCII characters of a text in UTF-8: faster than a regular expression.
_SPACES, _LETTERS, _DIGITS = b" \t\r\n\x0b\x0c\x1c\x1d\x1e\x1f", bytes(range(ord("a"), ord("z") + 1)), b"0123456789"
_SYMBOLS = b"$+<=>^`|~" + b"%&*/"  # Unicode's symbols, and operators that Unicode counts as punctuation
_FOLDED = bytes.maketrans(_SPACES + _LETTERS.upper(), b" " * len(_SPACES) + _LETTERS)
_DROPPED = bytes(set(range(128)) - set(_SPACES + _LETTERS + _LETTERS.upper() + _DIGITS + _SYMBOLS))
_LETTERS_AND_SPACE = _LETTERS + b" "
_ODD = re.compile(r"[\W\d]")  # all but letters
PROSE = 4  # a text is prose while less than one byte in so many is a digit or, counted three times, a symbol


def normalise(story: str) -> str:
    """Lower-case, drop punctuation, fold blank space: normalised copies of a story become equal.

    Letters, vowel signs and other combining marks, digits, symbols and the operators % & * / remain. Case and
    punctuation distinguish sums, code and chess: where digits and symbols (these count three times) are a quarter of
    what remains, or nothing remains, only blank space is folded. What remains of copies is the same, so one
    rule applies to all of them.

    Example:
        >>> normalise('"Hello,"  said Tom.')
        'hello said tom'
        >>> normalise("x = A[0] -  1")
        'x = A[0] - 1'
    """
    words, n_odd = _words(story)
    return (words if PROSE * n_odd < len(words) else _folded(story)).decode()


def _words(story: str) -> tuple[bytes, int]:
    """Return a story as prose, and the number of its digits plus three times that of its symbols."""
    words = (story if story.isascii() else story.lower()).encode().translate(_FOLDED, _DROPPED)
    odd = words.translate(None, _LETTERS_AND_SPACE)
    if odd.isascii():
        n_odd = len(odd) + 2 * len(odd.translate(None, _DIGITS)) if odd else 0
    else:
        text, odd, n_odd = words.decode(), odd.decode(), 0
        for character in set(_ODD.findall(odd)):
            kind = unicodedata.category(character)
            if character.isspace():
                text = text.replace(character, " ")
            elif character.encode() not in _SYMBOLS and (kind[0] == "P" or kind in ("Cc", "Cf")):
                text = text.replace(character, "")
            elif kind[0] != "M":
                n_odd += odd.count(character) * (1 if character.isdecimal() else 3)
        words = text.encode()
    while b"  " in words:
        words = words.replace(b"  ", b" ")
    return words.strip(b" "), n_odd


def _folded(story: str) -> bytes:
    """Return a story with one space for each run of blank space."""
    return " ".join(story.split()).encode()


def story_hash(story: str) -> int:
    """Return the first 64 bits of the SHA-256 of the normalised story: equal for normalised copies."""
    if len(story) <= PIECE:
        sha256 = hashlib.sha256(normalise(story).encode())
    else:  # in pieces, which bounds memory
        counts = [(len(words), n_odd) for words, n_odd in map(_words, pieces(story, PIECE)) if words]
        n_bytes, n_odd = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        is_prose = PROSE * n_odd < n_bytes + len(counts) - 1  # and a space between two pieces
        parts = (_words(piece)[0] if is_prose else _folded(piece) for piece in pieces(story, PIECE))
        sha256 = hashlib.sha256()
        for i, part in enumerate(filter(None, parts)):
            sha256.update(b" " + part if i else part)
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
