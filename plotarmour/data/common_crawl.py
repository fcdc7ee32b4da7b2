"""Common Crawl to stories, by datatrove: each WET file becomes a shard, and the shards are joined without duplicates.

One datatrove task per WET file: download and read it (`ReadWet`), drop pages (`web_pages.why_dropped`), write the pages
that pass (`write_shard`). Then one process joins the shards in the order of the files, so the text has the same bytes
for every executor and every number of workers. Until then the shards are in `.NAME.work` beside the text: an
interrupted run repeats only the files that have no shard.

This module needs the packages of requirements-crawl.txt; `web_pages.require` names a missing one.
"""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.lambda_filter import LambdaFilter
from loguru import logger

from plotarmour.cli import UserError, say
from plotarmour.data.stories import SEPARATOR, story_hash
from plotarmour.data.web_pages import GZIP, REASONS, PageRules, check_file, check_language, read_wet, why_dropped
from plotarmour.files import complete_file, download, write_json

ROOT = Path(__file__).resolve().parents[2]
COMMON_CRAWL = "https://data.commoncrawl.org/"


@dataclass(frozen=True)
class Wet:
    """One WET file.

    Args:
        path: where it is, or where it will be after the download.
        url: address to download it from; None for a file of the user, which is never deleted.
    """

    path: Path
    url: str | None = None


@dataclass(frozen=True)
class Crawl:
    """A text to make from WET files.

    Args:
        wets: the files, in the order of the stories.
        out: the text to write: UTF-8, `<|endoftext|>` between stories.
        rules: which pages to keep.
        keep_downloads: False deletes each downloaded file after its shard is written.
    """

    wets: tuple[Wet, ...]
    out: Path
    rules: PageRules = PageRules()
    keep_downloads: bool = True

    @property
    def work(self) -> Path:
        return self.out.with_name(f".{self.out.name}.work")

    def shard(self, index: int) -> Path:
        """One story per line, as a JSON string."""
        return self.work / f"{index:06d}.jsonl"

    def shard_counts(self, index: int) -> Path:
        """Written last: the shard is complete where this file exists."""
        return self.work / f"{index:06d}.json"

    def missing(self) -> list[int]:
        """Return the indices of the files that have no complete shard."""
        return [index for index in range(len(self.wets)) if not self.shard_counts(index).exists()]


