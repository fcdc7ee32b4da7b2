import hashlib
import os
import random
import shutil
import socket

import pytest
from web import Site, serving

from plotarmour.cli import UserError
from plotarmour.crawl import partfile
from plotarmour.crawl.downloads import download

CONTENT = random.Random(0).randbytes(1_000_003)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fetch(tmp_path):
    """Download from a site to tmp_path/a/t.txt, without waiting; checks that only the whole file stays."""
    def fetched(site, **options):
        with serving(site) as url:
            done = download(url + "/t.txt", tmp_path / "a" / "t.txt", wait_s=0.001, **options)
        assert done.path.read_bytes() == site.files["/t.txt"] and done.n_bytes == len(site.files["/t.txt"])
        assert done.sha256 == hashlib.sha256(site.files["/t.txt"]).hexdigest()
        assert [p.name for p in done.path.parent.iterdir()] == ["t.txt"]
        return done
    return fetched


def test_dropped_connections_cost_no_byte_twice(fetch, capsys):
    """Guards: a download that starts from zero after every drop; a hash of a file with a seam."""
    site = Site({"/t.txt": CONTENT}, drops=[300_000, 0, 5, 400_000])
    assert fetch(site).sha256 == SHA256
    assert site.sent == len(CONTENT)
    starts = [span and int(span[6:-1]) for _, span, _ in site.asked]
    assert starts == [None, 300_000, 300_000, 300_005, 700_005]
    assert "broke off at 300,000 bytes" in capsys.readouterr().err


def test_a_server_without_range_starts_over(fetch, capsys):
    """Guards: the whole file appended to a half one."""
    assert fetch(Site({"/t.txt": CONTENT}, drops=[300_000, 100_000], ranges=False)).sha256 == SHA256
    assert "cannot go on in the middle; starting over (300,000 bytes dropped)" in capsys.readouterr().err


def test_a_server_that_never_comes_further_is_given_up(tmp_path):
    """Guards: an endless loop where every attempt starts at zero and breaks off at the same byte."""
    with serving(Site({"/t.txt": CONTENT}, drops=[300_000] * 9, ranges=False)) as url:
        with pytest.raises(UserError, match="cannot be fetched: the connection broke off at 300,000 bytes"):
            download(url + "/t.txt", tmp_path / "t.txt", wait_s=0.001, attempts=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".t.txt.partial", ".t.txt.partial.json"]


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("n_bytes", [1_000_003, 200_000, 1_100_000])
def test_a_file_that_changed_meanwhile_starts_over_and_says_so(fetch, capsys, if_range, n_bytes):
    """Guards: the head of one file with the tail of another, also from servers that ignore If-Range."""
    site = Site({"/t.txt": CONTENT}, drops=[300_000], if_range=if_range)
    site.after_drop = lambda: site.files.update({"/t.txt": CONTENT[::-1][:1_000_003].ljust(n_bytes)[:n_bytes]})
    fetch(site)
    assert "starting over (300,000 bytes dropped)" in capsys.readouterr().err


DATE = {"Last-Modified": "Fri, 20 Nov 2026 10:00:00 GMT"}


@pytest.mark.parametrize(("etag", "date", "span"), [(None, {}, None), ('W/"weak"', {}, None),
                                                    ('W/"weak"', DATE, "bytes=300000-")])
def test_without_a_mark_to_know_the_file_by_nothing_is_continued(tmp_path, etag, date, span, capsys):
    """Guards: a seam between two files that nobody can tell apart. With a date, it is continued."""
    site = Site({"/t.txt": CONTENT}, drops=[300_000], etag=lambda *_: etag, headers=date, if_range=False)
    with serving(site) as url:
        with pytest.raises(UserError):
            download(url + "/t.txt", tmp_path / "a" / "t.txt", attempts=1)
        done = download(url + "/t.txt", tmp_path / "a" / "t.txt")
    assert done.sha256 == SHA256 and ("neither an ETag nor a date" in capsys.readouterr().err) == (not date)
    assert site.asked[1][1:] == (span, date.get("Last-Modified"))


def test_a_whole_part_that_was_not_renamed_is_not_fetched_again(fetch, tmp_path):
    """Guards: 416 for a file that was complete when its process was killed."""
    site = Site({"/t.txt": CONTENT}, drops=[300_000])
    with serving(site) as url:
        with pytest.raises(UserError):
            download(url + "/t.txt", tmp_path / "t.txt", attempts=1)
        (tmp_path / ".t.txt.partial").write_bytes(CONTENT)
        assert download(url + "/t.txt", tmp_path / "t.txt").sha256 == SHA256
    assert site.sent == 300_000


