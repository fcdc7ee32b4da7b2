"""Texts to token files: one streaming pass that can be killed at any moment and goes on where it was.

Three things happen at once: a thread reads, hashes and cuts the text into stories (chunks.py), the tokenizer's own
threads encode (encoders.py), and a thread writes and hashes (tokenwriter.py). Everything unfinished lies in one hidden
folder beside the output; `journal.json` in it says after every chunk how far all files are. Files appear under their
names only when all parts are whole.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plotarmour.errors import UserError
from plotarmour.files import publish
from plotarmour.text.chunks import BLOCK, Chunk, Reading, read_chunks
from plotarmour.text.encoders import Differs, Encoder, make_encoder
from plotarmour.text.sample import sample_stories
from plotarmour.text.sources import HashingReader, Source, check_text, find_texts, is_stream, spool
from plotarmour.text.stories import PARTS, POLICIES, parse_split
from plotarmour.text.tokenfile import TokenFile
from plotarmour.text.tokenizers import Tokenizer, load_tokenizer, make_tokenizer
from plotarmour.text.tokenwriter import TokenFileWriter, Unusable
from plotarmour.text.unfinished import describe, differences, locked

BPE_BYTES = 64 * 10**6
NAMED_SOURCES = 6  # more would not fit into the header
DEPTH = 2  # chunks that wait between the threads
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Job:
    """What is asked for; the same job gives the same bytes."""

    sources: list[Source]
    tokenizer: str
    targets: dict[str, Path]
    shares: tuple[int, int, int] | None
    reading: Reading
    policies: dict
    exclude: list[Source] = field(default_factory=list)


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
        exclude: texts whose stories (near-copies count) are left out and counted.
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
    shares = parse_split(split) if split else None
    targets = {part: part_path(out, part) for part in _parts(shares)} if shares else {"all": out}
    for path in targets.values():
        _check_target(path)
    texts, exclude = find_texts(texts), find_texts(exclude)
    for path in [*texts, *exclude]:
        check_text(path)
    work = out.with_name(f".{out.name}.unfinished")
    with ExitStack() as stack:
        streams = [path for path in [*texts, *exclude] if is_stream(path)]
        if streams:
            stack.enter_context(locked(work, out))
        kept = {path: _spooled(path, work, i) for i, path in enumerate(streams)}
        sources, excluded = ([Source(kept.get(path, path), "-" if path in kept else path.name, text_column)
                              for path in paths] for paths in (texts, exclude))
        policies = {"stories": stories, "split": split, "newlines": "kept", "errors": errors,
                    "excluded": _joined([s.fingerprint() for s in excluded]) if excluded else None,
                    "bpe_bytes": bpe_bytes if tokenizer.startswith("bpe:") else None}
        job = Job(sources, tokenizer, targets, shares, Reading(stories, errors, True, bool(shares or excluded), block),
                  policies, excluded)
        wanted = _wanted(job)
        if not force and not _all_but_named(work, wanted) and _reusable(job, replace, verify):
            return list(targets.values())
        if not streams:
            stack.enter_context(locked(work, out))
        try:
            _make(job, work, backend, force, wanted)
        except Differs as difference:
            warnings.warn(f"{difference}: starting over with tokenizers, which is slower.", stacklevel=2)
            _empty(work)
            _make(job, work, "tokenizers", force, wanted)
        except UserError:
            _empty(work)
            raise
        except OSError as error:
            if error.errno not in FULL:
                raise
            _empty(work)
            raise UserError(f"{out.parent.resolve()}: {error.strerror}. {_room(job, work)}") from None
        _empty(work)
    return list(targets.values())


def _make(job: Job, work: Path, backend: str, force: bool, wanted: dict) -> None:
    """Make all files of a job in `work`, going on from what lies there, and put them under their names."""
    journal = _read_journal(work, wanted, force)
    if "complete" not in journal:
        excluded = _excluded(job)
        made = _tokenizer(job, work, excluded)
        try:
            _encode_all(job, work, made, backend, excluded, journal, wanted)
        except Unusable as reason:
            _say(f"what an earlier start left cannot be used ({reason}): starting over")
            _empty(work)
            _encode_all(job, work, _tokenizer(job, work, excluded), backend, excluded, {}, wanted)
    for path in job.targets.values():
        if (work / path.name).exists():  # a start that was killed here may have moved some already
            publish(work / path.name, path)


def _encode_all(job: Job, work: Path, made: Tokenizer, backend: str, excluded: np.ndarray | None, journal: dict,
                wanted: dict) -> None:
    total = sum(s.path.stat().st_size for s in job.sources)
    encoder = make_encoder(made, backend, total)
    reading = Reading(job.reading.stories, job.reading.errors, made.takes_pieces, job.reading.hashed, job.reading.block)
    with ExitStack() as stack:
        writers = {}
        for part, path in job.targets.items():
            state = journal["writers"][part] if journal else None
            writers[part] = TokenFileWriter(path, made, {**job.policies, "part": part}, work, state)
            stack.enter_context(writers[part])
        sink = _Sink(job, work, writers, excluded, wanted, journal, total)
        first, position = journal.get("source", 0), journal.get("position", 0)
        if journal:
            _say(f"going on where an earlier start was stopped: {position:,} bytes or rows into "
                 f"{job.sources[first].name}")
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, mininterval=0.5, smoothing=0.05,
                                       desc=f"pretokenize ({made.kind}, {encoder.name})"))
        bar.update(sum(s.path.stat().st_size for s in job.sources[:first]))
        for i, source in enumerate(job.sources[first:], first):
            expected = tuple(journal["read"]) if journal and i == first else None
            with HashingReader(source, bar.update, expected) as reader:
                _encode_one(source, reader, reading, encoder, sink, position if i == first else 0)
                sink.end_source(reader.finish())
                if reader.matches is False:
                    raise Unusable(f"{source.name} has changed")
        for part, writer in writers.items():
            if not writer.n_stories:
                found = sum(w.n_stories for w in writers.values())
                where = f"the {part} part of {found} stories" if job.shares else ", ".join(s.name for s in job.sources)
                raise UserError(f"{where} holds no story; expected at least one. Use more text"
                                + (", or another --split." if job.shares else ", or another --stories policy."))
        sources = _described([{**s, "sha256": sha} for s, sha in zip(wanted["sources"], sink.done, strict=True)])
        for writer in writers.values():
            writer.complete(sources, sink.n_empty, sink.n_excluded, sink.n_replaced)
        _write_journal(work, {"wanted": wanted, "complete": True})


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Let threads take turns every 0.1 ms: at Python's 5 ms a finished encoder waits for the reader (a fifth slower)."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _encode_one(source: Source, reader: HashingReader, reading: Reading, encoder: Encoder, sink: "_Sink",
                position: int) -> None:
    """Read, encode and write one text, each in its own thread."""
    with _quick_switches(), ThreadPoolExecutor(1) as pool:
        writing: deque = deque()
        for chunk in _ahead(read_chunks(source, reader, reading, position)):
            if reader.matches is False:
                raise Unusable(f"{source.name} has changed")
            ids, counts = encoder.encode(chunk.texts)
            writing.append(pool.submit(sink.write, chunk, ids, counts))
            if len(writing) > DEPTH:
                writing.popleft().result()
        for job in writing:
            job.result()


def _ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Make chunks in a thread, `DEPTH` ahead of their use."""
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, chunks, None) for _ in range(DEPTH))
        while (chunk := made.popleft().result()) is not None:
            made.append(pool.submit(next, chunks, None))
            yield chunk


