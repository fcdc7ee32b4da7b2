"""Token files of other programs: bare ids, or llm.c's 1,024-byte header and ids, to a token file of ours.

    raw      nothing but little-endian ids, such as nanoGPT's train.bin (uint16, GPT-2; end-of-text closes a document)
    llm.c    256 int32 (magic, version, number of tokens, zeros), then the ids; end-of-text opens a document
             magic 20240520, version 1: uint16 ids of GPT-2;  magic 20240801, version 7: uint32 ids of Llama 3

Either way end-of-text separates documents; what stands between two of them is a story, and empty ones are dropped and
counted. A file without any is one story, as text without separators is, up to `LONGEST_STORY`; or it is cut into
stories of a given number of ids, which begin anywhere.

Source: data/shakespeare/prepare.py and data/openwebtext/prepare.py of github.com/karpathy/nanoGPT;
dev/data/data_common.py of github.com/karpathy/llm.c.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plotarmour.cli import UserError
from plotarmour.data.readers import HashingReader, Source
from plotarmour.data.token_file import TokenFile, looks_like_token_file
from plotarmour.data.token_writer import TokenFileWriter
from plotarmour.data.tokenizer import Tokenizer, make_tokenizer

FORMATS = ("auto", "raw", "llm.c")
DTYPES = ("uint16", "uint32", "int32", "int64")
LLM_C_HEADER_BYTES = 1024
LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic: version, dtype of the ids
BLOCK_TOKENS = 2**20
STORIES_PER_BATCH = 1000
LONGEST_STORY = 2**24  # ids; about 64 MB of text. A story is held in memory whole


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        path: the token file.
        n_stories, n_tokens: of it; one end-of-text per story is counted as a token.
        n_empty_dropped: documents without a token.
        format, dtype: as the ids were read.
        first_story: the beginning of the first story as text: nonsense there means a wrong dtype or tokenizer.
    """

    path: Path
    n_stories: int
    n_tokens: int
    n_empty_dropped: int
    format: str
    dtype: str
    first_story: str


@dataclass(frozen=True)
class Layout:
    """Where the ids stand in a file: format, dtype, offset of the first in bytes, and how many."""

    format: str
    dtype: np.dtype
    offset: int
    n_tokens: int


def import_bin(path: Path, tokenizer: str, out: Path, dtype: str | None = None, format: str = "auto",
               end_of_text: int | None = None, story_tokens: int | None = None, force: bool = False) -> Imported:
    """Write the token file of some ids that another program made.

    Args:
        path: of the ids. Of any size: it is read in blocks.
        tokenizer: that made them: "gpt2", a folder, or a token file or run folder whose tokenizer to use.
        out: the token file to write.
        dtype: of the ids: "uint16", "uint32", "int32" or "int64"; for llm.c its header says it.
        format: "raw", "llm.c", or "auto": llm.c where its magic stands.
        end_of_text: id that separates documents; the tokenizer's by default.
        story_tokens: cut documents longer than this many ids into stories of so many.
        force: replace an existing file.

    Raises:
        UserError: a file that is not of this format, an id outside the vocabulary, an existing `out` without `force`.
    """
    if out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"{out} is both read and written; expected another name for the token file with --out.")
    if out.exists() and not force:
        raise UserError(f"{out} exists already; expected a new name. Use another --out, or --force to replace it.")
    if story_tokens is not None and story_tokens < 1:
        raise UserError(f"--story-tokens {story_tokens} is too small; expected at least 1.")
    layout = find_layout(path, dtype, format)
    made = TokenFile.open(tokenizer).tokenizer() if tokenizer.endswith(".bin") else make_tokenizer(tokenizer)
    separator = made.end_of_text_id if end_of_text is None else end_of_text
    if not 0 <= separator < made.vocab_size:
        raise UserError(f"--end-of-text {separator} is outside the vocabulary of {made.vocab_size:,} entries; expected "
                        f"an id of it, by default {made.end_of_text_id}.")
    source = Source(path, path.name)
    bar = tqdm(total=layout.n_tokens, unit="token", unit_scale=True, desc=f"import ({layout.format})", mininterval=0.5)
    policies = {"stories": "imported", "split": None, "newlines": "kept", "part": "all"}
    with bar, HashingReader(source) as reader, TokenFileWriter(out, made, policies) as writer:
        documents = Documents(separator, made.end_of_text_id, story_tokens, path)
        stories = documents.stories(_blocks(path, layout, made, reader, bar))
        while batch := list(islice(stories, STORIES_PER_BATCH)):
            _add(writer, batch, made)
        if not writer.n_stories:
            raise UserError(f"{path} holds no story: nothing but end-of-text; expected ids between them.")
        writer.publish([{**source.fingerprint(), "sha256": reader.finish()}], documents.n_empty)
    data = TokenFile.open(out)
    return Imported(out, data.n_stories, data.n_tokens, data.header["n_empty_dropped"], layout.format,
                    layout.dtype.name, made.decode(data.story(0)[:200]))


