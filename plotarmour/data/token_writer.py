"""Write token files, whose layout `token_file` describes: batch by batch, or from ids of other programs.

`import_bin` reads bare ids, llm.c's 1,024-byte header and ids, or a tensor:

    raw      nothing but little-endian ids, such as nanoGPT's train.bin (uint16, GPT-2; end-of-text ends a document)
    llm.c    256 int32 (magic, version, number of tokens, zeros), then the ids; end-of-text begins a document
    pt       one tensor of integers, (n,), written by `torch.save`; no code in it is run

In all, end-of-text separates documents. Each document becomes a story; empty ones are dropped and counted. A file
without end-of-text, such as nanoGPT's Shakespeare, is one story.

Source: data/shakespeare/prepare.py and data/openwebtext/prepare.py of github.com/karpathy/nanoGPT;
dev/data/data_common.py of github.com/karpathy/llm.c.
"""

import hashlib
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

import plotarmour
from plotarmour.cli import AnyPath, UserError, as_path, progress, refuse_existing
from plotarmour.data.readers import Source
from plotarmour.data.token_file import (
    CRC_BLOCK,
    FIXED,
    FORMAT_VERSION,
    HEADER_BYTES,
    MAGIC,
    TokenFile,
    looks_like_token_file,
    open_tokenizer,
)
from plotarmour.data.tokenizer import Tokenizer
from plotarmour.files import map_file, publish, unfinished

DTYPES = ("uint16", "uint32", "int32", "int64")
LLM_C_HEADER_BYTES = 1024
LLM_C = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # (magic, version): dtype of the ids; GPT-2, Llama 3
BLOCK_TOKENS = 2**20
STORIES_PER_BATCH = 1000


