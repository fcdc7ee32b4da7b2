"""Where text comes from: plain and gzipped text, JSON lines, Parquet, standard input; looked at before it is read.

Every file is hashed as it lies on the disk while it is read, so that a token file can say what it was made from.
"""

import codecs
import glob
import gzip
import hashlib
import os
import select
import shutil
import stat
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from plotarmour.cli import UserError

MIB = 2**20
SNIFFED = 2**16  # bytes looked at before a text is believed to be one
WAIT_S = 10.0  # how long a FIFO may stay silent at first
STDIN = Path("-")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SIGNATURES = {b"PK\x03\x04": "a zip archive", b"%PDF-": "a PDF", b"\x89PNG": "a PNG picture", b"\x7fELF": "a program",
              b"\xff\xd8\xff": "a JPEG picture", b"\x28\xb5\x2f\xfd": "zstd data", b"\xfd7zXZ": "xz data",
              b"BZh": "bzip2 data", b"\x1f\x8b": "gzip data (name it .gz, or unpack it with zcat)",
              b"PAR1": "Parquet (name it .parquet)",
              b"PLOTARM": "a token file"}


@dataclass(frozen=True)
class Source:
    """One text: where it lies, and what its owner calls it.

    Attributes:
        path: of the file that is read.
        name: in headers and messages; "-" for standard input, which is copied to a file first.
        text_column: of JSON lines and Parquet.
        state: of the file when it was first looked at; reading notices when it is another. None: when it is opened.
    """

    path: Path
    name: str
    text_column: str = "text"
    state: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, path: Path, name: str | None = None, text_column: str = "text") -> "Source":
        """A text as it lies there now."""
        shown = (name or path.name).encode("utf-8", "replace").decode()  # a name need not be UTF-8, a header must
        return cls(path, shown, text_column, file_state(path))

    @property
    def kind(self) -> str:
        """"text", "jsonl" or "parquet", by the name's ending."""
        return KINDS.get(Path(self.name.lower().removesuffix(".gz")).suffix, "text")

    @property
    def gzipped(self) -> bool:
        return self.name.lower().endswith(".gz")

    def fingerprint(self) -> dict:
        """Return name, size and the hashes of the first and last MiB: quick, and changes with most changes."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            head = file.read(MIB)
            file.seek(max(0, size - MIB))
            tail = file.read(MIB)
        return {"name": self.name, "bytes": size, "sha256_first_mib": hashlib.sha256(head).hexdigest(),
                "sha256_last_mib": hashlib.sha256(tail).hexdigest()}

    def sha256(self) -> str:
        """Return the SHA-256 of the whole file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path) -> tuple[int, int, int]:
    """Return inode, size and time of change: by name, so that also a file put in another's place counts."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def find_texts(names: list[str | Path]) -> list[Path]:
    """Expand patterns such as data/*.txt, which a shell may have left alone; sorted by name.

    Raises:
        UserError: a pattern that matches nothing.
    """
    found = []
    for name in map(str, names):
        if not glob.has_magic(name) or Path(name).exists():
            found.append(Path(name))
            continue
        matches = sorted(filter(Path.is_file, map(Path, glob.glob(name, recursive=True))), key=Path.as_posix)
        if not matches:
            raise UserError(f"{name} matches no file; expected at least one text. Check the pattern.")
        found += matches
    return found


def is_stream(path: Path) -> bool:
    """Whether a text can be read only once: standard input or a FIFO."""
    return path == STDIN or (path.exists() and stat.S_ISFIFO(path.stat().st_mode))


def check_text(path: Path, name: str | None = None) -> None:
    """Raise `UserError` unless `path` is a readable file that looks like text (or gzip, JSON lines, Parquet)."""
    if is_stream(path):
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a text file. Name the file, e.g. {path}/stories.txt.")
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a UTF-8 text file. Check the path.")
    if not path.is_file():
        raise UserError(f"{path} is a device or socket; expected a text file.")
    source = Source(path, name or path.name)
    try:
        if source.kind == "parquet":
            return
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{source.name} is empty (0 bytes); expected stories as UTF-8 text.")
        with HashingReader(source) as reader:
            start = next(blocks(source, reader, SNIFFED), b"")
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied. Allow reading it, or copy it.") from None
    complaint = _not_text(start)
    if complaint:
        raise UserError(f"{source.name} {complaint}")
    if start.startswith(b"\xef\xbb\xbf"):
        warnings.warn(f"{source.name} begins with a byte order mark (BOM): left out.", stacklevel=2)


def _not_text(start: bytes) -> str | None:
    """What is wrong with a file that begins so, or None."""
    to_utf8 = "expected UTF-8 text. Convert it, e.g. with: iconv -f utf-16 -t utf-8"
    if not start:
        return "is empty (0 bytes when unpacked); expected stories as UTF-8 text."
    if start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return f"is UTF-32 (it begins with its byte order mark); {to_utf8.replace('utf-16', 'utf-32')}."
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return f"is UTF-16 (it begins with its byte order mark); {to_utf8}."
    for signature, what in SIGNATURES.items():
        # "BZh" and "PAR1" may begin a story; data have bytes that no text has.
        if start.startswith(signature) and (signature == b"PLOTARM" or not _is_plain(start)):
            return f"is {what}; expected UTF-8 text."
    zeros = (start[::2].count(0) / len(start[::2]), start[1::2].count(0) / max(1, len(start[1::2])))
    if len(start) >= 64 and max(zeros) > 0.4 and min(zeros) < 0.1:  # Latin letters: every other byte is 0
        return f"looks like UTF-16 without a byte order mark; {to_utf8}."
    control = len(start.translate(None, bytes(set(range(256)) - set(range(32)) | set(b"\t\n\r\x0b\x0c\x1b"))))
    if len(start) >= 512 and control > 0.1 * len(start):
        return f"looks binary ({control / len(start):.0%} control bytes at its beginning); expected UTF-8 text."
    return None


def _is_plain(start: bytes) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False


class HashingReader:
    """A file that is hashed as it is read, and noticed when it changes meanwhile.

    Attributes:
        n_bytes: read so far.
    """

    def __init__(self, source: Source, progress: Callable[[int], object] | None = None,
                 expected: tuple[int, str] | None = None):
        """Open the file. `expected`: what the first so many bytes must hash to; `matches` says whether they did."""
        self.source, self.progress, self.expected = source, progress, expected
        self.file: BinaryIO = source.path.open("rb", buffering=0)
        self.before = source.state or file_state(source.path)
        self.sha256, self.n_bytes, self.matches = hashlib.sha256(), 0, None

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size if size >= 0 else MIB)
        new = memoryview(data)
        if self.expected and self.n_bytes < self.expected[0] <= self.n_bytes + len(data):
            cut = self.expected[0] - self.n_bytes
            self.sha256.update(new[:cut])
            self.matches = self.sha256.hexdigest() == self.expected[1]
            new = new[cut:]
        self.sha256.update(new)
        self.n_bytes += len(data)
        if self.progress:
            self.progress(len(data))
        return data

    def digest(self) -> tuple[int, str]:
        """Return how many bytes were read, and their SHA-256."""
        return self.n_bytes, self.sha256.copy().hexdigest()

    def finish(self) -> str:
        """Read what is left, and return the SHA-256 of the whole file.

        Raises:
            UserError: the file changed while it was read.
        """
        while self.read(MIB):
            pass
        after = file_state(self.source.path)
        self.close()
        if after != self.before or self.n_bytes != self.before[1]:
            raise UserError(f"{self.source.name} changed while it was read ({self.before[1]:,} bytes at first, "
                            f"{after[1]:,} now); expected a file that stays as it is. Start again when it is complete.")
        return self.sha256.hexdigest()

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "HashingReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def blocks(source: Source, reader: HashingReader, size: int) -> Iterator[bytes]:
    """Yield the unpacked bytes of a text in blocks of at most `size`.

    Raises:
        UserError: damaged or truncated gzip data.
    """
    file = gzip.GzipFile(fileobj=reader, mode="rb") if source.gzipped else reader
    try:
        while block := file.read(size):
            yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{source.name} is damaged or cut short ({error}); expected whole gzip data. Get it "
                        "again.") from None


def spool(path: Path, to: Path) -> None:
    """Copy standard input or a FIFO to a file: what can be read only once cannot be checked, or read for a tokenizer.

    Raises:
        UserError: a FIFO that nobody writes, no input.
    """
    with to.open("wb") as out:
        if path == STDIN:
            shutil.copyfileobj(sys.stdin.buffer, out, MIB)
        else:
            _copy_fifo(path, out)
        if not out.tell():
            raise UserError(f"{'standard input' if path == STDIN else path} is empty (0 bytes); expected stories as "
                            "UTF-8 text.")


def _copy_fifo(path: Path, out: BinaryIO) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a blocking open would wait for a writer for ever
    try:
        begun, poll, deadline = False, select.poll(), time.monotonic() + WAIT_S
        poll.register(handle, select.POLLIN)
        while True:
            ready = poll.poll(100)
            data = os.read(handle, MIB) if ready else None
            if data:
                begun = True
                out.write(data)
            elif data == b"" and begun:
                return  # the writer has closed it
            elif not begun and time.monotonic() > deadline:
                raise UserError(f"{path} is a FIFO that nobody has written to for {WAIT_S:.0f} s; expected text. Start "
                                "the program that writes it, or name a file.")
            elif data == b"":
                time.sleep(0.05)  # no writer yet
    finally:
        os.close(handle)
