#!/usr/bin/env python3
"""The writing desk's speed with two trained runs: a blend against its two models in turn, first tokens, long stories.

- blend: `Run.stream` of two runs, against a plain loop in which each of the two models in turn draws a token of a text
  of its own (features, logits, softmax, multinomial). In turn, on the same prompts; printed is the median of the paired
  ratios: 1 means that blending, top-p and probabilities of both models for every token cost nothing.
- first token: seconds from a prompt of 512 tokens to the first token of the blend.
- long story: each run reads a story of 20,000 tokens, then scores 100 drafts of it; resident memory before, between and
  after, in MiB.
"""

import argparse
import statistics
import time
from pathlib import Path

import psutil
import torch
from training_loop import ROOT, write_rows

from plotarmour.cli import as_path, run_command
from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.surprise import Memory
from plotarmour.run import Run, load_run
from plotarmour.suite.steps import find_prepared


@torch.no_grad()
def in_turn(runs: list[Run], prompt: list[int], n: int) -> float:
    """Return the seconds in which each model draws n tokens, one of each in turn."""
    begun, texts = time.perf_counter(), []
    for run in runs:
        texts.append([run.model, *run.model.features(torch.tensor([prompt]), run.model.initial_state(1))])
    for _ in range(n):
        for text in texts:
            model, features, state = text
            p = torch.softmax(features[0, -1] @ model.unembedding.T / 0.8, -1)
            text[1:] = model.features(torch.multinomial(p, 1)[None], state)
    return time.perf_counter() - begun


def blended(runs: list[Run], prompt: list[int], n: int, seed: int = 0) -> tuple[float, int]:
    """Return the seconds of a blended text, and its tokens: n, or fewer where it ends before."""
    begun = time.perf_counter()
    new = list(runs[0].stream(prompt, runs[1], 0.5, max_new_tokens=n, top_p=0.95, seed=seed))
    return time.perf_counter() - begun, len(new)


def resident_mib() -> float:
    """Return the memory of this process."""
    return psutil.Process().memory_info().rss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=as_path, nargs=2, help="run folders of one tokenizer: logic, creativity")
    parser.add_argument("--tokens", type=as_path, help="folder of tokens.test.bin (default: that of the first run)")
    parser.add_argument("--repeats", type=int, default=20, help="of blends and first tokens (default: 20)")
    parser.add_argument("--drafts", type=int, default=100, help="(default: 100)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "desk_speed.csv")
    args = parser.parse_args()
    runs = [load_run(folder, device="cpu") for folder in args.runs]
    test = TokenFile.open(find_prepared(args.tokens or args.runs[0].resolve().parent)["test"])
    stories, rows = [test.story(i).tolist() for i in range(test.n_stories)], []

    ratios, per_token, first_s = [], [], []
    for i in range(args.repeats + 1):
        prompt = stories[i][:20]
        plain_first = in_turn(runs, prompt, 60) if i % 2 else None
        seconds, n = blended(runs, prompt, 60, i)
        plain = plain_first or in_turn(runs, prompt, 60)
        long = [token for story in stories[i:] for token in story][:512]
        if i and n == 60:  # the first one warms up, and a text that ends early has another share of its prompt
            ratios.append(plain / seconds)
            per_token.append(seconds / n)
            first_s.append(blended(runs, long, 1)[0])
    rows.append({"what": "blend", "run": "", "ratio": f"{statistics.median(ratios):.3f}",
                 "ms": f"{1e3 * statistics.median(per_token):.2f}"})
    rows.append({"what": "first token after 512", "run": "", "ms": f"{1e3 * statistics.median(first_s):.0f}"})
    print(f"blend: {rows[0]['ratio']} of the tokens/s of the two models in turn ({rows[0]['ms']} ms a token here, "
          f"{len(ratios)} texts); first token after 512: {rows[1]['ms']} ms", flush=True)

    story = test.tokenizer().decode([token for each in stories for token in each][:20_000])
    drafts = [test.tokenizer().decode(stories[i][:40]) for i in range(args.drafts)]
    for run in runs:
        Memory.of(run, story[:4000]).words(drafts[0])
        before, begun = resident_mib(), time.perf_counter()
        memory = Memory.of(run, story)
        read_s, read_mib, took = time.perf_counter() - begun, resident_mib(), []
        for draft in drafts:
            begun = time.perf_counter()
            memory.words(draft)
            took.append(time.perf_counter() - begun)
        rows.append({"what": "long story", "run": run.name, "read_s": f"{read_s:.2f}",
                     "ms": f"{1e3 * statistics.median(took):.1f}", "before_mib": f"{before:.0f}",
                     "read_mib": f"{read_mib:.0f}", "after_mib": f"{resident_mib():.0f}"})
        print(f"{run.name}: 20,000 tokens read in {read_s:.1f} s, a draft of 40 tokens scored in {rows[-1]['ms']} ms; "
              f"{before:.0f} MiB before, {read_mib:.0f} after reading, {rows[-1]['after_mib']} after "
              f"{len(drafts)} drafts", flush=True)
    write_rows(rows, args.out)


if __name__ == "__main__":
    run_command(main)
