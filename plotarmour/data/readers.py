"""Texts as files to stories, in chunks: plain text, JSON lines (both also gzipped), Parquet, standard input.

Every file is hashed while it is read, so that a token file can state what it was made from. Memory holds a block and
the longest story; the stories do not depend on the size of the blocks.
"""

import gzip
import hashlib
import json
import os
import re
import shlex
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from plotarmour.cli import UserError, warn
from plotarmour.data.stories import BLANK, SEPARATORS

MIB = 2**20
BLOCK = MIB  # bytes read, cut, encoded and written at once; larger blocks leave the CPU's caches and are slower
LONGEST_STORY = 2**30  # bytes
PARQUET_ROWS = 100  # decoded at once
STDIN = Path("-")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".json": "json", ".csv": "csv",
         ".tsv": "table"}  # those that pandas reads are refused
BLANK_LINES = re.compile(rb"\n[ \t\r\n\x0b\x0c]*\n")
BLANK_BYTES = BLANK.encode()
BOM = b"\xef\xbb\xbf"
# Beginnings of files that are taken for text, and what such a file is.
SIGNATURES = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x1f\x8b": "gzip data", b"PK\x03\x04": "a zip archive",
              b"\x28\xb5\x2f\xfd": "zstd data", b"\xfd7zXZ": "xz data", b"BZh9": "bzip2 data", b"%PDF-": "a PDF",
              b"PAR1": "Parquet", b"PLOTARM": "a token file"}


@dataclass(frozen=True)
class Source:
    """One text, and how it is read."""

    path: Path  # of the file that is read
    name: str  # in headers and messages; "-" for standard input, which is copied to a file first
    text_column: str = "text"  # of JSON lines and Parquet
    stories: str = "endoftext"  # what makes a story in plain text: a key of `SEPARATORS`
    errors: str = "strict"  # or "replace" to put U+FFFD in place of bytes that are not UTF-8
    state: tuple[int, int, int] | None = None  # `file_state` when the text was checked; None: when it is opened

    @classmethod
    def of(cls, path: Path, name: str | None = None, **options: str) -> "Source":
        """Return the text as it is now; the options are `text_column`, `stories` and `errors`."""
        shown = (name or path.name).encode("utf-8", "replace").decode()  # a file name may not be UTF-8, a header is
        return cls(path, shown, **options, state=file_state(path))

    @property
    def kind(self) -> str:
        """"text", or what `KINDS` says of the ending of the name."""
        return KINDS.get(Path(self.name.lower().removesuffix(".gz")).suffix, "text")

    def fingerprint(self) -> dict:
        """Return name, size and the hashes of the first and last MiB: fast, and most changes change it."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(MIB)
            file.seek(max(0, size - MIB))
            tail = file.read(MIB)
        return {"name": self.name, "bytes": size, "sha256_first_mib": hashlib.sha256(head).hexdigest(),
                "sha256_last_mib": hashlib.sha256(tail).hexdigest()}


def file_state(path: Path) -> tuple[int, int, int]:
    """Return inode, size and time of change of the file that has this name now."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def is_stream(path: Path) -> bool:
    """Return whether a text can be read only once: standard input or a FIFO."""
    return path == STDIN or (path.exists() and stat.S_ISFIFO(path.stat().st_mode))


def check_text(path: Path, name: str | None = None) -> None:
    """Raise `UserError` unless `path` is a readable file that looks like text (or gzip, JSON lines, Parquet)."""
    if is_stream(path):
        return
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is no plain file" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; expected a UTF-8 text file. Check the path.")
    source = Source(path, name or path.name)
    if source.kind == "parquet":
        return
    if source.kind in ("json", "csv", "table"):
        table = f"pandas.read_{source.kind}({str(path)!r})"
        code = f"import pandas; {table}.to_json('rows.jsonl', orient='records', lines=True)"
        raise UserError(f"{source.name} is a table by its name; expected text, JSON lines or Parquet. If its lines are "
                        "JSON objects, name it .jsonl (.jsonl.gz if packed); if it is prose, .txt; else convert it: "
                        f'python -c "{code}"')
    with HashingReader(source) as reader:
        start = next(blocks(source, reader, 2**16), b"")
    if not start:
        raise UserError(f"{source.name} is empty (0 bytes of text); expected stories as UTF-8 text.")
    found = [found for signature, found in SIGNATURES.items() if start.startswith(signature)]
    if start.count(0) > len(start) / 4:
        found.append("full of zero bytes, as UTF-16 or binary data are")
    if found[:1] == ["gzip data"] and source.name.lower().endswith(".gz"):
        raise UserError(f"{source.name} is gzip data inside gzip data; expected text inside. Unpack it once more: zcat "
                        f"{shlex.quote(str(path))} > once.txt.gz, and read once.txt.gz.")
    if found:
        raise UserError(f"{source.name} is {found[0]}; expected UTF-8 text. Convert it (UTF-16 with: iconv -f utf-16 "
                        "-t utf-8) or unpack it; files named .gz and .parquet are read as they are.")
    if start.startswith(BOM):
        warn(f"{source.name} begins with a byte order mark (BOM): left out.")


