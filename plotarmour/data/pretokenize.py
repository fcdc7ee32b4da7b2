"""Texts to token files: one streaming pass that can be killed at any moment and goes on where it was.

The work itself is in pipeline.py. Everything unfinished lies in one hidden folder beside the output (unfinished.py);
`journal.json` in it says after every chunk how far all files are. Files appear under their names only when all parts
are whole; those that are there already are taken as they are where they are what is wanted (reuse.py).
"""

import errno
import os
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError, say
from plotarmour.data.chunks import BLOCK, Reading, read_chunks
from plotarmour.data.encoders import BACKENDS, Differs
from plotarmour.data.job import Job, fingerprints, identity
from plotarmour.data.pipeline import encode_all
from plotarmour.data.readers import STDIN, HashingReader, Source, check_text, find_texts, is_stream, spool
from plotarmour.data.reuse import reusable
from plotarmour.data.sample import sample_stories
from plotarmour.data.stories import PARTS, POLICIES, parse_split
from plotarmour.data.token_file import TokenFile
from plotarmour.data.token_writer import Unusable
from plotarmour.data.tokenizer import Tokenizer, bpe_size, load_tokenizer, make_tokenizer
from plotarmour.data.unfinished import (
    all_but_named,
    empty,
    read_journal,
    tidy,
    unfinished_folder,
    write_journal,
)
from plotarmour.files import locked, publish

BPE_BYTES = 64 * 10**6
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def pre_tokenize(texts: list[Path], tokenizer: str, out: Path, split: str | None = None, stories: str = "endoftext",
                 exclude: list[Path] = (), force: bool = False, replace: bool = False, verify: bool = False,
                 errors: str = "strict", text_column: str = "text", bpe_bytes: int = BPE_BYTES, backend: str = "auto",
                 block: int = BLOCK) -> list[Path]:
    """Write the token file, or with a split the three token files, of some texts, unless they are there already.

    Killed at any moment, the same call goes on after the last whole chunk and ends with the same bytes.

    Args:
        texts: files or patterns, read in this order: UTF-8 text, .jsonl, each also with .gz, .parquet, "-" for standard
            input.
        tokenizer: "gpt2", "bpe:N" (learned from the train part only), "bytes", a folder, or a token file whose
            tokenizer to use.
        out: X.bin; with a split X.train.bin, X.val.bin and X.test.bin are written instead.
        split: "train:val:test" in whole shares, or None for one file.
        stories: what makes a story in plain text: "endoftext", "line" or "file".
        exclude: texts whose stories, be it with other case, punctuation or spacing, are left out and counted.
        force: make existing files anew.
        replace: make existing files anew where they come from another text or other settings.
        verify: before existing files are taken as they are, read them and the texts whole.
        errors: "strict", or "replace" for U+FFFD in place of what is not UTF-8; counted in the header.
        text_column: of .jsonl and .parquet.
        bpe_bytes: of text that bpe:N learns from, at most: a sample spread over the train part.
        backend: "auto", "fastokens" or "tokenizers".
        block: bytes read at once; the result does not depend on it.

    Returns:
        The paths, in the order train, val, test.

    Raises:
        UserError: text that cannot be read, no story in a part, existing files of something else, a full disk, another
            process at the same output.
    """
    for name, value, known in (("--stories", stories, POLICIES), ("--errors", errors, ("strict", "replace"))):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; expected one of {', '.join(known)}.")
    if backend not in BACKENDS:
        raise UserError(f"--backend {backend!r} is unknown; expected one of {', '.join(BACKENDS)}.")
    if bpe_bytes < 1000:
        raise UserError(f"--bpe-bytes {bpe_bytes} is too small to learn from; expected 1,000 or more.")
    shares = parse_split(split) if split else None
    if not out.name:
        raise UserError(f"--out {out} is no name for a file; expected one, such as tokens.bin.")
    targets = {part: part_path(out, part) for part in _parts(shares)} if shares else {"all": out}
    texts, exclude = find_texts(texts), find_texts(exclude)
    for path in targets.values():
        _check_target(path, [*texts, *exclude, Path(tokenizer)])
    for i, path in enumerate(texts):
        if path in texts[:i]:
            raise UserError(f"{path} is named twice; all of its stories would be copies. Name each text once.")
    for path in [*texts, *exclude]:
        check_text(path)
    if tokenizer.startswith("bpe:"):
        bpe_size(tokenizer)
    work = unfinished_folder(out)
    with ExitStack() as stack:
        streams = [path for path in [*texts, *exclude] if is_stream(path)]
        if streams:
            stack.enter_context(locked(work, out))
            stack.callback(_remove_streams, work)
        kept = {path: _spooled(path, work, i) for i, path in enumerate(streams)}
        sources, excluded = ([Source.of(kept.get(path, path), "-" if path == STDIN else path.name, text_column)
                              for path in paths] for paths in (texts, exclude))
        policies = {"stories": stories, "split": split, "newlines": "kept", "errors": errors,
                    "excluded": identity(fingerprints(excluded)) if excluded else None,
                    "bpe_bytes": bpe_bytes if tokenizer.startswith("bpe:") else None,
                    "text_column": text_column if any(s.kind != "text" for s in [*sources, *excluded]) else None}
        found, reading = fingerprints(sources), Reading(stories, errors, True, bool(shares or excluded), block)
        wanted = identity(found, tokenizer, policies, list(targets))
        job = Job(sources, tokenizer, targets, shares, reading, policies, found, wanted, excluded)
        if _is_there(job, work, force, replace, verify):
            if not streams:
                tidy(work, out)
            return list(targets.values())
        if not streams:
            stack.enter_context(locked(work, out))
            if _is_there(job, work, force, replace, verify):  # another start has made it meanwhile
                return list(targets.values())
        try:
            _make(job, work, backend, force)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on from here. What is unfinished lies in {work}")
            raise
        except UserError:
            empty(work)
            raise
        except OSError as error:
            if error.errno not in FULL:
                raise
            empty(work)
            raise UserError(f"{out.parent.resolve()}: {error.strerror}. {_room(job, work)}") from None
        empty(work)
    return list(targets.values())


