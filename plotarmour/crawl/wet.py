"""WET files of Common Crawl: the text of web pages, one record each, in a WARC (plain or gzip), read as a stream."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.crawl.pages import require
from plotarmour.crawl.wetlist import check_file

GZIP = b"\x1f\x8b"


class _CutShort(Exception):
    """The file ends where it must not."""


class _WholeGzip(gzip.GzipFile):
    """Says where a file was cut; warcio would take the EOFError for the file's end."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except EOFError:
            raise _CutShort from None


def read_wet(path: Path, progress: Callable[[int], object] | None = None) -> Iterator[str]:
    """Stream the pages of one WET file; memory holds one page.

    Args:
        path: `.wet`, or compressed `.wet.gz` (told by content).
        progress: called with the number of bytes of the file just read.

    Yields:
        Texts, without blank space around them. Bytes that are not UTF-8 become replacement characters.

    Raises:
        UserError: no such file, not a WET file (also a WARC with HTML), one that is cut short or damaged.

    Source:
        The WARC format, ISO 28500:2017; in WET files pages are records of type "conversion".
    """
    check_file(path)
    require("warcio")
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    with path.open("rb") as raw:
        packed = raw.peek(2)[:2] == GZIP
        stream = _WholeGzip(fileobj=raw) if packed else raw
        n_read = n_records = 0
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
                if str(len(content)) != length:  # None where even the header is cut
                    raise _CutShort
                if progress:
                    progress(raw.tell() - n_read)
                    n_read = raw.tell()
                if kind == "conversion":
                    yield content.decode("utf-8", "replace").strip()
        except (_CutShort, zlib.error, gzip.BadGzipFile, ArchiveLoadFailed) as error:
            how = "is cut short" if isinstance(error, _CutShort) else f"is damaged ({str(error).splitlines()[0]})"
            raise UserError(f"{path} {how} after {n_records:,} records, {raw.tell():,} of {path.stat().st_size:,} "
                            "bytes. Delete it and fetch it again.") from None
