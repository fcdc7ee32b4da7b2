"""Around the making of token files: one process at a time, and whether what is there is what is wanted."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plotarmour.errors import UserError
from plotarmour.text.sources import Source
from plotarmour.text.tokenfile import TokenFile, read_header
from plotarmour.text.tokenizers import make_tokenizer


@contextmanager
def locked(work: Path, out: Path) -> Iterator[None]:
    """Hold the folder `work` for this process; remove it afterwards where it is empty.

    The operating system lets go of the lock when a process dies, however it dies.

    Raises:
        UserError: another process holds it (pid, since when).
    """
    from filelock import FileLock, Timeout

    try:
        work.mkdir(parents=True, exist_ok=True)
    except PermissionError:
        raise UserError(f"{out.parent} cannot be written: permission denied. Allow it, or use another --out.") from None
    lock, owner = FileLock(work / "lock"), work / "owner.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        try:
            found = json.loads(owner.read_text(encoding="utf-8"))
            who = f"process {found['pid']}, since {found['since']}"
        except (OSError, ValueError, KeyError):
            who = "another process"
        raise UserError(f"{out} is being written by {who}; expected nobody. Wait for it, stop it, or use another "
                        "--out.") from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(json.dumps({"pid": os.getpid(), "since": since}), encoding="utf-8")
        yield
    finally:
        if not any((work / name).exists() for name in ("journal.json", "tokenizer.json")):  # nothing to go on from
            shutil.rmtree(work, ignore_errors=True)
        lock.release()
        if work.exists() and {path.name for path in work.iterdir()} <= {"lock", "owner.json"}:
            shutil.rmtree(work, ignore_errors=True)  # Windows cannot remove a file that is open


def describe(name: str) -> str:
    """A text's name for a header: what does not fit is cut."""
    return name if len(name) <= 100 else name[:97] + "..."


def differences(path: Path, sources: list[dict], policies: dict, tokenizer: str, whole: list[Source]) -> list[str]:
    """Return in what an existing token file differs from what is wanted; empty where it can be taken as it is.

    Args:
        path: of the file.
        sources: of the wanted one, without `sha256`.
        policies: of the wanted one.
        tokenizer: as the user names it.
        whole: texts to be compared whole, and the file with its hashes; empty for a look at the header alone.
    """
    try:
        header = read_header(path)
        data = TokenFile.open(path)
    except UserError as error:
        return [str(error)]
    found = []
    old = [{key: value for key, value in s.items() if key != "sha256"} for s in header["source"]]
    if old != sources:
        found.append(f"text {', '.join(s['name'] for s in old)} of {sum(s['bytes'] for s in old):,} bytes"
                     + (", since changed" if [s["name"] for s in old] == [s["name"] for s in sources] else ""))
    defaults = {"errors": "strict"}
    for key, value in policies.items():
        if header.get(key, defaults.get(key)) != value:
            found.append(f"{key} {header.get(key)}, now {value}")
    kind, sha256 = header["tokenizer"]["kind"], header["tokenizer"]["sha256"]
    named = tokenizer in ("gpt2", "bytes") or tokenizer.startswith("bpe:")
    if (kind != tokenizer) if named else (_sha256_of(tokenizer) != sha256):
        found.append(f"tokenizer {kind}, now {tokenizer}")
    if whole and not found:
        data.verify()
        hashes = [source.sha256() for source in whole]
        kept = [s["sha256"] for s in header["source"]]
        if hashes != kept and hashlib.sha256("".join(hashes).encode()).hexdigest() not in kept:
            found.append("another text of the same size, beginning and end")
    return found


def _sha256_of(tokenizer: str) -> str:
    if tokenizer.endswith(".bin"):
        return read_header(Path(tokenizer))["tokenizer"]["sha256"]
    return make_tokenizer(tokenizer).sha256
