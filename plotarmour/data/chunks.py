"""Blocks of bytes to stories, in chunks and in bounded memory; the stories do not depend on the size of the blocks.

A story of at most `PIECE` bytes comes whole. A longer one comes in pieces, each cut at the last place within `PIECE`
across which a byte-level BPE never has a token (`tokenizer.cut_place`), so their ids are those of the story.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from plotarmour.cli import UserError
from plotarmour.data.readers import BOM, MIB, HashingReader, Source, blocks
from plotarmour.data.stories import BLANK, SEPARATOR, StoryHasher, story_hash
from plotarmour.data.tokenizer import cut_place

BLOCK = 2**20  # bytes read, cut, encoded and written at once; larger blocks leave the CPU's caches and are slower
PIECE = 2**20  # bytes
LONGEST_WHOLE = 64 * 2**20  # bytes of a story that does not come in pieces
PARQUET_ROWS = 100  # decoded at once
BLANK_BYTES = BLANK.encode()


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Attributes:
        stories: what makes a story in plain text: "endoftext", "line" or "file".
        errors: "strict", or "replace" to put U+FFFD in place of bytes that are not UTF-8.
        in_pieces: whether the tokenizer takes long stories in pieces.
        hashed: whether story hashes are computed (for a split, or to exclude stories).
        block: bytes read at once.
    """

    stories: str = "endoftext"
    errors: str = "strict"
    in_pieces: bool = True
    hashed: bool = False
    block: int = BLOCK


@dataclass(frozen=True)
class Chunk:
    """Some whole stories, or one piece of a long one.

    Attributes:
        texts: without the blank space around them, none empty.
        sizes: UTF-8 bytes of each text.
        position: where the next chunk begins: in bytes of the unpacked text, or in rows of a Parquet file.
        hashes: `story_hash` of each story, if `Reading.hashed`; of a long story with its last piece.
        piece: "" for whole stories; "more" or "last" for a piece.
        n_empty: empty stories dropped.
        n_replaced: U+FFFD put in.
    """

    texts: list[str]
    sizes: list[int]
    position: int
    hashes: list[int] | None = None
    piece: str = ""
    n_empty: int = 0
    n_replaced: int = 0


def read_chunks(source: Source, reader: HashingReader, reading: Reading, position: int = 0) -> Iterator[Chunk]:
    """Stream the stories of one text.

    Args:
        source: the text.
        reader: reads and hashes the file; call `reader.finish()` afterwards.
        reading: what makes a story, and how it is decoded.
        position: of an earlier chunk, to continue behind it. What lies before is read and hashed, too.

    Raises:
        UserError: text that is not UTF-8 (byte offset, line), an unbroken run above `PIECE`, damaged records.
    """
    if source.kind == "parquet":
        yield from _read_parquet(source, reader, reading, position)
        return
    cutter = _Cutter(source, reading)
    for block in blocks(source, reader, reading.block):
        if cutter.offset < position:
            skipped = min(len(block), position - cutter.offset)
            cutter.offset, block = cutter.offset + skipped, block[skipped:]
        yield from cutter.feed(block)
    yield from cutter.finish()


def read_stories(source: Source, reading: Reading | None = None) -> Iterator[str]:
    """Stream the stories of a text one by one; the pieces of a long one are joined."""
    pieces = []
    with HashingReader(source) as reader:
        for chunk in read_chunks(source, reader, reading or Reading()):
            if not chunk.piece:
                yield from chunk.texts
                continue
            pieces += chunk.texts
            if chunk.piece == "last":
                yield "".join(pieces)
                pieces = []


