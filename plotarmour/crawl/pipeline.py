"""The same filters as a datatrove pipeline: many processes here, or many machines under Slurm or Ray.

Tasks share out the WET files and make one shard of each; the function that drops pages is the one of the streaming way.
Duplicates are dropped afterwards, where the shards are joined in order, by one process. So the text has the same bytes
for every executor and any number of tasks. Under Slurm and Ray the output's folder and this checkout must be on a file
system that all machines see. Only who has datatrove can import this file.
"""

import shlex
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from loguru import logger

from plotarmour.cli import UserError, say
from plotarmour.crawl.commoncrawl import Crawl, StoryFile, fetch, finish_shard, join_shards
from plotarmour.crawl.pages import require, why_dropped
from plotarmour.crawl.wet import read_wet

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Executor:
    """Where the tasks run.

    Args:
        kind: "local", "slurm" or "ray".
        tasks: among how many tasks the files are shared out (never more than files).
        workers: how many tasks at once; -1: all.
        logging_dir: for datatrove's logs and statistics. None: none are kept (local), NAME.logs beside the text.
        partition: Slurm's.
        time: Slurm's limit for a task, hours:minutes:seconds.
    """

    kind: str = "local"
    tasks: int = 1
    workers: int = -1
    logging_dir: Path | None = None
    partition: str = ""
    time: str = "12:00:00"

    def __post_init__(self) -> None:
        if self.tasks < 1 or self.workers == 0 or self.workers < -1:
            raise UserError(f"--tasks {self.tasks}, --workers {self.workers}: expected 1 or more (--workers -1: all).")
        if self.kind == "slurm" and not self.partition:
            raise UserError("--executor slurm needs to know where; expected --slurm-partition NAME (see: sinfo).")
        if self.kind == "slurm" and not shutil.which("sbatch"):
            raise UserError("sbatch is not on this machine; expected a login node of a Slurm cluster, or --executor "
                            "local.")


class ReadWets(PipelineStep):
    """Yields the pages of this task's files. A Document without text ends each file.

    (datatrove's own WarcReader detects encodings by two more packages; the text of WET files is UTF-8 already.)
    """

    type, name = "📖 - READER", "WET"

    def __init__(self, crawl: Crawl, quiet: bool) -> None:
        super().__init__()
        self.crawl, self.quiet = crawl, quiet

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.quiet:  # in a new process, before its first line: a user's mistake is one line, not a traceback
            logger.disable("datatrove")

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for index in range(rank, len(self.crawl.wets), world_size):
            if self.crawl.shard_counts(index).exists():
                continue
            fetch(self.crawl.wets[index])
            n_pages = 0
            for page in read_wet(self.crawl.wets[index].path):
                self.stat_update("pages")
                yield Document(page, f"{index}/{n_pages}", metadata={"file": index})
                n_pages += 1
            yield Document("", f"{index}/end", metadata={"file": index, "counts": Counter(pages=n_pages)})


class DropPages(PipelineStep):
    """Drops pages by `why_dropped`, and adds to the end of a file how many were dropped why."""

    type, name = "🔻 - FILTER", "language, length, repetition"

    def __init__(self, crawl: Crawl) -> None:
        super().__init__()
        self.crawl = crawl

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        counts = Counter()
        for document in data:
            if "counts" in document.metadata:
                document.metadata["counts"].update(counts)
                counts.clear()
                yield document
                continue
            reason = why_dropped(document.text, self.crawl.rules)
            counts[reason or "passed"] += 1
            self.stat_update(f"dropped_{reason}" if reason else "passed")
            if not reason:
                yield document


class WriteShards(PipelineStep):
    """Writes a shard for every file."""

    type, name = "💽 - WRITER", "shards"

    def __init__(self, crawl: Crawl) -> None:
        super().__init__()
        self.crawl = crawl

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with ExitStack() as open_shards:
            shard = None
            for document in data:
                index = document.metadata["file"]
                shard = shard or open_shards.enter_context(StoryFile(self.crawl.shard(index)))
                if "counts" not in document.metadata:
                    shard.write(document.text)
                    continue
                counts = document.metadata["counts"]
                finish_shard(self.crawl, index, shard, counts)
                say(f"{self.crawl.wets[index].path.name}: {counts['passed']:,} of {counts['pages']:,} pages passed")
                shard = None
        yield from ()


