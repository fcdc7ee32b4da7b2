#!/usr/bin/env python3
"""Compare token files with `tokenizers` and `tiktoken`: real texts, and drawn texts in many block sizes."""

import argparse
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretokenize import ROOT

from plotarmour.data import pipeline, pretokenize
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import TokenFile
from plotarmour.data.tokenizer import load_tokenizer

BLOCKS = (1, 2, 3, 5, 13, 64, 100, 1000, 4096, 10_007, 2**16, 2**21)
ODD = ["é", "e\u0301", "😀", "👩‍🚀", "\r\n", "\x00", "<|endoftext|>", " ", "  ", "\u3000", "'s", "don't", "42", "\t",
       "\ufeff"]


def tiktoken_gpt2(folder: Path) -> object:
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "merges.txt"), str(folder / "vocab.json"))
    return tiktoken.Encoding("gpt2", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}, pat_str=(
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"))


def main() -> None:
    shared = Path(os.environ.get("PLOTARMOUR_TEST_DATA", ROOT.parent / "shared"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, default=[shared / "data" / name for name in (
        "tinystories/stories_a.txt", "tinystories/stories_b.txt", "kjv/kjv.tsv.txt", "tinyshakespeare/input.txt")])
    parser.add_argument("--vocabulary", type=Path, default=shared / "gpt2")
    parser.add_argument("--drawn", type=int, default=500, help="texts drawn")
    args = parser.parse_args()
    for module, name in ((pretokenize, "open_tokenizer"), (pipeline, "Encoder")):
        setattr(module, name, lru_cache(getattr(module, name)))  # loading takes longer than encoding a drawn text
    tokenizer, other = load_tokenizer(args.vocabulary), tiktoken_gpt2(args.vocabulary)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for text in args.texts:
            raw = text.read_bytes().decode()
            for policy in ("endoftext", "line"):
                [path] = pre_tokenize([text], str(args.vocabulary), folder / "x.bin", stories=policy, force=True,
                                      backend="fastokens")
                separator = "<|endoftext|>" if policy == "endoftext" else "\n"
                stories = [s for t in raw.split(separator) if (s := t.strip(" \t\r\n\x0b\x0c"))]
                found = TokenFile.open(path).tokens
                expected = [np.array([*ids, 50256]) for ids in tokenizer.encode_batch(stories)]
                third = [np.array([*ids, 50256]) for ids in other.encode_ordinary_batch(stories)]
                print(f"{text.name}, a story by {policy}: {len(found):,} tokens, as tokenizers: "
                      f"{np.array_equal(found, np.concatenate(expected))}, as tiktoken: "
                      f"{np.array_equal(found, np.concatenate(third))}", flush=True)
        drawn = [0, 0]
        text = folder / "drawn.txt"

        @settings(max_examples=args.drawn, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=10)), min_size=1, max_size=80).map("".join))
        def compare(story: str) -> None:
            text.write_bytes(f"end\n<|endoftext|>{story}".encode())
            stories = [s for t in f"end\n<|endoftext|>{story}".split("<|endoftext|>")
                       if (s := t.strip(" \t\r\n\x0b\x0c"))]
            expected = [i for s in stories for i in [*tokenizer.encode(s), 50256]]
            assert expected == [i for s in stories for i in [*other.encode_ordinary(s), 50256]]
            drawn[0] += 1
            for block in BLOCKS:
                [path] = pre_tokenize([text], str(args.vocabulary), folder / "y.bin", force=True, block=block,
                                      backend="fastokens" if drawn[0] % 2 else "tokenizers")
                assert TokenFile.open(path).tokens.tolist() == expected, (story, block)
                drawn[1] += 1

        compare()
        fast = sum(1 for n in range(1, drawn[0] + 1) if n % 2)
        print(f"{drawn[0]} drawn texts in {len(BLOCKS)} block sizes, {drawn[1]} files, {fast} texts by fastokens: all "
              "as tokenizers and tiktoken")


if __name__ == "__main__":
    main()