class _Cutter:
    """Cuts the unpacked bytes of a text into chunks, block by block."""

    def __init__(self, source: Source, reading: Reading):
        self.source, self.reading = source, reading
        policies = {"endoftext": SEPARATOR, "line": b"\n", "file": b""}
        self.separator = b"\n" if source.kind == "jsonl" else policies[reading.stories]
        self.limit = PIECE if reading.in_pieces and source.kind == "text" else LONGEST_WHOLE  # bytes of a whole story
        self.offset = 0  # in the unpacked text, of the first byte that is not in a chunk yet
        self.rest = b""  # what was read from there on: the beginning of a story
        self.inside = False  # whether it continues a story whose first pieces are out
        self.hasher = StoryHasher()

    def feed(self, block: bytes) -> Iterator[Chunk]:
        rest = self.rest + block if self.rest else block
        if self.offset == 0 and BOM.startswith(rest[:3]):
            if len(rest) < 3:
                self.rest = rest  # too few bytes to tell
                return
            rest, self.offset = rest[3:], 3
        if self.separator:
            *parts, rest = rest.split(self.separator)
            yield from self._stories(parts, self.separator)
        if len(rest) > self.limit:
            rest = yield from self._pieces(rest, max(0, len(self.separator) - 1))
        self.rest = rest

    def finish(self) -> Iterator[Chunk]:
        if self.rest or self.inside:
            yield from self._stories([self.rest], b"")

    def _stories(self, parts: list[bytes], separator: bytes) -> Iterator[Chunk]:
        """Yield complete stories; the separator is empty for the story at the end of the text."""
        if not self.inside and sum(map(len, parts)) <= self.limit:
            yield from self._whole(parts, separator)
            return
        small = []  # neighbours that come whole
        for part in parts:
            if not self.inside and len(part.strip(BLANK_BYTES)) <= self.limit:
                small.append(part)
                continue
            yield from self._whole(small, separator)
            small = []
            rest = yield from self._pieces(part, 0)
            start, self.offset = self.offset, self.offset + len(rest) + len(separator)
            yield self._piece(rest.rstrip(BLANK_BYTES), start, "last")
        yield from self._whole(small, separator)

    def _pieces(self, rest: bytes, margin: int) -> Generator[Chunk, None, bytes]:
        """Yield pieces from the beginning of a long story, and return what is left of it.

        Args:
            rest: of the story, as far as it was read.
            margin: bytes at its end that may belong to a separator.
        """
        if not self.inside:
            stripped = rest.lstrip(BLANK_BYTES)
            self.offset, rest = self.offset + len(rest) - len(stripped), stripped
        while len(rest[:len(rest) - margin].rstrip(BLANK_BYTES)) > self.limit:  # blank space may end the story
            start, cut = self.offset, self._cut(rest)
            piece, rest = rest[:cut], rest[cut:]
            self.offset += cut
            yield self._piece(piece, start, "more")
        if len(rest) > 2 * LONGEST_WHOLE:
            raise UserError(f"{self.source.name}: more than {2 * LONGEST_WHOLE // MIB} MiB of blank space after byte "
                            f"{self.offset:,}; expected text. Remove it.")
        return rest

    def _cut(self, rest: bytes) -> int:
        """Return where the first piece of a long story ends."""
        if self.limit > PIECE:
            raise UserError(f"{self.source.name}: the story or line at byte {self.offset:,} has more than "
                            f"{LONGEST_WHOLE // MIB} MiB; expected shorter ones in JSON lines, and with any tokenizer "
                            "but gpt2, bpe:N and bytes. Cut it into several.")
        if cut := cut_place(rest, PIECE + 1):
            return cut
        raise UserError(f"{self.source.name}: an unbroken run of more than {PIECE // MIB} MiB at byte "
                        f"{self.offset:,}, in a story longer than that; expected words with spaces between them. Is it "
                        "text? Put separators between stories, or line by line: --stories line.")

    def _whole(self, parts: list[bytes], separator: bytes) -> Iterator[Chunk]:
        if not parts:
            return
        start, self.offset = self.offset, self.offset + sum(map(len, parts)) + len(separator) * len(parts)
        if self.source.kind == "jsonl":
            lines, n_replaced = self._decode(parts, parts, start)
            records = [(i, line) for i, line in enumerate(lines) if line.strip()]
            texts = [self._text_of(line, parts, i, start).strip(BLANK) for i, line in records]
            texts, n_stories = [text for text in texts if text], len(texts)
        else:
            stripped = [s for part in parts if (s := part.strip(BLANK_BYTES))]
            texts, n_replaced = self._decode(stripped, parts, start)
            n_stories = len(parts) if separator else len(texts)  # nothing after the last separator is no story
        yield _chunk(texts, self.source, self.reading, self.offset, n_stories - len(texts), n_replaced)

    def _piece(self, raw: bytes, start: int, kind: str) -> Chunk:
        [text], n_replaced = self._decode([raw], [raw], start)
        hashes = None
        if self.reading.hashed:
            self.hasher.update(text)
            hashes = [self.hasher.value()] if kind == "last" else None
        self.inside = kind == "more"
        if kind == "last":
            self.hasher = StoryHasher()
        return Chunk([text], [len(text.encode())], self.offset, hashes, kind, 0, n_replaced)

    def _decode(self, stories: list[bytes], parts: list[bytes], start: int) -> tuple[list[str], int]:
        """Return texts and the number of U+FFFD put in; the stories are `parts`, which begin at `start`, stripped."""
        if self.reading.errors == "replace":
            texts = [story.decode("utf-8", "replace") for story in stories]
            return texts, sum(t.count("\ufffd") - s.count(b"\xef\xbf\xbd")
                              for t, s in zip(texts, stories, strict=True) if not t.isascii())
        try:
            return [story.decode() for story in stories], 0
        except UnicodeDecodeError:
            raw = self.separator.join(parts)
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(_not_utf8(self.source, start + error.start, raw[error.start])) from None
        raise AssertionError("the stories are not UTF-8, but their text is")

    def _text_of(self, line: str, parts: list[bytes], i: int, start: int) -> str:
        """Return the text of the JSON line `parts[i]`."""
        column = self.source.text_column
        try:
            record = json.loads(line)
            if isinstance(record, dict) and column in record and isinstance(record[column], str | None):
                return record[column] or ""  # null is an empty story, as in Parquet
            complaint = f"is a JSON {type(record).__name__}; expected an object with a text in {column!r}"
            if isinstance(record, dict) and column in record:
                complaint = f"has {type(record[column]).__name__} in {column!r}; expected text"
            elif isinstance(record, dict):
                keys = " ".join(", ".join(record).split())[:200]
                complaint = f"has no text in {column!r} (it has: {keys})"
            complaint += ". Name the column with --text-column"
        except (ValueError, RecursionError) as error:
            complaint = f"is not JSON ({error}); expected one object a line"
        offset = start + sum(map(len, parts[:i])) + i
        raise UserError(f"{self.source.name}: the line at byte {offset:,} {complaint}.")


