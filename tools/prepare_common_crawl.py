#!/usr/bin/env python3
"""Turn Common Crawl into a text of stories: keep one language, drop short, repetitive and duplicate pages."""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, next_command, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=HelpFormatter,
        epilog="One WET file of a crawl is roughly 80 MB packed, with 30,000 pages, two in five of them English. The "
               "same command continues an interrupted run: it downloads and filters only what is missing. Needs: pip "
               "install datatrove warcio py3langid requests.")
    parser.add_argument("wet", nargs="+", help="a crawl's wet.paths or wet.paths.gz, or WET files (.wet, .wet.gz): "
                        "files or addresses")
    parser.add_argument("--out", type=as_path, required=True, metavar="X.txt", help="text to write; X.counts.csv "
                        "beside it says how many pages each reason dropped")
    parser.add_argument("--language", default="en", help="code of the language to keep, e.g. en, de, an")
    parser.add_argument("--min-probability", type=float, default=0.65, help="least probability of the language, 0 to 1")
    parser.add_argument("--min-words", type=int, default=50, help="shorter pages are dropped")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N WET files")
    parser.add_argument("--base-url", default="https://data.commoncrawl.org/", metavar="URL",
                        help="comes before the paths of a listing: Common Crawl or a mirror")
    parser.add_argument("--downloads", type=as_path, metavar="FOLDER",
                        help="folder for downloads (default: wet beside --out)")
    parser.add_argument("--delete-downloads", action="store_true", help="delete a downloaded file once it is filtered")
    add_common(parser, "force")
    many = parser.add_argument_group("several processes or machines (datatrove's executors; the text is the same)")
    many.add_argument("--executor", choices=("local", "slurm", "ray"), default="local", help="where the tasks run, one "
                      "per WET file")
    many.add_argument("--at-once", type=int, metavar="N", help="WET files at a time, -1: all (default: 1 for local, "
                      "else all)")
    many.add_argument("--logging-dir", type=as_path, metavar="FOLDER", help="datatrove's logs and statistics (default: "
                      "none for local, else X.logs beside --out)")
    many.add_argument("--slurm-partition", metavar="NAME", help="Slurm partition of the tasks")
    many.add_argument("--slurm-time", default="12:00:00", help="limit of a task, hours:minutes:seconds")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    packages = ["datatrove", "warcio", "py3langid", "requests", *["ray"] * (args.executor == "ray")]
    if missing := " ".join(name for name in packages if importlib.util.find_spec(name) is None):
        raise UserError(f"Common Crawl needs packages that are not installed. Run: pip install {missing}")
    if args.executor == "slurm" and not (args.slurm_partition and shutil.which("sbatch")):
        raise UserError("--executor slurm needs --slurm-partition NAME, and sbatch, as on a login node of a cluster. "
                        "Use --executor local elsewhere.")
    from contrib.common_crawl.crawl import Crawl, describe_dropped, list_wets, prepare_common_crawl
    from contrib.common_crawl.web_pages import PageRules

    rules = PageRules(args.language, args.min_probability, args.min_words)
    downloads = (args.downloads or args.out.parent / "wet").absolute()
    wets = list_wets(args.wet, downloads, args.base_url, args.limit)
    crawl = Crawl(wets, args.out.absolute(), rules, downloads, not args.delete_downloads)
    counts = prepare_common_crawl(crawl, args.executor, args.at_once, args.logging_dir and args.logging_dir.absolute(),
                                  {"partition": args.slurm_partition, "time": args.slurm_time}, args.force)
    if counts is None:
        print(f"submitted; {args.out} appears when job join_shards has ended (see: squeue)")
    else:
        print(f"{args.out}: {counts['kept']:,} stories of {counts['read']:,} pages "
              f"({args.out.stat().st_size / 1e6:,.1f} MB); dropped: {describe_dropped(counts)} "
              f"({args.out.stem}.counts.csv)")
    split = ["--split", "90:5:5"] if counts is None or counts["kept"] >= 100 else []  # of fewer a part may be empty
    print(next_command("pre_tokenize", args.out, "--tokenizer", "bpe:4096", *split, "--out",
                       args.out.with_suffix(".bin")))


if __name__ == "__main__":
    run_command(main)
