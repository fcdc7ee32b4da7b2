"""A file from the web: goes on where it broke off, is checked, and appears only whole.

A part from before is continued only where the server vouches, by ETag or date, that the file is still the same
(RFC 9110, If-Range).
"""

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from plotarmour.cli import UserError, say
from plotarmour.crawl.partfile import BLOCK, Download, PartFile

if TYPE_CHECKING:
    import requests

PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be gone a moment later
LONGEST_WAIT_S = 60.0


class _Passing(Exception):
    """A failure that may pass, and how many seconds the server asks to wait."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def download(url: str, path: Path, force: bool = False, attempts: int = 6, wait_s: float = 1.0,
             timeout_s: float = 60.0) -> Download:
    """Fetch a file, or what is missing of it.

    Args:
        url: http or https.
        path: where it appears once it is whole. A file there is kept if its size is the server's, also where the
            server cannot be reached (which is said).
        force: replace a file at `path`.
        attempts: how many failures in a row, without a new byte, end it.
        wait_s: seconds before the second attempt; doubled for each further one, 60 at most.
        timeout_s: seconds without a byte after which a connection counts as dropped.

    Returns:
        Size and SHA-256, computed as the bytes arrive (a part from before is read once).

    Raises:
        UserError: no such file on the server, no connection, not enough room, another file of that name.

    Source:
        RFC 9110, sections 13.1.5 (If-Range) and 14 (Range).
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected the name of the file to write.")
    if path.exists() and not force:
        return _kept(url, path, timeout_s)
    with PartFile(url, path) as part:
        failures, furthest = 0, part.n_bytes
        while True:
            try:
                _fetch(part, timeout_s)
                return part.finish()
            except _Passing as error:
                # a server that drops and cannot resume comes no further than before: that must end, too
                failures = 1 if part.n_bytes > furthest else failures + 1
                furthest = max(furthest, part.n_bytes)
                if failures >= attempts:
                    kept = f" {part.n_bytes:,} bytes are kept." if part.n_bytes else ""
                    raise UserError(f"{url} cannot be fetched: {error}. Check the network and the address, "
                                    f"or put the file into {path.parent} in another way; the same "
                                    f"command goes on from here.{kept}") from None
                pause = min(max(wait_s * 2 ** (failures - 1), error.wait_s), LONGEST_WAIT_S)
                say(f"{path.name}: {error}; attempt {failures + 1} of {attempts} in {pause:.3g} s")
                time.sleep(pause)


def _fetch(part: PartFile, timeout_s: float) -> None:
    """Ask for what is missing and write it. A part that does not belong to the file is dropped first."""
    from urllib3.exceptions import HTTPError

    headers = {"Range": f"bytes={part.n_bytes}-", "If-Range": part.validator} if part.n_bytes else {}
    with _get(part.url, headers, timeout_s) as response:
        start, size = _place(response)
        note = {"url": part.url, "etag": response.headers.get("ETag"),
                "last_modified": response.headers.get("Last-Modified"), "size": size}
        if response.status_code == 416:
            if size == part.n_bytes == part.note.get("size"):
                return  # nothing is missing: the last start ended between the last byte and the renaming
            part.start_over("the file on the server is shorter now")
            return _fetch(part, timeout_s)
        if part.n_bytes:
            same = all(note[key] == part.note.get(key) for key in ("etag", "last_modified", "size"))
            if start == 0:
                part.start_over("the server cannot go on in the middle" if same else "the file on the server has "
                                "changed")
            elif not same or start != part.n_bytes:  # If-Range was ignored: asking without Range is safe
                part.start_over("the file on the server has changed")
                return _fetch(part, timeout_s)
        part.published_sha256 = _hub_sha256(response)
        part.begin(note)
        with tqdm(total=size, initial=part.n_bytes, unit="B", unit_scale=True, desc=part.path.name,
                  mininterval=0.5) as bar:
            try:
                # bytes as they are on the server: a .gz stays one, whatever Content-Encoding claims
                for block in response.raw.stream(BLOCK, decode_content=False):
                    part.write(block)
                    bar.update(len(block))
            except (HTTPError, ConnectionError, TimeoutError) as error:
                raise _Passing(f"the connection broke off at {part.n_bytes:,} bytes ({_cause(error)})") from None
    if size is not None and part.n_bytes != size:
        if part.n_bytes > size:
            part.start_over(f"the server sent more than the {size:,} bytes it had announced")
        raise _Passing(f"the connection broke off at {part.n_bytes:,} bytes of {size:,}")


def _get(url: str, headers: dict, timeout_s: float) -> "requests.Response":
    """GET with the body still to come; a status that is no answer raises. GET also where only the size is wanted:
    addresses that are signed for GET refuse HEAD."""
    import requests

    try:
        response = requests.get(url, headers={"Accept-Encoding": "identity"} | headers, stream=True, timeout=timeout_s)
    except requests.RequestException as error:
        if isinstance(error, ValueError):  # no scheme, no host, ...
            raise UserError(f"{url!r} is not an address to download from: {error}. Expected https://...") from None
        raise _Passing(_cause(error)) from None
    status = response.status_code
    if status in (200, 206) or (status == 416 and "Range" in headers):
        return response
    response.close()
    if status in PASSING:
        seconds = response.headers.get("Retry-After", "")
        raise _Passing(f"the server answers {status} {response.reason}", float(seconds) if seconds.isdigit() else 0.0)
    remedy = "Check the address." if status in (404, 410) else "Check the address and whether it is public."
    raise UserError(f"{url} cannot be had: the server answers {status} {response.reason}. {remedy}")


def _place(response: "requests.Response") -> tuple[int, int | None]:
    """Return the offset at which the body begins, and the size of the whole file (None where it is not said)."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes").strip().partition("/")
    start = span.split("-")[0]
    return int(start) if start.isdigit() else -1, int(total) if total.isdigit() else None


def _kept(url: str, path: Path, timeout_s: float) -> Download:
    """Vouch for a file that is there already."""
    n_bytes = path.stat().st_size
    try:
        with _get(url, {}, timeout_s) as response:
            size = _place(response)[1]
        if size is None:
            say(f"{path} is kept ({n_bytes:,} bytes); the server does not say how long it should be")
        elif size != n_bytes:
            raise UserError(f"{path} exists with {n_bytes:,} bytes, the file on the server has {size:,}. Use --force "
                            "to replace it, or another folder.")
    except _Passing as error:
        say(f"{path} is kept ({n_bytes:,} bytes), unchecked: {url} cannot be reached ({error})")
    with path.open("rb") as file:
        return Download(path, n_bytes, hashlib.file_digest(file, "sha256").hexdigest(), fetched=False)


def _hub_sha256(response: "requests.Response") -> str | None:
    """The SHA-256 by which the Hugging Face hub keeps large files, where it is the one that answers."""
    for answer in [*response.history, response]:
        tag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if len(tag) == 64 and not tag.strip("0123456789abcdef"):
            return tag
    return None


def _cause(error: BaseException) -> str:
    """The innermost reason: what the system said, without the layers around it."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(error) or type(error).__name__
