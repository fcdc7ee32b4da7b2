"""Text to tokens: a thread reads, hashes and cuts, the tokenizer's own threads encode, a thread writes and hashes."""

import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plotarmour.cli import UserError, say
from plotarmour.data.chunks import Chunk, Reading, read_chunks
from plotarmour.data.encoders import Encoder, make_encoder
from plotarmour.data.job import Job, described
from plotarmour.data.readers import HashingReader, Source
from plotarmour.data.token_writer import TokenFileWriter, Unusable
from plotarmour.data.tokenizer import Tokenizer
from plotarmour.data.unfinished import write_journal

DEPTH = 2  # chunks that wait between the threads
NOTED_SHARE = 0.25  # of a block must have been written since the last note: thousands of tiny texts need not be noted
ENOUGH = 2**20  # bytes of text that tell how large its tokens get


def encode_all(job: Job, work: Path, made: Tokenizer, backend: str, excluded: np.ndarray | None,
               journal: dict) -> None:
    """Encode the texts of a job into complete token files in `work`.

    Args:
        job: what is wanted.
        work: the folder of unfinished work, with what an earlier start left.
        made: the tokenizer.
        backend: see `encoders.make_encoder`.
        excluded: sorted uint64 hashes of stories to leave out, or None.
        journal: of the earlier start, or {}.

    Raises:
        Differs: ids of the fast backend differ from the reference's.
        Unusable: what the earlier start left is not what its journal says.
    """
    sizes = [s["bytes"] for s in job.fingerprints]
    encoder = make_encoder(made, backend, sum(sizes))
    reading = Reading(job.reading.stories, job.reading.errors, made.takes_pieces, job.reading.hashed, job.reading.block)
    if journal and journal["tokenizer"] != made.sha256:
        raise Unusable("the tokenizer has changed")
    with ExitStack() as stack:
        writers = {}
        for part, path in job.targets.items():
            state = journal["writers"][part] if journal else None
            writers[part] = TokenFileWriter(path, made, {**job.policies, "part": part}, work, state)
            stack.enter_context(writers[part])
        sink = _Sink(job, work, writers, excluded, made.sha256, journal)
        stack.callback(sink.close)
        first, position = journal.get("source", 0), journal.get("position", 0)
        if journal:
            say(f"going on where an earlier start was stopped: {position:,} bytes or rows into "
                f"{job.sources[first].name}")
        bar = stack.enter_context(tqdm(total=sum(sizes), unit="B", unit_scale=True, mininterval=0.5, smoothing=0.05,
                                       desc=f"pretokenize ({made.kind}, {encoder.name})"))
        bar.update(sum(sizes[:first]))
        for i, source in enumerate(job.sources[first:], first):
            expected = tuple(journal["read"]) if journal and i == first else None
            with HashingReader(source, bar.update, expected) as reader:
                _encode_one(source, reader, reading, encoder, sink, position if i == first else 0)
                sink.end_source(reader.finish())
                if reader.matches is False:
                    raise Unusable(f"{source.name} has changed")
        for part, writer in writers.items():
            if not writer.n_stories:
                raise UserError(_no_story(job, part, sum(w.n_stories for w in writers.values()), sink.n_excluded))
        sources = described([{**s, "sha256": sha} for s, sha in zip(job.fingerprints, sink.done, strict=True)])
        for writer in writers.values():
            writer.complete(sources, sink.n_empty, sink.n_excluded, sink.n_replaced)
        write_journal(work, {"wanted": job.wanted, "complete": True})


def _no_story(job: Job, part: str, n_stories: int, n_excluded: int) -> str:
    """What to say of a part without a story."""
    names = ", ".join(s.name for s in job.sources[:3])
    where = f"the {part} part of {n_stories} stories ({names})" if job.shares else names
    help_ = "Use more text" + (", or another --split" if job.shares else "")
    if n_excluded and not n_stories:
        help_ = f"All its {n_excluded:,} stories are left out by --exclude"
    elif n_stories < 10 and job.reading.stories == "endoftext" and any(s.kind == "text" for s in job.sources):
        help_ = ("Is there no <|endoftext|> between the stories? Then use --stories line (in a suite: --set "
                 "stories=line), or more text")
    return f"{where} holds no story; expected at least one. {help_}."


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Let threads take turns every 0.1 ms: at Python's 5 ms a finished encoder waits for the reader."""
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
                 tokenizer_sha256: str, journal: dict):
        self.job, self.work, self.writers, self.excluded = job, work, writers, excluded
        self.tokenizer_sha256 = tokenizer_sha256
        self.n_empty, self.n_excluded, self.n_replaced = journal.get("dropped", (0, 0, 0))
        self.done = self._read_done(journal.get("source", 0))  # SHA-256 of the texts that are through
        self.done_bytes = sum(s["bytes"] for s in job.fingerprints[:len(self.done)])
        self.unnoted = 0  # bytes of stories since the last note
        self.checked_room = self.failed = False
        self.long_bytes = 0  # of the long story that is coming in
        self.long_file = None

    def _read_done(self, n: int) -> list[str]:
        """SHA-256 of the first n texts, a line each: not in the journal, which is written anew at every chunk."""
        path = self.work / "done.txt"
        lines = path.read_text(encoding="utf-8").splitlines()[:n] if n and path.exists() else []
        if len(lines) < n:
            raise Unusable("done.txt is too short")
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return lines

    def close(self) -> None:
        if self.long_file:
            self.long_file.close()

    def write(self, chunk: Chunk, ids: np.ndarray, counts: np.ndarray) -> None:
        if self.failed:  # chunks that waited behind one that could not be written must not be noted
            return
        try:
            self._write(chunk, ids, counts)
        except BaseException:
            self.failed = True
            raise

    def _write(self, chunk: Chunk, ids: np.ndarray, counts: np.ndarray) -> None:
        self.n_empty += chunk.n_empty
        self.n_replaced += chunk.n_replaced
        if chunk.piece:
            self._write_piece(chunk, ids)
        else:
            self._write_whole(chunk, ids, counts)
        self.unnoted += sum(chunk.sizes)
        if chunk.piece != "more" and self.unnoted >= NOTED_SHARE * self.job.reading.block:
            self._note(chunk.position, chunk.read)
        self._check_room(chunk.read[0])

    def end_source(self, sha256: str) -> None:
        self.done.append(sha256)
        self.done_bytes += self.job.fingerprints[len(self.done) - 1]["bytes"]
        with (self.work / "done.txt").open("a", encoding="utf-8") as file:
            file.write(f"{sha256}\n")

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
        self.unnoted = 0
        write_journal(self.work, {
            "wanted": self.job.wanted, "tokenizer": self.tokenizer_sha256, "source": len(self.done),
            "position": position, "read": read, "dropped": (self.n_empty, self.n_excluded, self.n_replaced),
            "writers": {part: writer.state() for part, writer in self.writers.items()}})

    def _check_room(self, n_read: int) -> None:
        """Notice once a disk that will not hold the result, as soon as enough is read to tell how large it gets."""
        total = sum(s["bytes"] for s in self.job.fingerprints)
        written = sum(w.n_tokens * w.dtype.itemsize + 12 * w.n_stories for w in self.writers.values())
        through = self.done_bytes + n_read
        if self.checked_room or not written or not n_read or through < min(total, ENOUGH):
            return
        self.checked_room = True
        needed, free = written / through * total, shutil.disk_usage(self.work).free + written
        if needed > free:
            raise UserError(f"{self.work.parent.resolve()} has {free / 1e6:,.1f} MB free; the token files need about "
                            f"{needed / 1e6:,.1f} MB. Make room, or write to another disk with --out.")
