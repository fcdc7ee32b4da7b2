"""Texts to token files: one streaming pass that can be killed at any moment and continues after its last whole shard.

Everything unfinished lies in one hidden folder beside the output:

    lock, owner.json   one process at a time
    job.json           what was asked for, so that another job does not continue this one
    tokenizer.json     of bpe:N, once it is learned
    stream_0           standard input, or a FIFO
    shards/            see plotarmour.data.shards
    X.bin              final files, complete, before all of them are moved to their names

Final files that exist are taken as they are if they come from the same text with the same settings.
"""

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

import plotarmour
from plotarmour.cli import UserError, say
from plotarmour.data.chunks import BLOCK, Reading, read_chunks
from plotarmour.data.encoders import BACKENDS, Differs
from plotarmour.data.readers import STDIN, HashingReader, Source, check_text, copy_stream, find_texts, is_stream
from plotarmour.data.sample import sample_stories
from plotarmour.data.shards import SHARD_BYTES, Job, Join, write_shards
from plotarmour.data.stories import PARTS, POLICIES, parse_split
from plotarmour.data.token_file import TokenFile, open_tokenizer
from plotarmour.data.tokenizer import Tokenizer, bpe_size, load_tokenizer, make_tokenizer
from plotarmour.files import LOCK_FILES, locked, publish, write_json, write_text

