"""Text to ids and back: GPT-2's vocabulary, byte-level BPE or whole words learned from the text, or plain bytes.

Every tokenizer is a `tokenizers.Tokenizer` (Hugging Face) and is stored as its JSON: in token files, in run folders. A
literal `<|endoftext|>` inside a story is ordinary text: only the pretokenizer writes the end-of-text id.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from plotarmour.cli import UserError, as_path, warn

END_OF_TEXT = "<|endoftext|>"
SPECIAL_WORDS = ["<?>", "<s>", "</s>", "<>"]  # ids 0 to 3 of words:N: unknown, start and end of a story, padding
LEARNED = ("bpe:", "words:")  # from the text
GPT2_VOCAB_SIZE = 50257
GPT2_SHA256 = "0f8c9d6ae8900a28603a84f9c4be747822b43891146b9d76e7d3faf936c34c0b"  # see `_is_gpt2`
LOST_SHARE = 0.2  # of the characters that a tokenizer may lose
SAMPLED_CHARACTERS = 2048  # of one story, at most
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def _failures(kind: str, action: str) -> Iterator[None]:
    """Raise `UserError` for a failure or panic of the library: it knows plain Exception, and PanicException."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the {kind} tokenizer cannot {action} ({' '.join(str(error).split())[:200]}); "
                        "expected a Hugging Face tokenizer.json that the package tokenizers can use.") from None


