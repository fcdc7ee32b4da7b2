"""Token files from ids of other programs.

`import_bin` reads bare ids, llm.c's 1,024-byte header and ids, or a tensor:

    raw      nothing but little-endian ids, such as nanoGPT's train.bin (uint16, GPT-2; end-of-text ends a document)
    llm.c    256 int32 (magic, version, number of tokens, zeros), then the ids; end-of-text begins a document
    pt       one tensor of integers, (n,), written by `torch.save`; no code in it is run

In all, end-of-text separates documents. Each document becomes a story; empty ones are dropped and counted. A file
without end-of-text, such as nanoGPT's Shakespeare, is one story.

Source: data/shakespeare/prepare.py and data/openwebtext/prepare.py of github.com/karpathy/nanoGPT;
dev/data/data_common.py of github.com/karpathy/llm.c.
"""

import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from plotarmour.cli import AnyPath, UserError, as_path, progress, refuse_existing
from plotarmour.data.readers import Source
from plotarmour.data.token_file import TokenFile, looks_like_token_file, open_tokenizer
from plotarmour.data.token_writer import TokenFileWriter
from plotarmour.data.tokenizer import Tokenizer
from plotarmour.files import map_file, publish, sha256_of

DTYPES = ("uint16", "uint32", "int32", "int64")
LLM_C_HEADER_BYTES = 1024
LLM_C = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # (magic, version): dtype of the ids; GPT-2, Llama 3
BLOCK_TOKENS = 2**20
STORIES_PER_BATCH = 1000


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
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        unfinished = Path(work) / out.name
        policies = {"stories": "imported", "split": None, "newlines": "kept", "part": "all"}
        with TokenFileWriter(unfinished, loaded, policies) as writer:
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
            writer.complete([Source.of(path).fingerprint() | {"sha256": sha256_of(path)}], n_empty)
        publish(unfinished, out)
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