class _Sink:
    """Where encoded chunks go: to the writer of their part, then into the journal."""

    def __init__(self, job: Job, work: Path, writers: dict[str, TokenFileWriter], excluded: np.ndarray | None,
                 wanted: dict, journal: dict, total: int):
        self.job, self.work, self.writers, self.excluded = job, work, writers, excluded
        self.wanted, self.total, self.checked_room = wanted, total, False
        self.n_empty, self.n_excluded, self.n_replaced = journal.get("dropped", (0, 0, 0))
        self.done = list(journal.get("done", []))  # SHA-256 of the texts that are through
        self.long_bytes = 0  # of the long story that is coming in
        self.long_file = None

    def write(self, chunk: Chunk, ids: np.ndarray, counts: np.ndarray) -> None:
        self.n_empty += chunk.n_empty
        self.n_replaced += chunk.n_replaced
        if chunk.piece:
            self._write_piece(chunk, ids)
        else:
            self._write_whole(chunk, ids, counts)
        if chunk.piece != "more":
            self._note(chunk.position, chunk.read)
        if not self.checked_room and chunk.read[0]:
            self._check_room(chunk.read[0])

    def end_source(self, sha256: str) -> None:
        self.done.append(sha256)
        if len(self.done) < len(self.job.sources):
            self._note(0, (0, ""))

    def _write_whole(self, chunk: Chunk, ids: np.ndarray, counts: np.ndarray) -> None:
        sizes = np.array(chunk.sizes)
        if chunk.hashes is None:
            [writer] = self.writers.values()
            writer.add(ids, counts, sizes)
            return
        parts = self._parts_of(np.array(chunk.hashes, np.uint64))
        self.n_excluded += int((parts < 0).sum())
        for number, writer in enumerate(self.writers.values()):
            mine = parts == number
            if mine.any():
                writer.add(ids[np.repeat(mine, counts)], counts[mine], sizes[mine])

    def _parts_of(self, hashes: np.ndarray) -> np.ndarray:
        """Index of each story's writer, -1 for one that is left out; as `stories.part_of`, for many at once."""
        parts = np.zeros(len(hashes), np.int64)
        if self.job.shares:
            place = hashes % np.uint64(sum(self.job.shares))
            ends = np.cumsum([share for share in self.job.shares if share]).astype(np.uint64)
            parts = np.searchsorted(ends, place, side="right")
        if self.excluded is not None and len(self.excluded):
            near = np.minimum(np.searchsorted(self.excluded, hashes), len(self.excluded) - 1)
            parts[self.excluded[near] == hashes] = -1
        return parts

    def _write_piece(self, chunk: Chunk, ids: np.ndarray) -> None:
        """A long story's part is known only at its end: until then its ids wait in a file."""
        ids = ids if chunk.piece == "last" else ids[:-1]  # only the last piece ends with end-of-text
        self.long_bytes += chunk.sizes[0]
        if not self.job.reading.hashed:
            [writer] = self.writers.values()
            writer.add_piece(ids)
        else:
            self.long_file = self.long_file or (self.work / "long_story.ids").open("w+b")
            self.long_file.write(ids.astype("<u4").tobytes())
        if chunk.piece != "last":
            return
        if self.job.reading.hashed:
            [part] = self._parts_of(np.array(chunk.hashes, np.uint64))
            writer = list(self.writers.values())[part] if part >= 0 else None
            self.n_excluded += writer is None
            self.long_file.seek(0)
            while writer and (block := self.long_file.read(2**20)):
                writer.add_piece(np.frombuffer(block, "<u4"))
            self.long_file.close()
            self.long_file = None
        if writer:
            writer.end_story(self.long_bytes)
        self.long_bytes = 0

    def _note(self, position: int, read: tuple[int, str]) -> None:
        _write_journal(self.work, {
            "wanted": self.wanted, "source": len(self.done), "position": position, "read": read, "done": self.done,
            "dropped": (self.n_empty, self.n_excluded, self.n_replaced),
            "writers": {part: writer.state() for part, writer in self.writers.items()}})

    def _check_room(self, n_read: int) -> None:
        """Notice a disk that will not hold the result when the first chunk shows how large it gets."""
        self.checked_room = True
        written = sum(w.n_tokens * w.dtype.itemsize + 12 * w.n_stories for w in self.writers.values())
        needed, free = written / n_read * self.total, shutil.disk_usage(self.work).free + written
        if needed > free:
            raise UserError(f"{self.work.parent.resolve()} has {free / 1e6:,.0f} MB free; the token files need about "
                            f"{needed / 1e6:,.0f} MB. Make room, or write to another disk with --out.")


