"""Text to tokens by shards: each is a small complete token file for every part; the final files are their join.

One thread reads and cuts, the tokenizer's own threads encode, one thread writes shards, one joins them. A killed start
leaves whole shards; the next start takes them and continues where the last one ends. The final files do not depend on
the size of the shards.
"""

import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError, progress, say
from plotarmour.data.chunks import Chunk, Reading, read_chunks
from plotarmour.data.encoders import make_encoder
from plotarmour.data.readers import HashingReader, Source
from plotarmour.data.stories import parts_of
from plotarmour.data.token_file import TokenFile, TokenFileWriter, read_header
from plotarmour.data.tokenizer import Tokenizer

SHARD_BYTES = 256 * 10**6  # of text
WAITING = 2  # chunks between two threads
LONG_STORY_IN_MEMORY = 64 * 2**20  # bytes of ids; more go to a file
COPIED = 2**20  # tokens or stories at once


@dataclass(frozen=True)
class Job:
    """The texts, and the token files to write from them.

    Attributes:
        sources: the texts, in order.
        targets: the token file of each part; {"all": path} without a split.
        shares: of train, val and test, or None.
        reading: how texts are read.
        policies: for the header.
        excluded: sorted uint64 hashes of stories to leave out.
    """

    sources: list[Source]
    targets: dict[str, Path]
    shares: tuple[int, int, int] | None
    reading: Reading
    policies: dict
    excluded: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))


def targets_of(hashes: np.ndarray, job: Job) -> np.ndarray:
    """Return the final file of each story.

    Args:
        hashes: uint64 (n,), `story_hash` of each story.
        job: with shares and excluded stories.

    Returns:
        int64 (n,): index into `job.targets`, which has the parts of `stories.parts_of` whose share is not 0; -1 for a
        story that is left out.
    """
    parts = np.zeros(len(hashes), np.int64)
    if job.shares:
        index = np.cumsum([share > 0 for share in job.shares]) - 1  # among the parts that have a share
        parts = index[parts_of(hashes, job.shares)]
    if len(job.excluded):
        nearest = np.minimum(np.searchsorted(job.excluded, hashes), len(job.excluded) - 1)
        parts[job.excluded[nearest] == hashes] = -1
    return parts


def write_shards(job: Job, folder: Path, tokenizer: Tokenizer, backend: str, shard_bytes: int,
                 join: "Join") -> list[str]:
    """Encode the texts into shards, after those that an earlier start left in the folder, and join them all.

    Args:
        job: texts and parts.
        folder: of the shards.
        tokenizer: for the ids.
        backend: see `encoders.make_encoder`.
        shard_bytes: of text in a shard, at least; it ends with a story.
        join: gets every shard, in order.

    Returns:
        The SHA-256 of each text.

    Raises:
        Differs: the ids of the fast backend are not the reference's.
    """
    done = _whole_shards(job, folder)
    for leftover in set(folder.iterdir()).difference(*done):  # of a shard that was not complete
        leftover.unlink()
    for paths in done:
        join.add(paths)
    first, position = read_header(done[-1][0])["end"] if done else (0, 0)
    if done and first < len(job.sources):
        say(f"going on where an earlier start was stopped: {position:,} bytes or rows into {job.sources[first].name}")
    n_bytes = sum(source.path.stat().st_size for source in job.sources)
    encoder = make_encoder(tokenizer, backend, n_bytes)
    job = replace(job, reading=replace(job.reading, in_pieces=tokenizer.takes_pieces))
    hashes, number, size = [], len(done), 0
    bar = progress(n_bytes, "bytes", f"pretokenize ({tokenizer.kind}, {encoder.name})")
    with bar, _frequent_switches(), ExitStack() as stack, ThreadPoolExecutor(1) as thread:
        shard, writing = stack.enter_context(_Shard(job, folder, number, tokenizer)), deque()
        for source, chunk in _ahead(_chunks(job, first, position, bar.update, hashes)):
            ids, counts = encoder.encode(chunk.texts)
            writing.append(thread.submit(shard.add, chunk, ids, counts))
            size += sum(chunk.sizes)
            full = size >= shard_bytes and chunk.piece != "more"
            while len(writing) > (0 if full else WAITING):
                writing.popleft().result()
            if full:
                join.add(shard.publish((source, chunk.position)))
                number, size = number + 1, 0
                shard = stack.enter_context(_Shard(job, folder, number, tokenizer))
        for future in writing:
            future.result()
        if first < len(job.sources):
            join.add(shard.publish((len(job.sources), 0)))
    return hashes


