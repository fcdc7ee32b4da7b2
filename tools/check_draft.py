#!/usr/bin/env python3
"""Check a draft against the story before it: print the words that do not fit, and the sentence that each contradicts.

With --state, the story is read once: later drafts of it are checked from what the run remembers.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, require_run, run_command, say


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=as_path, help="run folder; a BDH reads a story of any length")
    parser.add_argument("--draft", type=as_path, required=True, metavar="FILE", help="text that follows the story")
    parser.add_argument("--story", type=as_path, metavar="FILE", help="text; not needed where --state has it")
    parser.add_argument("--state", type=as_path, metavar="FILE", help="the story and what the run remembers of it, a "
                        ".safetensors file: read if it is there, written if it is not or the story has changed")
    parser.add_argument("--threshold", type=float, metavar="MISFIT", help="mark words above it (default: what 1 %% of "
                        "the words of validation stories exceed, which takes some seconds to find)")
    parser.add_argument("--tokens", type=as_path, metavar="FOLDER", help="folder of tokens.val.bin, for the threshold "
                        "(default: the folder that holds the run)")
    add_common(parser, "device", "checkpoint")
    return parser


def text_of(path: Path) -> str:
    """Return the content of a text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}); save it as UTF-8.") from None
    if not text.strip():
        raise UserError(f"{path} is empty; expected text.")
    return text


def main() -> None:
    args = build_parser().parse_args()
    require_run(args.run)
    draft, story = text_of(args.draft), args.story and text_of(args.story)
    has_state = args.state is not None and args.state.exists()
    if story is None and not has_state:
        raise UserError("no story; expected --story FILE, or a --state FILE of an earlier call.")
    from plotarmour.evaluation.surprise import Memory
    from plotarmour.run import load_run
    from plotarmour.suite.desk import calibrated, check_draft

    run = load_run(args.run, args.checkpoint, args.device)
    memory = Memory.load(run, args.state) if has_state else None
    if memory is None or story not in (None, memory.story):
        memory = Memory.of(run, story)
        if args.state:
            memory.save(args.state)
            say(f"{args.state} has the story now")
    threshold = calibrated(run, args.tokens) if args.threshold is None else args.threshold
    *_, (words, reasons) = check_draft(memory, draft, threshold, explained=len(draft))
    marked = [i for i, word in enumerate(words) if word.misfit > threshold]
    print(f"{len(marked)} of {len(words)} words do not fit the story (--threshold {threshold:.3g})")
    for i in marked:
        print(f"{words[i].misfit:6.2f}  {words[i].of(draft)}  {reasons.get(i, '')}".rstrip())


if __name__ == "__main__":
    run_command(main)
