"""Web pages as training text: read them from WET files, and keep those in one language, long enough, not repetitive.

The rules for length, letters and repetition are those of MassiveText (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1
and table A1), with its thresholds, and repeats are counted as in datatrove's GopherRepetitionFilter. Differences: words
are those of `plotarmour.data.stories.normalise` (lower case, no punctuation); a phrase that occurs once is no
repetition; rules for paragraphs (extracted text has none) and for English only are left out. Words are separated by
spaces: languages written without spaces are refused.

This module needs the packages of the extra `crawl` in pyproject.toml.
"""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_duplicates, get_n_grams
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from warcio.archiveiterator import ArchiveIterator
from warcio.exceptions import ArchiveLoadFailed

from plotarmour.cli import UserError
from plotarmour.data.stories import SEPARATOR, normalise

LETTERS = 0.80  # least share of words that have a letter
REPEATED_LINES = 0.30  # largest share of lines that repeat an earlier line
REPEATED_LINE_CHARACTERS = 0.20  # largest share of characters in such lines
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # n: largest share of characters in the most frequent n-gram
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # n: ... in repeated n-grams
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
    """Which pages to keep. Raise `UserError` for a value out of range, and a language unknown or without spaces."""

    language: str = "en"  # code of py3langid
    min_probability: float = 0.65  # least probability of the language; FineWeb uses this with its (other) classifier
    min_words: int = 50
    max_words: int = 100_000

    def __post_init__(self) -> None:
        if not (0 <= self.min_probability <= 1 and 1 <= self.min_words <= self.max_words):
            raise UserError(f"--min-probability {self.min_probability:g} or --min-words {self.min_words} is out of "
                            f"range; expected 0 to 1, and 1 to {self.max_words:,}.")
        known = set(_identifier().labels) - WITHOUT_SPACES
        if self.language not in known:
            raise UserError(f"--language {self.language!r} is unknown, or is written without spaces between the words "
                            f"that the rules count; expected one of {len(known)} codes of py3langid, e.g. en, de, an.")


def read_wet(path: Path) -> Iterator[str]:
    """Yield the stripped text of each page of a WET file, plain or gzip (recognised by content).

    Memory holds one page. Bytes that are not UTF-8 become replacement characters.

    Raises:
        UserError: the file is no WET file (such as a WARC with HTML), truncated or damaged.
    """
    with path.open("rb") as raw:
        stream, kind = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw, None
        try:
            for record in ArchiveIterator(stream, no_record_parse=True):
                kind, length = record.rec_type, record.rec_headers.get_header("Content-Length")
                if kind not in ("warcinfo", "conversion"):
                    raise UserError(f"{path} holds a record of type {kind}; expected a WET file, with text of pages. "
                                    "Use the .warc.wet.gz of the same number.")
                content = record.content_stream().read()
                if str(len(content)) != length:  # length is None where the header itself is truncated
                    raise EOFError("its last record is truncated")
                if kind == "conversion":  # a page, in the WARC format of ISO 28500:2017
                    yield content.decode("utf-8", "replace").strip()
            stream.read(1)  # warcio takes the EOFError of a truncated gzip file for its end; this raises it again
            if kind is None:
                raise EOFError("it is empty")
        except (EOFError, zlib.error, gzip.BadGzipFile, ArchiveLoadFailed) as error:
            raise UserError(f"{path} is not a complete WET file: {str(error).splitlines()[0]}. Delete it and download "
                            "it again.") from None


def why_dropped(page: str, rules: PageRules) -> str | None:
    """Return why a page is dropped: the first key of `REASONS` (never "duplicate") that applies; None to keep it."""
    if SEPARATOR.decode() in page:
        return "separator"
    if "\ufffd" in page:
        return "undecoded"
    text = normalise(page)
    words = text.split()
    if not rules.min_words <= len(words) <= rules.max_words:
        return "short" if len(words) < rules.min_words else "long"
    if sum(any(map(str.isalpha, word)) for word in words) < LETTERS * len(words):
        return "few_letters"
    language, probability = _identifier().classify(page)
    if language != rules.language or probability < rules.min_probability:
        return "language"
    lines = [stripped for line in page.splitlines() if (stripped := line.strip())]
    n_lines, n_characters = find_duplicates(lines)
    if n_lines > REPEATED_LINES * len(lines) or n_characters > REPEATED_LINE_CHARACTERS * sum(map(len, lines)):
        return "repeated_lines"
    for n, share in TOP_NGRAM.items():
        for phrase, times in Counter(get_n_grams(words, n)).most_common(1):
            if times > 1 and times * len(phrase) > share * len(text):
                return "frequent_ngram"
    if any(find_all_duplicate(words, n) > share * len(text) for n, share in REPEATED_NGRAMS.items()):
        return "repeated_ngrams"
    return None


@cache
def _identifier() -> LanguageIdentifier:
    """Return py3langid with its 140 languages and normalised probabilities; loading takes half a second."""
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
