#!/usr/bin/env python3
"""Turn Common Crawl into a text of stories: keep one language, drop short, repetitive and double pages."""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="One WET file of a crawl is roughly 80 MB packed, with 30,000 pages, two in five of them English. An "
               "interrupted run goes on: the same command fetches and filters only what is missing. Needs: pip install "
               "-r requirements-crawl.txt.")
    parser.add_argument("wet", nargs="+", help="a crawl's wet.paths or wet.paths.gz, or WET files (.wet, .wet.gz): "
                        "files or addresses")
    parser.add_argument("--out", type=Path, required=True, metavar="X.txt", help="text to write; X.counts.csv beside "
                        "it says what was dropped why")
    parser.add_argument("--language", default="en", help="code of the language to keep, e.g. en, de, an")
    parser.add_argument("--min-probability", type=float, default=0.65, help="of the language, 0 to 1")
    parser.add_argument("--min-words", type=int, default=50, help="shorter pages are dropped")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N WET files")
    parser.add_argument("--base-url", default="https://data.commoncrawl.org/", metavar="URL",
                        help="stands before the paths of a listing: Common Crawl or a mirror")
    parser.add_argument("--downloads", type=Path, metavar="FOLDER",
                        help="for what is fetched (default: wet beside --out)")
    parser.add_argument("--delete-downloads", action="store_true", help="delete a fetched file once it is filtered")
    parser.add_argument("--force", action="store_true", help="replace an existing text")
    many = parser.add_argument_group("more than one process or machine (a datatrove pipeline; same text)")
    many.add_argument("--executor", choices=("local", "slurm", "ray"), help="where (default: in this process)")
    many.add_argument("--tasks", type=int, default=1, help="among how many tasks the WET files are shared out")
    many.add_argument("--workers", type=int, default=-1, help="tasks at once; -1: all")
    many.add_argument("--logging-dir", type=Path, metavar="FOLDER", help="keep datatrove's logs and "
                      "statistics here (default: none for local, else X.logs beside --out)")
    many.add_argument("--slurm-partition", metavar="NAME", help="where Slurm is to run the tasks")
    many.add_argument("--slurm-time", default="12:00:00", help="limit of a task, hours:minutes:seconds")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    from plotarmour.crawl.commoncrawl import Crawl, describe_dropped, prepare_common_crawl, start_crawl
    from plotarmour.crawl.pages import PageRules, check_language, require
    from plotarmour.crawl.wetlist import list_wets

    require("warcio", "py3langid", *["datatrove"] * bool(args.executor), *["ray"] * (args.executor == "ray"))
    rules = PageRules(args.language, args.min_probability, args.min_words)
    check_language(rules.language)
    if not args.executor and (args.tasks != 1 or args.workers != -1):
        raise UserError("--tasks and --workers need an --executor; expected local, slurm or ray.")
    run_filters = None
    if args.executor:
        from plotarmour.crawl.pipeline import Executor, filter_by, submit_to_slurm

        executor = Executor(args.executor, args.tasks, args.workers, args.logging_dir, args.slurm_partition or "",
                            args.slurm_time)
        run_filters = partial(filter_by, executor)
    wets = list_wets(args.wet, args.downloads or args.out.parent / "wet", args.base_url, args.limit)
    crawl = Crawl(wets, args.out, rules, not args.delete_downloads)
    tool = Path(sys.argv[0]).with_name("pre_tokenize.py").as_posix()  # as it was typed: it works from the same folder
    following = ["python", tool, args.out.as_posix(), "--tokenizer", "bpe:4096"]
    last = ["--out", args.out.with_suffix(".bin").as_posix()]
    if args.executor == "slurm":
        start_crawl(crawl, args.force)
        submit_to_slurm(executor, crawl)
        print(f"submitted; {args.out} appears when job join_shards has ended (see: squeue)")
        print("then: " + shlex.join([*following, "--split", "90:5:5", *last]))
        return
    counts = prepare_common_crawl(crawl, args.force, run_filters)
    print(f"{args.out}: {counts['kept']:,} stories of {counts['pages']:,} pages ({args.out.stat().st_size / 1e6:,.1f} "
          f"MB); dropped: {describe_dropped(counts)} ({crawl.counts.name})")
    split = ["--split", "90:5:5"] if counts["kept"] >= 100 else []  # of fewer a part could come out empty
    print("next: " + shlex.join([*following, *split, *last]))


if __name__ == "__main__":
    run_command(main)