class TokenFileWriter:
    """Write a token file batch by batch; it appears under its name only when `publish` succeeds.

    Args:
        path: of the file.
        tokenizer: whose ids are written.
        policies: more entries of the header, such as `stories` and `split`.
        saved: what `save` of an earlier writer of this path returned, or (0, 0): this one continues behind it, writes
            to the path itself, and leaves it as it is after an error.

    Use as a context manager.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, policies: dict, saved: tuple[int, int] | None = None):
        self.path, self.tokenizer, self.policies, self.is_kept = path, tokenizer, policies, saved is not None
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
        self.n_tokens, self.n_stories = saved or (0, 0)
        self.n_indexed = self.n_tokens  # tokens of the stories in the index
        self.sha256, self.crcs, self.crc, self.filled = hashlib.sha256(), [], 0, 0  # of whole blocks; of the last one
        # The index comes behind the tokens, whose number is known only at the end.
        temporary = path if self.is_kept else unfinished(path)
        parts = {temporary: HEADER_BYTES + self.n_tokens * self.dtype.itemsize,
                 temporary.with_name(f"{temporary.name}.offsets"): 8 * self.n_stories,
                 temporary.with_name(f"{temporary.name}.lengths"): 4 * self.n_stories}
        for part, size in parts.items():
            part.touch()
            if self.n_stories and part.stat().st_size < size:
                raise UserError(f"{part} is truncated; expected what an earlier start has saved. Give the same command "
                                "again: it starts over.")
            os.truncate(part, size)  # what was written after the last save goes
        self.files = [part.open("r+b") for part in parts]
        self.body, self.offsets, self.lengths = self.files
        self.body.seek(HEADER_BYTES)
        while block := self.body.read(CRC_BLOCK):
            self._count(block)
        for file in self.files:
            file.seek(0, os.SEEK_END)

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *exception) -> None:
        for file in self.files:
            file.close()
            if not self.is_kept:
                Path(file.name).unlink(missing_ok=True)

    def add(self, ids: np.ndarray, counts: np.ndarray, sizes: np.ndarray) -> None:
        """Append ids, and the stories that end in them. Further calls may continue the last story.

        Args:
            ids: unsigned integers (n,); each story ends with end-of-text.
            counts: integers (m,): ids of each story, end-of-text and ids of earlier calls included.
            sizes: integers (m,): UTF-8 bytes of each story.

        Raises:
            UserError: an id outside the vocabulary, or a story of 4 GiB or more.

        Example:
            `add([5, 6, 0, 7], [3], [2])`, then `add([8, 0], [3], [4])`: the stories 5 6 0 of 2 bytes, 7 8 0 of 4.
        """
        ids, counts, sizes = np.asarray(ids), np.asarray(counts, np.int64), np.asarray(sizes, np.int64)
        if ids.max(initial=0) >= self.tokenizer.vocab_size:  # astype would wrap silently
            bad = ids[ids >= self.tokenizer.vocab_size][0]
            raise UserError(f"story {self.n_stories} or one soon after: id {bad} is outside the vocabulary of "
                            f"{self.tokenizer.vocab_size:,} entries; the tokenizer is inconsistent.")
        if sizes.max(initial=0) >= 2**32:
            raise UserError(f"story {self.n_stories} or one soon after has {sizes.max():,} bytes; expected less than "
                            f"{2**32:,}. Put separators into it.")
        ends = self.n_indexed + np.cumsum(counts)
        self.offsets.write((ends - counts).astype("<u8").data)
        self.lengths.write(sizes.astype("<u4").data)
        self.n_indexed, self.n_stories = self.n_indexed + int(counts.sum()), self.n_stories + len(counts)
        self._append(ids.astype(self.dtype).view("u1").data)
        self.n_tokens += len(ids)

    def save(self) -> tuple[int, int]:
        """fsync what was added, whole stories, and return the numbers of tokens and stories."""
        for file in self.files:
            file.flush()
            os.fsync(file.fileno())
        return self.n_tokens, self.n_stories

    def publish(self, sources: list[dict], n_empty_dropped: int = 0, n_excluded: int = 0, n_replaced: int = 0) -> None:
        """Add index, checks, tokenizer and header, and put the file under its name, atomically.

        Args:
            sources: name, bytes and hashes of the texts, for the header.
            n_empty_dropped, n_excluded: stories of the whole text that no part holds.
            n_replaced: U+FFFD put in.
        """
        self._end_block()
        sections = {"tokens": [HEADER_BYTES, self.n_tokens * self.dtype.itemsize]}
        self._append(bytes(-self.body.tell() % 8), checked=False)  # offsets begin at a multiple of 8
        for name, file in (("offsets", self.offsets), ("lengths", self.lengths)):
            start = self.body.tell()
            file.seek(0)
            while block := file.read(2**20):
                self._append(block)
            sections[name] = [start, self.body.tell() - start]
        self._end_block()
        checks = struct.pack(f"<{len(self.crcs)}I", *self.crcs)
        for name, data in (("checks", checks), ("tokenizer", self.tokenizer.json.encode())):
            sections[name] = [self.body.tell(), len(data)]
            self._append(data, checked=False)
        self.body.seek(0)
        self.body.write(header_block({
            "dtype": "uint16" if self.dtype.itemsize == 2 else "uint32", "n_tokens": self.n_tokens,
            "n_stories": self.n_stories, "n_empty_dropped": n_empty_dropped, "n_excluded": n_excluded,
            "n_replaced": n_replaced, "vocab_size": self.tokenizer.vocab_size,
            "end_of_text_id": self.tokenizer.end_of_text_id,
            "tokenizer": {"kind": self.tokenizer.kind, "sha256": self.tokenizer.sha256}, "source": sources,
            **self.policies, "payload_sha256": self.sha256.hexdigest(), "checks_crc32": zlib.crc32(checks),
            "sections": sections, "program": f"plotarmour {plotarmour.__version__}"}))
        self.save()
        self.files.remove(self.body)
        self.body.close()
        publish(Path(self.body.name), self.path)

    def _append(self, data: bytes | memoryview, checked: bool = True) -> None:
        self.body.write(data)
        self._count(data, checked)

    def _count(self, data: bytes | memoryview, checked: bool = True) -> None:
        """Update the SHA-256 of the payload and the CRC-32 of each block."""
        self.sha256.update(data)
        data = memoryview(data)
        while checked and data:
            part, data = data[:CRC_BLOCK - self.filled], data[CRC_BLOCK - self.filled:]
            self.crc, self.filled = zlib.crc32(part, self.crc), self.filled + len(part)
            if self.filled == CRC_BLOCK:
                self._end_block()

    def _end_block(self) -> None:
        if self.filled:
            self.crcs.append(self.crc)
        self.crc, self.filled = 0, 0


def header_block(header: dict) -> bytes:
    """Return the first 4,096 bytes of a token file."""
    text = json.dumps(header, ensure_ascii=False).encode()
    room = HEADER_BYTES - FIXED.size - 4
    if len(text) > room:
        raise UserError(f"the header needs {len(text)} bytes, {room} fit; join the source files into one.")
    block = FIXED.pack(MAGIC, FORMAT_VERSION, len(text)) + text.ljust(room)
    return block + struct.pack("<I", zlib.crc32(block))


def import_bin(path: AnyPath, tokenizer: str, out: AnyPath, dtype: str | None = None, format: str = "auto",
               end_of_text: int | None = None, force: bool = False) -> TokenFile:
    """Write a token file from the ids of another program. Memory holds a block, the longest document and a tensor.

    Args:
        path: the file of ids.
        tokenizer: the one that made the ids: "gpt2", a folder, a token file or a run folder.
        out: the token file to write.
        dtype: of bare ids, one of `DTYPES`; llm.c's header and a tensor say it.
        format: "raw", "llm.c", "pt", or "auto": by the name or by llm.c's magic.
        end_of_text: id between documents; default: the tokenizer's. (llm.c separates Llama 3's by 128000.)
        force: replace an existing file.

    Returns:
        The token file. Look at its first story: nonsense means a wrong dtype or tokenizer.

    Raises:
        UserError: the file has another format, an id is outside the vocabulary, or `out` exists.
    """
    path, out = as_path(path), as_path(out)
    if out.exists() and out.samefile(path):
        raise UserError(f"{out} is both read and written; expected another name for the token file with --out.")
    refuse_existing(out, force)
    ids = _open_ids(path, dtype, format)
    loaded = open_tokenizer(tokenizer)
    separator = loaded.end_of_text_id if end_of_text is None else end_of_text
    if not 0 <= separator < loaded.vocab_size:
        raise UserError(f"--end-of-text {separator} is outside the vocabulary of {loaded.vocab_size:,} entries; "
                        f"expected an id of it, by default {loaded.end_of_text_id}.")
    n_empty = 0
    with TokenFileWriter(out, loaded, {"stories": "imported", "split": None, "newlines": "kept", "part": "all"}
                         ) as writer:
        documents = split_documents(_checked_blocks(path, ids, loaded, separator), separator)
        while batch := list(islice(documents, STORIES_PER_BATCH)):
            stories = [story for story in batch if len(story)]
            n_empty += len(batch) - len(stories)
            if loaded.token_bytes is not None:
                sizes = [int(loaded.token_bytes[ids].sum()) for ids in stories]
            else:
                sizes = [len(text.encode()) for text in loaded.decode_batch(stories)]
            ids = [np.append(story, loaded.end_of_text_id) for story in stories]
            writer.add(np.concatenate([np.zeros(0, np.int64), *ids]).astype(np.uint32), list(map(len, ids)), sizes)
        if not writer.n_stories:
            raise UserError(f"{path} holds no story: nothing but end-of-text; expected ids between them.")
        source = Source.of(path)
        writer.publish([source.fingerprint() | {"sha256": source.sha256()}], n_empty)
    return TokenFile.open(out)


def _read_tensor(path: Path) -> np.ndarray:
    """Return the ids of a tensor, (n,). Torch refuses all but plain data, so that no code of the file is run."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # about the pickles that it refuses
            ids = torch.load(path, map_location="cpu", weights_only=True)
        found = f"a tensor of {ids.dtype} {list(ids.shape)}" if torch.is_tensor(ids) else f"a {type(ids).__name__}"
    except Exception as error:  # of many kinds, with one remedy
        ids, found = None, f"what torch.load(weights_only=True) refuses ({type(error).__name__})"
    if torch.is_tensor(ids) and ids.dim() == 1 and len(ids) and str(ids.dtype).startswith(("torch.int", "torch.uint")):
        return ids.numpy()
    raise UserError(f"{path} holds {found}; expected one tensor of ids, one-dimensional integers. Write it with "
                    "torch.save(ids, 'ids.pt').")