class HashingReader(FileIO):
    """A file that is hashed while it is read; `progress` is called with the number of bytes of each read."""

    def __init__(self, source: Source, progress: Callable[[int], object] | None = None):
        super().__init__(source.path)
        self.source, self.progress = source, progress
        self.before = source.state or file_state(source.path)
        self._sha256, self.n_bytes = hashlib.sha256(), 0  # of what was read so far

    def read(self, size: int) -> bytes:
        data = super().read(size)
        self._sha256.update(data)
        self.n_bytes += len(data)
        if self.progress:
            self.progress(len(data))
        return data

    def finish(self) -> str:
        """Read the rest, and return the SHA-256 of the whole file.

        Raises:
            UserError: the file changed while it was read.
        """
        while self.read(MIB):
            pass
        after = file_state(self.source.path)
        if after != self.before or self.n_bytes != self.before[1]:
            raise UserError(f"{self.source.name} changed while it was read ({self.before[1]:,} bytes at first, "
                            f"{after[1]:,} now); expected a file that does not change. Start again when it is "
                            "complete.")
        return self._sha256.hexdigest()


def blocks(source: Source, reader: HashingReader, size: int) -> Iterator[bytes]:
    """Yield the unpacked bytes of a text in blocks of at most `size`.

    Raises:
        UserError: damaged or truncated gzip data.
    """
    file = gzip.GzipFile(fileobj=reader, mode="rb") if source.name.lower().endswith(".gz") else reader
    try:
        while block := file.read(size):
            yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{source.name} is cut short ({error}); expected whole gzip data. Get it again.") from None


@dataclass(frozen=True)
class Chunk:
    """Some whole stories."""

    texts: list[str]  # without the blank space around them, none empty
    sizes: list[int]  # UTF-8 bytes of each text
    position: int  # where the next chunk begins: in bytes of the unpacked text, or in rows of a Parquet file
    n_empty: int  # empty stories dropped
    n_replaced: int  # U+FFFD put in


def read_chunks(source: Source, reader: HashingReader, position: int = 0, block: int = BLOCK) -> Iterator[Chunk]:
    """Stream the stories of one text.

    Args:
        source: the text.
        reader: reads and hashes the file; call `reader.finish()` afterwards.
        position: of an earlier chunk, to continue behind it. What lies before is read and hashed, too.
        block: bytes read at once.

    Raises:
        UserError: text that is not UTF-8 (byte offset, line), a story above `LONGEST_STORY`, damaged records.
    """
    if source.kind == "parquet":
        yield from _read_parquet(source, reader, position, block)
        return
    separator = b"\n" if source.kind == "jsonl" else SEPARATORS[source.stories]
    # A story whose end is not read yet; its last bytes, in which a separator may begin, are in `tail`.
    begun, tail, n_read = bytearray(), b"", 0
    for data in blocks(source, reader, block):
        skipped = min(len(data), max(0, position - n_read))
        n_read += len(data)
        data, held = tail + data[skipped:], b""
        if source.stories == "paragraph" and source.kind == "text":
            held = data[len(data.rstrip(BLANK_BYTES)):]  # may go on in the next block
            data = BLANK_LINES.sub(lambda blank: separator.rjust(len(blank[0])), data.removesuffix(held))
        *parts, rest = data.split(separator) if separator else [data]
        if parts:
            parts[0], begun = b"".join([begun, parts[0]]), bytearray()
            chunk = _chunk_of(source, parts, position, separator)
            position = chunk.position
            yield chunk
        cut = max(0, len(rest) - max(0, len(separator) - 1))
        begun += rest[:cut]
        tail = rest[cut:] + held
        if len(begun) > LONGEST_STORY:
            raise UserError(f"{source.name}: the story or line at byte {position:,} has more than "
                            f"{LONGEST_STORY // MIB:,} MiB; expected shorter ones. Put separators between stories, or "
                            "use --stories line.")
    begun = b"".join([begun, tail])
    if begun and not begun.isspace():  # nothing after the last separator is no story
        yield _chunk_of(source, [begun], position, b"")


def read_whole(source: Source, block: int = BLOCK) -> Iterator[Chunk]:
    """Stream the stories of one text from its beginning; it must not change meanwhile."""
    with HashingReader(source) as reader:
        yield from read_chunks(source, reader, 0, block)
        reader.finish()