def list_wets(inputs: list[str], downloads: Path, base_url: str = COMMON_CRAWL, limit: int | None = None
              ) -> tuple[Wet, ...]:
    """List the WET files that some inputs name, with absolute paths; download listings, but no WET file.

    Args:
        inputs: paths or addresses of listings (names end in .paths or .paths.gz) and of WET files.
        downloads: folder for downloads.
        base_url: comes before each path of a listing.
        limit: maximum number of files.

    Raises:
        UserError: a listing is missing or lists other files; two files have the same name.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no file; expected 1 or more.")
    names, downloads = [], downloads.absolute()
    for name in inputs:
        if name.endswith((".paths", ".paths.gz")):
            names += [f"{base_url.rstrip('/')}/{line}" for line in _read_listing(name, downloads)]
        else:
            names.append(name)
    wets = []
    for name in names[:limit]:
        if "://" in name and not name.endswith((".wet", ".wet.gz")):
            raise UserError(f"{name[:160]} is no WET file; expected an address that ends in .warc.wet.gz, as in a "
                            "crawl's wet.paths.gz.")
        wets.append(Wet(downloads / name.rsplit("/", 1)[-1], name) if "://" in name else Wet(Path(name).absolute()))
    twice = [path for path, times in Counter(wet.path for wet in wets).items() if times > 1]
    if not wets or twice:
        raise UserError(f"{twice[0]} is named twice; expected every WET file once." if twice else
                        f"{', '.join(inputs)} lists no file; expected one path per line.")
    return tuple(wets)


def _read_listing(name: str, downloads: Path) -> list[str]:
    """Return the lines of a listing; one from the web is stored as CRAWL.wet.paths.gz."""
    path = Path(name)
    if "://" in name:
        path = downloads / ".".join(urlsplit(name).path.strip("/").split("/")[-2:])
        download(name, path)
    check_file(path)
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if content.startswith(GZIP) else content).decode().split()
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a listing of WET files ({error}); expected text, plain or gzip. Download it "
                        "again.") from None


class ReadWet(PipelineStep):
    """datatrove step: download the WET file of the task and yield its pages.

    (datatrove's WarcReader needs two packages that detect encodings; the text of WET files is UTF-8 already.)
    """

    type, name = "📖 - READER", "WET"

    def __init__(self, crawl: Crawl, missing: list[int] | None = None, quiet: bool = False) -> None:
        """Read the files with the indices `missing` (default: all), one per task."""
        super().__init__()
        self.crawl, self.quiet = crawl, quiet
        self.missing = list(range(len(crawl.wets))) if missing is None else missing

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.quiet:  # a worker process unpickles this step before it logs: a UserError stays one line
            logger.disable("datatrove")

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        wet = self.crawl.wets[self.missing[rank]]
        if wet.url:
            download(wet.url, wet.path)
        for i, page in enumerate(read_wet(wet.path)):
            yield Document(page, f"{wet.path.name}/{i}")


def _passes(rules: PageRules, document: Document) -> bool | tuple[bool, str]:
    """Return what a datatrove filter returns: True, or False and the reason, which its statistics count."""
    reason = why_dropped(document.text, rules)
    return True if reason is None else (False, reason)


def write_shard(crawl: Crawl, missing: list[int], filters: LambdaFilter, data: DocumentsPipeline, rank: int,
                world_size: int) -> None:
    """datatrove step: write the shard of the task's WET file, then the counts from the statistics of `filters`."""
    index, wet = missing[rank], crawl.wets[missing[rank]]
    with complete_file(crawl.shard(index)) as shard:
        for document in data:
            shard.write(json.dumps(document.text) + "\n")
    totals = {label: int(metric.total) for label, metric in filters.stats.stats.items()}
    counts = {"pages": totals.get("total", 0)} | {reason: totals.get(f"dropped_{reason}", 0) for reason in REASONS}
    write_json(crawl.shard_counts(index), counts)
    if wet.url and not crawl.keep_downloads:
        wet.path.unlink(missing_ok=True)
    say(f"{wet.path.name} ({index + 1:,}/{len(crawl.wets):,}): {totals.get('forwarded', 0):,} of {counts['pages']:,} "
        "pages passed")


def prepare_common_crawl(crawl: Crawl, executor: str = "local", workers: int | None = None,
                         logging_dir: Path | None = None, slurm: dict | None = None, force: bool = False
                         ) -> Counter | None:
    """Download, filter and join by one of datatrove's executors.

    Args:
        crawl: the WET files, the text to write and the rules. Slurm and Ray need absolute paths on a file system that
            all machines share.
        executor: "local", "slurm" or "ray".
        workers: WET files at a time, -1: all; None: 1 for "local", else all.
        logging_dir: folder for datatrove's logs and statistics. None: none for "local", else NAME.logs beside the text.
        slurm: "partition" and "time" (limit per task, hours:minutes:seconds).
        force: replace an existing text.

    Returns:
        Pages read ("pages"), kept ("kept"), and dropped by each key of `REASONS`; also written to NAME.counts.csv.
        None for "slurm": the jobs were submitted, and the last one writes the text.

    Raises:
        UserError: a WET file is missing or damaged, the language is unknown, no page is kept, the text exists, or Slurm
            refuses a job.
    """
    start_crawl(crawl, force)
    missing, quiet = crawl.missing(), executor == "local" and not logging_dir
    filters = LambdaFilter(partial(_passes, crawl.rules))
    steps = [ReadWet(crawl, missing, quiet), filters, partial(write_shard, crawl, missing, filters)]
    logs = logging_dir or (crawl.work / "logs" if quiet else crawl.out.with_name(f"{crawl.out.stem}.logs"))
    options = {"tasks": len(missing), "workers": workers or (1 if executor == "local" else -1),
               "logging_dir": str(logs / "filter"), "skip_completed": False}
    if executor == "slurm":
        return _submit_to_slurm(crawl, steps, logs, options, slurm)
    try:
        if missing and executor == "ray":
            import ray
            from datatrove.executor.ray import RayPipelineExecutor

            with ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False):
                RayPipelineExecutor(steps, **options).run()
        elif missing:
            from datatrove.executor.local import LocalPipelineExecutor

            if quiet:
                logger.disable("datatrove")
            start = "spawn" if os.name == "nt" else "forkserver"
            LocalPipelineExecutor(steps, start_method=start, **options).run()
        if left := crawl.missing():
            raise UserError(f"{len(left)} of {len(crawl.wets)} files were not filtered, first "
                            f"{crawl.wets[left[0]].path.name}; expected all. See the logs in {logs}.")
    except UserError as error:
        if len(crawl.missing()) < len(crawl.wets):
            raise UserError(f"{error} Finished files are kept: the same command continues.") from None
        shutil.rmtree(crawl.work)
        raise
    return join_shards(crawl)


