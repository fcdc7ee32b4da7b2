"""Atomic writes (complete, fsynced, renamed), the one lock, and mapped files."""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from plotarmour.cli import UserError, warn

if TYPE_CHECKING:
    import numpy as np

LOCK_FILES = {"lock", "owner.json"}
# Of a file that should be JSON: it is no UTF-8, no JSON, or has other entries.
WRONG_CONTENT = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
# Answers of mounts, such as network drives and folders of a virtual machine's host, that lack a function.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NO_LOCKS = (*NOT_SUPPORTED, errno.ENOLCK, errno.EIO)


def unfinished(path: Path) -> Path:
    """Make the folder of `path`, and return a name beside it that nobody else uses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}.unfinished")


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete, fsynced file or folder to its final name, and fsync the folder that holds it."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a closed file, or a folder where the system and its mount can (not on Windows)."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only what is open for writing
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(handle)


@contextmanager
def complete_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file that replaces `path` only if the block ends without an exception. Text is UTF-8 with "\\n"."""
    temporary = unfinished(path)
    try:
        with temporary.open(mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": "\n"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a write that fails does not know its file's name
            error.filename = str(path)
        with suppress(OSError):  # the first failure is the one to report
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    with complete_file(path) as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def content_of(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Raise `UserError` that names a file where the block, or one of `errors`, says that its content is wrong."""
    try:
        yield
    except (*WRONG_CONTENT, *errors) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}. Restore it from a copy, or start "
                        "anew with another --out.") from None


def read_json(path: Path) -> dict:
    """Return the content of a JSON object; {} if there is no file. Raise `UserError` for anything else."""
    with content_of(path):
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        check_types(content, dict, path.name)
    return content


def check_types(value: object, kind: object, name: str) -> None:
    """Raise `ValueError` with the first part of a value from a JSON file that is not of its type.

    `kind` is a type, or the types of an object's entries by key; a missing entry is None.

    Example:
        check_types({"n": "7"}, {"n": int}, "train") says "train.n is '7', expected int".
    """
    if isinstance(kind, dict):
        check_types(value, dict, name)
        for key, each in kind.items():
            check_types(value.get(key), each, f"{name}.{key}")
    elif not isinstance(value, kind) and not (type(value) is int and isinstance(0.0, kind)):
        raise ValueError(f"{name} is {value!r:.60}, expected {getattr(kind, '__name__', kind)}")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, out: Path) -> Iterator[None]:
    """Hold a lock file in `folder` while this process writes `out`; afterwards remove the folder if it holds no more.

    The operating system releases it when the process ends or is killed. A `UserError` names who else holds it. Where
    the mount has no locks, a warning takes the place of the lock: a file in its place would outlive a killed process.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / "lock"), folder / "owner.json"
    try:
        with warnings.catch_warnings(action="ignore"):  # filelock's own, of a mount without locks
            lock.acquire(timeout=0)
    except Timeout:
        who = "another process"
        with suppress(OSError, ValueError):  # it has only just taken the lock
            who = "process {pid}, since {since}".format(**json.loads(owner.read_text(encoding="utf-8")))
        raise UserError(f"{out} is being written by {who}. Wait for it, stop it, or use another --out.") from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        warn(f"{folder.parent} is on a mount without locks: take care that no other process writes {out}.")
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(json.dumps({"pid": os.getpid(), "since": since}), encoding="utf-8")
        yield
    finally:
        if os.name == "nt":  # Windows cannot remove an open file
            lock.release()
        with suppress(OSError):
            if {path.name for path in folder.iterdir()} <= LOCK_FILES:
                shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def map_file(path: Path, dtype: "np.dtype | str", offset: int = 0, shape: tuple[int, ...] | None = None) -> "np.memmap":
    """Map a file, or a part of it, read-only; privately where its mount has no shared mappings."""
    import numpy as np

    try:
        return np.memmap(path, dtype, "r", offset, shape)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    try:
        mapped = np.memmap(path, dtype, "c", offset, shape)
    except OSError as error:
        raise UserError(f"{path} cannot be mapped into memory: {error.strerror}. Copy it to a disk of this "
                        "machine.") from None
    mapped.flags.writeable = False
    return mapped