BPE_BYTES = 64 * 10**6
NAMED_SOURCES = 6  # texts with an entry of their own in a header of 4,096 bytes
NAME_BYTES = 100  # of a text's name in a header
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def pre_tokenize(texts: list[Path], tokenizer: str, out: Path, split: str | None = None, stories: str = "endoftext",
                 exclude: list[Path] = (), force: bool = False, replace: bool = False, verify: bool = False,
                 errors: str = "strict", text_column: str = "text", bpe_bytes: int = BPE_BYTES, backend: str = "auto",
                 block: int = BLOCK, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write the token file, or with a split the three token files, of some texts, unless they exist already.

    Killed at any moment, the same call continues after the last whole shard and ends with the same bytes.

    Args:
        texts: files or patterns, read in this order: UTF-8 text, .jsonl, each also with .gz, .parquet, "-" for standard
            input.
        tokenizer: "gpt2", "bpe:N" (learned from the train part only), "bytes", a folder, or a token file whose
            tokenizer to use.
        out: X.bin; with a split X.train.bin, X.val.bin and X.test.bin are written instead.
        split: "train:val:test" in whole shares, or None for one file.
        stories: what makes a story in plain text: "endoftext", "line" or "file".
        exclude: texts whose stories are left out and counted, also where case, punctuation or spacing differ.
        force: replace existing files.
        replace: replace existing files if they come from another text or other settings.
        verify: read existing files and the texts whole before taking the files as they are.
        errors: "strict", or "replace" to put U+FFFD in place of bytes that are not UTF-8, counted in the header.
        text_column: of .jsonl and .parquet.
        bpe_bytes: of text that bpe:N learns from, at most: a sample spread over the train part.
        backend: "auto", "fastokens" or "tokenizers".
        block: bytes read at once. The files do not depend on it.
        shard_bytes: of text, after which a killed start can continue. The files do not depend on it.

    Returns:
        The paths, in the order train, val, test.

    Raises:
        UserError: text that cannot be read, a part without a story, existing files of something else, a full disk,
            another process that writes the same output.
    """
    for name, value, known in (("--stories", stories, POLICIES), ("--errors", errors, ("strict", "replace")),
                               ("--backend", backend, BACKENDS)):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; expected one of {', '.join(known)}.")
    if bpe_bytes < 1000:
        raise UserError(f"--bpe-bytes {bpe_bytes} is too small to learn from; expected 1,000 or more.")
    if not out.name:
        raise UserError(f"--out {out} is no name for a file; expected one, such as tokens.bin.")
    shares = parse_split(split) if split else None
    parts = [part for part, share in zip(PARTS, shares, strict=True) if share] if shares else ["all"]
    targets = {part: part_path(out, part) if shares else out for part in parts}
    texts, exclude = find_texts(texts), find_texts(exclude)
    for path in targets.values():
        _check_target(path, [*texts, *exclude, Path(tokenizer)])
    for i, path in enumerate(texts):
        if path in texts[:i]:
            raise UserError(f"{path} is named twice; all of its stories would be copies. Name each text once.")
    for path in [*texts, *exclude]:
        check_text(path)
    if tokenizer.startswith("bpe:"):
        bpe_size(tokenizer)  # refuses a wrong size
    work = out.with_name(f".{out.name}.unfinished")
    sizes = sum(path.stat().st_size for path in texts if not is_stream(path))
    with locked(work, out), ExitStack() as stack:
        copies = {path: work / f"stream_{i}" for i, path in enumerate(filter(is_stream, [*texts, *exclude]))}
        with _cleared_after_errors(work, out, sizes):
            for path, copy in copies.items():
                stack.callback(copy.unlink, missing_ok=True)
                copy_stream(path, copy)
                check_text(copy, "standard input" if path == STDIN else path.name)
        sources, excluded = ([Source.of(copies.get(path, path), "-" if path == STDIN else path.name, text_column)
                              for path in paths] for paths in (texts, exclude))
        policies = {"stories": stories, "split": split, "newlines": "kept", "errors": errors,
                    "excluded": _identity([source.fingerprint() for source in excluded]) if excluded else None,
                    "bpe_bytes": bpe_bytes if tokenizer.startswith("bpe:") else None,
                    "text_column": text_column if any(s.kind != "text" for s in [*sources, *excluded]) else None}
        reading = Reading(stories, errors, hashed=bool(shares or excluded), block=block)
        job = Job(sources, targets, shares, reading, policies)
        known = None if tokenizer.startswith("bpe:") else open_tokenizer(tokenizer)
        # A changed text has another time of change; a copied stream always has, so its content decides.
        states = [s.sha256() if s.path in copies.values() else s.state for s in sources]
        wanted = _identity([states, policies, list(targets), tokenizer, known and known.sha256])
        earlier = _read_json(work / "job.json")
        moving = earlier == {"wanted": wanted, "moving": True}  # killed while the final files got their names
        if moving or force or not _is_there(job, tokenizer, known, replace, verify):
            if earlier.get("wanted") != wanted:
                if earlier:
                    say("an earlier start was stopped and cannot be continued (the text or the settings are others "
                        "now): starting over")
                _empty(work, copies.values())
                write_json(work / "job.json", {"wanted": wanted})
            with _cleared_after_errors(work, out, sizes):
                job = dataclasses.replace(job, excluded=_hashes(excluded, reading))
                known = known or _learned(job, work, tokenizer, bpe_bytes)
                try:
                    _make(job, work, known, backend, shard_bytes)
                except Differs as difference:
                    warnings.warn(f"{difference}: starting over with tokenizers, which is slower.", stacklevel=2)
                    shutil.rmtree(work / "shards")
                    _make(job, work, known, "tokenizers", shard_bytes)
                write_json(work / "job.json", {"wanted": wanted, "moving": True})
                for path in targets.values():
                    publish(work / path.name, path)
        _empty(work)
    return list(targets.values())


def _check_target(path: Path, inputs: list[Path]) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link to {os.readlink(path)}; expected a name for a plain file. Name the "
                        "file itself with --out.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a folder or device; expected a name for a token file, such as tokens.bin.")
    if path.exists() and any(other.exists() and other.samefile(path) for other in inputs):
        raise UserError(f"{path} is both read and written; expected another name for the token file with --out.")


def part_path(out: Path, part: str) -> Path:
    """Return the name of one part: X.bin and "val" give X.val.bin."""
    return out.with_name(f"{out.name.removesuffix('.bin')}.{part}.bin")


@contextmanager
def _cleared_after_errors(work: Path, out: Path, n_bytes: int) -> Iterator[None]:
    """Remove unfinished work after an error, but not when the user stops; name what a full disk needs.

    Args:
        work: folder of unfinished work.
        out: for messages.
        n_bytes: of the texts.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; the same command continues after the last whole shard. Unfinished work lies in {work}")
        raise
    except UserError:
        _empty(work)
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = shutil.disk_usage(work).free
        _empty(work)
        # Shards and final files: two bytes for each token, and a token for each byte or about four.
        raise UserError(f"{out.parent.resolve()}: {error.strerror}. Needed are about {1.1 * n_bytes / 1e6:,.1f} MB "
                        f"(with --tokenizer bytes {4 * n_bytes / 1e6:,.1f} MB), free are {free / 1e6:,.1f} MB. Make "
                        "room, or write to another disk with --out.") from None


def _identity(value: object) -> str:
    """Return a hash of some JSON and this program's version."""
    return hashlib.sha256(json.dumps([plotarmour.__version__, value], sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _empty(work: Path, keep: Iterable[Path] = ()) -> None:
    """Remove all but the lock; job.json first, so that nothing is continued that is half removed."""
    for path in sorted(work.iterdir(), key=lambda path: path.name != "job.json"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in LOCK_FILES and path not in keep:
            path.unlink()


def _hashes(sources: list[Source], reading: Reading) -> np.ndarray:
    """Sorted uint64 hashes of the stories of some texts: 8 bytes a story."""
    hashes = [np.zeros(0, np.uint64)]
    for source in sources:
        with HashingReader(source) as reader:
            hashes += [np.array(c.hashes, np.uint64) for c in read_chunks(source, reader, reading) if c.hashes]
            reader.finish()
    return np.unique(np.concatenate(hashes))


def _learned(job: Job, work: Path, spec: str, bpe_bytes: int) -> Tokenizer:
    """Train the tokenizer bpe:N, or load the one that an earlier start of this job has trained."""
    path = work / "tokenizer.json"
    if path.exists():
        return Tokenizer(load_tokenizer(path).json, spec)
    tokenizer = make_tokenizer(spec, sample_stories(job, bpe_bytes))
    write_text(path, tokenizer.json)
    return tokenizer


def _make(job: Job, work: Path, tokenizer: Tokenizer, backend: str, shard_bytes: int) -> None:
    """Write the final files into `work`, continuing after whole shards."""
    shards = work / "shards"
    shards.mkdir(exist_ok=True)
    for leftover in work.glob(".*"):  # of final files that were not complete
        leftover.unlink()
    with Join(job, tokenizer, work) as join:
        hashes = write_shards(job, shards, tokenizer, backend, shard_bytes, join)
        sources = [{**source.fingerprint(), "sha256": sha256}
                   for source, sha256 in zip(job.sources, hashes, strict=True)]
        join.publish(described(sources))


def described(sources: list[dict]) -> list[dict]:
    """Return what a header states of some texts: an entry for each, or one for all where so many do not fit.

    Args:
        sources: `Source.fingerprint` of each, with or without `sha256`.
    """
    if len(sources) <= NAMED_SOURCES:
        return [{**source, "name": _short(source["name"])} for source in sources]
    hashes = {key: _joined(source[key] for source in sources) for key in sources[0] if key.startswith("sha256")}
    return [{"name": f"{_short(sources[0]['name'])} and {len(sources) - 1} more files",
             "bytes": sum(source["bytes"] for source in sources), **hashes}]


def _joined(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _short(name: str) -> str:
    raw = name.encode()
    return name if len(raw) <= NAME_BYTES else raw[:NAME_BYTES - 3].decode(errors="ignore") + "..."


def _is_there(job: Job, spec: str, tokenizer: Tokenizer | None, replace: bool, verify: bool) -> bool:
    """Return whether all final files exist and come from these texts with these settings.

    Args:
        job: texts, files and settings.
        spec: the user's name for the tokenizer.
        tokenizer: of that name; None for bpe:N, which is not learned yet.
        replace: whether files of something else are replaced; they are a mistake otherwise.
        verify: whether files and texts are read whole; otherwise headers, sizes, beginnings and ends are compared.

    Raises:
        UserError: files of something else, a part missing, or, with `verify`, a damaged file.
    """
    paths = list(job.targets.values())
    missing = [path.name for path in paths if not path.exists()]
    if len(missing) == len(paths) or (missing and replace):
        return False
    if missing:
        raise UserError(f"{next(path for path in paths if path.exists())} exists, {', '.join(missing)} does not; "
                        "expected all parts or none. Use another --out, or --force to replace them.")
    for part, path in job.targets.items():
        differences = _differences(path, part, job, spec, tokenizer, verify)
        if differences and replace:
            return False
        if differences:
            raise UserError(f"{path} exists and was made from something else ({'; '.join(differences)}); expected a "
                            "new name. Use another --out, or --force to replace it.")
    say(f"{', '.join(map(str, paths))}: made from this text with these settings before"
        f"{', all of it read and compared' if verify else ''}; nothing to do (--force makes it again)")
    return True


def _differences(path: Path, part: str, job: Job, spec: str, tokenizer: Tokenizer | None, verify: bool) -> list[str]:
    """Return in what an existing token file differs from the wanted one."""
    try:
        data = TokenFile.open(path)
    except UserError as error:
        return [str(error)]
    sources = [{key: value for key, value in s.items() if key != "sha256"} for s in data.header["source"]]
    wanted = described([source.fingerprint() for source in job.sources])
    differences = []
    if sources != wanted:
        changed = [s["name"] for s in sources] == [s["name"] for s in wanted]
        differences.append(f"text {', '.join(s['name'] for s in sources)} of {sum(s['bytes'] for s in sources):,} bytes"
                           f"{', since changed' if changed else ''}")
    for key, value in {**job.policies, "part": part}.items():
        if data.header.get(key) != value:
            differences.append(f"{key} {data.header.get(key)}, now {value}")
    kind, sha256 = data.header["tokenizer"]["kind"], data.header["tokenizer"]["sha256"]
    if kind != spec and sha256 != (tokenizer and tokenizer.sha256):
        differences.append(f"tokenizer {kind}, now {spec}")
    if verify and not differences:
        data.verify()
        hashes, stored = [source.sha256() for source in job.sources], [s["sha256"] for s in data.header["source"]]
        if hashes != stored and [_joined(hashes)] != stored:
            differences.append("another text of the same size, beginning and end")
    return differences
