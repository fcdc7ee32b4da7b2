import csv
import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from local_server import Site, serving
from wet_pages import pages, write_wet

from contrib.common_crawl.web_pages import PageRules
from plotarmour.cli import UserError

MADE = pages(600)
KEPT = [page for page, kind in MADE if kind == "kept"]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def wets(tmp_path_factory):
    """Three WET files of 200 pages each, gzip and plain."""
    folder = tmp_path_factory.mktemp("wets")
    return [write_wet(folder / f"{i}.warc.wet{'.gz' * (i != 1)}", [page for page, _ in MADE[i * 200:(i + 1) * 200]],
                      packed=i != 1) for i in range(3)]


@pytest.fixture
def site(wets):
    """A mirror with a listing of the three files."""
    files = {f"/crawl-data/X/wet/{wet.name}": wet.read_bytes() for wet in wets}
    listing = gzip.compress("".join(f"{path[1:]}\n" for path in files).encode())
    return Site({**files, "/crawl-data/X/wet.paths.gz": listing})


@pytest.fixture
def run_tool(root, tmp_path):
    """Call the tool in `tmp_path`, in a process of its own: datatrove changes logging. Returns the finished process."""
    def run(*args, code=(), **environment):
        command = [sys.executable, *(code or [str(root / "tools" / "prepare_common_crawl.py")]), *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True,
                              check=False, timeout=100)
    return run


@pytest.fixture
def refused(run_tool):
    """Call the tool; it must end with code 2 and one line, which is returned."""
    def run(*args):
        done = run_tool(*args)
        assert done.returncode == 2 and done.stdout == "", done.stderr
        [line] = [line for line in done.stderr.splitlines() if "pages passed" not in line]
        assert line.startswith("error: ")
        return line
    return run


def stories(path):
    return path.read_text(encoding="utf-8").split("\n<|endoftext|>\n")[:-1]


