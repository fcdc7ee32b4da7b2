#!/usr/bin/env python3
"""Train one model on token files; the same command continues a run that stopped.

On several GPUs: torchrun --standalone --nproc-per-node 2 tools/train.py ..., with the same arguments.
"""

import argparse
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import OTHERS_WAIT_S, HelpFormatter, add_common, as_path, next_command, overrides_of, run_command
from plotarmour.config import DataConfig, load_recipe, recipe_names, warn_ignored
from plotarmour.models import KINDS


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--model", required=True, help=f"one of {', '.join(KINDS)}")
    parser.add_argument("--train", type=as_path, required=True,
                        help="token file to learn from (or a text, tokenized at every start)")
    parser.add_argument("--val", type=as_path, required=True,
                        help="token file for validation (best checkpoint, early stopping)")
    parser.add_argument("--out", type=as_path, required=True, help="the run folder")
    add_common(parser, "set", "device")
    parser.add_argument("--resume", default="auto", help="auto (continue the run if there is one), never (refuse an "
                        "existing run) or must (refuse to begin a new one)")
    parser.add_argument("--from-step", type=int, metavar="N", help="go back to the kept checkpoint of this step; "
                        "later checkpoints are deleted")
    parser.add_argument("--extend", action="store_true", help="continue a run with a higher max_steps, "
                        "schedule_minutes or patience; run.json records the change")
    parser.add_argument("--tokenizer", help="only where --train and --val are texts: gpt2, bytes, a folder, or a token "
                        "file whose tokenizer to use")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    recipe = load_recipe(args.recipe, args.model, overrides_of(args))
    from plotarmour.run import train_run
    from plotarmour.suite.multi_gpu import stop_with_launcher
    from plotarmour.training.distributed import LostProcess, ToldElsewhere
    from plotarmour.training.ending import Reason

    launched, is_first = stop_with_launcher(), os.environ.get("RANK", "0") == "0"
    if is_first and not launched and args.tokenizer is None:  # overrides of a notebook are for the token files, too
        warn_ignored(recipe, [field.name for field in fields(DataConfig)], "the token files are made already")
    try:
        ending = train_run(recipe, args.train, args.val, args.out, args.resume, args.from_step, args.tokenizer,
                           args.extend)
    except LostProcess:
        if is_first:  # of a loss during training, `train` itself reports, and returns an ending
            print("another process of this run has died before training began", file=sys.stderr, flush=True)
        _outwait_others()
        sys.exit(1)
    except ToldElsewhere:
        sys.exit(0)  # a failure here would end the first process before it reports
    if is_first and not launched:  # a notebook prints this itself
        print(f"{args.out}: {ending.label}; {ending.step:,} steps, {ending.tokens_seen:,} tokens, "
              f"{ending.elapsed_s:,.0f} s; best: {ending.best}")
        if ending.is_done:
            test = args.val.with_name(args.val.name.replace(".val.", ".test."))
            test = test if test.exists() and test != args.val else "TEST.bin"
            print(next_command("generate", args.out, "--prompt", "Once upon a time"))
            print(next_command("evaluate", args.out, "--data", test, "--out", f"{args.out.as_posix()}_scores"))
            print(next_command("compare", args.out, "ANOTHER_RUN", "--data", test, "--train", args.train, "--out",
                               args.out.with_name("comparison")))
        else:
            print(ending.advice())
    sys.stdout.flush()
    if is_first and ending.reason == Reason.LOST_PROCESS:
        _outwait_others()
    # A failure in another process would end the first one while it saves.
    sys.exit(ending.reason.exit_code if is_first else 0)


def _outwait_others() -> None:
    """Wait before this process of torchrun ends because another one is lost, so that the other one can report why.

    torchrun ends this wait as soon as it notices that the other process has failed or was killed.
    """
    time.sleep(OTHERS_WAIT_S + 5.0)


if __name__ == "__main__":
    run_command(main)
