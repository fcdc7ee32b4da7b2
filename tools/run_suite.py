#!/usr/bin/env python3
"""Run the whole suite headless: pretokenize, train the models, compare. All results go into one folder.

With --grid, run one training per row of a CSV instead. Either way, summary.csv has a row for each run, and the same
command continues: it skips runs that are done, resumes stopped ones and tries failed ones again.
"""

import argparse
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, duration, overrides_of, run_command, say
from plotarmour.config import recipe_names
from plotarmour.models import KINDS, SUITE


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--recipe", default="tiny", help=f"one of {', '.join(recipe_names())}, or a TOML file")
    parser.add_argument("--text", type=as_path, help="UTF-8 text to learn from (recipe tiny has its own)")
    parser.add_argument("--extra-text", type=as_path, help="a second test set; stories that also stand in --text are "
                        "excluded and counted")
    parser.add_argument("--out", type=as_path, help="results folder (default: results/RECIPE, or results/GRID without "
                        "its .csv)")
    parser.add_argument("--models", default=",".join(SUITE), metavar="KINDS",
                        help=f"kinds of model to train and compare, of {', '.join(KINDS)}")
    add_common(parser, "set", "device")
    parser.add_argument("--gpus", type=int, default=1, metavar="N",
                        help="GPUs of this machine that train each model together")
    parser.add_argument("--grid", type=as_path, metavar="CSV", help="a row is a run, a column a parameter of the "
                        "notebook (model, overrides, ...); the column run names the run folders")
    parser.add_argument("--notebook", type=as_path, help="what a row of the grid runs (default: "
                        "notebooks/02_train.ipynb)")
    parser.add_argument("--at-once", type=int, metavar="N", help="runs at the same time: each on a GPU of its own, or "
                        "on its share of the CPU cores (default: 1; on Slurm: all)")
    parser.add_argument("--status", action="store_true", help="only show how far the runs are, by their folders")
    others = parser.add_argument_group("other machines (docs/grids.md)")
    others.add_argument("--executor", choices=("local", "slurm", "kaggle"), default="local",
                        help="what runs the rows: this machine; Slurm, a job for each row; or kernels on Kaggle")
    others.add_argument("--walltime", type=float, metavar="MINUTES", help="after which a job or kernel saves, and "
                        "another one continues (default: 240 on Slurm, 660 on Kaggle)")
    others.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="an option of sbatch for "
                        "each job, such as partition=gpu; may be repeated")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.grid is not None and args.models != ",".join(SUITE):
        raise UserError("--models is for a suite without a grid; expected the column model in the grid instead.")
    if args.notebook is not None and args.grid is None:
        raise UserError("--notebook is what the rows of a grid run; expected --grid CSV beside it.")
    is_local = args.executor == "local"
    if args.slurm and args.executor != "slurm":
        raise UserError("--slurm has options of sbatch; expected --executor slurm beside it.")
    endings = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # no SIGHUP on Windows
    for number in endings:  # end like Ctrl-C, so that the running notebooks are ended too
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)
    from plotarmour.machine import host

    if host() != "own machine":
        from plotarmour.suite.kaggle import install_missing

        install_missing()
    from plotarmour.suite.grid import TRAIN, plan_grid
    from plotarmour.suite.parameters import results_folder

    out, begun = args.out or results_folder(str(args.grid or args.recipe)), time.monotonic()
    grid = plan_grid(args.grid, args.recipe, out, args.notebook or TRAIN, args.text, args.extra_text,
                     overrides_of(args), args.gpus, args.at_once if is_local and args.at_once is not None else 1,
                     args.models.replace(" ", "").split(","))
    if not args.status:
        print(f"{len(grid.rows)} run{'s' * (len(grid.rows) > 1)}; results go to {out}", flush=True)
    from plotarmour.suite.executors import Local  # seconds of imports
    from plotarmour.suite.runner import compare_rows, describe_best, describe_status, run_grid

    if args.status:
        return print(describe_status(grid))
    try:
        executor_of = Local
        if args.executor == "slurm":
            from contrib.slurm import Slurm

            executor_of = partial(Slurm, at_once=args.at_once, minutes=args.walltime or 240, options=args.slurm)
        elif args.executor == "kaggle":
            from contrib.kaggle_kernels import Kaggle

            executor_of = partial(Kaggle, minutes=args.walltime or 660)
        states = run_grid(grid, executor_of)
        if args.grid is not None:
            best = describe_best(grid, states)
            print(f"{len(states)} runs: {out / 'summary.csv'}", *filter(None, [best]), sep="\n", flush=True)
        unfinished = [state for state in states if state.status != "done"]
        if unfinished:
            print("\n".join(state.advice for state in unfinished), file=sys.stderr)
            sys.exit(2 if all(state.error == "UserError" for state in unfinished) else 1)
        if args.grid is None:
            compare_rows(grid)
            if host() != "own machine":
                from plotarmour.suite.display import download_links

                for folder in (out / "comparison", *(row.folder for row in grid.rows)):
                    download_links(folder, gather=True)
            print(f"suite {args.recipe} done in {duration(time.monotonic() - begun)}: {out}")
            print((out / "comparison" / "summary.txt").read_text(encoding="utf-8"))
            print(f"Open {out / 'comparison' / 'report.html'} in a browser: all results with their figures.")
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may have been closed
            say(f"stopped; {out} keeps what is done, and runs that trained have their checkpoints. The same command "
                "continues.")
        raise


if __name__ == "__main__":
    run_command(main)
