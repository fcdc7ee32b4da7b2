#!/usr/bin/env python3
"""How well the check of a draft finds a broken fact: ROC AUC by fact, distance, run and score.

The pairs of drafts are those of plotarmour/evaluation/contradictions.py: tales of the built-in grammar with --tales,
held-out stories with --stories. A model recalls a fact only from as far back as its training text made it learn, and
the built-in corpus names every fact anew within some forty tokens. So --write makes a text of tales in which facts come
back after up to 400 tokens; to train runs on it:

    python benchmarks/contradictions.py --write 20000 --out results/far_facts.txt
    set="--set context_length=512 --set windows=packed --set rows_per_step=2 --set micro_batch_size=2"
    python tools/run_suite.py --text results/far_facts.txt $set --set max_steps=3600 --models bdh,gpt2 --at-once 2 \\
        --out results/far_facts
    python tools/train.py --recipe tiny --model bdh --train results/far_facts/tokens.train.bin $set \\
        --val results/far_facts/tokens.val.bin --set max_steps=6000 --extend --out results/far_facts/bdh
    python benchmarks/contradictions.py results/far_facts/{bdh,gpt2} --tales 50 \\
        --train results/far_facts/tokens.train.bin

and for stories, with runs of recipe `laptop`:

    python benchmarks/contradictions.py RUN ... --stories tokens.test.bin --train tokens.train.bin
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BINS = ((0, "up to 31"), (32, "32 to 127"), (128, "128 and more"))  # of distances in held-out stories


def write_tales(n: int, path: Path) -> None:
    """Write tales that name facts again and again, after up to 280 words, more often from far than from near."""
    from plotarmour.evaluation.contradictions import FILLERS, tale

    words = SimpleNamespace(encode=str.split)
    # Nearly half ask for several facts, so that fewer tokens teach them; other events repeat all but the holder.
    kinds = [("hero", "object", "holder"), ("place", "animal")] * 3 + [(fact,) for fact in (*FILLERS, *["holder"] * 2)]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for i in range(n):
            (*also, fact), distance = kinds[i % len(kinds)], round(280 * (i // len(kinds) * 0.618 % 1) ** 0.7)
            pair = tale(fact, distance, 0, i, words, min(4, 1 + 130 // (distance + 20)), also)
            file.write(f"{pair.story}{pair.kept}\n<|endoftext|>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders of one tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tales", type=int, metavar="N", help="tales for each fact and distance")
    what.add_argument("--stories", type=Path, help="token file of held-out stories")
    what.add_argument("--write", type=int, metavar="N", help="write a text of N tales to --out")
    parser.add_argument("--distances", default="0,64,128,256,1024,4096,8192", help="of tales, tokens, separated by ,")
    parser.add_argument("--seed", type=int, default=1000, help="of the tales; the corpus of the recipes has 0")
    parser.add_argument("--train", type=Path, help="token file of the train part; adds trigrams")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "contradictions.csv")
    args = parser.parse_args()
    from plotarmour.data.token_file import TokenFile
    from plotarmour.evaluation.contradictions import FILLERS, measure, swaps, tale
    from plotarmour.run import load_run

    if args.write:
        write_tales(args.write, args.out)
        return
    runs = list(map(load_run, args.runs))
    tokenizer = runs[0].tokenizer
    if args.tales:
        pairs = [tale(fact, distance, args.seed, i, tokenizer) for fact in FILLERS
                 for distance in map(int, args.distances.split(",")) for i in range(args.tales)]
    else:
        pairs = [dataclasses.replace(pair, distance=max(bin for bin in BINS if bin[0] <= pair.distance)[1])
                 for pair in swaps(TokenFile.open(args.stories), tokenizer)]
    table = measure(runs, pairs, TokenFile.open(args.train) if args.train else None)
    print(table.round(3).to_string(index=False))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
