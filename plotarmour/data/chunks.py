"""Blocks of bytes to stories, a chunk at a time, in bounded memory and the same for any size of block.

A story of at most `PIECE` bytes comes whole. A longer one comes in pieces, each cut at the last place within `PIECE`
where a space follows a character that is not blank: a byte-level BPE never has a token across such a place, so the ids
of the pieces are the ids of the story.
"""

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from plotarmour.cli import UserError
from plotarmour.data.readers import HashingReader, Source, blocks
from plotarmour.data.stories import BLANK, SEPARATOR, StoryHasher, story_hash

BLOCK = 2**20  # bytes read, cut, encoded and written at once; more leave the CPU's caches and are slower
PIECE = 2**20
PARQUET_ROWS = 100  # at a time
LONGEST_WHOLE = 64 * 2**20  # bytes of a story that its tokenizer cannot take in pieces
BLANK_BYTES = BLANK.encode()
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Attributes:
        stories: what makes a story in plain text: "endoftext", "line" or "file".
        errors: "strict", or "replace" for U+FFFD in place of what is not UTF-8.
        in_pieces: whether the tokenizer takes long stories in pieces.
        hashed: whether story hashes are wanted (for a split, or to leave stories out).
        block: bytes.
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
        sizes: UTF-8 bytes of each.
        position: where the next chunk begins: bytes of the unpacked text, or rows of a Parquet file.
        hashes: of each story if wanted; of a long story with its last piece.
        piece: "" for whole stories, "more" or "last" for a piece.
        n_empty: empty stories dropped on the way.
        n_replaced: U+FFFD put in.
        read: bytes of the file read so far, and their SHA-256.
    """

    texts: list[str]
    sizes: list[int]
    position: int
    hashes: list[int] | None = None
    piece: str = ""
    n_empty: int = 0
    n_replaced: int = 0
    read: tuple[int, str] = (0, "")


def read_chunks(source: Source, reader: HashingReader, reading: Reading, position: int = 0) -> Iterator[Chunk]:
    """Stream the stories of one text.

    Args:
        source: the text.
        reader: through which it is read; complete it with `reader.finish()` afterwards.
        reading: what makes a story, and how it is decoded.
        position: a chunk's `position` to go on from. Everything before is still read, and hashed.

    Raises:
        UserError: text that is not UTF-8 (byte offset, line), an unbroken run above `PIECE`, damaged records.
    """
    if source.kind == "parquet":
        yield from _parquet_chunks(source, reader, reading, position)
        return
    separator = b"\n" if source.kind == "jsonl" else {"endoftext": SEPARATOR, "line": b"\n", "file": None}[
        reading.stories]
    cutter = _Cutter(source, reader, reading)
    seen, carry = 0, b""
    for block in blocks(source, reader, reading.block):
        if seen < position:  # of an earlier start: hashed by the reader, done before
            skipped = min(len(block), position - seen)
            seen, block = seen + skipped, block[skipped:]
            cutter.offset = seen
            if not block:
                continue
        seen += len(block)
        carry = carry + block if carry else block
        if cutter.offset == 0 and BOM.startswith(carry[:3]):
            if len(carry) < 3:
                continue  # too few bytes to tell
            carry, cutter.offset = carry[3:], 3
        if separator:
            *parts, carry = carry.split(separator)
            if parts:
                yield from cutter.stories(parts, separator)
        if len(carry) > cutter.limit:
            carry = yield from cutter.pieces(carry, len(separator or b""))
    if carry or cutter.inside:
        yield from cutter.stories([carry], b"")


@dataclass
class _Cutter:
    """The state between blocks: where in the text it stands, and whether inside a long story."""

    source: Source
    reader: HashingReader
    reading: Reading
    offset: int = 0  # in the unpacked text: of what comes next
    inside: bool = False
    hasher: StoryHasher = field(default_factory=StoryHasher)

    @property
    def limit(self) -> int:
        """Bytes of a story that comes whole."""
        return PIECE if self.reading.in_pieces and self.source.kind == "text" else LONGEST_WHOLE

    def stories(self, parts: list[bytes], separator: bytes) -> Iterator[Chunk]:
        """Yield complete stories; with an empty separator `parts` is what follows the last one."""
        if self.inside or sum(map(len, parts)) > self.limit:
            small = []  # neighbours that come whole
            for part in parts:
                if self.inside or len(part.strip(BLANK_BYTES)) > self.limit:
                    yield from self._whole(small, separator)
                    small = []
                    yield from self._long(part, separator)
                else:
                    small.append(part)
            parts = small
        yield from self._whole(parts, separator)

    def pieces(self, carry: bytes, separator_length: int) -> Generator[Chunk, None, bytes]:
        """Yield pieces from the beginning of a story that is already too long; return what is left of it."""
        if not self.inside:
            left = carry.lstrip(BLANK_BYTES)
            self.offset, carry = self.offset + len(carry) - len(left), left
        # A separator may have begun in the last bytes, and blank space may prove to be the end: neither counts.
        while len(carry[:len(carry) - max(0, separator_length - 1)].rstrip(BLANK_BYTES)) > self.limit:
            cut = self._cut(carry)
            piece, carry = carry[:cut], carry[cut:]
            self.offset += cut
            yield self._piece(piece, "more")
        if len(carry) > 2 * LONGEST_WHOLE:  # only blank space can have gathered here
            raise UserError(f"{self.source.name}: more than {2 * LONGEST_WHOLE // 2**20} MiB of blank space after byte "
                            f"{self.offset:,}; expected text. Take it out.")
        return carry

    def _whole(self, parts: list[bytes], separator: bytes) -> Iterator[Chunk]:
        if not parts:
            return
        start = self.offset
        self.offset += sum(map(len, parts)) + len(separator) * len(parts)
        if self.source.kind == "jsonl":
            lines, replaced = self._decode(parts, parts, separator, start)
            found = [t for i, line in enumerate(lines) if (t := self._record(line, start, parts, i)) is not None]
            texts = [stripped for t in found if (stripped := t.strip(BLANK))]
            n_empty = len(found) - len(texts)
        else:
            stripped = [s for part in parts if (s := part.strip(BLANK_BYTES))]
            n_empty = len(parts) - len(stripped) if separator else 0  # what follows the last separator is no story
            texts, replaced = self._decode(stripped, parts, separator, start)
        sizes = [len(t) if t.isascii() else _size(t, self.source) for t in texts]
        hashes = list(map(story_hash, texts)) if self.reading.hashed else None
        yield Chunk(texts, sizes, self.offset, hashes, "", n_empty, replaced, self.reader.digest())

    def _long(self, part: bytes, separator: bytes) -> Iterator[Chunk]:
        """Yield the pieces of a long story, or what is left of one, up to its end."""
        rest = yield from self.pieces(part, 0)
        self.offset += len(rest) + len(separator)
        yield self._piece(rest.rstrip(BLANK_BYTES), "last", len(rest) + len(separator))

    def _piece(self, raw: bytes, kind: str, behind: int = 0) -> Chunk:
        start = self.offset - (behind or len(raw))
        [text], replaced = self._decode([raw], [raw], b"", start)
        if self.reading.hashed:
            self.hasher.update(text)
        hashes = [self.hasher.value()] if kind == "last" and self.reading.hashed else None
        self.inside = kind == "more"
        if not self.inside:
            self.hasher = StoryHasher()
        return Chunk([text], [len(text.encode())], self.offset, hashes, kind, 0, replaced, self.reader.digest())

    def _cut(self, buffer: bytes) -> int:
        """Where to cut the first piece: before a space that follows a character that is not blank."""
        if self.source.kind == "jsonl":
            raise UserError(f"{self.source.name}: the line at byte {self.offset:,} has more than "
                            f"{LONGEST_WHOLE // 2**20} MiB; expected one record a line. Cut it into several.")
        if self.limit > PIECE:
            raise UserError(f"{self.source.name}: the story at byte {self.offset:,} has more than "
                            f"{LONGEST_WHOLE // 2**20} MiB; expected shorter ones with this tokenizer, which cannot "
                            "take a story in pieces. Put separators into it, or use gpt2, bpe:N or bytes.")
        end = PIECE + 1
        while (end := buffer.rfind(b" ", 1, end)) > 0:
            before = buffer[max(0, end - 4):end].decode("utf-8", "replace")[-1]
            if not before.isspace():
                return end
        raise UserError(f"{self.source.name}: an unbroken run of more than {PIECE // 2**20} MiB at byte "
                        f"{self.offset:,}, in a story longer than that; expected words with spaces between them. Is it "
                        "text? Put separators between stories, or line by line: --stories line.")

    def _decode(self, stories: list[bytes], parts: list[bytes], separator: bytes, start: int) -> tuple[list[str], int]:
        """Return texts and the number of U+FFFD put in. `parts` lay between separators from byte `start` on."""
        if self.reading.errors == "replace":
            texts = [story.decode("utf-8", "replace") for story in stories]
            return texts, sum(t.count("\ufffd") - s.count(b"\xef\xbf\xbd")
                              for t, s in zip(texts, stories, strict=True) if not t.isascii())
        try:
            return [story.decode() for story in stories], 0
        except UnicodeDecodeError:
            raw = separator.join(parts)
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(self.source, start + error.start, raw[error.start])) from None
            raise

    def _record(self, line: str, start: int, parts: list[bytes], i: int) -> str | None:
        """The text of one JSON line, or None for a blank line."""
        if not line.strip():
            return None
        column = self.source.text_column
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            offset = start + sum(map(len, parts[:i])) + i
            raise UserError(f"{self.source.name}: no JSON at byte {offset:,} ({error}); expected one object a "
                            "line.") from None
        if isinstance(record, dict) and column in record and isinstance(record[column], str | None):
            return record[column] or ""  # null counts as an empty story, as in Parquet
        offset = start + sum(map(len, parts[:i])) + i
        if not isinstance(record, dict):
            found = f"is a JSON {type(record).__name__}; expected an object"
        elif column in record:
            found = f"has {type(record[column]).__name__} in {column!r}; expected text. Name another with --text-column"
        else:
            keys = " ".join(", ".join(record).split())[:200]
            found = f"has no text in {column!r} (it has: {keys}). Name the column with --text-column"
        raise UserError(f"{self.source.name}: the line at byte {offset:,} {found}.")


def _size(text: str, source: Source) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:  # JSON can spell what UTF-8 cannot
        raise UserError(f"{source.name}: a text with a lone surrogate (U+{ord(text[error.start]):04X}); expected "
                        "characters that UTF-8 has. Mend or leave out that record.") from None


def _not_utf8(source: Source, offset: int, byte: int) -> str:
    line, left = 1, offset
    with HashingReader(source) as reader:
        for block in blocks(source, reader, 2**20):
            line += block[:left].count(b"\n")
            left -= min(left, len(block))
            if not left:
                break
    return (f"{source.name} is not UTF-8: byte 0x{byte:02x} at offset {offset:,}, line {line:,}. Save it as UTF-8, "
            f"e.g. with: iconv -f latin1 -t utf-8 {source.name} > utf8.txt, or use --errors replace.")


def _parquet_chunks(source: Source, reader: HashingReader, reading: Reading, position: int) -> Iterator[Chunk]:
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
            done, found, size = 0, [], 0
            report, reader.progress = reader.progress, None  # by rows: the reader sees the bytes only at the end
            total, rows = source.path.stat().st_size, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[source.text_column]):
                if report:
                    report(total * (done + len(batch)) // rows - total * done // rows)
                done += len(batch)
                if done <= position:
                    continue
                found += batch.column(0).to_pylist()
                size += batch.nbytes
                if size >= reading.block:
                    yield _rows(source, found, done, reading)
                    found, size = [], 0
            if found:
                yield _rows(source, found, done, reading)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source.name} cannot be read as Parquet ({str(error).partition(chr(10))[0]}); expected a "
                        "whole .parquet file with UTF-8 text. Get it again.") from None


def _rows(source: Source, found: list, done: int, reading: Reading) -> Chunk:
    """The chunk of some rows of a Parquet file, up to row `done`."""
    texts = [s for t in found if t and (s := t.strip(BLANK))]
    sizes = [len(t) if t.isascii() else _size(t, source) for t in texts]
    if max(sizes, default=0) > LONGEST_WHOLE:
        raise UserError(f"{source.name}: a row before row {done:,} has more than {LONGEST_WHOLE // 2**20} MiB; "
                        "expected shorter ones. Cut it into several.")
    hashes = list(map(story_hash, texts)) if reading.hashed else None
    return Chunk(texts, sizes, done, hashes, "", len(found) - len(texts))


def read_stories(source: Source, reading: Reading | None = None) -> Iterator[str]:
    """Stream the stories of a text, one by one; a story longer than `PIECE` is put together again."""
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
