"""Text files to token files: what the user asks for is checked, work is continued, results get their names at the end.

Everything unfinished lies in one hidden folder beside the output:

    lock, owner.json   one process at a time
    job.json           what was asked for, so that another job does not continue this one
    tokenizer.json     of bpe:N, once it is learned
    stream_0           standard input, or a FIFO
    saved.json         where to continue: see plotarmour.data.pipeline
    X.bin, X.bin.*     token files that grow, before all of them are moved to their names

Final files that exist are taken as they are if they come from the same text with the same settings.
"""

import errno
import glob
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace as changed
from itertools import repeat
from pathlib import Path

import numpy as np

import plotarmour
from plotarmour.cli import AnyPath, UserError, as_path, say, warn
from plotarmour.data.pipeline import (
    BACKENDS,
    SAVE_BYTES,
    SAVED,
    Differs,
    Job,
    described,
    joined_hash,
    targets_of,
    write_token_files,
)
from plotarmour.data.readers import BLOCK, MIB, STDIN, Source, check_text, is_stream, read_whole
from plotarmour.data.stories import PARTS, PIECE, SEPARATORS, parse_split, pieces, story_hash, story_hashes
from plotarmour.data.token_file import TokenFile, open_tokenizer, unknown_words
from plotarmour.data.tokenizer import LEARNED, Tokenizer, load_tokenizer, make_tokenizer, vocab_size_of
from plotarmour.files import LOCK_FILES, locked, publish, read_json, sha256_of, write_json, write_text
from plotarmour.machine import free_disk

BPE_BYTES = 64 * 10**6
OVERHEAD = 200  # bytes of memory for each text of a sample, beside its characters
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def pre_tokenize(texts: list[AnyPath], tokenizer: str, out: AnyPath, split: str | None = None,
                 stories: str = "endoftext", exclude: list[AnyPath] = (), force: bool = False, replace: bool = False,
                 verify: bool = False, errors: str = "strict", text_column: str = "text", bpe_bytes: int = BPE_BYTES,
                 backend: str = "auto", least_tokens: int = 1,
                 block: int = BLOCK, save_bytes: int = SAVE_BYTES) -> list[Path]:
    """Write the token file, or with a split the three token files, of some texts, unless they exist already.

    Killed at any moment, the same call continues where it has saved last and ends with the same bytes.

    Args:
        texts: files or patterns, read in this order: UTF-8 text, .jsonl, each also with .gz, .parquet, "-" for standard
            input.
        tokenizer: "gpt2", "bpe:N" or "words:N" (learned from the train part only; "bpe:N:all" from all of the text),
            "bytes", a folder, or a token file whose tokenizer to use.
        out: X.bin; with a split X.train.bin, X.val.bin and X.test.bin are written instead.
        split: "train:val:test" in whole shares, or None for one file.
        stories, errors, text_column: see `readers.Source`.
        exclude: texts whose stories are left out and counted, also where case, punctuation or spacing differ.
        force, replace: replace existing files: all, or those that come from another text or other settings.
        verify: read existing files and the texts whole before taking the files as they are.
        bpe_bytes: of text that bpe:N and words:N learn from, at most: a sample spread over the train part.
        backend: "auto", "fastokens" or "tokenizers".
        least_tokens: that new train and val parts must have, such as one context.
        block, save_bytes: of text read at once; between two saves. The files do not depend on them.

    Returns:
        The paths, in the order train, val, test.

    Raises:
        UserError: text that cannot be read, a part without a story, existing files of something else, a full disk,
            another process that writes the same output.
    """
    for name, value, known in (("--stories", stories, SEPARATORS), ("--errors", errors, ("strict", "replace")),
                               ("--backend", backend, BACKENDS)):
        if value not in known:
            raise UserError(f"{name} {value!r} is unknown; expected one of {', '.join(known)}.")
    if bpe_bytes < 1000:
        raise UserError(f"--bpe-bytes {bpe_bytes} is too small to learn from; expected 1,000 or more.")
    out = as_path(out)
    if not out.name:
        raise UserError(f"--out {out} is no name for a file; expected one, such as tokens.bin.")
    shares = parse_split(split) if split else None
    parts = [part for part, share in zip(PARTS, shares, strict=True) if share] if shares else ["all"]
    targets = {part: part_path(out, part) if shares else out for part in parts}
    texts, exclude = find_texts(texts), find_texts(exclude)
    for path in targets.values():
        _check_target(path, [*texts, *exclude, as_path(tokenizer)])
    for i, path in enumerate(texts):
        if path in texts[:i]:
            raise UserError(f"{path} is named twice; all of its stories would be copies. Name each text once.")
    for path in [*texts, *exclude]:
        check_text(path)
    if tokenizer.startswith(LEARNED):
        vocab_size_of(tokenizer)  # refuses a wrong size
    work = out.with_name(f".{out.name}.unfinished")
    sizes = sum(path.stat().st_size for path in texts if not is_stream(path))
    with locked(work, out), ExitStack() as stack:
        copies = {path: work / f"stream_{i}" for i, path in enumerate(filter(is_stream, [*texts, *exclude]))}
        with _cleared_after_errors(work, out, sizes):
            for path, copy in copies.items():
                stack.callback(copy.unlink, missing_ok=True)
                # A copy can be checked, and read again for a tokenizer.
                with sys.stdin.buffer if path == STDIN else path.open("rb") as stream, copy.open("wb") as file:
                    shutil.copyfileobj(stream, file, MIB)
                check_text(copy, "standard input" if path == STDIN else path.name)
        options = {"stories": stories, "errors": errors, "text_column": text_column}
        sources, excluded = ([Source.of(copies.get(path, path), "-" if path == STDIN else path.name, **options)
                              for path in paths] for paths in (texts, exclude))
        policies = {"stories": stories, "split": split, "newlines": "kept", "errors": errors,
                    "excluded": _identity([source.fingerprint() for source in excluded]) if excluded else None,
                    "bpe_bytes": bpe_bytes if tokenizer.startswith(LEARNED) else None,
                    "text_column": text_column if any(s.kind != "text" for s in [*sources, *excluded]) else None}
        job = Job(sources, targets, shares, policies, block=block)
        known = None if tokenizer.startswith(LEARNED) else open_tokenizer(tokenizer)
        # A changed text has another time of change; a copied stream always has, so its content decides.
        states = [sha256_of(s.path) if s.path in copies.values() else s.state for s in sources]
        wanted = {"wanted": _identity([states, policies, list(targets), tokenizer, known and known.sha256])}
        earlier = read_json(work / "job.json")
        if force or not _is_there(job, tokenizer, known, replace, verify):
            if earlier != wanted:
                if earlier:
                    say("an earlier start was stopped and cannot be continued (the text or the settings are others "
                        "now): starting over")
                _empty(work, copies.values())
                write_json(work / "job.json", wanted)
            with _cleared_after_errors(work, out, sizes):
                job = changed(job, excluded=_hashes(excluded))
                known = known or _learned(job, work, tokenizer, bpe_bytes)
                try:
                    write_token_files(job, work, known, backend, save_bytes)
                except Differs as difference:
                    warn(f"{difference}: starting over with tokenizers, which is slower.")
                    (work / SAVED).unlink(missing_ok=True)
                    write_token_files(job, work, known, "tokenizers", save_bytes)
                for part in targets.keys() & {"train", "val"}:
                    if (n := TokenFile.open(work / targets[part].name).n_tokens) < least_tokens:
                        raise UserError(f"the {part} part would hold {n:,} tokens, fewer than one context of "
                                        f"{least_tokens:,}; use more text, or --set context_length={max(1, n // 2)} or "
                                        "less.")
                (work / "job.json").unlink()  # a start that is killed from here on is not continued
                for path in targets.values():
                    publish(work / path.name, path)
        _empty(work)
    for data in map(TokenFile.open, targets.values()):
        if "n_unknown_bytes" in data.header:
            say(f"{data.path}: {unknown_words(data)}")
    return list(targets.values())