def find_layout(path: Path, dtype: str | None, format: str = "auto") -> Layout:
    """Find out where the ids of a file stand.

    Raises:
        UserError: no such file, a size that does not fit, a foreign magic, or a dtype that is missing or does not fit.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is unknown; expected one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}.")
    if path.is_dir() or not path.exists():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a file of token ids.")
    if looks_like_token_file(path):
        raise UserError(f"{path} is a token file of this program already; use it as it is.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
    if format == "raw" or (format == "auto" and int(head[0]) not in LLM_C):
        return _raw_layout(path, size, dtype)
    if int(head[0]) not in LLM_C:
        raise UserError(f"{path} is not a file of llm.c: it begins with {head[0]}, expected "
                        f"{' or '.join(map(str, LLM_C))}. Use --format raw and a --dtype for bare ids.")
    version, expected = LLM_C[int(head[0])]
    if head[1] != version:
        raise UserError(f"{path} has version {head[1]} of llm.c's format {head[0]}; this program reads {version}.")
    if dtype not in (None, expected):
        raise UserError(f"--dtype {dtype} contradicts {path}, whose llm.c header stands for {expected}. Leave it out.")
    layout = Layout("llm.c", np.dtype(expected).newbyteorder("<"), LLM_C_HEADER_BYTES, int(head[2]))
    end = layout.offset + layout.n_tokens * layout.dtype.itemsize
    if layout.n_tokens < 1 or size != end:
        raise UserError(f"{path} is {'truncated' if size < end else 'not whole'}: {size:,} bytes, its header says "
                        f"{end:,} ({layout.n_tokens:,} ids). Make or copy it again.")
    return layout


def _raw_layout(path: Path, size: int, dtype: str | None) -> Layout:
    if dtype is None:
        raise UserError(f"{path} does not say how its ids are stored; expected --dtype, one of {', '.join(DTYPES)} "
                        "(nanoGPT: uint16).")
    found = np.dtype(dtype).newbyteorder("<")
    if size == 0 or size % found.itemsize:
        raise UserError(f"{path} has {size:,} bytes; expected a multiple of {found.itemsize} for {dtype} ids. It is "
                        "truncated, or --dtype is another.")
    return Layout("raw", found, 0, size // found.itemsize)


def _blocks(path: Path, layout: Layout, tokenizer: Tokenizer, reader: HashingReader, bar: tqdm) -> Iterator[np.ndarray]:
    """Yield the checked ids as int64 arrays of at most `BLOCK_TOKENS`; hashes the file on the way."""
    reader.read(layout.offset)
    position, left = 0, b""  # a read may end inside an id
    while data := left + reader.read(BLOCK_TOKENS * layout.dtype.itemsize - len(left)):
        whole = len(data) - len(data) % layout.dtype.itemsize
        if not whole:
            break
        left = data[whole:]
        ids = np.frombuffer(data[:whole], dtype=layout.dtype).astype(np.int64)
        wrong = np.flatnonzero((ids < 0) | (ids >= tokenizer.vocab_size))
        if len(wrong):
            raise UserError(f"{path}: id {ids[wrong[0]]} at position {position + wrong[0]:,} is outside the vocabulary "
                            f"of {tokenizer.vocab_size:,} entries ({tokenizer.kind}); expected little-endian "
                            f"{layout.dtype.name} ids of this tokenizer. Check --dtype and --tokenizer.")
        position += len(ids)
        bar.update(len(ids))
        yield ids


@dataclass
class Documents:
    """Cuts blocks of ids into stories.

    Attributes:
        separator: id between documents, not part of any.
        end_of_text: the tokenizer's; inside a document only where the separator is another, and refused there.
        story_tokens: longest story in ids, or None.
        path: for messages.
        n_empty: documents without an id, so far. The gaps before a first and behind a last separator are none.
    """

    separator: int
    end_of_text: int
    story_tokens: int | None
    path: Path
    n_empty: int = 0

    def stories(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the ids of each story, int64 (n,), n >= 1.

        Example:
            5 0 0 6 7 with separator 0: the stories 5 and 6 7; one empty document.
        """
        waiting, first = [], True  # pieces of a document that goes on in the next block
        for ids in blocks:
            begin = 0
            for end in np.flatnonzero(ids == self.separator):
                waiting.append(ids[begin:end])
                begin = end + 1
                if any(map(len, waiting)):
                    yield from self._cut(np.concatenate(waiting))
                elif not first:
                    self.n_empty += 1
                waiting, first = [], False
            waiting.append(ids[begin:])
            if self.story_tokens:  # so that a file without separators is not held whole
                *whole, rest = self._cut(np.concatenate(waiting)) or [ids[:0]]
                yield from whole
                waiting = [rest]
            elif sum(map(len, waiting)) > LONGEST_STORY:
                raise UserError(f"{self.path} holds more than {LONGEST_STORY:,} ids without end-of-text "
                                f"{self.separator}; expected shorter stories. Cut it, e.g. with --story-tokens 1024, "
                                "or name the id that separates its documents: --end-of-text ID.")
        if any(map(len, waiting)):
            yield from self._cut(np.concatenate(waiting))

    def _cut(self, ids: np.ndarray) -> list[np.ndarray]:
        if self.separator != self.end_of_text and (ids == self.end_of_text).any():
            raise UserError(f"{self.path} holds the tokenizer's end-of-text id {self.end_of_text} inside a document "
                            f"that --end-of-text {self.separator} separates; expected one separator. Leave it out.")
        size = self.story_tokens or max(1, len(ids))
        return [ids[begin:begin + size] for begin in range(0, len(ids), size)]


def _add(writer: TokenFileWriter, stories: list[np.ndarray], tokenizer: Tokenizer) -> None:
    """Append some stories with the UTF-8 bytes of their text: summed by token where that is exact, else decoded."""
    end = np.array([tokenizer.end_of_text_id])
    if tokenizer.token_bytes is not None:
        sizes = np.array([int(tokenizer.token_bytes[ids].sum()) for ids in stories])
    else:
        sizes = np.array([len(text.encode()) for text in tokenizer.decode_batch(stories)])
    ids = np.concatenate([part for story in stories for part in (story, end)]).astype(np.uint32)
    writer.add(ids, np.array([len(story) + 1 for story in stories]), sizes)
