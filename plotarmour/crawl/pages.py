"""Which pages of the web are worth reading: one language, long enough, not repetitive.

Lengths, letters and repetition follow the rules for MassiveText (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1 and
table A1), with its thresholds. Differences: words are those of `plotarmour.data.stories.normalise` (lower-case, without
punctuation), a first occurrence never counts as a repeat, and its rules for paragraphs are absent, for extracted text
has none; so are those that only fit English. Words stand between blanks: languages written without them are refused.
"""

import difflib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.stories import SEPARATOR, normalise

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

LETTERS = 0.80  # of the words have a letter, at least
REPEATED_LINES = 0.30  # of the lines stand further up already, at most
REPEATED_LINE_CHARACTERS = 0.20  # of the characters are in such lines, at most
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # of the characters are in the most frequent n-gram, at most
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # ... in those that occurred before, at most
REASONS = {
    "separator": "hold a literal <|endoftext|>, which would end a story",
    "undecoded": "hold the replacement character: their encoding was lost",
    "short": "fewer words than --min-words", "long": "more than 100,000 words", "few_letters": "under 80 % words",
    "language": "another language, or not surely this one", "repeated_lines": "too many lines repeat",
    "frequent_ngram": "one phrase of 2 to 4 words too often", "repeated_ngrams": "phrases of 5 to 10 words repeat",
    "duplicate": "equal to an earlier page but for case, punctuation and blanks",
}
WITHOUT_BLANKS = {"dz", "ja", "km", "lo", "my", "th", "wuu", "yue", "zh"}


@dataclass(frozen=True)
class PageRules:
    """What a page must be.

    Args:
        language: code of py3langid, e.g. "en".
        min_probability: that the page is in it, 0 to 1. 0.65 is what FineWeb asks of its (other) identifier.
        min_words: fewest words.
        max_words: most words.
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
    """Raise `UserError` with the command that installs what is missing of some packages."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"Common Crawl needs {' and '.join(missing)}, which is not installed. Run: pip install "
                        + " ".join(missing))


def check_language(code: str) -> None:
    """Raise `UserError` unless pages of this language can be told and counted."""
    known = _identifier().labels
    if code not in known:
        close = difflib.get_close_matches(code, known, 3, 0.4)
        raise UserError(f"--language {code!r} is unknown" + (f"; did you mean {' or '.join(close)}?" if close else ";")
                        + f" Expected one of the {len(known)} codes of py3langid, e.g. en, de, es, fr, an.")
    if code in WITHOUT_BLANKS:
        raise UserError(f"--language {code} is written without blanks between words, which the rules count; expected a "
                        "language with them.")


def why_dropped(page: str, rules: PageRules) -> str | None:
    """Say why a page is dropped.

    Args:
        page: its text, lines separated by line breaks.
        rules: language and lengths.

    Returns:
        The first key of `REASONS` that applies (never "duplicate": that needs the other pages), or None: kept.

    Example:
        >>> why_dropped("Too short.", PageRules())
        'short'

    Source:
        Rae et al. 2021, arXiv 2112.11446, appendix A.1.1, table A1.
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
    if sum(word.isnumeric() for word in words) > (1 - LETTERS) * len(words):  # of letters or digits they are all
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
    """Measure the lines that stand further up already.

    Returns:
        Their share of the lines that are not blank, and of these lines' characters.

    Example:
        >>> repeated_lines("ab\\ncd\\nab\\nab")
        (0.5, 0.5)
    """
    lines = [stripped for line in page.splitlines() if (stripped := line.strip())]
    seen, n_repeated, n_characters = set(), 0, 0
    for line in lines:
        if line in seen:
            n_repeated += 1
            n_characters += len(line)
        seen.add(line)
    return n_repeated / max(1, len(lines)), n_characters / max(1, sum(map(len, lines)))


def ngram_fractions(words: list[str]) -> Iterator[tuple[int, float]]:
    """Measure how far phrases repeat.

    Args:
        words: of a page, in order.

    Yields:
        (n, share of the words' characters) for n from 2 to 10. For n up to 4: in all places of the most frequent
        n-gram, if it is there twice; from 5: in n-grams that occurred further up, each character once.

    Example:
        >>> dict(ngram_fractions("a b c a b d".split()))[2]   # "a b" twice: 4 of 6 characters
        0.6666666666666666
    """
    vocabulary: dict[str, int] = {}
    ids = np.fromiter((vocabulary.setdefault(word, len(vocabulary)) for word in words), np.int64, len(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate(([0], np.cumsum(lengths)))
    codes = ids  # of the n-gram at each place: first that of n - 1 words, then the next word
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
    """py3langid with its model of 140 languages, probabilities normalised; half a second, once per process."""
    require("py3langid")
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
