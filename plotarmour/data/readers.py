"""Texts as files: plain text, JSON lines (both also gzipped), Parquet, standard input; checked before they are read.

Every file is hashed while it is read, so that a token file can state what it was made from.
"""

import glob
import gzip
import hashlib
import os
import shutil
import stat
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plotarmour.cli import UserError

MIB = 2**20
STDIN = Path("-")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BOM = b"\xef\xbb\xbf"
# Beginnings of files that are taken for text, what such a file is, and what to do.
SIGNATURES = {b"\xff\xfe": ("UTF-16", "Convert it, e.g. with: iconv -f utf-16 -t utf-8"),
              b"\xfe\xff": ("UTF-16", "Convert it, e.g. with: iconv -f utf-16 -t utf-8"),
              b"\x1f\x8b": ("gzip data", "Name it .gz, or unpack it with zcat."),
              b"PK\x03\x04": ("a zip archive", "Unpack it."), b"\x28\xb5\x2f\xfd": ("zstd data", "Unpack it."),
              b"\xfd7zXZ": ("xz data", "Unpack it."), b"BZh9": ("bzip2 data", "Unpack it."),
              b"%PDF-": ("a PDF", "Extract its text, e.g. with pdftotext."),
              b"PAR1": ("Parquet", "Name it .parquet."), b"PLOTARM": ("a token file", "Use it as it is.")}


@dataclass(frozen=True)
class Source:
    """One text.

    Attributes:
        path: of the file that is read.
        name: in headers and messages; "-" for standard input, which is copied to a file first.
        text_column: of JSON lines and Parquet.
        state: inode, size and time of change when the text was checked; None: as it is when it is opened.
    """

    path: Path
    name: str
    text_column: str = "text"
    state: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, path: Path, name: str | None = None, text_column: str = "text") -> "Source":
        """Return the text as it is now."""
        shown = (name or path.name).encode("utf-8", "replace").decode()  # a file name may not be UTF-8, a header is
        return cls(path, shown, text_column, file_state(path))

    @property
    def kind(self) -> str:
        """"text", "jsonl" or "parquet", by the ending of the name."""
        return KINDS.get(Path(self.name.lower().removesuffix(".gz")).suffix, "text")

    @property
    def gzipped(self) -> bool:
        return self.name.lower().endswith(".gz")

    def fingerprint(self) -> dict:
        """Return name, size and the hashes of the first and last MiB: fast, and most changes change it."""
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
    """Return inode, size and time of change of the file that has this name now."""
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def find_texts(names: list[str | Path]) -> list[Path]:
    """Expand patterns such as data/*.txt, which some shells do not expand; sorted by name.

    Raises:
        UserError: a pattern that matches nothing.
    """
    paths = []
    for name in map(str, names):
        if not glob.has_magic(name) or Path(name).exists():
            paths.append(Path(name))
            continue
        matches = sorted(filter(Path.is_file, map(Path, glob.glob(name, recursive=True))), key=Path.as_posix)
        if not matches:
            raise UserError(f"{name} matches no file; expected at least one text. Check the pattern.")
        paths += matches
    return paths


def is_stream(path: Path) -> bool:
    """Return whether a text can be read only once: standard input or a FIFO."""
    return path == STDIN or (path.exists() and stat.S_ISFIFO(path.stat().st_mode))


def copy_stream(path: Path, to: Path) -> None:
    """Copy standard input or a FIFO to a file, which can be checked, and read again for a tokenizer."""
    with sys.stdin.buffer if path == STDIN else path.open("rb") as stream, to.open("wb") as file:
        shutil.copyfileobj(stream, file, MIB)


def check_text(path: Path, name: str | None = None) -> None:
    """Raise `UserError` unless `path` is a readable file that looks like text (or gzip, JSON lines, Parquet)."""
    if is_stream(path):
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a text file. Name the file, e.g. {path}/stories.txt.")
    if not path.is_file():
        raise UserError(f"{path} {'is no plain file' if path.exists() else 'does not exist'}; expected a UTF-8 text "
                        "file. Check the path.")
    source = Source(path, name or path.name)
    if source.kind == "parquet":
        return
    try:
        with HashingReader(source) as reader:
            start = next(blocks(source, reader, 2**16), b"")
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied. Allow reading it, or copy it.") from None
    if not start:
        raise UserError(f"{source.name} is empty (0 bytes of text); expected stories as UTF-8 text.")
    for signature, (description, remedy) in SIGNATURES.items():
        if start.startswith(signature):
            raise UserError(f"{source.name} is {description}; expected UTF-8 text. {remedy}")
    if start.count(0) > len(start) / 4:
        raise UserError(f"{source.name} has many zero bytes, as UTF-16 or binary data have; expected UTF-8 text. "
                        "Convert it, e.g. with: iconv -f utf-16le -t utf-8")
    if start.startswith(BOM):
        warnings.warn(f"{source.name} begins with a byte order mark (BOM): left out.", stacklevel=2)


class HashingReader:
    """A file that is hashed while it is read.

    Args:
        source: the text.
        progress: called with the number of bytes of each read.

    Attributes:
        n_bytes: read so far.
    """

    def __init__(self, source: Source, progress: Callable[[int], object] | None = None):
        self.source, self.progress = source, progress
        self.file = source.path.open("rb", buffering=0)
        self.before = source.state or file_state(source.path)
        self._sha256, self.n_bytes = hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size if size >= 0 else MIB)
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

    def __enter__(self) -> "HashingReader":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()


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