def _chunk_of(source: Source, parts: list[bytes], start: int, separator: bytes) -> Chunk:
    """Decode complete stories, or lines of JSON, that begin at byte `start`, each followed by the separator."""
    stories = parts
    if source.stories == "line_without_prefix" and source.kind == "text":
        for i, line in enumerate(parts):
            if b"\t" not in line and line.strip(BLANK_BYTES):
                raise UserError(f"{source.name}: the line at byte {start + sum(map(len, parts[:i])) + i:,} has no tab; "
                                "expected a prefix, a tab and the story in each line. It begins "
                                f"{line[:60].decode(errors='replace')!r}. Correct it, or use --stories line alone.")
        stories = [line.partition(b"\t")[2] for line in parts]
    stories = [story.strip(BLANK_BYTES) for story in stories]
    if start == 0:
        stories[0] = stories[0].removeprefix(BOM).strip(BLANK_BYTES)
    try:
        texts, n_replaced = [story.decode("utf-8", source.errors) for story in stories], 0
    except UnicodeDecodeError:
        raise _not_utf8(source, start, separator.join(parts)) from None
    if source.errors == "replace":
        n_replaced = sum(text.count("\ufffd") - story.count(b"\xef\xbf\xbd")
                         for text, story in zip(texts, stories, strict=True) if not text.isascii())
    if source.kind == "jsonl":
        texts = list(_texts_of_records(source, texts, parts, start))
    position = start + sum(map(len, parts)) + len(separator) * len(parts)
    return _chunk(source, texts, position, n_replaced)


def _chunk(source: Source, texts: list[str], position: int, n_replaced: int = 0) -> Chunk:
    """Return the chunk of some stories, of which the empty ones are dropped."""
    told = [text for text in texts if text]
    try:
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in told]
    except UnicodeEncodeError as error:  # JSON can write what UTF-8 cannot
        raise UserError(f"{source.name}: a text has a lone surrogate (U+{ord(error.object[error.start]):04X}); "
                        "expected characters that UTF-8 has. Correct or remove that record.") from None
    return Chunk(told, sizes, position, len(texts) - len(told), n_replaced)


def _not_utf8(source: Source, start: int, raw: bytes) -> UserError:
    """Return the message for bytes that begin at `start` in the text, with offset and line of the first wrong one."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        place, byte = error.start, raw[error.start]
    line, left = 1, start + place
    with HashingReader(source) as reader:
        for block in blocks(source, reader, MIB):
            line += block.count(b"\n", 0, left)
            left -= min(left, len(block))
            if not left:
                break
    path = shlex.quote(source.name if source.name == str(STDIN) else str(source.path))
    packed = source.name.lower().endswith(".gz")
    command = f"zcat {path} | iconv -f cp1252 -t utf-8" if packed else f"iconv -f cp1252 -t utf-8 {path}"
    return UserError(f"{source.name} is not UTF-8: byte 0x{byte:02x} at offset {start + place:,}, line {line:,}. Save "
                     f"it as UTF-8, e.g. text of Western Windows with: {command} > utf8.txt, or use --errors replace.")


def likely_stories(source: Source) -> str:
    """Return what probably makes a story in a text without separators: "paragraph" where it has blank lines."""
    with HashingReader(source) as reader:
        start = next(blocks(source, reader, MIB), b"")
    return "paragraph" if len(BLANK_LINES.findall(start.strip(BLANK_BYTES))) >= 2 else "line"


def _text_of(value: object, column: str) -> str:
    """Return the text of a record; null is an empty one."""
    if not isinstance(value, str | None):
        raise TypeError(f"{column!r} holds {type(value).__name__}; expected text")
    return (value or "").strip(BLANK)


def _texts_of_records(source: Source, lines: list[str], parts: list[bytes], start: int) -> Iterator[str]:
    """Yield the texts of JSON lines, which are `parts` of a file from byte `start` on, decoded; blank ones are none."""
    for i, line in enumerate(lines):
        try:
            if line:
                yield _text_of(json.loads(line)[source.text_column], source.text_column)
        except (ValueError, RecursionError, LookupError, TypeError) as error:
            offset = start + sum(map(len, parts[:i])) + i
            raise UserError(f"{source.name}: the line at byte {offset:,} is no JSON object with text in "
                            f"{source.text_column!r} ({type(error).__name__}: {error}). It begins {line[:60]!r}. "
                            "Correct it, or name the column with --text-column.") from None


def _read_parquet(source: Source, reader: HashingReader, position: int, block: int) -> Iterator[Chunk]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{source.name} is Parquet and pyarrow is not installed; expected it for this format. Install "
                        "it with: pip install pyarrow") from None
    column = source.text_column
    try:
        with parquet.ParquetFile(source.path) as file:
            if column not in file.schema_arrow.names:
                raise LookupError(f"its columns are {', '.join(file.schema_arrow.names)}")
            n_read, texts, size = 0, [], 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                n_read += len(batch)
                # The file is hashed in step with the rows, so that a progress bar moves.
                reader.read(reader.before[1] * n_read // file.metadata.num_rows - reader.n_bytes)
                if n_read <= position:
                    continue
                texts += [_text_of(row, column) for row in batch.column(0).to_pylist()]
                size += batch.nbytes
                if size >= block or n_read == file.metadata.num_rows:
                    yield _chunk(source, texts, n_read)
                    texts, size = [], 0
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise UserError(f"{source.name} cannot be read as Parquet with text in column {column!r} "
                        f"({str(error).partition(chr(10))[0]}). Name the column with --text-column, or get the file "
                        "again.") from None