def start_crawl(crawl: Crawl, force: bool = False) -> None:
    """Check all inputs and make the work folder; delete shards of other files or rules.

    Raises:
        UserError: the text exists, a file is missing or empty, or the language is unknown.
    """
    check_language(crawl.rules.language)
    if crawl.out.exists() and not force:
        raise UserError(f"{crawl.out} exists already; expected a new name. Use another --out, or --force to replace "
                        "it.")
    files = []  # what identifies each file: its address, or name, size and time of change
    for wet in crawl.wets:
        if not wet.url:
            check_file(wet.path)
            stat = wet.path.stat()
        files.append([wet.url] if wet.url else [str(wet.path), stat.st_size, stat.st_mtime_ns])
    settings, path = {"rules": asdict(crawl.rules), "wets": files}, crawl.work / "settings.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == settings:
        say(f"continuing: {len(files) - len(crawl.missing()):,} of {len(files):,} files are filtered already "
            f"({crawl.work})")
        return
    if crawl.work.exists():
        say(f"{crawl.work} belongs to other files or rules; starting over")
        shutil.rmtree(crawl.work)
    write_json(path, settings)


def _submit_to_slurm(crawl: Crawl, steps: list, logs: Path, options: dict, slurm: dict) -> None:
    """Submit the filters as one job per WET file, and a job that joins the shards after them."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # jobs inherit
    activate = Path(sys.prefix) / "bin" / "activate"
    slurm = slurm | {"qos": "", "venv_path": str(activate) if activate.exists() else None}
    filters = SlurmPipelineExecutor(steps, job_name="filter_wets", **options, **slurm) if options["tasks"] else None
    options |= {"tasks": 1, "logging_dir": str(logs / "join"), "mem_per_cpu_gb": 8}
    try:
        SlurmPipelineExecutor([partial(join_shards, crawl)], job_name="join_shards", depends=filters, **options,
                              **slurm).run()
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused a job (exit code {error.returncode}, its reason is above). Check "
                        "--slurm-partition and --slurm-time.") from None


def join_shards(crawl: Crawl, *_task: object) -> Counter:
    """Write the text from all shards in order, each story once (the first of its normalised copies); delete the shards.

    Memory grows by 70 bytes per kept story (an eight-byte hash in a Python set, measured for a million).

    Args:
        crawl: whose shards are complete.
        _task: what datatrove passes to a step: data, rank and world size.

    Returns:
        The counts, as `prepare_common_crawl` does.

    Raises:
        UserError: no page was kept.
    """
    counts, seen = Counter(kept=0), set()
    with complete_file(crawl.out) as text:
        for index in range(len(crawl.wets)):
            counts.update(json.loads(crawl.shard_counts(index).read_text(encoding="utf-8")))
            with crawl.shard(index).open(encoding="utf-8") as shard:
                for story in map(json.loads, shard):
                    key = story_hash(story)
                    counts["duplicate" if key in seen else "kept"] += 1
                    if key not in seen:
                        seen.add(key)
                        text.write(f"{story}\n{SEPARATOR.decode()}\n")
        if not counts["kept"]:
            shutil.rmtree(crawl.work)
            raise UserError(f"no page of {counts['pages']:,} was kept; expected at least one. Dropped: "
                            f"{describe_dropped(counts)}. Use more files, another --language or a lower --min-words.")
    with complete_file(crawl.out.with_name(f"{crawl.out.stem}.counts.csv")) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["outcome", "pages", "meaning"])
        writer.writerow(["read", counts["pages"], "pages in the WET files"])
        writer.writerows([reason, counts[reason], meaning] for reason, meaning in REASONS.items())
        writer.writerow(["kept", counts["kept"], "stories written"])
    shutil.rmtree(crawl.work)
    return counts


def describe_dropped(counts: dict[str, int]) -> str:
    """Return how many pages each reason dropped, most first, in one line."""
    dropped = sorted(((counts[reason], reason) for reason in REASONS if counts[reason]), reverse=True)
    return ", ".join(f"{reason} {count:,}" for count, reason in dropped) or "nothing"