class Tokenizer:
    """A tokenizer with an end-of-text id.

    Args:
        json_text: what `tokenizers.Tokenizer.to_str` returns, the content of a tokenizer.json.
        kind: the user's name for it: "gpt2", "bpe:4096", "words:4096", "bytes" or "file".

    Raises:
        UserError: not a tokenizer, one without an end-of-text entry, or one that cannot be relied on: with BPE dropout,
            with ids beyond its vocabulary, or a byte-level one that lacks bytes.
    """

    def __init__(self, json_text: str, kind: str):
        import tokenizers

        with _failures(kind, "be read"):
            self.backend = tokenizers.Tokenizer.from_str(json_text)
        self.json, self.sha256 = json_text, hashlib.sha256(json_text.encode()).hexdigest()
        self._settings = json.loads(json_text)
        self.vocab_size = self.backend.get_vocab_size()
        model = type(self.backend.model).__name__
        self._has_words, self._is_bpe = model == "WordLevel", model == "BPE"
        ends = map(self.backend.token_to_id, (END_OF_TEXT, SPECIAL_WORDS[2]) if self._has_words else (END_OF_TEXT,))
        self.end_of_text_id = next((i for i in ends if i is not None), None)
        if complaint := self._complaint():
            raise UserError(f"the {kind} tokenizer {complaint}")
        self.kind = "gpt2" if kind == "file" and self._is_gpt2 else kind
        self.backend.encode_special_tokens = True  # a literal <|endoftext|> in a story stays text
        self.backend.no_padding()
        self.backend.no_truncation()

    def _complaint(self) -> str | None:
        """Return why the tokenizer cannot be used."""
        vocabulary, model = self.backend.get_vocab(), self._settings["model"]
        if self.end_of_text_id is None:
            return f"has no {END_OF_TEXT} entry; expected one, it ends every story. Add it as a special token."
        if model.get("dropout"):
            return (f"has BPE dropout {model['dropout']}: it gives other ids at every start; expected none. Set "
                    '"dropout" to null in its tokenizer.json.')
        ids = sorted(vocabulary.values())
        if twice := [i for i, following in zip(ids, ids[1:], strict=False) if i == following]:
            return f"has two entries with id {twice[0]:,}: it gives other texts at every start. Number them anew."
        if (largest := max(vocabulary.values())) >= self.vocab_size:
            return (f"has an entry with id {largest:,}, beyond its {self.vocab_size:,} entries; expected ids from 0 on "
                    "without gaps. Number them anew.")
        missing = [byte for byte, character in enumerate(byte_characters()) if character not in vocabulary]
        missing = [byte for byte in missing if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))]  # never in UTF-8
        if missing and self._is_byte_level and not model.get("unk_token"):
            return (f"is a byte-level one without an entry for {len(missing)} of the bytes, such as "
                    f"0x{missing[0]:02x}: it would lose them; expected all 256. Learn it again with all bytes.")
        return None

    @property
    def _is_byte_level(self) -> bool:
        """Whether the text becomes one character for each byte before a BPE reads it."""
        steps = [self._settings.get("pre_tokenizer") or {}, self._settings.get("normalizer") or {}]
        steps += [step for parent in steps for key in ("pretokenizers", "normalizers") for step in parent.get(key, [])]
        return self._is_bpe and any(step.get("type") == "ByteLevel" for step in steps)

    @property
    def _changes_nothing(self) -> bool:
        """Whether it neither normalises the text nor has entries of its own beside special ones."""
        added = self._settings.get("added_tokens", [])
        return self._settings.get("normalizer") is None and all(token["special"] for token in added)

    @property
    def _is_gpt2(self) -> bool:
        """Whether entries, merges and splitting are GPT-2's; the size alone does not identify it."""
        if self.vocab_size != GPT2_VOCAB_SIZE or not self.takes_pieces:
            return False
        vocab, merges = self._settings["model"]["vocab"], self._settings["model"]["merges"]
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
        content = "\n".join(sorted(vocab, key=vocab.get)) + "\0" + "\n".join(merges)
        return hashlib.sha256(content.encode()).hexdigest() == GPT2_SHA256

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any end-of-text id."""
        with _failures(self.kind, "encode"):
            return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text as `encode` does, and the end of each in characters of the text."""
        with _failures(self.kind, "encode"):
            encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, computed on all cores."""
        with _failures(self.kind, "encode"):
            return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; the end-of-text id becomes `<|endoftext|>`."""
        with _failures(self.kind, "decode"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_batch(self, rows: list[np.ndarray]) -> list[str]:
        """Return the text of each row of ids, as `decode` does, computed on all cores."""
        with _failures(self.kind, "decode"):
            return self.backend.decode_batch([row.tolist() for row in rows], skip_special_tokens=False)

    @cached_property
    def unknown_id(self) -> int | None:
        """The id that stands for what the vocabulary lacks."""
        model = self._settings["model"]
        return model.get("unk_id", self.backend.token_to_id(model.get("unk_token") or ""))

    @cached_property
    def takes_pieces(self) -> bool:
        """Whether the `pieces` of a story have the ids of the whole story.

        True for byte-level BPE: its regular expression never matches across the cuts. Other tokenizers may normalise
        across them, mark the beginning of a text, or have entries that contain spaces.
        """
        split = self._settings.get("pre_tokenizer") or {}
        return (split.get("type") == "ByteLevel" and split.get("use_regex", True) and self._changes_nothing
                and not split.get("add_prefix_space", True) and self._is_bpe)

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """int32 (vocab_size,): UTF-8 bytes that each id stands for; 0 for end-of-text. None where the sum is not exact.

        Exact only where the text is encoded unchanged, by bytes (each character of an entry stands for one, and none is
        missing) or words. Others mark continuations (`##ed`), normalise, or put a space before the text.
        """
        vocabulary, splits = self.backend.get_vocab(), self._settings.get("pre_tokenizer") or {}
        splits = splits.get("pretokenizers") or [splits]  # a sequence, or a single one
        unchanged = all(split.get("type") == "Split" and split.get("behavior") != "Removed"
                        or split.get("type") == "ByteLevel" and not split.get("add_prefix_space", True)
                        for split in splits)
        decoder, splitter = (self._settings.get("decoder") or {}).get("type"), splits[-1].get("type")
        byte_level = decoder == splitter == "ByteLevel" and set(byte_characters()) <= set(vocabulary)
        words = self._has_words and (decoder, splitter) == ("Fuse", "Split")
        if not ((byte_level or words) and unchanged and self._changes_nothing):
            return None
        empty = {self.end_of_text_id, *([self.unknown_id, *self.backend.get_added_tokens_decoder()] * words)}
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in vocabulary.items():
            sizes[i] = 0 if i in empty else len(token.encode() if words else token)
        return sizes

    @cached_property
    def drops_unknown(self) -> bool:
        """Whether unknown words, and nothing else, become the unknown token; they then count no bytes anywhere."""
        return self._has_words and self.token_bytes is not None and self.unknown_id is not None


class Spelling:
    """How well a tokenizer gives a text back, counted over the first stories and one of every later chunk.

    Tokenizers with `token_bytes` lose nothing, or words that are counted elsewhere, and are not looked at.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.n_chunks, self.example = tokenizer, 0, ""
        self.n_characters = self.n_lost = self.n_ids = self.n_unknown = 0

    def check(self, texts: list[str]) -> None:
        """Encode and decode some stories of a chunk; raise `UserError` if more than `LOST_SHARE` is lost so far."""
        if self.tokenizer.token_bytes is not None or not texts:
            return
        sample = texts[:20] if self.n_chunks == 0 else texts[self.n_chunks % len(texts):][:1]
        self.n_chunks += 1
        for text in (text[:SAMPLED_CHARACTERS] for text in sample):
            ids = self.tokenizer.encode(text)
            lost = (Counter(text) - Counter(self.tokenizer.decode(ids))).total()  # whatever their order is
            self.example = self.example or (text[:40] if lost else "")
            self.n_characters, self.n_lost = self.n_characters + len(text), self.n_lost + lost
            self.n_ids, self.n_unknown = self.n_ids + len(ids), self.n_unknown + ids.count(self.tokenizer.unknown_id)
        if self.n_lost > LOST_SHARE * self.n_characters:
            raise UserError(f"{self.summary()}; expected one that gives it back. Use another --tokenizer, such as "
                            "bpe:4096, which learns from the text.")

    def summary(self) -> str:
        """Return in a line what is lost; "" if it is nothing."""
        if not self.n_lost:
            return ""
        unknown = f", {self.n_unknown / self.n_ids:.1%} of the tokens are its unknown token" if self.n_unknown else ""
        return (f"the {self.tokenizer.kind} tokenizer does not give the text back: "
                f"{self.n_lost / self.n_characters:.1%} of {self.n_characters:,} characters looked at are lost"
                f"{unknown} (as in {self.example!r})")


def make_tokenizer(spec: str, train_stories: Iterable[str] | None = None) -> Tokenizer:
    """Load or train the tokenizer that a command line or recipe names.

    Args:
        spec: "gpt2", "bpe:N" (N entries including <|endoftext|>), "words:N" (including `SPECIAL_WORDS`), "bytes", a
            tokenizer.json, or a folder with a tokenizer.json or with vocab.json and merges.txt.
        train_stories: text that bpe:N and words:N learn from: of the train part only, or held-out text leaks into
            training; with bpe:N:all and words:N:all, all of the text.

    Raises:
        UserError: an unknown name, a folder without a tokenizer, or GPT-2's vocabulary cannot be found.
    """
    from tokenizers import models

    if spec == "gpt2":
        return _gpt2()
    if spec == "bytes":
        vocabulary = {character: i for i, character in enumerate(sorted(byte_characters()))}
        return Tokenizer(_byte_level(models.BPE(vocabulary, [])).to_str(), "bytes")
    if spec.startswith(LEARNED):
        return _learn(spec, train_stories)
    path = as_path(spec)
    if spec and path.exists():
        return load_tokenizer(path)
    raise UserError(f"unknown tokenizer {spec!r}; expected gpt2, bpe:N (such as bpe:4096), words:N, bytes, or a "
                    "folder or token file that holds a tokenizer.")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, or the one of a folder, or vocab.json and merges.txt of a folder."""
    from tokenizers import models

    file = path / "tokenizer.json" if path.is_dir() else path
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if not file.is_file() and vocab.is_file() and merges.is_file():
        with _failures(str(path), "be read"):
            content = _byte_level(models.BPE.from_file(str(vocab), str(merges))).to_str()
        return Tokenizer(content, "file")
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
        raise UserError(f"GPT-2's vocabulary is not in data/gpt2 and the hub fails ({type(error).__name__}). Put "
                        "tokenizer.json of huggingface.co/openai-community/gpt2 into data/gpt2, or name its folder: "
                        "--tokenizer FOLDER, or use --tokenizer bpe:4096.") from None
    return Tokenizer(path.read_text(encoding="utf-8"), "gpt2")


def vocab_size_of(spec: str) -> int:
    """Return the entries of "gpt2", "bpe:N", "words:N" (a small text yields fewer) or "bytes" without loading it."""
    if spec in ("gpt2", "bytes"):
        return GPT2_VOCAB_SIZE if spec == "gpt2" else 257  # 256 bytes and <|endoftext|>
    if not spec.startswith(LEARNED):
        raise UserError(f"tokenizer {spec!r} does not tell its vocabulary's size; expected gpt2, bpe:N, words:N or "
                        "bytes. Name the size: --vocab-size N.")
    kind = spec.partition(":")[0]
    least, content = (257, f"256 bytes and {END_OF_TEXT}") if kind == "bpe" else (5, "<?>, <s>, </s>, <> and a word")
    if not (match := re.fullmatch(r"\w+:(\d+)(:all)?", spec)) or int(match[1]) < least:
        raise UserError(f"tokenizer {spec!r} has no usable size; expected {kind}:N or {kind}:N:all with N at least "
                        f"{least} ({content}), such as {kind}:4096.")
    return int(match[1])


def byte_characters() -> list[str]:
    """Return the characters that stand for the bytes 0 to 255, as GPT-2 has them.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and the following, in order.
    """
    others = iter(range(0x100, 0x200))
    return [chr(i if chr(i).isprintable() and i != 0x20 else next(others)) for i in range(256)]


def _byte_level(model: object) -> object:
    """A `tokenizers.Tokenizer` that splits text as GPT-2 does and maps each byte to one character."""
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True)])
    return backend


def _learn(spec: str, stories: Iterable[str] | None) -> Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    size = vocab_size_of(spec)
    if stories is None:
        raise UserError(f"{spec} learns from text and has none; give it a text, or name an existing tokenizer.")
    if spec.startswith("words:"):
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token=SPECIAL_WORDS[0]))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"\w+|\s|[^\w\s]"), "isolated")
        backend.decoder = decoders.Fuse()  # blank space is a token of its own
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=SPECIAL_WORDS, show_progress=False)
    else:
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False,
                                      initial_alphabet=byte_characters())
    backend.train_from_iterator(stories, trainer)
    if backend.get_vocab_size() < size:
        warn(f"the text yields only {backend.get_vocab_size()} of {spec} entries: every word of it is one "
             "token already. A smaller N, more text or --bpe-bytes helps.")
    return Tokenizer(backend.to_str(), spec)
