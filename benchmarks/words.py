#!/usr/bin/env python3
"""Tokenizers of one text against each other in bits per byte: words, BPE, and BPE that has also seen the held-out text.

Each folder holds the runs and token files of one tokenizer, of the grid plotarmour/recipes/words.csv; the first one is
what others are compared with. Unknown words are spelled out: 8 bits for each of their bytes and for the end of each, so
that every tokenizer pays for all of the text. The trigram baseline needs no training and has no seed.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.training_loop import write_rows  # noqa: E402
from plotarmour.cli import run_command  # noqa: E402
from plotarmour.data.token_file import TokenFile  # noqa: E402
from plotarmour.evaluation.ngrams import evaluate_baselines  # noqa: E402
from plotarmour.evaluation.scoring import evaluate_run  # noqa: E402
from plotarmour.evaluation.statistics import compare_losses  # noqa: E402
from plotarmour.run import load_run  # noqa: E402
from plotarmour.suite.steps import find_prepared  # noqa: E402


def nats_of_text(folder: Path, n_bytes: np.ndarray) -> dict[str, np.ndarray]:
    """Return the nats of each test story, unknown words spelled out: of the runs (S, n), and of trigrams (1, n).

    `n_bytes` has the bytes of each story, unknown words included.
    """
    train, test = (TokenFile.open(find_prepared(folder)[part]) for part in ("train", "test"))
    unknown = np.zeros(test.n_stories)
    if test.tokenizer().drops_unknown:
        unknown = n_bytes - test.story_bytes + [np.count_nonzero(test.story(i) == 0) for i in range(test.n_stories)]
    runs = [evaluate_run(load_run(path.parent), test)[0]["nats"] for path in sorted(folder.glob("*/DONE.json"))]
    trigrams = [evaluate_baselines(train, test)["trigram"]["nats"]]
    return {name: np.stack(nats) + 8 * math.log(2) * unknown for name, nats in (("runs", runs), ("trigrams", trigrams))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="results of the grid, one for each tokenizer, BPE first")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "words.csv")
    args = parser.parse_args()
    n_bytes = np.asarray(TokenFile.open(find_prepared(args.folders[0])["test"]).story_bytes, dtype=np.float64)
    base, rows = nats_of_text(args.folders[0], n_bytes), []
    for folder in args.folders:
        test, nats = TokenFile.open(find_prepared(folder)["test"]), nats_of_text(folder, n_bytes)
        row = {"tokenizer": test.header["tokenizer"]["kind"], "test_tokens": test.n_tokens, "seeds": len(nats["runs"]),
               "train_tokens": TokenFile.open(find_prepared(folder)["train"]).n_tokens}
        for name, own in nats.items():
            row[f"{name}_bits_per_byte"] = own.mean(axis=0).sum() / math.log(2) / n_bytes.sum()
            if folder != args.folders[0]:
                difference = compare_losses(n_bytes, own, base[name], paired=False).difference
                row |= {f"{name}_less{end}": nats / math.log(2) for end, nats in
                        zip(("", "_low", "_high"), difference, strict=True)}
        rows.append(row)
        print(row, flush=True)
    write_rows(rows, args.out)


if __name__ == "__main__":
    run_command(main)
