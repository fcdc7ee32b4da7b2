#!/usr/bin/env python3
"""The forecast of a run's end against its real end: a ten-minute run, by default recipe laptop's BDH on two cores.

At every step the estimate that the progress bar shows, and the last one that was said in a line, are noted. From the
first minute on, the worst of each is printed as a share of the run's whole time; the CSV has a row per half minute.
"""

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour import run as runs
from plotarmour.config import load_recipe
from plotarmour.suite.steps import prepare
from plotarmour.training.progress import Forecast

FIRST_S, EVERY_S = 60.0, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="laptop", help="(default: laptop)")
    parser.add_argument("--model", default="bdh", help="bdh or gpt2 (default: bdh)")
    parser.add_argument("--text", type=Path, help="for recipe laptop, such as 5 MB of TinyStories")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference" / "forecast.csv")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.model, args.overrides)
    noted: list[tuple[float, float, float]] = []  # seconds since the run began; its whole time, as shown and as said
    original = Forecast.line

    def line(self, step: int, *rest) -> str | None:
        said = original(self, step, *rest)
        if self.said_at is not None:
            now = self.pace.session_s
            noted.append((now, now + self.left_s(step), self.said_end))
        return said

    Forecast.line = line
    with tempfile.TemporaryDirectory() as name:
        files = prepare(recipe, Path(name), None if recipe.data.corpus_stories else args.text)
        begun = time.perf_counter()
        final = runs.train_run(recipe, files["train"], files["val"], Path(name) / "run")
        took = time.perf_counter() - begun
    real = final.elapsed_s
    later = [row for row in noted if row[0] >= FIRST_S]
    if not later:
        sys.exit(f"the run took {real:.0f} s; expected more than {FIRST_S:.0f}")
    worst = [max(abs(row[column] - real) / real for row in later) for column in (1, 2)]
    print(f"{args.recipe} {args.model}: {real:.0f} s ({took - real:.0f} s of set-up before); from the first minute on "
          f"the end shown was off by at most {worst[0]:.1%}, the end last said by at most {worst[1]:.1%} of it; first "
          f"said after {noted[0][0]:.0f} s: off by {abs(noted[0][2] - real) / real:.1%}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["elapsed_s", "shown_s", "said_s", "real_s"])
        due = 0.0
        for row in noted:
            if row[0] >= due:
                writer.writerow([f"{value:.1f}" for value in (*row, real)])
                due = row[0] + EVERY_S


if __name__ == "__main__":
    main()
