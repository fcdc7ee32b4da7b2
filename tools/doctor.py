#!/usr/bin/env python3
"""Say what this machine is and which dtype will be used, with reasons."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.errors import run_command
from plotarmour.machine import report


def build_parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=__doc__)


def main() -> None:
    build_parser().parse_args()
    print(report())


if __name__ == "__main__":
    run_command(main)
