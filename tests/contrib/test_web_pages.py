from collections import Counter

import pytest
from wet_pages import pages, write_wet

from contrib.common_crawl.web_pages import PageRules, read_wet, why_dropped
from plotarmour.cli import UserError

MADE = pages(240)


@pytest.mark.parametrize("kind", sorted({kind for _, kind in MADE} - {"duplicate", "kept"}))
def test_every_rule_drops_what_it_is_for(kind):
    """Guards: a rule that never fires, or fires on good prose."""
    found = Counter(why_dropped(page, PageRules()) for page, expected in MADE if expected == kind)
    assert set(found) == {kind}
    assert {why_dropped(page, PageRules()) for page, expected in MADE if expected == "kept"} == {None}


def test_phrases_count_as_repeats_only_from_their_second_occurrence():
    """Guards: a short page without any repetition that is dropped, as its one phrase is a fifth of it."""
    rules = PageRules(min_words=1)
    words = "The old gardener walked through the bright morning"
    assert why_dropped(words, rules) is None
    assert why_dropped(f"{words} and the old gardener walked home and the old gardener walked away", rules
                       ) == "frequent_ngram"


def test_languages_are_those_of_the_model():
    """Guards: Aragonese, which few identifiers know."""
    PageRules("an")
    with pytest.raises(UserError, match="131 codes"):
        PageRules("klingon")


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
    (lambda path: path.touch(), "complete WET file: it is empty"),
    (write_text, "complete WET file: .*Once"), (write_junk, "not a complete WET file"),
    (write_cut, "complete WET file: its last record is truncated"),
    (lambda path: write_wet(path, ["<html>"], kind="response"), "holds a record of type response")])
def test_bad_wet_files_are_refused_in_one_line(tmp_path, write, message):
    """Guards: tracebacks of warcio; a file of web pages read as text."""
    write(tmp_path / "a.wet")
    with pytest.raises(UserError, match=message) as refused:
        list(read_wet(tmp_path / "a.wet"))
    assert "\n" not in str(refused.value)
