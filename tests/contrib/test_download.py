"""Downloads from a local server with faults."""

import pytest
from local_server import Site, serving

from contrib.common_crawl import crawl
from plotarmour.cli import UserError

CONTENT = bytes(range(256)) * 4_000


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Download from a site to tmp_path/a/t.wet without waiting; only the complete file may stay."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(crawl.time, "sleep", lambda seconds: None)

    def fetched(site):
        path = tmp_path / "a" / "t.wet"
        with serving(site) as url:
            try:
                crawl.download(url + "/t.wet", path)
            finally:
                assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [path.name] * path.exists()
        assert path.read_bytes() == site.files["/t.wet"]
    return fetched


def test_a_dropped_download_is_repeated_and_a_busy_server_asked_again(fetch):
    """Guards: a half file that is taken for a whole one; a 503 that ends a night's work."""
    site = Site({"/t.wet": CONTENT}, drops=[600_000, 300_000], refuse=[503])
    fetch(site)
    fetch(site)
    assert len(site.requests) == 4  # a file that exists is not downloaded again


@pytest.mark.parametrize(("site", "message", "requests"), [
    (Site({"/t.wet": b""}, refuse=[404]), "404", 1), (Site({"/t.wet": b""}, refuse=[403]), "403", 1),
    (Site({"/t.wet": CONTENT}, drops=[0] * 9), "cannot be downloaded", 5)])
def test_a_download_that_fails_is_one_line_and_leaves_nothing(fetch, site, message, requests):
    """Guards: five attempts at a typing mistake, endless ones at a broken server; half a file."""
    with pytest.raises(UserError, match=message) as error:
        fetch(site)
    assert "\n" not in str(error.value) and len(site.requests) == requests