def _chunks(job: Job, first: int, position: int, count: Callable[[int], object],
            hashes: list[str]) -> Iterator[tuple[int, Chunk]]:
    """Yield the chunks from a position of text `first` on, each with the number of its text; append texts' SHA-256."""
    for i, source in enumerate(job.sources):
        with HashingReader(source, count) as reader:
            if i >= first:
                for chunk in read_chunks(source, reader, job.reading, position if i == first else 0):
                    yield i, chunk
            hashes.append(reader.finish())


def _ahead(items: Iterator) -> Iterator:
    """Iterate in a thread, `WAITING` items ahead."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, None) for _ in range(WAITING))
        while (item := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, items, None))
            yield item


@contextmanager
def _frequent_switches() -> Iterator[None]:
    """Let threads take turns every 0.1 ms: at Python's 5 ms a finished encoder waits for the reader."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _paths(job: Job, folder: Path, number: int) -> list[Path]:
    return [folder / f"{number:05}.{part}.bin" for part in job.targets]


def _whole_shards(job: Job, folder: Path) -> list[list[Path]]:
    """The shards of which every part is complete, up to the first gap."""
    shards = []
    while all(path.exists() for path in _paths(job, folder, len(shards))):
        shards.append(_paths(job, folder, len(shards)))
    return shards


class _Shard:
    """One token file for each part, and the counts of stories that no part holds."""

    def __init__(self, job: Job, folder: Path, number: int, tokenizer: Tokenizer):
        self.job, self.n_empty, self.n_excluded, self.n_replaced = job, 0, 0, 0
        self.long_bytes = 0  # of the long story whose pieces come in
        with ExitStack() as stack:
            self.writers = [stack.enter_context(TokenFileWriter(path, tokenizer, {}))
                            for path in _paths(job, folder, number)]
            self.long_ids = stack.enter_context(tempfile.SpooledTemporaryFile(LONG_STORY_IN_MEMORY, dir=folder))
            self.stack = stack.pop_all()

    def __enter__(self) -> "_Shard":
        return self

    def __exit__(self, *exception) -> None:
        self.stack.close()

    def add(self, chunk: Chunk, ids: np.ndarray, counts: np.ndarray) -> None:
        """Write each story of a chunk into the file of its part."""
        self.n_empty += chunk.n_empty
        self.n_replaced += chunk.n_replaced
        if chunk.piece:
            self._add_piece(chunk, ids)
            return
        parts, sizes = self._parts(chunk), np.array(chunk.sizes, np.int64)
        for number, writer in enumerate(self.writers):
            mine = parts == number
            if mine.all():
                writer.add(ids, counts, sizes)
            elif mine.any():
                writer.add(ids[np.repeat(mine, counts)], counts[mine], sizes[mine])

    def publish(self, end: tuple[int, int]) -> list[Path]:
        """Complete the shard, which ends at this text and position; return its files."""
        for writer in self.writers:
            writer.policies["end"] = end
            writer.publish([], self.n_empty, self.n_excluded, self.n_replaced)
        self.stack.close()
        return [writer.path for writer in self.writers]

    def _parts(self, chunk: Chunk) -> np.ndarray:
        if chunk.hashes is None:
            return np.zeros(len(chunk.texts), np.int64)
        parts = targets_of(np.array(chunk.hashes, np.uint64), self.job)
        self.n_excluded += int((parts < 0).sum())
        return parts

    def _add_piece(self, chunk: Chunk, ids: np.ndarray) -> None:
        """Keep the ids of a long story until its end, where its part is known."""
        ids = ids if chunk.piece == "last" else ids[:-1]  # the encoder ends each piece with end-of-text
        self.long_ids.write(ids.astype("<u4").data)
        self.long_bytes += chunk.sizes[0]
        if chunk.piece == "more":
            return
        [part] = self._parts(chunk)
        n_ids, nothing = self.long_ids.tell() // 4, np.zeros(0, np.uint32)
        self.long_ids.seek(0)
        if part >= 0:
            while block := self.long_ids.read(4 * COPIED):
                self.writers[part].add(np.frombuffer(block, "<u4"), nothing, nothing)
            self.writers[part].add(nothing, [n_ids], [self.long_bytes])
        self.long_ids.seek(0)
        self.long_ids.truncate()
        self.long_bytes = 0


