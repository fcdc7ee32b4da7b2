"""Common Crawl to stories: every WET file becomes a shard of kept pages; the shards are joined without duplicates.

Shards wait in `.NAME.work` beside the output: an interrupted run neither fetches nor filters again what is done. They
are joined in the order of the files, whoever made them: one process, or many machines (`pipeline`).
"""

import csv
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from plotarmour.cli import UserError, say
from plotarmour.crawl.downloads import download
from plotarmour.crawl.pages import REASONS, PageRules, check_language, require, why_dropped
from plotarmour.crawl.wet import read_wet
from plotarmour.crawl.wetlist import Wet, check_file
from plotarmour.data.chunks import read_stories
from plotarmour.data.readers import Source
from plotarmour.data.stories import SEPARATOR, story_hash
from plotarmour.files import publish, unfinished, write_json, write_text


@dataclass(frozen=True)
class Crawl:
    """A text to make from WET files.

    Args:
        wets: the files, in the order of the stories.
        out: the text to write, UTF-8, stories between lines of `<|endoftext|>`.
        rules: what a page must be.
        keep_downloads: False deletes each file that was fetched once its shard is written.
    """

    wets: tuple[Wet, ...]
    out: Path
    rules: PageRules = PageRules()
    keep_downloads: bool = True

    @property
    def work(self) -> Path:
        return self.out.with_name(f".{self.out.name}.work")

    @property
    def counts(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.counts.csv")

    def shard(self, index: int) -> Path:
        return self.work / f"{index:06d}.txt"

    def shard_counts(self, index: int) -> Path:
        """Written last: a shard is whole where it exists."""
        return self.work / f"{index:06d}.json"


class StoryFile:
    """A text that appears only when it is published; left before, it leaves nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> "StoryFile":
        self.temporary = unfinished(self.path)
        self.file = self.temporary.open("wb")
        return self

    def write(self, story: str) -> None:
        self.file.write(story.encode() + b"\n" + SEPARATOR + b"\n")

    def publish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        publish(self.temporary, self.path)

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def prepare_common_crawl(crawl: Crawl, force: bool = False,
                         run_filters: Callable[[Crawl], None] | None = None) -> Counter:
    """Fetch, filter, deduplicate and write.

    Args:
        crawl: what from what.
        force: replace an existing text.
        run_filters: makes all shards; by default one after the other in this process.

    Returns:
        Pages read ("pages"), kept ("kept"), and dropped by each key of `REASONS`; also written to NAME.counts.csv.

    Raises:
        UserError: a file that is no WET file or damaged, an unknown language, no page kept, an existing text.
    """
    start_crawl(crawl, force)
    try:
        (run_filters or filter_all)(crawl)
    except UserError as error:
        if any(crawl.shard_counts(i).exists() for i in range(len(crawl.wets))):
            raise UserError(f"{error} What is done is kept: the same command goes on.") from None
        shutil.rmtree(crawl.work)
        raise
    return join_shards(crawl)


def start_crawl(crawl: Crawl, force: bool = False) -> None:
    """Check everything that can be checked now, and make the work folder; shards of other settings go."""
    require("warcio", "py3langid")
    check_language(crawl.rules.language)
    if crawl.out.exists() and not force:
        raise UserError(f"{crawl.out} exists already; expected a new name. Use another --out, or --force to replace "
                        "it.")
    for wet in crawl.wets:
        if not wet.url:
            check_file(wet.path)
    settings = {"version": 1, "rules": asdict(crawl.rules), "wets": [wet.describe() for wet in crawl.wets]}
    about = crawl.work / "settings.json"
    if crawl.work.exists():
        before = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
        if before == settings:
            done = sum(crawl.shard_counts(i).exists() for i in range(len(crawl.wets)))
            say(f"going on: {done:,} of {len(crawl.wets):,} files are filtered already ({crawl.work})")
            return
        say(f"{crawl.work} is of other files or rules; starting over")
        shutil.rmtree(crawl.work)
    write_json(about, settings)


def filter_all(crawl: Crawl) -> None:
    """Make every shard that is missing, one after the other."""
    for index, wet in enumerate(crawl.wets):
        if crawl.shard_counts(index).exists():
            continue
        fetch(wet)
        counts = Counter()
        with StoryFile(crawl.shard(index)) as shard, tqdm(
                total=wet.path.stat().st_size, unit="B", unit_scale=True, mininterval=0.5,
                desc=f"filter {index + 1}/{len(crawl.wets)}") as bar:
            for page in read_wet(wet.path, bar.update):
                reason = why_dropped(page, crawl.rules)
                counts.update(["pages", reason or "passed"])
                if not reason:
                    shard.write(page)
            finish_shard(crawl, index, shard, counts)


def fetch(wet: Wet) -> None:
    """Download a WET file unless it is there."""
    if wet.url:
        download(wet.url, wet.path)


def finish_shard(crawl: Crawl, index: int, shard: StoryFile, counts: dict[str, int]) -> None:
    """Publish a shard, then its counts; what was fetched for it goes, if so wished."""
    shard.publish()
    write_json(crawl.shard_counts(index), dict(counts))
    if crawl.wets[index].url and not crawl.keep_downloads:
        crawl.wets[index].path.unlink(missing_ok=True)


def join_shards(crawl: Crawl) -> Counter:
    """Write the text: all shards in order, each story once (the first of its near-copies). Then the shards go.

    Memory grows by an eight-byte hash per kept story: 70 bytes in a Python set, as measured for a million.

    Returns:
        The counts, as `prepare_common_crawl` does.

    Raises:
        UserError: no page was kept.
    """
    counts, seen = Counter(pages=0, kept=0), set()
    with StoryFile(crawl.out) as text:
        for index in range(len(crawl.wets)):
            counts.update(json.loads(crawl.shard_counts(index).read_text(encoding="utf-8")))
            if not crawl.shard(index).stat().st_size:
                continue
            for story in read_stories(Source(crawl.shard(index), crawl.shard(index).name)):
                key = story_hash(story)
                counts["duplicate" if key in seen else "kept"] += 1
                if key not in seen:
                    seen.add(key)
                    text.write(story)
        del counts["passed"]
        if not counts["kept"]:
            shutil.rmtree(crawl.work)
            raise UserError(f"no page of {counts['pages']:,} was kept; expected at least one. Dropped: "
                            f"{describe_dropped(counts)}. Use more files, another --language or a lower --min-words.")
        text.publish()
    rows = io.StringIO(newline="")
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(["outcome", "pages", "meaning"])
    writer.writerow(["read", counts["pages"], "pages in the WET files"])
    writer.writerows([reason, counts[reason], meaning] for reason, meaning in REASONS.items())
    writer.writerow(["kept", counts["kept"], "stories written"])
    write_text(crawl.counts, rows.getvalue())
    shutil.rmtree(crawl.work)
    return counts


def describe_dropped(counts: dict[str, int]) -> str:
    """Name what was dropped why in one line, most first."""
    found = sorted(((counts[reason], reason) for reason in REASONS if counts[reason]), reverse=True)
    return ", ".join(f"{reason} {count:,}" for count, reason in found) or "nothing"
