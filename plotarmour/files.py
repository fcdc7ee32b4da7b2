"""Files that appear only whole: written beside their place, flushed, fsynced, renamed, the folder fsynced."""

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Make the folder of `path`, and return a name beside it that nobody else uses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}.unfinished")


def publish(temporary: Path, path: Path) -> None:
    """Rename a complete, fsynced file or folder to its final name and make that last."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder where the system can (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(path: Path) -> None:
    """fsync a file that was written and closed."""
    with path.open("rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    temporary = unfinished(path)
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # a write that fails does not know its file's name
            error.filename = str(path)
        with suppress(OSError):  # the first failure is the one to tell; the next start of a run removes the rest
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Replace a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