def _chunk(texts: list[str], source: Source, reading: Reading, position: int, n_empty: int, n_replaced: int) -> Chunk:
    """Return the chunk of some whole stories."""
    try:
        sizes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    except UnicodeEncodeError as error:  # JSON can write what UTF-8 cannot
        raise UserError(f"{source.name}: a text has a lone surrogate (U+{ord(error.object[error.start]):04X}); "
                        "expected characters that UTF-8 has. Correct or remove that record.") from None
    hashes = list(map(story_hash, texts)) if reading.hashed else None
    return Chunk(texts, sizes, position, hashes, "", n_empty, n_replaced)


def _not_utf8(source: Source, offset: int, byte: int) -> str:
    line, left = 1, offset
    with HashingReader(source) as reader:
        for block in blocks(source, reader, MIB):
            line += block[:left].count(b"\n")
            left -= min(left, len(block))
            if not left:
                break
    return (f"{source.name} is not UTF-8: byte 0x{byte:02x} at offset {offset:,}, line {line:,}. Save it as UTF-8, "
            f"e.g. with: iconv -f latin1 -t utf-8 {source.name} > utf8.txt, or use --errors replace.")


def _read_parquet(source: Source, reader: HashingReader, reading: Reading, position: int) -> Iterator[Chunk]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{source.name} is Parquet and pyarrow is not installed; expected it for this format. Install "
                        "it with: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(source.path) as file:
            names, types = file.schema_arrow.names, pyarrow.types
            if source.text_column not in names:
                raise UserError(f"{source.name} has no column {source.text_column!r} (it has: {', '.join(names)}). "
                                "Name the column with --text-column.")
            kind = file.schema_arrow.field(source.text_column).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
                raise UserError(f"{source.name}: column {source.text_column!r} holds {kind}; expected text. Name "
                                "another with --text-column.")
            n_read, rows, size = 0, [], 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[source.text_column]):
                n_read += len(batch)
                # The file is hashed in step with the rows, so that a progress bar moves.
                reader.read(reader.before[1] * n_read // file.metadata.num_rows - reader.n_bytes)
                if n_read <= position:
                    continue
                rows += batch.column(0).to_pylist()
                size += batch.nbytes
                if size >= reading.block or n_read == file.metadata.num_rows:
                    texts = [text for row in rows if row and (text := row.strip(BLANK))]
                    if max(map(len, texts), default=0) > LONGEST_WHOLE:
                        raise UserError(f"{source.name}: a row before row {n_read:,} has more than "
                                        f"{LONGEST_WHOLE // MIB} Mi characters; expected shorter ones. Cut it into "
                                        "several.")
                    yield _chunk(texts, source, reading, n_read, len(rows) - len(texts), 0)
                    rows, size = [], 0
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source.name} cannot be read as Parquet ({str(error).partition(chr(10))[0]}); expected a "
                        "whole .parquet file with UTF-8 text. Get it again.") from None
