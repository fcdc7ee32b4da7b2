"""Web pages as training text: read them from WET files, and keep those in one language, long enough, not repetitive.

The rules for length, letters and repetition are those of MassiveText (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1
and table A1), with its thresholds. Differences: words are those of `plotarmour.data.stories.normalise` (lower case, no
punctuation); the first occurrence of a phrase is no repetition; rules for paragraphs (extracted text has none) and for
English only are left out. Words are separated by spaces: languages written without spaces are refused.
"""

import difflib
import gzip
import importlib.util
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.stories import SEPARATOR, normalise

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

GZIP = b"\x1f\x8b"  # the first bytes of a gzip file
LETTERS = 0.80  # least share of words that have a letter
REPEATED_LINES = 0.30  # largest share of lines that repeat an earlier line
REPEATED_LINE_CHARACTERS = 0.20  # largest share of characters in such lines
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # n: largest share of characters in the most frequent n-gram
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # n: ... in n-grams that occurred before
REASONS = {
    "separator": "hold a literal <|endoftext|>, which would end a story",
    "undecoded": "hold the replacement character: their encoding was lost",
    "short": "fewer words than --min-words", "long": "more than 100,000 words",
    "few_letters": "under 80 % of the words have a letter",
    "language": "another language, or this one with a probability below --min-probability",
    "repeated_lines": "too many lines repeat", "frequent_ngram": "one phrase of 2 to 4 words too often",
    "repeated_ngrams": "phrases of 5 to 10 words repeat",
    "duplicate": "equal to an earlier page except for case, punctuation and spaces",
}
WITHOUT_SPACES = {"dz", "ja", "km", "lo", "my", "th", "wuu", "yue", "zh"}


@dataclass(frozen=True)
class PageRules:
    """Which pages to keep.

    Args:
        language: code of py3langid, e.g. "en".
        min_probability: least probability of the language, 0 to 1. FineWeb uses 0.65 with its (other) classifier.
        min_words: least number of words.
        max_words: largest number of words.
    """

    language: str = "en"
    min_probability: float = 0.65
    min_words: int = 50
    max_words: int = 100_000

    def __post_init__(self) -> None:
        if not 0 <= self.min_probability <= 1:
            raise UserError(f"--min-probability {self.min_probability:g} is no probability; expected 0 to 1.")
        if not 1 <= self.min_words <= self.max_words:
            raise UserError(f"--min-words {self.min_words} is out of range; expected 1 to {self.max_words:,}.")


def require(*packages: str) -> None:
    """Raise `UserError` with the command that installs the missing ones of some packages."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"Common Crawl needs {' and '.join(missing)}, which is not installed. Run: pip install "
                        + " ".join(missing))


def check_language(code: str) -> None:
    """Raise `UserError` unless py3langid knows the language and it is written with spaces."""
    known = _identifier().labels
    if code not in known:
        close = difflib.get_close_matches(code, known, 3, 0.4)
        raise UserError(f"--language {code!r} is unknown" + (f"; did you mean {' or '.join(close)}?" if close else ";")
                        + f" Expected one of the {len(known)} codes of py3langid, e.g. en, de, es, fr, an.")
    if code in WITHOUT_SPACES:
        raise UserError(f"--language {code} is written without spaces between words, and the rules count words; "
                        "expected a language with spaces.")


def check_file(path: Path) -> None:
    """Raise `UserError` unless `path` is a file that is not empty."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file. Name its files one by one.")
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a file. Check the path.")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty (0 bytes); expected a WET file or a listing. Download it again.")


class _Truncated(Exception):
    """The file ends inside a record."""


