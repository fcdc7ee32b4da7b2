from collections import Counter

import pytest
from wet_pages import pages, write_wet

from plotarmour.cli import UserError
from plotarmour.data.stories import normalise
from plotarmour.data.web_pages import PageRules, check_language, ngram_fractions, read_wet, repeated_lines, why_dropped

MADE = pages(240)


@pytest.mark.parametrize("kind", sorted({kind for _, kind in MADE} - {"duplicate", "kept"}))
def test_every_rule_drops_what_it_is_for(kind):
    """Guards: a rule that never fires, or fires on good prose."""
    found = Counter(why_dropped(page, PageRules()) for page, expected in MADE if expected == kind)
    assert set(found) == {kind}
    assert {why_dropped(page, PageRules()) for page, expected in MADE if expected == "kept"} == {None}


def test_fractions_are_those_one_counts_by_hand():
    """Guards: fractions over the wrong denominator, overlaps counted twice, first occurrences as repeats."""
    assert repeated_lines("ab\ncd\n\nab\n ab ") == (0.5, 0.5)
    assert repeated_lines("") == (0, 0)
    found = dict(ngram_fractions("a b c a b d".split()))
    assert found == {2: 4 / 6, 3: 0, 4: 0, 5: 0, 6: 0}
    longer = dict(ngram_fractions("aa b c d e aa b c d e f".split()))  # the second "aa b c d e": 6 of 13 characters
    assert longer[5] == 6 / 13 and longer[6] == 0
    same = dict(ngram_fractions(["x"] * 20))  # all but the first n-gram repeat, and cover 19 words
    assert same[10] == 19 / 20 and same[2] == 2 * 19 / 20


def test_repeats_agree_with_counting_the_slow_way():
    """Guards: n-gram codes that collide, places that shift by one."""
    words = normalise(MADE[8][0]).split() + ["tom"] * 7 + normalise(MADE[0][0]).split()[:30]
    for n, fraction in ngram_fractions(words):
        seen, covered, counts = set(), set(), Counter()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i:i + n])
            counts[gram] += 1
            covered |= set(range(i, i + n)) if gram in seen else set()
            seen.add(gram)
        most = max(counts.values())
        top = max(most * sum(map(len, gram)) for gram, count in counts.items() if count == most) * (most > 1)
        characters = top if n <= 4 else sum(len(words[i]) for i in covered)
        assert fraction == pytest.approx(characters / sum(map(len, words))), n


def test_languages_are_those_of_the_model():
    """Guards: Aragonese, which few identifiers know."""
    check_language("an")
    with pytest.raises(UserError, match="140 codes"):
        check_language("klingon")


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Guards: a WET file read whole. 30 pages of 1 MB pass within 12 MB."""
    import tracemalloc

    path = write_wet(tmp_path / "big.wet.gz", ["x" * 2**20] * 30)
    next(read_wet(path))
    tracemalloc.start()
    assert sum(len(page) for page in read_wet(path)) == 30 * 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20


def test_every_cut_of_a_packed_file_is_noticed(tmp_path):
    """Guards: half a file taken for a whole one, which warcio does by itself. Only a cut between records can pass."""
    path = write_wet(tmp_path / "a.wet.gz", ["one", "two", "three"])
    whole, passed = path.read_bytes(), []
    for n in range(7, len(whole)):
        path.write_bytes(whole[:n])
        try:
            passed.append(list(read_wet(path)))
        except UserError as error:
            assert "Delete it and download it again" in str(error)
    assert passed == [[], ["one"], ["one", "two"]]


def write_text(path):
    path.write_text("Once upon a time.\n" * 100)


def write_junk(path):
    path.write_bytes(b"\x1f\x8bjunk" * 100)


def write_cut(path):
    write_wet(path, ["one", "two"], packed=False)
    path.write_bytes(path.read_bytes()[:-6])


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: None, "does not exist"), (lambda path: path.mkdir(), "is a folder"),
    (lambda path: path.touch(), "is empty"),
    (write_text, "is not a WET file: it begins with b'Once '"), (write_junk, "is damaged"), (write_cut, "is truncated"),
    (lambda path: write_wet(path, ["<html>"], kind="response"), "a WARC with whole web pages")])
def test_bad_wet_files_are_refused_in_one_line(tmp_path, write, message):
    """Guards: tracebacks of warcio; a file of web pages read as text."""
    write(tmp_path / "a.wet")
    with pytest.raises(UserError, match=message) as refused:
        list(read_wet(tmp_path / "a.wet"))
    assert "\n" not in str(refused.value)