def test_a_complete_file_is_kept_and_force_replaces_it(fetch, tmp_path, capsys):
    """Guards: 2 GB fetched twice; a file of the user's overwritten without a word."""
    site = Site({"/t.txt": CONTENT})
    assert fetch(site).fetched and not fetch(site).fetched
    (tmp_path / "a" / "t.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match="exists with 4 bytes, the file on the server has 1,000,003. Use --force"):
        fetch(site)
    assert fetch(site, force=True).fetched
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        done = download(f"http://127.0.0.1:{nobody.getsockname()[1]}/t.txt", tmp_path / "a" / "t.txt")
    assert done.sha256 == SHA256 and "unchecked" in capsys.readouterr().err


def test_busy_servers_are_asked_again(fetch, capsys):
    """Guards: a 503 that ends a night's work."""
    fetch(Site({"/t.txt": CONTENT}, refuse=[503, 429, 500]))
    assert "answers 503" in capsys.readouterr().err


def test_an_empty_file_arrives(fetch):
    """Guards: size 0 taken for size unknown."""
    assert fetch(Site({"/t.txt": b""})).n_bytes == 0


def test_damage_that_the_hub_can_tell_is_told(fetch, tmp_path):
    """Guards: a file that differs from what the hub holds. The right hash passes."""
    fetch(Site({"/t.txt": CONTENT}, headers={"X-Linked-ETag": f'"{SHA256}"'}))
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(UserError, match="arrived damaged"):
        fetch(Site({"/t.txt": CONTENT[:-1] + b"?"}, headers={"X-Linked-ETag": f'"{SHA256}"'}))
    assert list((tmp_path / "a").iterdir()) == []


@pytest.mark.parametrize(("status", "message"), [(404, "404 Not Found. Check the address"), (403, "403 Forbidden")])
def test_what_is_not_there_is_said_at_once_and_leaves_nothing(tmp_path, status, message):
    """Guards: six attempts at a typing mistake; empty folders."""
    site = Site({"/t.txt": b""}, refuse=[status])
    with serving(site) as url, pytest.raises(UserError, match=message):
        download(url + "/t.txt", tmp_path / "a" / "t.txt")
    assert len(site.asked) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "message"), [("ftp:/x", "not an address"), ("x.txt", "not an address"),
                                              ("http://127.0.0.1:NOBODY/x", "Connection refused")])
def test_no_connection_is_one_line(tmp_path, url, message):
    """Guards: three layers of tracebacks for a cable that is not plugged in."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=message) as found:
            download(url.replace("NOBODY", str(nobody.getsockname()[1])), tmp_path / "x", attempts=2, wait_s=0.001)
    assert "\n" not in str(found.value) and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_the_first_byte_and_in_the_middle(fetch, tmp_path, monkeypatch):
    """Guards: two hours of download that end in ENOSPC; a part that cannot be continued afterwards."""
    site, usage = Site({"/t.txt": CONTENT}), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_002))
    with pytest.raises(UserError, match="needs 1,000,003 more bytes, .* has 1,000,002 free"):
        fetch(site)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    opened = partfile.PartFile._open

    class FullFile:
        def __init__(self, file):
            self.file, self.room = file, 300_001

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, block):
            if not self.room:
                raise OSError(28, "No space left on device")
            n = self.file.write(block[:self.room])
            self.room -= n
            return n

    def open_full(part):
        opened(part)
        part.file = FullFile(part.file)

    monkeypatch.setattr(partfile.PartFile, "_open", open_full)
    with pytest.raises(UserError, match="disk or your quota is full"):
        fetch(site)
    monkeypatch.setattr(partfile.PartFile, "_open", opened)
    assert 0 < (tmp_path / "a" / ".t.txt.partial").stat().st_size <= 300_001
    assert fetch(site).sha256 == SHA256


@pytest.mark.skipif(os.name != "posix", reason="no lock on this system")
def test_two_processes_do_not_write_one_part(tmp_path):
    """Guards: two starts of one command that append to the same part."""
    site = Site({"/t.txt": CONTENT}, drops=[300_000])
    with serving(site) as url:
        def meanwhile():
            with pytest.raises(UserError, match="by another process"):
                download(url + "/t.txt", tmp_path / "t.txt")
            seen.append(True)
        seen = []
        site.after_drop = meanwhile
        assert download(url + "/t.txt", tmp_path / "t.txt", wait_s=0.3).sha256 == SHA256
    assert seen == [True]