class JoinShards(PipelineStep):
    """Writes the text, as one task after all others."""

    type, name = "🫂 - DEDUP", "join shards"

    def __init__(self, crawl: Crawl) -> None:
        super().__init__()
        self.crawl = crawl

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for name, value in join_shards(self.crawl).items():
            self.stat_update(name, value=value)
        yield from ()


def filter_by(executor: Executor, crawl: Crawl) -> None:
    """Make all shards in this machine's processes or on a Ray cluster, and wait for them.

    Raises:
        UserError: what the filters raise; a package that is missing.
    """
    crawl, quiet = _absolute(crawl), executor.kind == "local" and not executor.logging_dir
    where = crawl.work / "logs" if quiet else _logs(executor, crawl) / "filter"
    # shards say themselves what is done; datatrove's own marks could be of other rules
    options = {"tasks": min(executor.tasks, len(crawl.wets)), "workers": executor.workers, "logging_dir": str(where),
               "skip_completed": False}
    pipeline = [ReadWets(crawl, quiet), DropPages(crawl), WriteShards(crawl)]
    if executor.kind == "ray":
        require("ray")
        import ray
        from datatrove.executor.ray import RayPipelineExecutor

        with ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}, log_to_driver=False):
            RayPipelineExecutor(pipeline, **options).run()
    else:
        from datatrove.executor.local import LocalPipelineExecutor

        if quiet:
            logger.disable("datatrove")
        try:
            LocalPipelineExecutor(pipeline, **options).run()
        finally:
            logger.enable("datatrove")
    missing = [i for i in range(len(crawl.wets)) if not crawl.shard_counts(i).exists()]
    if missing:
        raise UserError(f"{len(missing)} of {len(crawl.wets)} files were not filtered, first "
                        f"{crawl.wets[missing[0]].path.name}. See the logs in {where}.")


def submit_to_slurm(executor: Executor, crawl: Crawl) -> None:
    """Submit two jobs, the filters and, once all of them have ended well, the joining; do not wait.

    Raises:
        UserError: `sbatch` refuses.
    """
    from datatrove.executor.slurm import SlurmPipelineExecutor

    crawl, logs = _absolute(crawl), _logs(executor, crawl)
    activate = Path(sys.prefix) / "bin" / "activate"
    environment = f"export PYTHONPATH={shlex.quote(str(ROOT))}:${{PYTHONPATH:-}}" + (
        f" && source {shlex.quote(str(activate))}" if activate.exists() else "")
    options = {"time": executor.time, "partition": executor.partition, "env_command": environment, "qos": "",
               "skip_completed": False}
    filters = SlurmPipelineExecutor([ReadWets(crawl, False), DropPages(crawl), WriteShards(crawl)],
                                    tasks=min(executor.tasks, len(crawl.wets)), workers=executor.workers,
                                    job_name="filter_wets", logging_dir=str(logs / "filter"), **options)
    join = SlurmPipelineExecutor([JoinShards(crawl)], tasks=1, job_name="join_shards", logging_dir=str(logs / "join"),
                                 depends=filters, mem_per_cpu_gb=8, **options)
    try:
        join.run()
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch refused a job (exit code {error.returncode}, its reason is above). Check "
                        "--slurm-partition and --slurm-time.") from None


def _absolute(crawl: Crawl) -> Crawl:
    """Tasks start in folders of their own."""
    return replace(crawl, out=crawl.out.absolute(), wets=tuple(
        replace(wet, path=wet.path.absolute()) for wet in crawl.wets))


def _logs(executor: Executor, crawl: Crawl) -> Path:
    return (executor.logging_dir or crawl.out.with_name(f"{crawl.out.stem}.logs")).absolute()