def _open_ids(path: Path, dtype: str | None, format: str) -> np.ndarray:
    """Return the ids of a file, (n,), if its format, dtype and size are the expected ones; map them if it can be."""
    if looks_like_token_file(path):
        raise UserError(f"{path} is a token file of this program already; use it as it is.")
    if path.suffix in (".pkl", ".pickle"):
        raise UserError(f"{path} is a pickle, which can run code; expected bare ids or a .pt file of one tensor. Write "
                        "it with torch.save(torch.tensor(ids), 'ids.pt').")
    if format == "pt" or (format == "auto" and path.suffix in (".pt", ".pth")):
        return _read_tensor(path)
    size, start = path.stat().st_size, 0
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise UserError(f"{path} is a .npy file of NumPy; expected bare ids, without its header. Write them with: "
                            f"python -c \"import numpy; numpy.load({str(path)!r}).tofile('ids.bin')\"")
        file.seek(0)
        magic, version, n_tokens = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4").tolist()
    if format == "llm.c" or (format == "auto" and (magic, version) in LLM_C):
        if (magic, version) not in LLM_C:
            raise UserError(f"{path} is not a file of llm.c: it begins with {magic}, {version}; expected magic and "
                            f"version {' or '.join(map(str, LLM_C))}. Use --format raw and a --dtype for bare ids.")
        dtype, start = LLM_C[magic, version], LLM_C_HEADER_BYTES
    elif dtype is None:
        raise UserError(f"{path} does not say how its ids are stored; expected --dtype, one of {', '.join(DTYPES)} "
                        "(nanoGPT: uint16).")
    stored = np.dtype(dtype).newbyteorder("<")
    n_ids, rest = divmod(size - start, stored.itemsize)
    if rest or n_ids < 1 or (start and n_ids != n_tokens):
        expected = f"{n_tokens:,} ids, as its header says" if start else "a whole number of ids, at least one"
        raise UserError(f"{path} has {size:,} bytes, which is {n_ids:,} {dtype} ids and {rest} bytes; expected "
                        f"{expected}. Copy it again, or check --dtype.")
    return map_file(path, stored, start)


