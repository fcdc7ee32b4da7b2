#!/usr/bin/env python3
"""The forecast of a run's end against its real end: a ten-minute run, by default recipe laptop's BDH on two cores.

The estimate that the progress line shows is recorded at every step. The worst one after the first minute is printed as
a share of the run's whole time; the CSV has a row per half minute.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pandas as pd

from plotarmour import run as runs
from plotarmour.config import load_recipe
from plotarmour.suite.steps import prepare
from plotarmour.training.progress import TIMED_STEPS, Pace

FIRST_S, EVERY_S = 60.0, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="laptop", help="(default: laptop)")
    parser.add_argument("--model", default="bdh", help="a kind of model (default: bdh)")
    parser.add_argument("--text", type=Path, help="for recipe laptop, such as 5 MB of TinyStories")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "forecast.csv")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.model, args.overrides)
    noted: list[tuple[float, float]] = []  # seconds since the run began; its whole time, as estimated then
    original = Pace.session_left_s

    def session_left_s(self, step: int) -> float:
        left = original(self, step)
        if self.steps >= TIMED_STEPS:
            noted.append((self.session_s, self.session_s + left))
        return left

    Pace.session_left_s = session_left_s
    with tempfile.TemporaryDirectory() as name:
        files = prepare(recipe, Path(name), None if recipe.data.corpus_stories else args.text)
        begun = time.perf_counter()
        final = runs.train_run(recipe, files["train"], files["val"], Path(name) / "run")
        took = time.perf_counter() - begun
    real = final.elapsed_s
    later = [row for row in noted if row[0] >= FIRST_S]
    if not later:
        sys.exit(f"the run took {real:.0f} s; expected more than {FIRST_S:.0f}")
    worst = max(abs(estimate - real) / real for _, estimate in later)
    print(f"{args.recipe} {args.model}: {real:.0f} s ({took - real:.0f} s of set-up before); from the first minute on "
          f"the estimate was off by at most {worst:.1%}; the first one, after {noted[0][0]:.0f} s, by "
          f"{abs(noted[0][1] - real) / real:.1%}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for elapsed, shown in noted:
        if not rows or elapsed >= rows[-1]["elapsed_s"] + EVERY_S:
            rows.append({"elapsed_s": elapsed, "shown_s": shown, "real_s": real})
    pd.DataFrame(rows).to_csv(args.out, index=False, float_format="%.1f", lineterminator="\n")


if __name__ == "__main__":
    main()