def test_pages_are_kept_once_and_in_order_and_the_counts_add_up(wets, run_tool, tmp_path):
    """Guards: pages lost, doubled or out of order; counts that do not add up; a next command that fails."""
    done = run_tool(*wets, "--out", "out/crawl.txt")
    assert done.returncode == 0, done.stderr
    assert stories(tmp_path / "out" / "crawl.txt") == KEPT and len(KEPT) == 150
    with (tmp_path / "out" / "crawl.counts.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["outcome"]: int(row["pages"]) for row in csv.DictReader(file)}
    assert rows == {"read": 600, "long": 0, **Counter(kind for _, kind in MADE)} and sum(rows.values()) == 2 * 600
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["crawl.counts.csv", "crawl.txt"]
    first, last = done.stdout.splitlines()
    assert first.startswith("out/crawl.txt: 150 stories of 600 pages") and "duplicate 25" in first
    assert re.fullmatch(r"next: python \S+/pre_tokenize.py out/crawl.txt --tokenizer bpe:4096 --split 90:5:5 "
                        r"--out out/crawl.bin", last)


def test_any_number_of_workers_gives_the_same_bytes_and_downloads_can_go(site, wets, run_tool, tmp_path):
    """Guards: stories in the order in which processes end; duplicates across tasks; disks that fill with WET files."""
    run_tool(*wets, "--out", "one.txt")
    with serving(site) as url:
        done = run_tool(f"{url}/crawl-data/X/wet.paths.gz", "--base-url", url, "--out", "three.txt", "--at-once", 3,
                        "--delete-downloads")
    assert done.returncode == 0 and done.stderr.count("pages passed\n") == 3 and "Traceback" not in done.stderr
    for name in ("txt", "counts.csv"):
        assert (tmp_path / f"one.{name}").read_bytes() == (tmp_path / f"three.{name}").read_bytes()
    assert sorted({p.name.split(".")[0] for p in tmp_path.iterdir()}) == ["one", "three", "wet"]
    assert [p.name for p in (tmp_path / "wet").iterdir()] == ["X.wet.paths.gz"] and all(wet.exists() for wet in wets)


def test_the_real_record_is_aragonese(shared, run_tool, refused, tmp_path):
    """Guards: a language told by Common Crawl's own label, which says Spanish; records of the real format."""
    real = shared / "data" / "commoncrawl" / "whirlwind.warc.wet"
    for path in (real, f"{real}.gz"):
        done = run_tool(path, "--language", "an", "--out", "an.txt", "--force")
        assert done.returncode == 0 and "1 stories of 1 pages" in done.stdout, done.stderr
        [story] = stories(tmp_path / "an.txt")
        assert story.startswith("Escopete - Biquipedia") and story.endswith("anchura del contenido")
    spanish = refused(real, "--language", "es", "--out", "es.txt")
    assert "no page of 1 was kept" in spanish and "language 1" in spanish
    assert sorted(p.name for p in tmp_path.iterdir()) == ["an.counts.csv", "an.txt"]


def test_an_interrupted_run_repeats_only_the_file_that_was_not_done(site, wets, run_tool, refused, tmp_path):
    """Guards: a night's work lost to the last file; files downloaded or filtered twice; the limit ignored."""
    whole = site.files["/crawl-data/X/wet/2.warc.wet.gz"]
    site.files["/crawl-data/X/wet/2.warc.wet.gz"] = whole[:-50]
    with serving(site) as url:
        args = (f"{url}/crawl-data/X/wet.paths.gz", "--base-url", url, "--out", "crawl.txt")
        done = run_tool(*args)
        assert done.returncode == 2 and "not a complete WET" in done.stderr and "same command continues" in done.stderr
        assert sorted(p.name for p in (tmp_path / ".crawl.txt.work").glob("0*")) == [
            "000000.jsonl", "000001.jsonl"] and not (tmp_path / "crawl.txt").exists()
        (tmp_path / "wet" / "2.warc.wet.gz").unlink()
        site.files["/crawl-data/X/wet/2.warc.wet.gz"] = whole
        before = len(site.requests)
        done = run_tool(*args)
        assert done.returncode == 0 and "continuing: 2 of 3 files" in done.stderr, done.stderr
        assert [path for _, path, _ in site.requests[before:]] == ["/crawl-data/X/wet/2.warc.wet.gz"]
        assert stories(tmp_path / "crawl.txt") == KEPT
        run_tool(*args[:3], "--out", "two.txt", "--limit", 2)
    assert stories(tmp_path / "two.txt") == [page for page, kind in MADE[:400] if kind == "kept"]


def test_shards_of_other_rules_are_deleted(wets, tmp_path, capsys):
    """Guards: an interrupted English run that continues as a German one."""
    from contrib.common_crawl.crawl import Crawl, _make_work_folder, list_wets

    files = list_wets([str(wets[0])], tmp_path)
    english, german = (Crawl(files, tmp_path / "o.txt", PageRules(code), tmp_path) for code in ("en", "de"))
    _make_work_folder(english)
    english.shard(0).write_text("{}")
    _make_work_folder(english)
    assert english.missing() == []
    _make_work_folder(german)
    assert german.missing() == [0] and "belongs to other files or rules" in capsys.readouterr().err


def test_a_page_never_becomes_two_stories(run_tool, tmp_path):
    """Guards: a page with a separator counted as two stories by the pretokenizer."""
    one, two, three, four = KEPT[:4]
    write_wet(tmp_path / "a.wet", [one + "\n<|endoftext|>\n" + two, three, four + "\n<|endof"])
    assert run_tool("a.wet", "--out", "o.txt").returncode == 0
    assert stories(tmp_path / "o.txt") == [three, four + "\n<|endof"]


def test_a_damaged_file_is_one_line_and_leaves_nothing(wets, refused, tmp_path):
    """Guards: a worker's traceback before the one line; half a text."""
    (tmp_path / "cut.wet.gz").write_bytes(wets[0].read_bytes()[:-50])
    (tmp_path / "cut.wet").write_bytes(wets[1].read_bytes()[:-50])
    for workers in (1, 2):
        assert "is not a complete WET file" in refused("cut.wet", "cut.wet.gz", "--out", "o.txt", "--at-once", workers)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.wet", "cut.wet.gz"]


LISTINGS = {"empty.paths": (b"\n", "gives no file"), "warc.paths": (b"crawl-data/X/a.warc.gz\n", "is no WET file")}


@pytest.mark.parametrize("name", LISTINGS)
def test_bad_listings_are_one_line(tmp_path, name):
    """Guards: tracebacks; gigabytes of web pages downloaded before they are refused."""
    from contrib.common_crawl.crawl import list_wets

    content, message = LISTINGS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        list_wets([str(tmp_path / name)], tmp_path / "wet")
    assert "\n" not in str(error.value) and not (tmp_path / "wet").exists()


@pytest.mark.parametrize(("args", "message"), [
    (("--language", "eng"), "'eng' is unknown, or is"), (("--language", "zh"), "without spaces"),
    (("--min-probability", "65"), "--min-probability 65 or"), (("--min-words", "0"), "--min-words 0 is out of range"),
    (("--limit", "0"), "gives no file"),
    (("--executor", "slurm"), "--slurm-partition"),
    (("--executor", "slurm", "--slurm-partition", "p"), "and sbatch"),
    (("--executor", "ray"), "Run: pip install ray"), (("--out", "here.txt"), "exists already"),
])
def test_bad_settings_are_one_line(wets, run_main, monkeypatch, tmp_path, args, message):
    """Guards: an hour of work under a language that does not exist."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no sbatch, also where Slurm is installed
    (tmp_path / "here.txt").write_text("mine")
    code, out, err = run_main("prepare_common_crawl", wets[0], "--out", "o.txt", *args)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["here.txt"]


@pytest.mark.parametrize("missing", ["warcio", "py3langid", "datatrove", "requests"])
def test_a_missing_package_is_one_line_with_its_command(root, wets, run_tool, tmp_path, missing):
    """Guards: ModuleNotFoundError; and plotarmour itself needing an extra."""
    code = ("import sys, importlib.util as u, runpy; find = u.find_spec\n"
            f"u.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
            f"sys.modules[{missing!r}] = None; sys.argv[0] = {str(root / 'tools' / 'prepare_common_crawl.py')!r}\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run_tool(wets[0], "--out", "o.txt", code=("-c", code))
    assert done.returncode == 2 and f"pip install {missing}\n" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SBATCH = """#!{python}
import os, re, subprocess, sys, json
script = open(sys.argv[-1]).read()
with open({log!r}, "a") as log:
    print(json.dumps([sys.argv[1:-1], re.findall("^#SBATCH (.*)$", script, re.M)]), file=log)
last = int(re.search("--array=0-([0-9]+)", script).group(1))
environment = dict(os.environ, SLURM_NODELIST="n1", RUN_OFFSET="0")
for task in range(last + 1):
    subprocess.run(["bash", sys.argv[-1]], env=dict(environment, SLURM_ARRAY_TASK_ID=str(task)), check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
print("Submitted batch job", sum(1 for _ in open({log!r})))
"""
SRUN = '#!/bin/sh\nwhile [ "$1" != "-n" ]; do shift; done; shift 2; exec "$@"\n'


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Slurm has no Windows")
def test_slurm_gets_jobs_that_run_and_join_after_the_filters(wets, run_tool, tmp_path):
    """Guards: jobs that cannot import the package, relative paths, joining before the filters end. A stand-in for
    sbatch runs each job at once, from another folder."""
    scripts = tmp_path / "bin"
    scripts.mkdir()
    log = str(tmp_path / "sbatch.log")
    launch = "import sys; from datatrove.tools import {0}; sys.exit({0}.main())"
    for name, text in {"sbatch": SBATCH.format(python=sys.executable, log=log), "srun": SRUN,
                       "scontrol": "#!/bin/sh\necho n1\n"}.items():
        (scripts / name).write_text(text)
    for tool in ("launch_pickled_pipeline", "merge_stats"):
        (scripts / tool).write_text(f"#!{sys.executable}\n" + launch.format(tool))
    for script in scripts.iterdir():
        script.chmod(0o755)
    done = run_tool(*wets, "--out", "slurm.txt", "--executor", "slurm", "--at-once", "2", "--slurm-partition", "cpu",
                    PATH=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0 and "submitted" in done.stdout, done.stderr
    assert stories(tmp_path / "slurm.txt") == KEPT
    filters, merge, join, _ = [json.loads(line) for line in (tmp_path / "sbatch.log").read_text().splitlines()]
    assert {"partition=cpu", "array=0-2%2"} <= {option.removeprefix("--") for option in filters[1]}
    assert "--dependency=afterok:1" in join[0]
