"""What has arrived of a file: waits beside its place, with a note on what it is a part of, and appears only whole.

The part of `NAME` is `.NAME.partial`; `.NAME.partial.json` holds the address, ETag, date and size that it belongs to.
"""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from plotarmour.cli import UserError, say
from plotarmour.files import publish, write_json

BLOCK = 2**18


@dataclass(frozen=True)
class Download:
    """A complete file.

    Args:
        path: where it is.
        n_bytes: its size.
        sha256: of its bytes, in hex.
        fetched: False where it had been there before.
    """

    path: Path
    n_bytes: int
    sha256: str
    fetched: bool


class PartFile:
    """What has arrived of one file, with its running hash. No folder or file is made before the first good answer."""

    def __init__(self, url: str, path: Path) -> None:
        self.url, self.path = url, path
        self.partial = path.with_name(f".{path.name}.partial")
        self.about = path.with_name(f".{path.name}.partial.json")
        self.file: BinaryIO | None = None
        self.n_bytes, self.sha256, self.note = 0, hashlib.sha256(), {}
        self.published_sha256: str | None = None

    def __enter__(self) -> "PartFile":
        if not self.partial.exists():
            return self
        self._open()
        with suppress(OSError, ValueError):
            self.note = json.loads(self.about.read_text(encoding="utf-8"))
        self.n_bytes = self.partial.stat().st_size
        if self.n_bytes and self.note.get("url") != self.url:
            self.start_over("what is there came from another address")
        elif self.n_bytes and not self.validator:
            self.start_over("the server gave neither an ETag nor a date by which to know the file again")
        while block := self.file.read(BLOCK):
            self.sha256.update(block)
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()
            if not self.n_bytes and self.partial.exists():
                self.discard()

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.touch()
        self.file = self.partial.open("r+b", buffering=0)  # a killed process leaves all that arrived
        if not _lock(self.file):
            self.file.close()
            self.file = None
            raise UserError(f"{self.path} is being downloaded by another process. Wait for it, or end it.")

    @property
    def validator(self) -> str | None:
        """What If-Range takes: a strong ETag, else the date of the last change."""
        etag = self.note.get("etag")
        return etag if etag and not etag.startswith("W/") else self.note.get("last_modified")

    def start_over(self, reason: str) -> None:
        say(f"{self.path.name}: {reason}; starting over ({self.n_bytes:,} bytes dropped)")
        self.file.seek(0)
        self.file.truncate()
        self.n_bytes, self.sha256 = 0, hashlib.sha256()

    def begin(self, note: dict) -> None:
        """Make room for the bytes that follow, at the end of those that are there."""
        check_room(self.path, (note["size"] or 0) - self.n_bytes)
        if not self.file:
            self._open()
        if note != self.note:
            self.note = note
            write_json(self.about, note)
        self.file.seek(self.n_bytes)

    def write(self, block: bytes) -> None:
        try:
            rest = memoryview(block)
            while rest:
                rest = rest[self.file.write(rest):]
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.file.truncate(self.n_bytes)
                check_room(self.path, (self.note["size"] or 0) - self.n_bytes)
                raise UserError(f"{self.path}: the disk or your quota is full after {self.n_bytes:,} bytes. Make room; "
                                "the same command goes on from here.") from None
            raise
        self.sha256.update(block)
        self.n_bytes += len(block)

    def finish(self) -> Download:
        sha256 = self.sha256.hexdigest()
        if self.published_sha256 not in (None, sha256):
            self.n_bytes = 0  # so that the damaged part goes
            raise UserError(f"{self.url} arrived damaged: SHA-256 {sha256}, its server says {self.published_sha256}. "
                            "Run the same command again.")
        os.fsync(self.file.fileno())
        self.file.close()
        publish(self.partial, self.path)
        self.discard()
        return Download(self.path, self.n_bytes, sha256, fetched=True)

    def discard(self) -> None:
        self.partial.unlink(missing_ok=True)
        self.about.unlink(missing_ok=True)


def check_room(path: Path, needed: int) -> None:
    """Raise `UserError` where fewer than `needed` bytes are free for `path`."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{path} needs {needed:,} more bytes, {folder} has {free:,} free. Make room, or choose another "
                        "folder.")


def _lock(file: BinaryIO) -> bool:
    """Keep other processes off an open file until it is closed, however this process ends. False: taken."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # a file system without locks goes unlocked
    return True
