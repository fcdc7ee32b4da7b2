"""What is asked of the pretokenizer; the same job gives the same bytes."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import plotarmour
from plotarmour.data.chunks import Reading
from plotarmour.data.readers import Source

NAMED_SOURCES = 6  # more would not fit into the header
NAME_BYTES = 100  # of a text's name, in a header
JOURNAL_VERSION = 1


@dataclass(frozen=True)
class Job:
    """One call of `pre_tokenize`.

    Attributes:
        sources: the texts, in order.
        tokenizer: as the user names it.
        targets: the token file of each part; {"all": file} without a split.
        shares: of train, val and test, or None.
        reading: how texts are read.
        policies: for the header.
        fingerprints: of the texts, in order.
        wanted: what an earlier start must have been asked, for this one to go on from it: `identity` of all this.
        exclude: texts whose stories are left out.
    """

    sources: list[Source]
    tokenizer: str
    targets: dict[str, Path]
    shares: tuple[int, int, int] | None
    reading: Reading
    policies: dict
    fingerprints: list[dict]
    wanted: str
    exclude: list[Source] = field(default_factory=list)


def identity(*parts: object) -> str:
    """Return a hash of what makes a job, this program's version and the form of its journal included."""
    text = json.dumps([JOURNAL_VERSION, plotarmour.__version__, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprints(sources: list[Source]) -> list[dict]:
    """Return name, size and the hashes of the first and last MiB of each text."""
    return [source.fingerprint() for source in sources]


def described(each: list[dict]) -> list[dict]:
    """Return what a header says of some texts: one entry each, or one for all where so many would not fit.

    Args:
        each: `fingerprints`, with or without `sha256`.
    """
    if len(each) <= NAMED_SOURCES:
        return [{**s, "name": _short(s["name"])} for s in each]
    joined = {key: digest_of(d[key] for d in each) for key in each[0] if key.startswith("sha256")}
    return [{"name": f"{_short(each[0]['name'])} and {len(each) - 1} more files",
             "bytes": sum(d["bytes"] for d in each), **joined}]


def digest_of(hashes: Iterable[str]) -> str:
    """Return the SHA-256 of some hexadecimal hashes, one after another."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _short(name: str) -> str:
    raw = name.encode()
    return name if len(raw) <= NAME_BYTES else raw[:NAME_BYTES - 3].decode(errors="ignore") + "..."