class _WholeGzip(gzip.GzipFile):
    """A gzip file that raises `_Truncated` where it breaks off; warcio would take an EOFError for the file's end."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except EOFError:
            raise _Truncated from None


def read_wet(path: Path) -> Iterator[str]:
    """Yield the stripped text of each page of a WET file; memory holds one page.

    Args:
        path: `.wet`, plain or gzip (recognised by content). Bytes that are not UTF-8 become replacement characters.

    Raises:
        UserError: the file is missing, is no WET file (such as a WARC with HTML), is truncated or damaged.

    Source:
        The WARC format, ISO 28500:2017; in WET files pages are records of type "conversion".
    """
    check_file(path)
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    with path.open("rb") as raw:
        stream, n_records = _WholeGzip(fileobj=raw) if raw.peek(2)[:2] == GZIP else raw, 0
        try:
            start = stream.read(5)
            stream.seek(0)
            if start != b"WARC/":
                raise UserError(f"{path} is not a WET file: it begins with {start!r}; expected WARC/. WET files of "
                                "Common Crawl end in .warc.wet.gz.")
            for record in ArchiveIterator(stream, no_record_parse=True):
                n_records += 1
                kind, length = record.rec_type, record.rec_headers.get_header("Content-Length")
                if kind in ("response", "request", "resource", "revisit"):
                    raise UserError(f"{path} is a WARC with whole web pages (a record of type {kind}); expected a WET "
                                    "file with their text: replace /warc/ by /wet/ and .warc.gz by .warc.wet.gz.")
                content = record.content_stream().read()
                if str(len(content)) != length:  # length is None where the header itself is truncated
                    raise _Truncated
                if kind == "conversion":
                    yield content.decode("utf-8", "replace").strip()
        except (_Truncated, zlib.error, gzip.BadGzipFile, ArchiveLoadFailed) as error:
            how = "is truncated" if isinstance(error, _Truncated) else f"is damaged ({str(error).splitlines()[0]})"
            raise UserError(f"{path} {how} after {n_records:,} records; expected a complete WET file. Delete it and "
                            "download it again.") from None


def why_dropped(page: str, rules: PageRules) -> str | None:
    """Return the reason to drop a page.

    Args:
        page: its text, with line breaks between lines.
        rules: language and lengths.

    Returns:
        The first key of `REASONS` that applies (never "duplicate", which depends on other pages), or None to keep it.

    Example:
        >>> why_dropped("Too short.", PageRules())
        'short'
    """
    if SEPARATOR.decode() in page:
        return "separator"
    if "\ufffd" in page:
        return "undecoded"
    words = normalise(page).split()
    if len(words) < rules.min_words:
        return "short"
    if len(words) > rules.max_words:
        return "long"
    if sum(word.isnumeric() for word in words) > (1 - LETTERS) * len(words):  # words hold only letters and digits
        return "few_letters"
    language, probability = _identifier().classify(page)
    if language != rules.language or probability < rules.min_probability:
        return "language"
    by_count, by_characters = repeated_lines(page)
    if by_count > REPEATED_LINES or by_characters > REPEATED_LINE_CHARACTERS:
        return "repeated_lines"
    for n, fraction in ngram_fractions(words):
        if n in TOP_NGRAM and fraction > TOP_NGRAM[n]:
            return "frequent_ngram"
        if n in REPEATED_NGRAMS and fraction > REPEATED_NGRAMS[n]:
            return "repeated_ngrams"
    return None


def repeated_lines(page: str) -> tuple[float, float]:
    """Return the share of lines that repeat an earlier line, and the share of characters in them. Empty lines do not
    count.

    Example:
        >>> repeated_lines("ab\\ncd\\nab\\nab")
        (0.5, 0.5)
    """
    lines = [stripped for line in page.splitlines() if (stripped := line.strip())]
    distinct = set(lines)
    n_characters = sum(map(len, lines))
    return ((len(lines) - len(distinct)) / max(1, len(lines)),
            (n_characters - sum(map(len, distinct))) / max(1, n_characters))


def ngram_fractions(words: list[str]) -> Iterator[tuple[int, float]]:
    """Measure how much of a text is repeated phrases.

    Args:
        words: of a page, in order.

    Yields:
        (n, share of the words' characters) for n from 2 to 10. For n up to 4: in all occurrences of the most frequent
        n-gram, if it occurs twice; from 5: in n-grams that occurred before, each character once.

    Example:
        >>> dict(ngram_fractions("a b c a b d".split()))[2]   # "a b" twice: 4 of 6 characters
        0.6666666666666666
    """
    vocabulary: dict[str, int] = {}
    ids = np.fromiter((vocabulary.setdefault(word, len(vocabulary)) for word in words), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate(([0], np.cumsum(lengths)))
    codes = ids  # of the n-gram at each position: first that of n - 1 words, then the next word
    for n in range(2, min(10, len(words)) + 1):
        _, first, codes, counts = np.unique(codes[:-1] * len(vocabulary) + ids[n - 1:], return_index=True,
                                            return_inverse=True, return_counts=True)
        if n in TOP_NGRAM:
            most = counts.max()
            characters = (ends[n:] - ends[:-n])[first[counts == most]].max() * most if most > 1 else 0
        else:
            repeats = np.flatnonzero(first[codes] != np.arange(len(codes)))
            edges = np.zeros(len(words) + 1, np.int64)
            edges[repeats] += 1
            edges[repeats + n] -= 1
            characters = lengths[np.cumsum(edges[:-1]) > 0].sum()
        yield n, float(characters / ends[-1])


@cache
def _identifier() -> "LanguageIdentifier":
    """Return py3langid with its 140 languages and normalised probabilities; loading takes half a second."""
    require("py3langid")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