def _remove_streams(work: Path) -> None:
    if not (work / "journal.json").exists():
        for path in work.glob("stream_*"):
            path.unlink()


def _is_there(job: Job, work: Path, force: bool, replace: bool, verify: bool) -> bool:
    return not force and not all_but_named(work, job.wanted) and reusable(job, replace, verify)


def _make(job: Job, work: Path, backend: str, force: bool) -> None:
    """Make all files of a job in `work`, going on from what lies there, and put them under their names."""
    journal = read_journal(work, job.wanted, force)
    if "complete" in journal and not all(p.exists() or (work / p.name).exists() for p in job.targets.values()):
        empty(work)  # all had their names, and somebody has removed one since
        journal = {}
    while "complete" not in journal:
        if not journal:
            write_journal(work, {"wanted": job.wanted})  # so that a tokenizer learned for this job is known as such
        try:
            excluded = _excluded(job)
            made = _tokenizer(job, work, excluded)
            encode_all(job, work, made, backend, excluded, journal if "writers" in journal else {})
            break
        except Unusable as reason:
            say(f"what an earlier start left cannot be used ({reason}): starting over")
        except Differs as difference:
            warnings.warn(f"{difference}: starting over with tokenizers, which is slower.", stacklevel=3)
            backend = "tokenizers"
        empty(work)
        journal = {}
    for path in job.targets.values():
        if (work / path.name).exists():  # a start that was killed here may have moved some already
            publish(work / path.name, path)


def _check_target(path: Path, inputs: list[Path]) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link to {os.readlink(path)}; expected a name for a plain file. Name the "
                        "file itself with --out.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a name for a token file, such as {path / 'tokens.bin'}.")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or socket; expected a name for a plain file.")
    if path.exists() and any(other.exists() and other.samefile(path) for other in inputs):
        raise UserError(f"{path} is both read and written; expected another name for the token file with --out.")


def _spooled(path: Path, work: Path, i: int) -> Path:
    copy, name = work / f"stream_{i}", "standard input" if path == STDIN else path.name
    try:
        spool(path, copy)
        check_text(copy, name)
    except UserError:
        copy.unlink(missing_ok=True)
        raise
    except OSError as error:
        copy.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        raise UserError(f"{work.parent.resolve()}: {error.strerror}, while {name} was copied there; free are "
                        f"{shutil.disk_usage(work).free / 1e6:,.1f} MB. Make room, or name a file instead.") from None
    return copy


def _excluded(job: Job) -> np.ndarray | None:
    """Sorted uint64 hashes of the stories to leave out: 8 bytes a story."""
    if not job.exclude:
        return None
    hashes = []
    for source in job.exclude:
        reading = Reading(job.reading.stories, job.reading.errors, True, True, job.reading.block)
        with HashingReader(source) as reader:
            hashes += [np.array(c.hashes, np.uint64) for c in read_chunks(source, reader, reading) if c.hashes]
            reader.finish()
    return np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)


def _tokenizer(job: Job, work: Path, excluded: np.ndarray | None) -> Tokenizer:
    """The tokenizer of a job; a learned one is kept in `work` for a later start."""
    if job.tokenizer.endswith(".bin"):
        return TokenFile.open(job.tokenizer).tokenizer()
    if not job.tokenizer.startswith("bpe:"):
        return make_tokenizer(job.tokenizer)
    kept = work / "tokenizer.json"
    if kept.exists():
        return Tokenizer(load_tokenizer(kept).json, job.tokenizer)
    learned = sample_stories(job.sources, job.reading, job.shares, excluded, job.policies["bpe_bytes"])
    made = make_tokenizer(job.tokenizer, learned)
    made.save(work / "tokenizer.part")
    os.replace(work / "tokenizer.part", kept)
    return made


def _room(job: Job, work: Path) -> str:
    each = 2 if job.tokenizer == "bytes" else 0.55  # bytes a byte of text: a token has two, and stands for four
    needed = each * sum(s["bytes"] for s in job.fingerprints)
    return (f"Needed are about {needed / 1e6:,.1f} MB, free are {shutil.disk_usage(work).free / 1e6:,.1f} MB. Make "
            "room, or write to another disk with --out.")


def part_path(out: Path, part: str) -> Path:
    """Name of one part: X.bin and "val" give X.val.bin."""
    return out.with_name(f"{out.name.removesuffix('.bin')}.{part}.bin")


def _parts(shares: tuple[int, int, int]) -> list[str]:
    return [part for part, share in zip(PARTS, shares, strict=True) if share]
