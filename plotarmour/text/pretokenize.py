"""Text files to token files: one streaming pass, split by story, published only when all parts are whole."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plotarmour.errors import UserError
from plotarmour.text.stories import POLICIES, Source, check_text, parse_split, part_of, read_stories, story_hash
from plotarmour.text.tokenfile import TokenFile, TokenFileWriter
from plotarmour.text.tokenizers import Tokenizer, make_tokenizer

STORIES_PER_BATCH = 1000


def pre_tokenize(texts: list[Path], tokenizer: str, out: Path, split: str | None = None, stories: str = "endoftext",
                 exclude: list[Path] = (), force: bool = False) -> list[Path]:
    """Write the token file, or with a split the three token files, of some texts.

    Args:
        texts: UTF-8 files, read in this order.
        tokenizer: "gpt2", "bpe:N" (learned from the train part only), "bytes", a folder, or a token file or run
            folder whose tokenizer to use.
        out: X.bin; with a split X.train.bin, X.val.bin and X.test.bin are written instead.
        split: "train:val:test" in whole shares, or None for one file.
        stories: what makes a story: "endoftext", "line" or "file".
        exclude: texts whose stories (near-copies count) are left out and counted.
        force: replace existing files.

    Returns:
        The paths written, in the order train, val, test.

    Raises:
        UserError: text that cannot be read, no story in a part, existing files without `force`.
    """
    if stories not in POLICIES:
        raise UserError(f"--stories {stories!r} is unknown; expected one of {', '.join(POLICIES)}.")
    shares = parse_split(split) if split else None
    targets = {part: part_path(out, part) for part in _parts(shares)} if shares else {"all": out}
    existing = [str(path) for path in targets.values() if path.exists()]
    if existing and not force:
        raise UserError(f"{existing[0]} exists already; expected a new name. Use another --out, or --force to replace "
                        "it.")
    for path in [*texts, *exclude]:
        check_text(path)
    excluded = {story_hash(s) for path in exclude for s in read_stories(Source(path), stories)}
    made = _tokenizer(tokenizer, texts, stories, shares, excluded)
    sources = [Source(path) for path in texts]
    n_excluded = 0

    def chosen(bar: tqdm) -> Iterator[str]:
        nonlocal n_excluded
        for source in sources:
            for story in read_stories(source, stories, bar.update):
                if excluded and story_hash(story) in excluded:
                    n_excluded += 1
                else:
                    yield story

    with ExitStack() as stack:
        policies = {"stories": stories, "split": split, "newlines": "kept"}
        writers = {part: stack.enter_context(TokenFileWriter(path, made, {**policies, "part": part}))
                   for part, path in targets.items()}
        bar = stack.enter_context(tqdm(total=sum(path.stat().st_size for path in texts), unit="B", unit_scale=True,
                                       desc=f"pretokenize ({made.kind})", mininterval=0.5))
        for batch in _batches(chosen(bar), STORIES_PER_BATCH):
            for story, ids in zip(batch, made.encode_batch(batch), strict=True):
                part = part_of(story, shares) if shares else "all"
                writers[part].add(ids, len(story.encode()))
        for part, writer in writers.items():
            if not writer.offsets:
                found = sum(len(w.offsets) for w in writers.values())
                where = f"the {part} part of {found} stories" if shares else f"{', '.join(map(str, texts))}"
                raise UserError(f"{where} holds no story; expected at least one. Use more text"
                                + (", or another --split." if shares else ", or another --stories policy."))
        described, empty = _describe(sources), sum(s.n_empty for s in sources)
        for writer in writers.values():
            writer.publish(described, empty, n_excluded)
    return list(targets.values())


def _describe(sources: list[Source]) -> list[dict]:
    """One entry per file, or one for all where so many would not fit into the header."""
    each = [s.describe() for s in sources]
    if len(each) <= 6:
        return each
    joined = hashlib.sha256("".join(d["sha256"] for d in each).encode()).hexdigest()
    return [{"name": f"{each[0]['name'][:100]} and {len(each) - 1} more files", "bytes": sum(d["bytes"] for d in each),
             "sha256": joined, "sha256_first_mib": each[0]["sha256_first_mib"],
             "sha256_last_mib": each[-1]["sha256_last_mib"]}]


def part_path(out: Path, part: str) -> Path:
    """Name of one part: X.bin and "val" give X.val.bin."""
    return out.with_name(f"{out.name.removesuffix('.bin')}.{part}.bin")


def _parts(shares: tuple[int, int, int]) -> list[str]:
    return [part for part, share in zip(("train", "val", "test"), shares, strict=True) if share]


def _batches(items: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(items, size)):
        yield batch


def _tokenizer(spec: str, texts: list[Path], stories: str, shares: tuple[int, int, int] | None,
               excluded: set[int]) -> Tokenizer:
    if spec.endswith(".bin"):
        return TokenFile.open(spec).tokenizer()
    learned = (s for text in texts for s in read_stories(Source(text), stories)
               if (shares is None or part_of(s, shares) == "train") and story_hash(s) not in excluded)
    return make_tokenizer(spec, learned)


class TokensInMemory:
    """The slow fallback for training without a token file: a text, tokenized anew at every start and held in memory.

    Has what batches and scoring use of a `TokenFile`: `tokens`, `offsets`, `story_bytes`, `n_tokens`, `n_stories`,
    `header`, `story`, `tokenizer`.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, stories: str = "endoftext"):
        warnings.warn(f"{path} is not a token file: tokenizing it on the fly, in memory, at every start. "
                      f"Make a token file once with: python tools/pre_tokenize.py {path} --tokenizer "
                      f"{tokenizer.kind} --out {path.stem}.bin", stacklevel=2)
        source, rows, sizes = Source(path), [], []
        for batch in _batches(read_stories(source, stories), STORIES_PER_BATCH):
            for story, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                rows.append(np.array([*ids, tokenizer.end_of_text_id], dtype=np.uint32))
                sizes.append(len(story.encode()))
        if not rows:
            raise UserError(f"{path} holds no story; expected at least one.")
        self.path, self._tokenizer = path, tokenizer
        self.tokens = np.concatenate(rows)
        self.offsets = np.cumsum([0, *map(len, rows[:-1])]).astype(np.uint64)
        self.story_bytes = np.array(sizes, dtype=np.uint32)
        self.header = {"n_tokens": len(self.tokens), "n_stories": len(rows), "source": [source.describe()],
                       "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
                       "vocab_size": tokenizer.vocab_size, "end_of_text_id": tokenizer.end_of_text_id,
                       "payload_sha256": source.sha256.hexdigest(), "stories": stories}

    n_tokens, n_stories, story = TokenFile.n_tokens, TokenFile.n_stories, TokenFile.story

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer
