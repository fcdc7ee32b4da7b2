#!/usr/bin/env python3
"""Generate every notebook's .ipynb from its .py, or check that they agree."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import UserError, run_command
from plotarmour.files import write_text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 2 where a pair differs")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from plotarmour.suite.notebooks import generate_notebook, out_of_step

    stale = out_of_step()
    if args.check and stale:
        raise UserError(f"{', '.join(p.name for p in stale)} is not what its .py gives; run tools/sync_notebooks.py.")
    for path in stale:
        write_text(path, generate_notebook(path.with_suffix(".py")))
        print(f"wrote {path.name}")
    if not stale:
        print("all notebooks agree with their scripts")


if __name__ == "__main__":
    run_command(main)
