"""Texts to token files: one thread reads and cuts, the tokenizer's own threads encode, one thread writes.

Every `SAVE_BYTES` of text the unfinished files are synced, and saved.json gets their lengths and the place in the
texts. A later start cuts the files to these lengths and continues there. The files do not depend on where that was.

`fastokens` (Apache-2.0) gives the same ids as `tokenizers` about a hundred times faster; `Encoder` uses it where it is
installed and checks it against `tokenizers` on the user's own text. benchmarks/pretokenize.py measures both.
"""

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError, progress, say
from plotarmour.data.readers import BLOCK, Chunk, HashingReader, Source, likely_stories, read_chunks
from plotarmour.data.stories import PIECE, parts_of, pieces, story_hashes
from plotarmour.data.token_writer import TokenFileWriter
from plotarmour.data.tokenizer import END_OF_TEXT, Spelling, Tokenizer
from plotarmour.files import read_json, write_json
from plotarmour.machine import cores

SAVE_BYTES = 256 * 10**6  # of text
SAVED = "saved.json"
WAITING = 2  # chunks between two threads
BACKENDS = ("auto", "fastokens", "tokenizers")
CHECKED_SHARE = 0.005  # of the characters that fastokens encodes are encoded by tokenizers as well, at most
CHECKED_CHARACTERS = 2048  # of one text, at most
WORTHWHILE = 2**20  # bytes of text: below, the reference has finished before fastokens is loaded
UNCUT = 64 * 2**20  # characters that are encoded at once, at most
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
        tokenizer, backend: see `Encoder`.
        save_bytes: of text between two saves, at least.

    Raises:
        Differs: the ids of the fast backend are not the reference's.
        UserError: a part without a story, or a text that cannot be read or encoded.
    """
    saved = read_json(work / SAVED)
    (first, position), counts = saved.get("place", (0, 0)), np.array(saved.get("counts", [0] * (3 + len(job.targets))))
    if saved:
        say(f"going on where an earlier start was stopped: {position:,} bytes or rows into {job.sources[first].name}")
    n_bytes = sum(source.path.stat().st_size for source in job.sources)
    encoder, spelling, hashes, size, writing = Encoder(tokenizer, backend, n_bytes), Spelling(tokenizer), [], 0, deque()
    bar = progress(n_bytes, "bytes", f"pretokenize ({tokenizer.kind}, {encoder.name})")
    with bar, ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-4)  # seconds: at Python's 5 ms a finished encoder waits for the reader
        writers = [stack.enter_context(TokenFileWriter(work / path.name, tokenizer, {**job.policies, "part": part},
                                                       saved.get("files", {}).get(part, (0, 0))))
                   for part, path in job.targets.items()]
        thread = stack.enter_context(ThreadPoolExecutor(1))
        for i, chunk, targets in _ahead(_chunks(job, first, position, bar.update, hashes)):
            spelling.check(chunk.texts)
            counts[:3] += (chunk.n_empty, np.count_nonzero(targets < 0), chunk.n_replaced)
            n_done, sizes = 0, np.array(chunk.sizes)
            for ids, ends in encoder.encode_stories(chunk.texts, job.sources[i].name):
                ended = slice(n_done, n_done + len(ends))
                begun = slice(n_done, max(ended.stop, n_done + 1))  # ids that end no story continue one
                if tokenizer.drops_unknown:  # a tokenizer that takes no pieces: ids are those of whole stories
                    known = np.add.reduceat(tokenizer.token_bytes[ids], np.cumsum(ends) - ends)
                    unknown, sizes[ended] = sizes[ended] - known, known
                    counts[3:] += [unknown[targets[ended] == i].sum() for i in range(len(writers))]
                writing.append(thread.submit(_add, writers, ids, ends, sizes[ended], targets[begun]))
                n_done = ended.stop
                _wait(writing, WAITING)
            size += sum(chunk.sizes)
            if size >= save_bytes:
                _wait(writing)
                files = {part: writer.save() for part, writer in zip(job.targets, writers, strict=True)}
                write_json(work / SAVED, {"place": (i, chunk.position), "counts": counts.tolist(), "files": files})
                size = 0
        _wait(writing)
        n_empty, n_excluded, n_replaced, *n_unknown_bytes = counts.tolist()
        for part, writer in zip(job.targets, writers, strict=True):
            if not writer.n_stories:
                raise UserError(_no_story(job, part, sum(writer.n_stories for writer in writers), n_excluded))
        sources = described([{**source.fingerprint(), "sha256": sha256}
                             for source, sha256 in zip(job.sources, hashes, strict=True)])
        for writer, n_bytes in zip(writers, n_unknown_bytes, strict=True):
            writer.policies |= {"n_unknown_bytes": n_bytes} if tokenizer.drops_unknown else {}
            writer.complete(sources, n_empty, n_excluded, n_replaced)
    if lost := spelling.summary():
        say(f"{lost}; models learn and are scored on what remains")


def _add(writers: list[TokenFileWriter], ids: np.ndarray, counts: np.ndarray, sizes: np.ndarray,
         targets: np.ndarray) -> None:
    """Write each story into the file of its part."""
    for number, writer in enumerate(writers):
        mine = targets == number
        if mine.all():
            writer.add(ids, counts, sizes)
        elif mine.any():
            writer.add(ids[np.repeat(mine, counts)], counts[mine], sizes[mine])


def _wait(writing: deque, at_most: int = 0) -> None:
    """Wait until at most so many batches are left to write; raise what a write has raised."""
    while len(writing) > at_most:
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
    count = "1 story" if n_stories == 1 else f"{n_stories} stories"
    where = f"{names}, with {count} in all, leaves the {part} part empty" if job.shares else (
        f"{names} holds no story")
    remedy = "Use more text" + (", or another --split" if job.shares else "")
    if n_excluded and not n_stories:
        remedy = f"All its {n_excluded:,} stories are left out by --exclude"
    elif n_stories < 10 and job.policies["stories"] == "endoftext" and any(s.kind == "text" for s in job.sources):
        likely = likely_stories(job.sources[0])
        remedy = f"Is there no <|endoftext|> between the stories? Then use --stories {likely}, or more text"
    return f"{where}; expected at least one story{' in each part' if job.shares else ''}. {remedy}."


class Differs(Exception):
    """fastokens gave other ids than `tokenizers`: none of its ids can be trusted."""


class Encoder:
    """Encodes texts in batches: by fastokens, with samples compared with `tokenizers`, or by `tokenizers` alone.

    Args:
        tokenizer: the reference.
        backend: "auto" takes fastokens if it is installed, can read the tokenizer and the text is long enough; then
            `name` is "fastokens", else "tokenizers".
        n_bytes: size of the text.
    """

    def __init__(self, tokenizer: Tokenizer, backend: str, n_bytes: int):
        self.tokenizer, self.name, self._fast = tokenizer, "tokenizers", None
        self.n_seen = self.n_checked = self.n_calls = 0  # characters, characters, calls
        if backend == "tokenizers" or (backend == "auto" and n_bytes < WORTHWHILE):
            return
        try:
            self._fast, self.name = _fastokens(tokenizer), "fastokens"
        except Exception as error:  # of any kind: the reference can read this tokenizer
            if backend == "fastokens":
                raise UserError(f"fastokens cannot be used ({error}); expected it for --backend fastokens. Install it "
                                "with pip install fastokens, or use --backend auto.") from None

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode some texts; raise `Differs` if ids of fastokens are not the reference's.

        Returns:
            All ids, uint32 (n,), each text followed by end-of-text; and how many ids each text has, end-of-text
            included, int64 (len(texts),).
        """
        if self._fast:
            try:
                ids, offsets = self._fast(texts)
            except BaseException as error:  # of any kind, panics of Rust included: the reference may do better
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                raise Differs(f"fastokens fails ({' '.join(str(error).split())[:200]})") from None
            ids, offsets = np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8").astype(np.int64)
            self._check(texts, ids, offsets)
            return ids, np.diff(offsets)
        rows = [row + [self.tokenizer.end_of_text_id] for row in self.tokenizer.encode_batch(texts)]
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.uint32, int(counts.sum())), counts

    def encode_stories(self, stories: list[str], name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Encode some stories of the text `name` in batches; a long story comes in pieces.

        Yields:
            Ids as `encode` returns them, and how many ids each story has that ends in them, earlier batches included.
        """
        if max(map(len, stories), default=0) <= PIECE:
            yield self.encode(stories)
            return
        for story in stories:
            left, n_ids = len(story), 0
            for piece in pieces(story, PIECE) if self.tokenizer.takes_pieces else [story]:
                if len(piece) > UNCUT:
                    raise UserError(f"{name}: an unbroken run of {len(piece):,} characters, which begins "
                                    f"{piece[:40]!r}; expected at most {UNCUT:,} between two spaces (in a whole story, "
                                    "with any tokenizer but gpt2, bpe:N and bytes). Is it text? Put separators between "
                                    "stories, or use --stories line.")
                left -= len(piece)
                ids, _ = self.encode([piece])
                ids = ids[:-1] if left else ids  # end-of-text ends each piece
                n_ids += len(ids)
                yield ids, np.array([] if left else [n_ids], np.int64)

    def _check(self, texts: list[str], ids: np.ndarray, offsets: np.ndarray) -> None:
        """Compare the first texts, then one of every batch, with `tokenizers`."""
        end = self.tokenizer.end_of_text_id
        if len(offsets) != len(texts) + 1 or (ids[offsets[1:] - 1] != end).any() or (ids == end).sum() != len(texts):
            raise Differs("fastokens does not end every text with one end-of-text, as tokenizers does")
        self.n_seen += sum(map(len, texts))
        self.n_calls += 1
        first = self.n_calls * 7919 % max(1, len(texts))
        for i in range(len(texts)) if self.n_calls == 1 else range(first, min(first + 1, len(texts))):
            sample = next(pieces(texts[i], CHECKED_CHARACTERS), "")
            whole = sample == texts[i]  # else the beginning of a text, whose ids are the first ids of the text
            if len(sample) > CHECKED_CHARACTERS or not (whole or self.tokenizer.takes_pieces):
                continue
            if self.n_checked + len(sample) > CHECKED_SHARE * self.n_seen:
                return
            self.n_checked += len(sample)
            expected = self.tokenizer.encode(sample)
            actual = ids[offsets[i]:offsets[i + 1] - 1]
            if actual[:None if whole else len(expected)].tolist() != expected:
                raise Differs(f"fastokens gives other ids than tokenizers for {sample[:60]!r}")


def _fastokens(tokenizer: Tokenizer) -> Callable[[list[str]], tuple[bytes, bytes]]:
    """Return a function that encodes a batch by fastokens: ids, and the offset of each text, as bytes."""
    os.environ.setdefault("FASTOKENS_BPE_THREADS", str(max(1, cores() - 1)))  # one core reads and writes
    import fastokens

    closing = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": closing, "pair": closing, "special_tokens": {
        END_OF_TEXT: {"id": END_OF_TEXT, "ids": [tokenizer.end_of_text_id], "tokens": [END_OF_TEXT]}}}
    settings = json.loads(tokenizer.json) | {"post_processor": template, "truncation": None, "padding": None}
    return partial(fastokens.Tokenizer.from_json_str(json.dumps(settings)).encode_batch_flat,
                   add_special_tokens=True, split_special_tokens=True)