def _checked_blocks(path: Path, ids: np.ndarray, tokenizer: Tokenizer, separator: int) -> Iterator[np.ndarray]:
    """Yield the ids in int64 blocks, and check each id against the vocabulary."""
    with progress(len(ids), "tokens", "import") as bar:
        for begin in range(0, len(ids), BLOCK_TOKENS):
            block = ids[begin:begin + BLOCK_TOKENS].astype(np.int64)
            wrong = np.flatnonzero((block < 0) | (block >= tokenizer.vocab_size))
            if len(wrong):
                raise UserError(f"{path}: id {block[wrong[0]]} at position {begin + wrong[0]:,} is outside the "
                                f"vocabulary of {tokenizer.vocab_size:,} entries ({tokenizer.kind}); expected "
                                f"little-endian {ids.dtype.name} ids of this tokenizer. Check --dtype and --tokenizer.")
            if separator != tokenizer.end_of_text_id and (block == tokenizer.end_of_text_id).any():
                raise UserError(f"{path} holds the tokenizer's end-of-text id {tokenizer.end_of_text_id} inside a "
                                f"document that --end-of-text {separator} separates; expected one separator. Leave it "
                                "out.")
            yield block
            bar.update(len(block))


def split_documents(blocks: Iterator[np.ndarray], separator: int) -> Iterator[np.ndarray]:
    """Yield the ids between separators, int64 (n,). Before a first and after a last separator, n >= 1.

    Example:
        5 0 0 6 7 with separator 0: 5, an empty document, 6 7.
    """
    pieces, first = [], True  # pieces: of a document that continues in the next block
    for ids in blocks:
        begin = 0
        for end in np.flatnonzero(ids == separator):
            document = np.concatenate([*pieces, ids[begin:end]])
            if len(document) or not first:
                yield document
            pieces, first, begin = [], False, end + 1
        pieces.append(ids[begin:])
    if any(map(len, pieces)):
        yield np.concatenate(pieces)
