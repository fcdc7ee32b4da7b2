"""Which WET files: named by hand, or listed in a crawl's `wet.paths(.gz)`."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from plotarmour.cli import UserError
from plotarmour.crawl.downloads import download

COMMON_CRAWL = "https://data.commoncrawl.org/"


@dataclass(frozen=True)
class Wet:
    """One WET file.

    Args:
        path: where it is, or will be once it is fetched.
        url: where to fetch it; None for a file of the user's, which is never deleted.
    """

    path: Path
    url: str | None = None

    def describe(self) -> list:
        """What tells it from another: the address, or name, size and time of change."""
        stat = None if self.url else self.path.stat()
        return [self.url] if self.url else [str(self.path.absolute()), stat.st_size, stat.st_mtime_ns]


def check_file(path: Path) -> None:
    """Raise `UserError` unless `path` is a file with something in it."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file. Name the file, or its files one by one.")
    if not path.exists():
        raise UserError(f"{path} does not exist. Check the path.")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty (0 bytes). Fetch it again.")


def list_wets(inputs: list[str], downloads: Path, base_url: str = COMMON_CRAWL, limit: int | None = None
              ) -> tuple[Wet, ...]:
    """Name the WET files of some listings and files.

    Args:
        inputs: files or addresses: listings, whose names end in .paths or .paths.gz, and WET files.
        downloads: folder for what is fetched, listings included.
        base_url: stands before every path of a listing.
        limit: how many files at most.

    Returns:
        The files in order; nothing but listings has been fetched.

    Raises:
        UserError: a missing listing, a listing of something else, two files of one name, no file.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no file; expected 1 or more.")
    wets = []
    for name in inputs:
        if name.endswith((".paths", ".paths.gz")):
            wets += [Wet(downloads / path.rsplit("/", 1)[-1], base_url.rstrip("/") + "/" + path)
                     for path in _read_listing(name, downloads)]
        elif "://" in name:
            wets.append(Wet(downloads / _checked(urlsplit(name).path, name).rsplit("/", 1)[-1], name))
        else:
            wets.append(Wet(Path(name)))
    wets = wets[:limit]
    paths = [wet.path.absolute() for wet in wets]
    if twice := {str(path) for path in paths if paths.count(path) > 1} if len(set(paths)) < len(paths) else None:
        raise UserError(f"{min(twice)} is named twice; expected every WET file once.")
    return tuple(wets)


def _read_listing(name: str, downloads: Path) -> list[str]:
    """Return the paths in a listing, fetched first if it is an address. Every crawl's is called the same, so that the
    crawl's own name goes before it."""
    if "://" in name:
        crawl = urlsplit(name).path.strip("/").split("/")[-2:]
        name = str(download(name, downloads / ".".join(crawl)).path)
    check_file(Path(name))
    content = Path(name).read_bytes()
    try:
        lines = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode().split()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"{name} is not a listing of WET files: {error}. Fetch it again.") from None
    if not lines:
        raise UserError(f"{name} lists no file; expected a path per line.")
    return [_checked(line, f"{name}, line {number}") for number, line in enumerate(lines, 1)]


def _checked(path: str, where: str) -> str:
    if not path.endswith((".wet", ".wet.gz")):
        raise UserError(f"{where}: {path[:80]!r} is no path of a WET file; expected one that ends in .warc.wet.gz, as "
                        "in a crawl's wet.paths.gz.")
    return path