def find_texts(names: list[AnyPath]) -> list[Path]:
    """Expand patterns such as data/*.txt, which some shells do not expand; sorted by name.

    Raises:
        UserError: a pattern that matches nothing.
    """
    paths = []
    for name in (str(as_path(name)) for name in names):
        matches = [Path(name)]
        if glob.has_magic(name) and not matches[0].exists():
            matches = sorted(filter(Path.is_file, map(Path, glob.glob(name, recursive=True))), key=Path.as_posix)
        if not matches:
            raise UserError(f"{name} matches no file; expected at least one text. Check the pattern.")
        paths += matches
    return paths


def _check_target(path: Path, inputs: list[Path]) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        found = f"symbolic link to {os.readlink(path)}" if path.is_symlink() else "folder or device"
        raise UserError(f"{path} is a {found}; expected a name for a plain file, such as tokens.bin, with --out.")
    if path.exists() and any(other.exists() and other.samefile(path) for other in inputs):
        raise UserError(f"{path} is both read and written; expected another name for the token file with --out.")


def part_path(out: Path, part: str) -> Path:
    """Return the name of one part: X.bin and "val" give X.val.bin."""
    return out.with_name(f"{out.name.removesuffix('.bin')}.{part}.bin")


@contextmanager
def _cleared_after_errors(work: Path, out: Path, n_bytes: int) -> Iterator[None]:
    """Remove unfinished work after an error, but not when the user stops; name what `n_bytes` of text need on disk."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"stopped; the same command continues where it has saved last. Unfinished work lies in {work}")
        raise
    except UserError:
        _empty(work)
        raise
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        free = free_disk(work)
        _empty(work)
        # Two bytes for each token, and a token for each byte or about four; the index, for very short stories.
        raise UserError(f"{out.parent.resolve()}: {error.strerror}. Needed are about {0.6 * n_bytes / 1e6:,.1f} MB "
                        f"(with --tokenizer bytes {2.1 * n_bytes / 1e6:,.1f} MB), free are {free / 1e6:,.1f} MB. Make "
                        "room, or write to another disk with --out.") from None


def _identity(value: object) -> str:
    """Return a hash of some JSON and this program's version."""
    return hashlib.sha256(json.dumps([plotarmour.__version__, value], sort_keys=True).encode()).hexdigest()


