"""Text to ids and back: GPT-2's vocabulary, a byte-level BPE learned from the text, or plain bytes.

Every tokenizer is a `tokenizers.Tokenizer` (Hugging Face) and is stored as its JSON: in token files, in run folders. A
literal `<|endoftext|>` inside a story is ordinary text: only the pretokenizer writes the end-of-text id.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError

END_OF_TEXT = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
GPT2_SHA256 = "0f8c9d6ae8900a28603a84f9c4be747822b43891146b9d76e7d3faf936c34c0b"  # see `_is_gpt2`
ROOT = Path(__file__).resolve().parents[2]


class Tokenizer:
    """A tokenizer with an end-of-text id.

    Args:
        json_text: what `tokenizers.Tokenizer.to_str` returns, the content of a tokenizer.json.
        kind: the user's name for it: "gpt2", "bpe:4096", "bytes" or "file".

    Raises:
        UserError: not a tokenizer, or one without `<|endoftext|>`.
    """

    def __init__(self, json_text: str, kind: str):
        import tokenizers

        try:
            self.backend = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"the {kind} tokenizer cannot be read ({error}); expected a Hugging Face "
                            "tokenizer.json.") from None
        self.json = json_text
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        self.vocab_size = self.backend.get_vocab_size()
        end = self.backend.token_to_id(END_OF_TEXT)
        if end is None:
            raise UserError(f"the {kind} tokenizer has no {END_OF_TEXT} entry; expected one, it ends every story. "
                            "Add it as a special token.")
        self.end_of_text_id = end
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
        """Whether the two parts of a text, cut by `cut_place`, have the same ids as the whole text.

        True for byte-level BPE: its regular expression never matches across such a place. Other tokenizers may
        normalise across it, mark the beginning of a text, or have entries that contain spaces.
        """
        settings = json.loads(self.json)
        split, model = settings.get("pre_tokenizer") or {}, settings["model"]
        byte_level = (split.get("type") == "ByteLevel" and split.get("use_regex", True)
                      and not split.get("add_prefix_space", True))
        bpe = model.get("type", "BPE") == "BPE" and "merges" in model and not model.get("dropout")
        return (bpe and byte_level and settings.get("normalizer") is None
                and all(token["special"] for token in settings.get("added_tokens", [])))

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """int32 (vocab_size,): UTF-8 bytes that each id stands for; 0 for end-of-text. None where the sum is not exact.

        Exact only for byte-level vocabularies: each character of an entry stands for one byte, no byte is missing, and
        the text is encoded unchanged. Others mark continuations (`##ed`), normalise, or put a space before the text.
        """
        from tokenizers import pre_tokenizers

        settings, vocabulary = json.loads(self.json), self.backend.get_vocab(with_added_tokens=True)
        splits = settings.get("pre_tokenizer") or {}
        splits = splits.get("pretokenizers") or [splits]  # a sequence, or a single one
        unchanged = all(split.get("type") == "Split" and split.get("behavior") != "Removed"
                        or split.get("type") == "ByteLevel" and not split.get("add_prefix_space", True)
                        for split in splits)
        byte_level = (settings.get("decoder") or {}).get("type") == splits[-1].get("type") == "ByteLevel"
        if not (byte_level and unchanged and settings.get("normalizer") is None
                and all(token["special"] for token in settings.get("added_tokens", []))
                and set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)):
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in vocabulary.items():
            sizes[i] = 0 if token == END_OF_TEXT else len(token)
        return sizes

    def save(self, path: Path) -> None:
        path.write_text(self.json, encoding="utf-8")


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
    if spec == "gpt2":
        return _gpt2()
    if spec == "bytes":
        return Tokenizer(_byte_level_json({}, []), "bytes")
    if spec.startswith("bpe:"):
        return _train_bpe(bpe_size(spec), train_stories)
    path = Path(spec)
    if spec and path.exists():
        return load_tokenizer(path)
    raise UserError(f"unknown tokenizer {spec!r}; expected gpt2, bpe:N (such as bpe:4096), bytes, or a folder or "
                    "token file that holds a tokenizer.")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, or the one of a folder, or vocab.json and merges.txt of a folder."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            return Tokenizer(file.read_text(encoding="utf-8"), "file")
        except UnicodeDecodeError:
            raise UserError(f"{file} is no tokenizer: not UTF-8; expected a Hugging Face tokenizer.json.") from None
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        vocab = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        return Tokenizer(_byte_level_json(vocab, merges), "file")
    raise UserError(f"{path} holds no tokenizer; expected tokenizer.json, or vocab.json and merges.txt.")


def _gpt2() -> Tokenizer:
    for folder in (Path("data") / "gpt2", ROOT / "data" / "gpt2"):
        if folder.is_dir():
            tokenizer = load_tokenizer(folder)
            if tokenizer.kind != "gpt2":
                raise UserError(f"{folder} holds another tokenizer, of {tokenizer.vocab_size:,} entries; expected "
                                f"GPT-2's {GPT2_VOCAB_SIZE:,}. Put GPT-2's there, or name the folder: --tokenizer "
                                f"{folder}.")
            return tokenizer
    if os.environ.get("HF_HUB_OFFLINE") != "1":
        try:
            from huggingface_hub import hf_hub_download

            return Tokenizer(Path(hf_hub_download("openai-community/gpt2", "tokenizer.json")).read_text("utf-8"),
                             "gpt2")
        except Exception as error:  # being offline raises many kinds of exceptions, with one remedy
            reason = type(error).__name__
    else:
        reason = "HF_HUB_OFFLINE=1"
    raise UserError(f"GPT-2's vocabulary is not in data/gpt2 and the Hugging Face hub cannot be reached ({reason}). "
                    "Put tokenizer.json (or vocab.json and merges.txt) of huggingface.co/openai-community/gpt2 into "
                    "data/gpt2, or name their folder: --tokenizer FOLDER, or use --tokenizer bpe:4096.")


def bpe_size(spec: str) -> int:
    """Return N of "bpe:N"; raise `UserError` where N is no number or too small."""
    if not re.fullmatch(r"bpe:\d+", spec) or int(spec[4:]) < 257:
        raise UserError(f"tokenizer {spec!r} has no usable size; expected bpe:N with N at least 257 (256 bytes and "
                        f"{END_OF_TEXT}), such as bpe:4096.")
    return int(spec[4:])


def vocab_size_of(spec: str) -> int:
    """Return the number of entries of "gpt2", "bpe:N" (a small text yields fewer) or "bytes" without loading it.

    Raises:
        UserError: a folder or file, or an unknown name.
    """
    if spec.startswith("bpe:"):
        return bpe_size(spec)
    if spec not in ("gpt2", "bytes"):
        raise UserError(f"tokenizer {spec!r} does not tell its vocabulary's size; expected gpt2, bpe:N or bytes. Name "
                        "the size: --vocab-size N.")
    return GPT2_VOCAB_SIZE if spec == "gpt2" else 257  # 256 bytes and <|endoftext|>


def _byte_level(model: object) -> object:
    """A `tokenizers.Tokenizer` that splits text as GPT-2 does and maps each byte to one character."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _byte_level_json(vocab: dict[str, int], merges: list[tuple[str, str]]) -> str:
    """JSON of a byte-level BPE; an empty vocabulary stands for one entry per byte."""
    from tokenizers import AddedToken, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = _byte_level(models.BPE(vocab=vocab or {c: i for i, c in enumerate(alphabet)}, merges=merges))
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return backend.to_str()


def _train_bpe(size: int, stories: Iterable[str] | None) -> Tokenizer:
    from tokenizers import models, pre_tokenizers, trainers

    if stories is None:
        raise UserError(f"bpe:{size} learns from text and has none; give it a text, or name an existing tokenizer.")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator(stories, trainer)
    if backend.get_vocab_size() < size:
        warnings.warn(f"the text yields only {backend.get_vocab_size()} of bpe:{size} entries: every word of it is one "
                      "token already. A smaller N, more text or --bpe-bytes helps.", stacklevel=3)
    return Tokenizer(backend.to_str(), f"bpe:{size}")


def cut_place(text: bytes, end: int) -> int:
    """Return the last place before `end` where a space follows a character that is not blank; 0 if there is none.

    Example:
        >>> cut_place(b"Tom ran.  Home", 14)
        3
    """
    while (end := text.rfind(b" ", 1, end)) > 0:
        before = text[max(0, end - 4):end].decode("utf-8", "replace")[-1]
        if not before.isspace():
            return end
    return 0