def _check_target(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link to {os.readlink(path)}; expected a name for a plain file. Name the "
                        "file itself with --out.")
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a name for a token file, such as {path / 'tokens.bin'}.")


def _spooled(path: Path, work: Path, i: int) -> Path:
    copy = work / f"stream_{i}"
    try:
        spool(path, copy)
        check_text(copy, "standard input" if str(path) == "-" else str(path))
    except UserError:
        _empty(work)
        raise
    return copy


def _reusable(job: Job, replace: bool, verify: bool) -> bool:
    """Whether all files are there and come from this text with these settings."""
    existing = [path for path in job.targets.values() if path.exists()]
    if not existing:
        return False
    if len(existing) < len(job.targets):
        found = [f"{path.name} is missing" for path in job.targets.values() if not path.exists()]
    else:
        found = []
        sources = _described([s.fingerprint() for s in job.sources])
        for part, path in job.targets.items():
            found = found or differences(path, sources, {**job.policies, "part": part}, job.tokenizer,
                                         job.sources if verify else [])
    if not found:
        _say(f"{', '.join(map(str, job.targets.values()))}: made from this text with these settings before; nothing to "
             "do (--force makes it anew)")
        return True
    if replace:
        return False
    raise UserError(f"{existing[0]} exists and was made from something else ({'; '.join(found)}); expected a new name. "
                    "Use another --out, or --force to replace it.")