class Join:
    """The final token file of each part: the shards one after another, appended by a thread of its own.

    Args:
        job: texts and parts.
        tokenizer: of the ids.
        folder: of the final files.

    Use as a context manager.
    """

    def __init__(self, job: Job, tokenizer: Tokenizer, folder: Path):
        self.job, self.counts, self.appending = job, np.zeros(3, np.int64), []
        with ExitStack() as stack:
            self.writers = [stack.enter_context(TokenFileWriter(folder / path.name, tokenizer,
                                                                {**job.policies, "part": part}))
                            for part, path in job.targets.items()]
            self.thread = stack.enter_context(ThreadPoolExecutor(1))
            self.stack = stack.pop_all()

    def __enter__(self) -> "Join":
        return self

    def __exit__(self, *exception) -> None:
        self.thread.shutdown(cancel_futures=True)
        self.stack.close()

    def add(self, paths: list[Path]) -> None:
        """Append a shard."""
        self.appending.append(self.thread.submit(self._append, paths))

    def _append(self, paths: list[Path]) -> None:
        header = read_header(paths[0])  # of each part it states the same counts
        self.counts += [header[key] for key in ("n_empty_dropped", "n_excluded", "n_replaced")]
        for path, writer in zip(paths, self.writers, strict=True):
            _copy(TokenFile.open(path), writer)

    def publish(self, sources: list[dict]) -> None:
        """Complete the files. Args: what their headers state of the texts.

        Raises:
            UserError: a part without a story.
        """
        for future in self.appending:
            future.result()
        n_empty, n_excluded, n_replaced = self.counts.tolist()
        for part, writer in zip(self.job.targets, self.writers, strict=True):
            if not writer.n_stories:
                n_stories = sum(writer.n_stories for writer in self.writers)
                raise UserError(_no_story(self.job, part, n_stories, n_excluded))
        for writer in self.writers:
            writer.publish(sources, n_empty, n_excluded, n_replaced)


def _copy(data: TokenFile, writer: TokenFileWriter) -> None:
    nothing = np.zeros(0, np.uint32)
    for begin in range(0, data.n_tokens, COPIED):
        writer.add(data.tokens[begin:begin + COPIED], nothing, nothing)
    for begin in range(0, data.n_stories, COPIED):
        offsets = data.offsets[begin:begin + COPIED + 1].astype(np.int64)
        if begin + COPIED >= data.n_stories:
            offsets = np.append(offsets, data.n_tokens)
        writer.add(nothing, np.diff(offsets), data.story_bytes[begin:begin + COPIED])


def _no_story(job: Job, part: str, n_stories: int, n_excluded: int) -> str:
    """Return the message for a part without a story."""
    names = ", ".join(source.name for source in job.sources[:3])
    where = f"{names}, with {n_stories} stories in all, leaves the {part} part empty" if job.shares else (
        f"{names} holds no story")
    remedy = "Use more text" + (", or another --split" if job.shares else "")
    if n_excluded and not n_stories:
        remedy = f"All its {n_excluded:,} stories are left out by --exclude"
    elif n_stories < 10 and job.reading.stories == "endoftext" and any(s.kind == "text" for s in job.sources):
        remedy = ("Is there no <|endoftext|> between the stories? Then use --stories line (in a suite: --set "
                  "stories=line), or more text")
    return f"{where}; expected at least one story{' in each part' if job.shares else ''}. {remedy}."
