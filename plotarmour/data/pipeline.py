"""Texts to token files: one thread reads and cuts, the tokenizer's own threads encode, one thread writes.

Every `SAVE_BYTES` of text the unfinished files are synced, and saved.json gets their lengths and the place in the
texts. A later start cuts the files to these lengths and continues there. The files do not depend on where that was.
"""

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError, progress, say
from plotarmour.data.readers import BLOCK, Chunk, HashingReader, Source, read_chunks
from plotarmour.data.stories import parts_of, story_hashes
from plotarmour.data.token_file import TokenFileWriter
from plotarmour.data.tokenizer import Encoder, Tokenizer
from plotarmour.files import read_json, write_json

SAVE_BYTES = 256 * 10**6  # of text
SAVED = "saved.json"
WAITING = 2  # chunks between two threads
NAMED_SOURCES = 6  # texts with an entry of their own in a header of 4,096 bytes
NAME_BYTES = 100  # of a text's name in a header


@dataclass(frozen=True)
class Job:
    """The texts, and the token files to write from them."""

    sources: list[Source]  # in order
    targets: dict[str, Path]  # the token file of each part; {"all": path} without a split
    shares: tuple[int, int, int] | None = None  # of train, val and test
    policies: dict = field(default_factory=dict)  # for the header
    excluded: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # sorted hashes
    block: int = BLOCK  # bytes read at once


def targets_of(hashes: np.ndarray, job: Job) -> np.ndarray:
    """Return the final file of each story, by its `story_hash`.

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


def write_token_files(job: Job, work: Path, tokenizer: Tokenizer, backend: str, save_bytes: int) -> None:
    """Encode the texts into token files in a folder; continue where an earlier start has saved last.

    Args:
        job: texts and targets.
        work: folder of unfinished work, where the files get the names of the targets.
        tokenizer, backend: see `tokenizer.Encoder`.
        save_bytes: of text between two saves, at least.

    Raises:
        Differs: the ids of the fast backend are not the reference's.
        UserError: a part without a story, or a text that cannot be read or encoded.
    """
    saved = read_json(work / SAVED)
    (first, position), counts = saved.get("place", (0, 0)), np.array(saved.get("counts", (0, 0, 0)))
    if saved:
        say(f"going on where an earlier start was stopped: {position:,} bytes or rows into {job.sources[first].name}")
    n_bytes = sum(source.path.stat().st_size for source in job.sources)
    encoder, hashes, size, writing = Encoder(tokenizer, backend, n_bytes), [], 0, deque()
    bar = progress(n_bytes, "bytes", f"pretokenize ({tokenizer.kind}, {encoder.name})")
    with bar, _frequent_switches(), ExitStack() as stack:
        writers = [stack.enter_context(TokenFileWriter(work / path.name, tokenizer, {**job.policies, "part": part},
                                                       saved.get("files", {}).get(part, (0, 0))))
                   for part, path in job.targets.items()]
        thread = stack.enter_context(ThreadPoolExecutor(1))
        for i, chunk, targets in _ahead(_chunks(job, first, position, bar.update, hashes)):
            counts += (chunk.n_empty, np.count_nonzero(targets < 0), chunk.n_replaced)
            n_done, sizes = 0, np.array(chunk.sizes)
            for ids, ends in encoder.encode_stories(chunk.texts, job.sources[i].name):
                ended = slice(n_done, n_done + len(ends))
                begun = slice(n_done, max(ended.stop, n_done + 1))  # ids that end no story continue one
                writing.append(thread.submit(_add, writers, ids, ends, sizes[ended], targets[begun]))
                n_done = ended.stop
                while len(writing) > WAITING:
                    writing.popleft().result()
            size += sum(chunk.sizes)
            if size >= save_bytes:
                _wait(writing)
                files = {part: writer.save() for part, writer in zip(job.targets, writers, strict=True)}
                write_json(work / SAVED, {"place": (i, chunk.position), "counts": counts.tolist(), "files": files})
                size = 0
        _wait(writing)
        n_empty, n_excluded, n_replaced = counts.tolist()
        for part, writer in zip(job.targets, writers, strict=True):
            if not writer.n_stories:
                raise UserError(_no_story(job, part, sum(writer.n_stories for writer in writers), n_excluded))
        sources = described([{**source.fingerprint(), "sha256": sha256}
                             for source, sha256 in zip(job.sources, hashes, strict=True)])
        for writer in writers:
            writer.publish(sources, n_empty, n_excluded, n_replaced)


def _add(writers: list[TokenFileWriter], ids: np.ndarray, counts: np.ndarray, sizes: np.ndarray,
         targets: np.ndarray) -> None:
    """Write each story into the file of its part."""
    for number, writer in enumerate(writers):
        mine = targets == number
        if mine.all():
            writer.add(ids, counts, sizes)
        elif mine.any():
            writer.add(ids[np.repeat(mine, counts)], counts[mine], sizes[mine])


def _wait(writing: deque) -> None:
    """Wait until all is written; raise what a write has raised."""
    while writing:
        writing.popleft().result()


def _chunks(job: Job, first: int, position: int, count: Callable[[int], object],
            hashes: list[str]) -> Iterator[tuple[int, Chunk, np.ndarray]]:
    """Yield chunks from a position in text `first` on, with the number of the text and the target of each story.

    The SHA-256 of every text is appended to `hashes`.
    """
    needs_hashes = job.shares or len(job.excluded)
    for i, source in enumerate(job.sources):
        with HashingReader(source, count) as reader:
            for chunk in read_chunks(source, reader, position if i == first else 0, job.block) if i >= first else ():
                n = len(chunk.texts)
                yield i, chunk, targets_of(story_hashes(chunk.texts) if needs_hashes else np.zeros(n, np.uint64), job)
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


def described(sources: list[dict]) -> list[dict]:
    """Return what a header states of some texts, of which `Source.fingerprint` is given: one entry for many."""
    if len(sources) <= NAMED_SOURCES:
        return [{**source, "name": _short(source["name"])} for source in sources]
    hashes = {key: joined_hash(source[key] for source in sources) for key in sources[0] if key.startswith("sha256")}
    return [{"name": f"{_short(sources[0]['name'])} and {len(sources) - 1} more files",
             "bytes": sum(source["bytes"] for source in sources), **hashes}]


def joined_hash(hashes: Iterable[str]) -> str:
    """Return one SHA-256 for those of many texts."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _short(name: str) -> str:
    raw = name.encode()
    return name if len(raw) <= NAME_BYTES else raw[:NAME_BYTES - 3].decode(errors="ignore") + "..."


def _no_story(job: Job, part: str, n_stories: int, n_excluded: int) -> str:
    """Return the message for a part without a story."""
    names = ", ".join(source.name for source in job.sources[:3])
    where = f"{names}, with {n_stories} stories in all, leaves the {part} part empty" if job.shares else (
        f"{names} holds no story")
    remedy = "Use more text" + (", or another --split" if job.shares else "")
    if n_excluded and not n_stories:
        remedy = f"All its {n_excluded:,} stories are left out by --exclude"
    elif n_stories < 10 and job.policies["stories"] == "endoftext" and any(s.kind == "text" for s in job.sources):
        remedy = ("Is there no <|endoftext|> between the stories? Then use --stories line (in a suite: --set "
                  "stories=line), or more text")
    return f"{where}; expected at least one story{' in each part' if job.shares else ''}. {remedy}."