def _empty(work: Path, keep: Iterable[Path] = ()) -> None:
    """Remove all but the lock; job.json first, so that nothing is continued that is half removed."""
    for path in sorted(work.iterdir(), key=lambda path: path.name != "job.json"):
        if path.name not in LOCK_FILES and path not in keep:
            path.unlink()


def _hashes(sources: list[Source]) -> np.ndarray:
    """Sorted uint64 hashes of the stories of some texts: 8 bytes a story."""
    hashes = [story_hashes(chunk.texts) for source in sources for chunk in read_whole(source)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))


def _learned(job: Job, work: Path, spec: str, bpe_bytes: int) -> Tokenizer:
    """Train the tokenizer bpe:N or words:N, or load the one that an earlier start of this job has trained."""
    path = work / "tokenizer.json"
    if path.exists():
        return Tokenizer(load_tokenizer(path).json, spec)
    job = changed(job, shares=None) if spec.endswith(":all") else job
    tokenizer = make_tokenizer(spec, sample_stories(job, bpe_bytes))
    write_text(path, tokenizer.json)
    return tokenizer


def sample_stories(job: Job, n_bytes: int) -> Iterator[str]:
    """Yield what bpe:N learns from: stories, or pieces of long ones, spread over the train part (without a split, all).

    Those whose hash lies below a threshold, which is halved whenever they exceed `n_bytes` (UTF-8). So the sample
    depends on the set of texts, not on their order.
    """
    rows, threshold, size = {}, 2**64, 0  # text: mixed hash, bytes, copies
    for text, hashed in _train_texts(job):
        mixed = hashed * 0x9E3779B97F4A7C15 % 2**64  # the hash itself decides the part: its order is not independent
        if mixed >= threshold:
            continue
        row = rows.setdefault(text, [mixed, len(text.encode()) + OVERHEAD, 0])
        row[2] += 1
        size += row[1] if row[2] == 1 else 0
        while size > n_bytes and len(rows) > 1:
            threshold //= 2
            below = {text: row for text, row in rows.items() if row[0] < threshold}
            rows = below or dict([min(rows.items(), key=lambda item: item[1][0])])
            size = sum(row[1] for row in rows.values())
    for text, (_, _, copies) in rows.items():
        yield from repeat(text, copies)


def _train_texts(job: Job) -> Iterator[tuple[str, int]]:
    """Yield the stories of the first target, long ones in pieces, each with its `story_hash`."""
    for source in job.sources:
        for chunk in read_whole(source, job.block):
            hashes = story_hashes(chunk.texts)
            for i in np.flatnonzero(targets_of(hashes, job) == 0):
                story = chunk.texts[i]
                if len(story) <= PIECE:
                    yield story, int(hashes[i])
                else:
                    yield from ((piece, story_hash(piece)) for piece in pieces(story))


def _is_there(job: Job, spec: str, tokenizer: Tokenizer | None, replace: bool, verify: bool) -> bool:
    """Return whether all final files exist and come from these texts with these settings.

    Files of something else are replaced or a mistake. `verify` reads files and texts whole; otherwise headers, sizes,
    beginnings and ends are compared. `tokenizer` is None for bpe:N, which is not learned yet.
    """
    paths = {part: path for part, path in job.targets.items() if path.exists()}
    for part, path in paths.items():
        if differences := _differences(path, part, job, spec, tokenizer, verify):
            if replace:
                return False
            raise UserError(f"{path} exists and was made from something else ({'; '.join(differences)}); expected a "
                            "new name. Use another --out, or --force to replace it.")
    if len(paths) < len(job.targets):  # none, or a start was killed while the files got their names
        return False
    say(f"{', '.join(map(str, paths.values()))}: made from this text with these settings before"
        f"{', all of it read and compared' if verify else ''}; nothing to do "
        f"({'delete them, or use another --out, to make' if replace else '--force makes'} them again)")
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
        hashes = [sha256_of(source.path) for source in job.sources]
        stored = [source["sha256"] for source in data.header["source"]]
        if hashes != stored and [joined_hash(hashes)] != stored:
            differences.append("another text of the same size, beginning and end")
    return differences