def _described(each: list[dict]) -> list[dict]:
    """One entry per text, or one for all where so many would not fit into the header."""
    if len(each) <= NAMED_SOURCES:
        return [{**s, "name": describe(s["name"])} for s in each]
    joined = {key: hashlib.sha256("".join(d[key] for d in each).encode()).hexdigest()
              for key in each[0] if key.startswith("sha256")}
    return [{"name": f"{describe(each[0]['name'])} and {len(each) - 1} more files",
             "bytes": sum(d["bytes"] for d in each), **joined}]


def _joined(fingerprints: list[dict]) -> str:
    return hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()


def _excluded(job: Job) -> np.ndarray | None:
    """Sorted uint64 hashes of the stories to leave out: 8 bytes a story."""
    if not job.exclude:
        return None
    reading = Reading(job.reading.stories, job.reading.errors, True, True)
    hashes = []
    for source in job.exclude:
        with HashingReader(source) as reader:
            hashes += [np.array(c.hashes, np.uint64) for c in read_chunks(source, reader, reading) if c.hashes]
    return np.unique(np.concatenate(hashes)) if hashes else np.zeros(0, np.uint64)


def _tokenizer(job: Job, work: Path, excluded: np.ndarray | None) -> Tokenizer:
    """The tokenizer of a job; a learned one is kept in `work`, so that a later start need not learn it again."""
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


def _wanted(job: Job) -> dict:
    """What a journal must say for a start to go on from it."""
    wanted = {"sources": [s.fingerprint() for s in job.sources], "tokenizer": job.tokenizer, "policies": job.policies,
              "parts": list(job.targets)}
    return json.loads(json.dumps(wanted))


def _all_but_named(work: Path, wanted: dict) -> bool:
    """Whether an earlier start was killed while it gave complete files their names."""
    try:
        journal = json.loads((work / "journal.json").read_text(encoding="utf-8"))
        return "complete" in journal and journal["wanted"] == wanted
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _read_journal(work: Path, wanted: dict, force: bool) -> dict:
    """What an earlier start noted, if it can be continued; otherwise nothing, and an empty `work`."""
    path = work / "journal.json"
    try:
        journal = json.loads(path.read_text(encoding="utf-8"))
        if not force and journal["wanted"] == wanted:
            return journal
        reason = "--force" if force else "the text or the settings are others now"
    except FileNotFoundError:
        if not (work / "tokenizer.json").exists():
            return {}
        reason = "nothing was noted yet"
    except (ValueError, KeyError, TypeError):
        reason = "its journal is damaged"
    _say(f"an earlier start was stopped and cannot be continued ({reason}): starting over")
    _empty(work)
    return {}


def _write_journal(work: Path, journal: dict) -> None:
    """Not synced: after a loss of power the hashes in it tell whether it and the files agree."""
    temporary = work / "journal.part"
    temporary.write_text(json.dumps(journal), encoding="utf-8")
    os.replace(temporary, work / "journal.json")


def _empty(work: Path) -> None:
    """Remove what a job left in its folder, but for copies of streams and the lock."""
    for path in work.iterdir():
        if not path.name.startswith(("stream_", "lock", "owner")):
            path.unlink()


def _room(job: Job, work: Path) -> str:
    needed = sum(s.path.stat().st_size for s in job.sources) / 4 * 2 * 1.1  # English: four bytes a token of two
    return (f"Needed are about {needed / 1e6:,.0f} MB for GPT-2's vocabulary, free are "
            f"{shutil.disk_usage(work).free / 1e6:,.0f} MB. Make room, or write to another disk with --out.")


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def part_path(out: Path, part: str) -> Path:
    """Name of one part: X.bin and "val" give X.val.bin."""
    return out.with_name(f"{out.name.removesuffix('.bin')}.{part}.bin")


def _parts(shares: tuple[int, int, int]) -> list[str]:
    return [part for part, share in zip(PARTS, shares, strict=True) if share]
