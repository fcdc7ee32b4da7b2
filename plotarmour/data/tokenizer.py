"""Text to ids and back: GPT-2's vocabulary, a byte-level BPE learned from the text, or plain bytes.

Every tokenizer is a `tokenizers.Tokenizer` (Hugging Face) and is stored as its JSON: in token files, in run folders. A
literal `<|endoftext|>` inside a story is ordinary text: only the pretokenizer writes the end-of-text id.

`fastokens` (Apache-2.0) gives the same ids about a hundred times faster; `Encoder` uses it where it is installed
and checks it against `tokenizers` on the user's own text. benchmarks/pretokenize.py measures both.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError
from plotarmour.data.stories import PIECE, pieces
from plotarmour.machine import cores

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
GPT2_SHA256 = "0f8c9d6ae8900a28603a84f9c4be747822b43891146b9d76e7d3faf936c34c0b"  # see `_is_gpt2`
ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("auto", "fastokens", "tokenizers")
CHECKED_SHARE = 0.005  # of the characters that fastokens encodes are encoded by tokenizers as well, at most
CHECKED_CHARACTERS = 2048  # of one text, at most
WORTHWHILE = 2**20  # bytes of text: below, the reference has finished before fastokens is loaded
UNCUT = 64 * 2**20  # characters that are encoded at once, at most


class Tokenizer:
    """A tokenizer with an end-of-text id.

    Args:
        json_text: what `tokenizers.Tokenizer.to_str` returns, the content of a tokenizer.json.
        kind: the user's name for it: "gpt2", "bpe:4096", "bytes" or "file".

    Raises:
        UserError: not a tokenizer, or one without an end-of-text entry.
    """

    def __init__(self, json_text: str, kind: str):
        import tokenizers

        try:
            self.backend = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"the {kind} tokenizer cannot be read ({error}); expected a Hugging Face "
                            "tokenizer.json.") from None
        self.json, self.sha256 = json_text, hashlib.sha256(json_text.encode()).hexdigest()
        self.vocab_size, self.end_of_text_id = self.backend.get_vocab_size(), self.backend.token_to_id(END_OF_TEXT)
        if self.end_of_text_id is None:
            raise UserError(f"the {kind} tokenizer has no {END_OF_TEXT} entry; expected one, it ends every story. "
                            "Add it as a special token.")
        self.kind = "gpt2" if kind == "file" and _is_gpt2(self) else kind
        self.backend.encode_special_tokens = True  # a literal <|endoftext|> in a story stays text
        self.backend.no_padding()
        self.backend.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any end-of-text id."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; the end-of-text id becomes `<|endoftext|>`."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_batch(self, rows: list[np.ndarray]) -> list[str]:
        """Return the text of each row of ids, as `decode` does, computed on all cores."""
        return self.backend.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)

    @cached_property
    def takes_pieces(self) -> bool:
        """Whether the `pieces` of a story have the ids of the whole story.

        True for byte-level BPE: its regular expression never matches across the cuts. Other tokenizers may normalise
        across them, mark the beginning of a text, or have entries that contain spaces.
        """
        settings = json.loads(self.json)
        split, model = settings.get("pre_tokenizer") or {}, settings["model"]
        return (split.get("type") == "ByteLevel" and split.get("use_regex", True) and _changes_nothing(settings)
                and not split.get("add_prefix_space", True) and model.get("type", "BPE") == "BPE"
                and "merges" in model and not model.get("dropout"))

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """int32 (vocab_size,): UTF-8 bytes that each id stands for; 0 for end-of-text. None where the sum is not exact.

        Exact only for byte-level vocabularies: each character of an entry stands for one byte, no byte is missing, and
        the text is encoded unchanged. Others mark continuations (`##ed`), normalise, or put a space before the text.
        """
        settings, vocabulary = json.loads(self.json), self.backend.get_vocab(with_added_tokens=True)
        splits = settings.get("pre_tokenizer") or {}
        splits = splits.get("pretokenizers") or [splits]  # a sequence, or a single one
        unchanged = all(split.get("type") == "Split" and split.get("behavior") != "Removed"
                        or split.get("type") == "ByteLevel" and not split.get("add_prefix_space", True)
                        for split in splits)
        byte_level = (settings.get("decoder") or {}).get("type") == splits[-1].get("type") == "ByteLevel"
        if not (byte_level and unchanged and _changes_nothing(settings) and set(_alphabet()) <= set(vocabulary)):
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in vocabulary.items():
            sizes[i] = 0 if token == END_OF_TEXT else len(token)
        return sizes


def _changes_nothing(settings: dict) -> bool:
    """Whether a tokenizer.json neither normalises the text nor has entries of its own beside special ones."""
    return settings.get("normalizer") is None and all(token["special"] for token in settings.get("added_tokens", []))


def _is_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether entries, merges and splitting are GPT-2's; the size alone does not identify it."""
    if (tokenizer.vocab_size, tokenizer.end_of_text_id) != (GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - 1):
        return False
    model = json.loads(tokenizer.json)["model"]
    vocab, merges = model["vocab"], [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    content = "\n".join(sorted(vocab, key=vocab.get)) + "\0" + "\n".join(merges)
    return hashlib.sha256(content.encode()).hexdigest() == GPT2_SHA256 and tokenizer.takes_pieces


def make_tokenizer(spec: str, train_stories: Iterable[str] | None = None) -> Tokenizer:
    """Load or train the tokenizer that a command line or recipe names.

    Args:
        spec: "gpt2", "bpe:N" (N entries including <|endoftext|>), "bytes", a tokenizer.json, or a folder with a
            tokenizer.json or with vocab.json and merges.txt.
        train_stories: text that bpe:N learns from: of the train part only, or held-out text leaks into training.

    Raises:
        UserError: an unknown name, a folder without a tokenizer, or GPT-2's vocabulary cannot be found.
    """
    from tokenizers import models

    if spec == "gpt2":
        return _gpt2()
    if spec == "bytes":
        return Tokenizer(_byte_level(models.BPE({c: i for i, c in enumerate(_alphabet())}, [])).to_str(), "bytes")
    if spec.startswith("bpe:"):
        return _train_bpe(vocab_size_of(spec), train_stories)
    path = Path(spec)
    if spec and path.exists():
        return load_tokenizer(path)
    raise UserError(f"unknown tokenizer {spec!r}; expected gpt2, bpe:N (such as bpe:4096), bytes, or a folder or "
                    "token file that holds a tokenizer.")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, or the one of a folder, or vocab.json and merges.txt of a folder."""
    from tokenizers import models

    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if not file.is_file() and vocab.is_file() and merges.is_file():
        return Tokenizer(_byte_level(models.BPE.from_file(str(vocab), str(merges))).to_str(), "file")
    if not file.is_file():
        raise UserError(f"{path} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt.")
    try:
        return Tokenizer(file.read_text(encoding="utf-8", errors="replace"), "file")
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _gpt2() -> Tokenizer:
    for folder in (Path("data") / "gpt2", ROOT / "data" / "gpt2"):
        if folder.is_dir():
            tokenizer = load_tokenizer(folder)
            if tokenizer.kind != "gpt2":
                raise UserError(f"{folder} holds a tokenizer of {tokenizer.vocab_size:,} entries that is not GPT-2's. "
                                f"Put GPT-2's there, or name the folder: --tokenizer {folder}.")
            return tokenizer
    try:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download("openai-community/gpt2", "tokenizer.json"))
    except Exception as error:  # being offline raises many kinds of exceptions, with one remedy
        raise UserError("GPT-2's vocabulary is not in data/gpt2 and the Hugging Face hub cannot be reached "
                        f"({type(error).__name__}). Put tokenizer.json (or vocab.json and merges.txt) of "
                        "huggingface.co/openai-community/gpt2 into data/gpt2, or name their folder: --tokenizer "
                        "FOLDER, or use --tokenizer bpe:4096.") from None
    return Tokenizer(path.read_text(encoding="utf-8"), "gpt2")


def vocab_size_of(spec: str) -> int:
    """Return the number of entries of "gpt2", "bpe:N" (a small text yields fewer) or "bytes" without loading it.

    Raises:
        UserError: a folder or file, an unknown name, or an N that is no number or too small.
    """
    if spec in ("gpt2", "bytes"):
        return GPT2_VOCAB_SIZE if spec == "gpt2" else 257  # 256 bytes and <|endoftext|>
    if not spec.startswith("bpe:"):
        raise UserError(f"tokenizer {spec!r} does not tell its vocabulary's size; expected gpt2, bpe:N or bytes. Name "
                        "the size: --vocab-size N.")
    if not re.fullmatch(r"bpe:\d+", spec) or int(spec[4:]) < 257:
        raise UserError(f"tokenizer {spec!r} has no usable size; expected bpe:N with N at least 257 (256 bytes and "
                        f"{END_OF_TEXT}), such as bpe:4096.")
    return int(spec[4:])


def _alphabet() -> list[str]:
    """The characters that stand for the 256 bytes."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(model: object) -> object:
    """A `tokenizers.Tokenizer` that splits text as GPT-2 does and maps each byte to one character."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True)])
    return backend


def _train_bpe(size: int, stories: Iterable[str] | None) -> Tokenizer:
    from tokenizers import models, trainers

    if stories is None:
        raise UserError(f"bpe:{size} learns from text and has none; give it a text, or name an existing tokenizer.")
    backend = _byte_level(models.BPE())
    backend.train_from_iterator(stories, trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False, initial_alphabet=_alphabet()))
    if backend.get_vocab_size() < size:
        warnings.warn(f"the text yields only {backend.get_vocab_size()} of bpe:{size} entries: every word of it is one "
                      "token already. A smaller N, more text or --bpe-bytes helps.", stacklevel=3)
    return Tokenizer(backend.to_str(), f"bpe:{size}")


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
            ids, offsets = self._fast(texts)
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
    if "merges" in settings["model"]:
        settings["model"].setdefault("type", "BPE")  # missing in GPT-2's own file
    encode = partial(fastokens.Tokenizer.from_json_str(json.dumps(settings)).encode_batch_flat,
                     add_special_tokens=True, split_special_tokens=True)
    encode(["a"])  # an older release lacks the options
    return encode
