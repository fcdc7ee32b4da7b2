"""Downloads from a local server with faults."""

import pytest
from local_server import Site, serving

from plotarmour import files
from plotarmour.cli import UserError

CONTENT = bytes(range(256)) * 4_000


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Download from a site to tmp_path/a/t.wet without waiting; only the complete file may stay."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)

    def fetched(site):
        path = tmp_path / "a" / "t.wet"
        with serving(site) as url:
            try:
                files.download(url + "/t.wet", path)
            finally:
                assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [path.name] * path.exists()
        assert path.read_bytes() == site.files["/t.wet"]
    return fetched


def test_a_dropped_download_is_resumed_and_a_busy_server_asked_again(fetch):
    """Guards: 80 MB that start from zero at each drop; a 503 that ends a night's work."""
    site = Site({"/t.wet": CONTENT}, drops=[600_000, 300_000], refuse=[503])
    fetch(site)
    starts = [span and int(span[6:-1]) for _, _, span in site.requests]
    assert starts[:2] == [None, None] and 0 < starts[2] < starts[3] < len(CONTENT)
    fetch(site)
    assert len(site.requests) == 4  # a file that exists is not downloaded again


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_was_replaced_on_the_server_is_downloaded_anew(fetch, ranges):
    """Guards: the head of one file with the tail of another; a whole file appended to a half one."""
    site = Site({"/t.wet": CONTENT}, drops=[600_000], ranges=ranges)
    site.after_drop = lambda: site.files.update({"/t.wet": CONTENT[::-1]})
    fetch(site)


@pytest.mark.parametrize(("site", "message", "requests"), [
    (Site({"/t.wet": b""}, refuse=[404]), "404", 1), (Site({"/t.wet": b""}, refuse=[403]), "403", 1),
    (Site({"/t.wet": CONTENT}, drops=[0] * 9), "cannot be downloaded", 5)])
def test_a_download_that_fails_is_one_line_and_leaves_nothing(fetch, site, message, requests):
    """Guards: five attempts at a typing mistake, endless ones at a broken server; half a file."""
    with pytest.raises(UserError, match=message) as error:
        fetch(site)
    assert "\n" not in str(error.value) and len(site.requests) == requests
