"""Common Crawl to stories, by datatrove: each WET file becomes a shard, and the shards are joined without duplicates.

One datatrove task per WET file (`FilterWet`) downloads it and writes the pages that pass (`web_pages.why_dropped`).
Then one process joins the shards in the order of the files, so the text has the same bytes for every executor and every
number of workers. Until then the shards are in `.NAME.work` beside the text: an interrupted run repeats only the files
that have no shard.

This module needs the packages of the extra `crawl` in pyproject.toml.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import requests
from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from contrib.common_crawl.web_pages import REASONS, PageRules, read_wet, why_dropped
from plotarmour.cli import UserError, as_path, refuse_existing, say
from plotarmour.data.stories import SEPARATOR, story_hash
from plotarmour.files import complete_file, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
ATTEMPTS = 5  # of a download
BUSY = (429, 500, 502, 503, 504)  # HTTP statuses after which a download is tried again


@dataclass(frozen=True)
class Crawl:
    """A text to make from WET files. Under Slurm and Ray, all machines must share its absolute paths."""

    wets: tuple[str, ...]  # addresses and absolute paths, as `list_wets` returns them, in the order of the stories
    out: Path  # the text to write: UTF-8, `<|endoftext|>` between stories
    rules: PageRules  # which pages to keep
    downloads: Path  # folder for the files that have an address
    keep_downloads: bool = True  # False deletes each of them after its shard is written

    @property
    def work(self) -> Path:
        """Folder of the shards."""
        return self.out.with_name(f".{self.out.name}.work")

    def wet(self, index: int) -> Path:
        """Where a WET file is, or will be after its download."""
        name = self.wets[index]
        return self.downloads / name.rsplit("/", 1)[-1] if "://" in name else Path(name)

    def shard(self, index: int) -> Path:
        """One story per line, as a JSON string, and then the counts, as an object; the file exists only complete."""
        return self.work / f"{index:06d}.jsonl"

    def missing(self) -> list[int]:
        """Indices of the files that have no shard."""
        return [index for index in range(len(self.wets)) if not self.shard(index).exists()]


def list_wets(inputs: list[str], downloads: Path, base_url: str = "https://data.commoncrawl.org/",
              limit: int | None = None) -> tuple[str, ...]:
    """Return the addresses or absolute paths of some WET files, each once; download listings, but no WET file.

    Args:
        inputs: paths or addresses of listings (names end in .paths or .paths.gz) and of WET files.
        downloads: folder for downloads.
        base_url: comes before each path of a listing.
        limit: maximum number of files.

    Raises:
        UserError: no file is listed, or an address is not that of a WET file.
    """
    names = []
    for name in inputs:
        if not name.endswith((".paths", ".paths.gz")):
            names.append(name)
            continue
        path = as_path(name)
        if "://" in name:  # stored as CRAWL.wet.paths.gz
            path = downloads / ".".join(urlsplit(name).path.strip("/").split("/")[-2:])
            download(name, path)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as listing:
            names += [f"{base_url.rstrip('/')}/{line}" for line in listing.read().split()]
    names = list(dict.fromkeys(names))[:limit]
    if not names or (limit is not None and limit < 1):
        raise UserError(f"{', '.join(inputs)} gives no file; expected one path per line, and --limit 1 or more.")
    if wrong := [name for name in names if "://" in name and not name.endswith((".wet", ".wet.gz"))]:
        raise UserError(f"{wrong[0][:160]} is no WET file; expected an address that ends in .warc.wet.gz, as in a "
                        "crawl's wet.paths.gz.")
    return tuple(name if "://" in name else str(as_path(name).absolute()) for name in names)


def download(url: str, path: Path) -> None:
    """Download a file unless `path` exists; `ATTEMPTS` times unless refused."""
    if path.exists():
        return
    say(f"downloading {url}")
    with complete_file(path, "wb") as file:
        for attempt in range(ATTEMPTS):
            file.truncate(file.seek(0))
            try:
                with requests.get(url, headers={"Accept-Encoding": "identity"}, stream=True, timeout=60) as response:
                    response.raise_for_status()
                    for block in response.iter_content(2**18):
                        file.write(block)
                return
            except requests.RequestException as error:
                refused = error.response is not None and error.response.status_code not in BUSY
                if refused or attempt == ATTEMPTS - 1:
                    raise UserError(f"{url} cannot be downloaded: {str(error).splitlines()[0]}. Check the address and "
                                    f"the network, or put the file at {path}.") from None
                time.sleep(2**attempt)


class FilterWet(PipelineStep):
    """datatrove step: download the WET file of the task, and write a shard of the pages that pass and their counts.

    (datatrove's WarcReader needs two packages that detect encodings; the text of WET files is UTF-8 already.)
    """

    type, name = "🔻 - FILTER", "WET"

    def __init__(self, crawl: Crawl, quiet: bool) -> None:
        super().__init__()
        self.crawl, self.missing, self.quiet = crawl, crawl.missing(), quiet

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.quiet:  # a worker process unpickles this step before it logs: a UserError stays one line
            logger.disable("datatrove")

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        crawl, index = self.crawl, self.missing[rank]
        name, wet, counts = crawl.wets[index], crawl.wet(index), Counter(read=0, passed=0)
        if "://" in name:
            download(name, wet)
        with complete_file(crawl.shard(index)) as shard:
            for page in read_wet(wet):
                reason = why_dropped(page, crawl.rules)
                counts.update(("read", reason or "passed"))
                if reason is None:
                    shard.write(json.dumps(page) + "\n")
            shard.write(json.dumps(counts) + "\n")
        for outcome, n in counts.items():
            self.stat_update(outcome, value=n)
        if "://" in name and not crawl.keep_downloads:
            wet.unlink(missing_ok=True)
        say(f"{wet.name} ({index + 1:,}/{len(crawl.wets):,}): {counts['passed']:,} of {counts['read']:,} pages passed")


def prepare_common_crawl(crawl: Crawl, executor: str = "local", workers: int | None = None,
                         logging_dir: Path | None = None, slurm: dict | None = None, force: bool = False
                         ) -> Counter | None:
    """Download, filter and join by one of datatrove's executors.

    Args:
        executor: "local", "slurm" or "ray".
        workers: WET files at a time, -1: all; None: 1 for "local", else all.
        logging_dir: folder for datatrove's logs and statistics. None: none for "local", else NAME.logs beside the text.
        slurm: "partition" and "time" (limit per task, hours:minutes:seconds).
        force: replace an existing text.

    Returns:
        How many pages were "read", "kept", and dropped by each key of `REASONS`; also written to NAME.counts.csv. None
        for "slurm": the jobs were submitted, and the last one writes the text.

    Raises:
        UserError: a WET file is missing or damaged, no page is kept, the text exists, or Slurm refuses a job.
    """
    refuse_existing(crawl.out, force)
    _make_work_folder(crawl)
    n_missing, quiet = len(crawl.missing()), executor == "local" and not logging_dir
    steps = [FilterWet(crawl, quiet)]
    logs = logging_dir or (crawl.work / "logs" if quiet else crawl.out.with_name(f"{crawl.out.stem}.logs"))
    options = {"tasks": n_missing, "workers": workers or (1 if executor == "local" else -1),
               "logging_dir": str(logs / "filter"), "skip_completed": False}
    if executor == "slurm":
        return _submit_to_slurm(crawl, steps, logs, options, slurm)
    try:
        if n_missing and executor == "ray":
            import ray
            from datatrove.executor.ray import RayPipelineExecutor

            with ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False):
                RayPipelineExecutor(steps, **options).run()
        elif n_missing:
            if quiet:
                logger.disable("datatrove")
            LocalPipelineExecutor(steps, start_method="spawn" if os.name == "nt" else "forkserver", **options).run()
        if left := crawl.missing():
            raise UserError(f"{len(left)} of {len(crawl.wets)} files were not filtered, first "
                            f"{crawl.wet(left[0]).name}; expected all. See the logs in {logs}.")
    except UserError as error:
        if len(crawl.missing()) < len(crawl.wets):
            raise UserError(f"{error} Finished files are kept: the same command continues.") from None
        shutil.rmtree(crawl.work)
        raise
    return _join_shards(crawl)


def _make_work_folder(crawl: Crawl) -> None:
    """Make the work folder; delete shards of other files or rules. Raise `OSError` where a file does not exist."""
    files = [[name] if "://" in name else [name, (stat := Path(name).stat()).st_size, stat.st_mtime_ns]
             for name in crawl.wets]  # what identifies each file
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
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # jobs inherit
    activate = Path(sys.prefix) / "bin" / "activate"
    slurm = slurm | {"qos": "", "venv_path": str(activate) if activate.exists() else None}
    filters = SlurmPipelineExecutor(steps, job_name="filter_wets", **options, **slurm) if options["tasks"] else None
    options |= {"tasks": 1, "logging_dir": str(logs / "join"), "mem_per_cpu_gb": 8}
    try:
        SlurmPipelineExecutor([partial(_join_shards, crawl)], job_name="join_shards", depends=filters, **options,
                              **slurm).run()
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused a job (exit code {error.returncode}, its reason is above). Check "
                        "--slurm-partition and --slurm-time.") from None


def _join_shards(crawl: Crawl, *_of_datatrove: object) -> Counter:
    """Write the text from all shards in order, each story once (the first of its normalised copies); delete the shards.

    Memory grows by 70 bytes per kept story (an eight-byte hash in a Python set, measured for a million).
    """
    counts, seen = Counter(kept=0), set()
    with complete_file(crawl.out) as text:
        for index in range(len(crawl.wets)):
            with crawl.shard(index).open(encoding="utf-8") as shard:
                for line in map(json.loads, shard):
                    if isinstance(line, dict):
                        counts.update(line)
                    elif (key := story_hash(line)) in seen:
                        counts["duplicate"] += 1
                    else:
                        counts["kept"] += 1
                        seen.add(key)
                        text.write(f"{line}\n{SEPARATOR.decode()}\n")
        if not counts["kept"]:
            shutil.rmtree(crawl.work)
            raise UserError(f"no page of {counts['read']:,} was kept; expected at least one. Dropped: "
                            f"{describe_dropped(counts)}. Use more files, another --language or a lower --min-words.")
    meanings = {"read": "pages in the WET files"} | REASONS | {"kept": "stories written"}
    rows = [(outcome, counts[outcome], meaning) for outcome, meaning in meanings.items()]
    write_text(crawl.out.with_name(f"{crawl.out.stem}.counts.csv"),
               pd.DataFrame(rows, columns=["outcome", "pages", "meaning"]).to_csv(index=False, lineterminator="\n"))
    shutil.rmtree(crawl.work)
    return counts


def describe_dropped(counts: dict[str, int]) -> str:
    """Return how many pages each reason dropped, most first, in one line."""
    dropped = sorted(((counts[reason], reason) for reason in REASONS if counts[reason]), reverse=True)
    return ", ".join(f"{reason} {count:,}" for count, reason in dropped) or "nothing"
