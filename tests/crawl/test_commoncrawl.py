import csv
import gzip
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter

import pytest
from made_wet import pages, write_wet
from web import Site, serving

from plotarmour.cli import UserError, run_command
from plotarmour.crawl import commoncrawl
from plotarmour.crawl.commoncrawl import Crawl, prepare_common_crawl
from plotarmour.crawl.pages import PageRules, check_language, ngram_fractions, repeated_lines, why_dropped
from plotarmour.crawl.wet import read_wet
from plotarmour.crawl.wetlist import Wet, list_wets
from plotarmour.data.chunks import read_stories
from plotarmour.data.readers import Source
from plotarmour.data.stories import normalise

MADE = pages(1200)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="session")
def wets(tmp_path_factory):
    """Three WET files of 400 pages each, packed and plain."""
    folder = tmp_path_factory.mktemp("wets")
    return [write_wet(folder / f"{i}.warc.wet{'.gz' * (i != 1)}", [page for page, _ in MADE[i * 400:(i + 1) * 400]],
                      packed=i != 1) for i in range(3)]


@pytest.fixture
def run_tool(root, tmp_path, monkeypatch, capsys):
    """Call the tool in tmp_path: returns exit code, stdout, stderr. In this process, which saves a second of imports,
    but for datatrove, which changes logging and starts processes."""
    path = root / "tools" / "prepare_common_crawl.py"

    def run(*args, env=None):
        args = [*map(str, args)]
        if "--executor" in args:
            done = subprocess.run([sys.executable, str(path), *args], cwd=tmp_path, env=env, capture_output=True,
                                  text=True, check=False, timeout=100)
            return done.returncode, done.stdout, done.stderr
        spec = importlib.util.spec_from_file_location("tool", path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *args])
        code = 0
        try:
            run_command(tool.main)
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def refused(run_tool):
    """Call the tool; it must end with 2 and one line, which is returned."""
    def run(*args, **options):
        code, out, err = run_tool(*args, **options)
        [line] = [line for line in err.splitlines() if line and "B/s]" not in line]  # no bar
        assert code == 2 and line.startswith("error: ") and out == ""
        return line
    return run


def stories(path):
    return list(read_stories(Source(path, path.name)))


@pytest.mark.parametrize("kind", sorted({kind for _, kind in MADE} - {"duplicate", "kept"}))
def test_every_rule_drops_what_it_is_for(kind):
    """Guards: a rule that never fires, or fires on good prose."""
    found = Counter(why_dropped(page, PageRules()) for page, expected in MADE if expected == kind)
    assert set(found) == {kind}
    assert {why_dropped(page, PageRules()) for page, expected in MADE if expected == "kept"} == {None}


def test_fractions_are_those_one_counts_by_hand():
    """Guards: fractions over the wrong denominator, overlaps counted twice, first occurrences as repeats."""
    assert repeated_lines("ab\ncd\n\nab\n ab ") == (0.5, 0.5)
    assert repeated_lines("") == (0, 0)
    found = dict(ngram_fractions("a b c a b d".split()))
    assert found == {2: 4 / 6, 3: 0, 4: 0, 5: 0, 6: 0}
    longer = dict(ngram_fractions("aa b c d e aa b c d e f".split()))  # the second "aa b c d e": 6 of 13 characters
    assert longer[5] == 6 / 13 and longer[6] == 0
    same = dict(ngram_fractions(["x"] * 20))  # all but the first n-gram repeat, and cover 19 words
    assert same[10] == 19 / 20 and same[2] == 2 * 19 / 20


def test_repeats_agree_with_counting_the_slow_way():
    """Guards: n-gram codes that collide, places that shift by one."""
    words = normalise(MADE[8][0]).split() + ["tom"] * 7 + normalise(MADE[0][0]).split()[:30]
    for n, fraction in ngram_fractions(words):
        seen, covered, counts = set(), set(), Counter()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i:i + n])
            counts[gram] += 1
            covered |= set(range(i, i + n)) if gram in seen else set()
            seen.add(gram)
        most = max(counts.values())
        top = max(most * sum(map(len, gram)) for gram, count in counts.items() if count == most) * (most > 1)
        characters = top if n <= 4 else sum(len(words[i]) for i in covered)
        assert fraction == pytest.approx(characters / sum(map(len, words))), n


def test_the_streaming_way_keeps_what_is_wanted_once_and_in_order(wets, run_tool, tmp_path):
    """Guards: pages lost, doubled or out of order; counts that do not add up; a next command that fails."""
    code, out, err = run_tool(*wets, "--out", "out/crawl.txt")
    assert code == 0, err
    expected = [page for page, kind in MADE if kind == "kept"]
    assert stories(tmp_path / "out" / "crawl.txt") == expected and len(expected) == 300
    counts = Counter(kind for _, kind in MADE)
    with (tmp_path / "out" / "crawl.counts.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["outcome"]: int(row["pages"]) for row in csv.DictReader(file)}
    assert rows == {"read": 1200, "long": 0, **counts} and sum(rows.values()) == 2 * 1200
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["crawl.counts.csv", "crawl.txt"]
    first, last = out.splitlines()
    assert first.startswith("out/crawl.txt: 300 stories of 1,200 pages") and "duplicate 50" in first
    assert re.fullmatch(r"next: python \S+/pre_tokenize.py out/crawl.txt --tokenizer bpe:4096 --split 90:5:5 "
                        r"--out out/crawl.bin", last)


@pytest.fixture
def site(wets):
    """A mirror with a listing of the three files."""
    files = {f"/crawl-data/X/wet/{wet.name}": wet.read_bytes() for wet in wets}
    listing = gzip.compress("".join(f"{path[1:]}\n" for path in files).encode())
    return Site({**files, "/crawl-data/X/wet.paths.gz": listing})


def test_any_number_of_datatrove_tasks_gives_the_same_bytes(wets, site, run_tool, tmp_path):
    """Guards: a second implementation that drifts from the first; duplicates across tasks that stay. The local
    executor on 1,200 pages: one task in this process, and three in processes of their own that fetch what they read."""
    run_tool(*wets, "--out", "stream.txt")
    with serving(site) as url:
        for tasks, inputs in (1, wets), (3, [f"{url}/crawl-data/X/wet.paths.gz", "--base-url", url]):
            code, _, err = run_tool(*inputs, "--out", f"{tasks}.txt", "--delete-downloads", "--executor", "local",
                                    "--tasks", tasks)
            assert code == 0 and err.count("pages passed\n") == 3 and "Traceback" not in err, err
            for name in ("txt", "counts.csv"):
                assert (tmp_path / f"{tasks}.{name}").read_bytes() == (tmp_path / f"stream.{name}").read_bytes()
    assert sorted({p.name.split(".")[0] for p in tmp_path.iterdir()}) == ["1", "3", "stream", "wet"]
    assert [p.name for p in (tmp_path / "wet").iterdir()] == ["X.wet.paths.gz"] and all(wet.exists() for wet in wets)


def test_the_real_record_is_aragonese_both_ways(shared, run_tool, refused, tmp_path):
    """Guards: a language told by Common Crawl's own label, which says Spanish; records of the real format."""
    real = shared / "data" / "commoncrawl" / "whirlwind.warc.wet"
    for path, options in ((real, ()), (f"{real}.gz", ("--executor", "local"))):
        code, out, err = run_tool(path, "--language", "an", "--out", f"{len(options)}.txt", *options)
        assert code == 0 and "1 stories of 1 pages" in out, err
    [story] = stories(tmp_path / "0.txt")
    assert story.startswith("Escopete - Biquipedia") and story.endswith("anchura del contenido")
    assert (tmp_path / "0.txt").read_bytes() == (tmp_path / "2.txt").read_bytes()
    spanish = refused(real, "--language", "es", "--out", "es.txt")
    assert "no page of 1 was kept" in spanish and "language 1" in spanish
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.counts.csv", "0.txt", "2.counts.csv", "2.txt"]


def test_a_listing_is_fetched_and_what_was_fetched_can_go(site, run_tool, tmp_path):
    """Guards: files in the wrong order, the limit ignored, disks that fill up with WET files."""
    with serving(site) as url:
        code, _, err = run_tool(url + "/crawl-data/X/wet.paths.gz", "--base-url", url, "--limit", "2",
                                "--delete-downloads", "--out", "crawl.txt")
    assert code == 0, err
    assert stories(tmp_path / "crawl.txt") == [page for page, kind in MADE[:800] if kind == "kept"]
    assert [p.name for p in (tmp_path / "wet").iterdir()] == ["X.wet.paths.gz"]


@pytest.mark.parametrize("keep", [True, False])
def test_an_interrupted_run_goes_on(site, tmp_path, monkeypatch, capsys, keep):
    """Guards: files fetched or filtered twice after an interruption, also where they are deleted after use."""
    (tmp_path / "wet.paths").write_text("".join(f"{path[1:]}\n" for path in list(site.files)[:3]))
    real, filtered = commoncrawl.read_wet, []

    def stopping(path, progress):
        filtered.append(path.name)
        if len(filtered) == 3:
            raise KeyboardInterrupt
        return real(path, progress)

    monkeypatch.setattr(commoncrawl, "read_wet", stopping)
    with serving(site) as url:
        crawl = Crawl(list_wets([str(tmp_path / "wet.paths")], tmp_path / "wet", url), tmp_path / "crawl.txt",
                      keep_downloads=keep)
        with pytest.raises(KeyboardInterrupt):
            prepare_common_crawl(crawl)
        assert not crawl.out.exists() and len(list((tmp_path / "wet").iterdir())) == (3 if keep else 1)
        n_sent = site.sent
        counts = prepare_common_crawl(crawl)
    # a file that is there is asked for its size only: at most what a socket buffers is sent
    assert [path for path, *_ in site.asked] == [*list(site.files)[:3], list(site.files)[2]] and n_sent
    assert filtered == ["0.warc.wet.gz", "1.warc.wet", "2.warc.wet.gz", "2.warc.wet.gz"]
    assert counts["kept"] == 300 and stories(crawl.out) == [page for page, kind in MADE if kind == "kept"]
    assert "going on: 2 of 3 files are filtered already" in capsys.readouterr().err and not crawl.work.exists()


def test_shards_of_other_rules_are_not_taken(wets, tmp_path, monkeypatch, capsys):
    """Guards: an interrupted English run that goes on as a German one."""
    out = tmp_path / "crawl.txt"
    monkeypatch.setattr(commoncrawl, "join_shards", lambda crawl: None)  # as if stopped before joining
    prepare_common_crawl(Crawl(list_wets([str(wets[0])], tmp_path), out))
    monkeypatch.undo()
    prepare_common_crawl(Crawl(list_wets([str(wets[0])], tmp_path), out, PageRules("de")))
    assert stories(out)[0] == MADE[3][0] and "of other files or rules" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Guards: a WET file read whole. 30 pages of 1 MB pass within 12 MB."""
    import tracemalloc

    path = write_wet(tmp_path / "big.wet.gz", ["x" * 2**20] * 30)
    next(read_wet(path))
    tracemalloc.start()
    assert sum(len(page) for page in read_wet(path)) == 30 * 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20


def test_every_cut_of_a_packed_file_is_noticed(wets, tmp_path):
    """Guards: half a file taken for a whole one, which warcio does by itself. Only a cut between records can pass."""
    path = write_wet(tmp_path / "a.wet.gz", ["one", "two", "three"])
    whole, passed = path.read_bytes(), []
    for n in range(7, len(whole)):
        path.write_bytes(whole[:n])
        try:
            passed.append(list(read_wet(path)))
        except UserError as error:
            assert "Delete it and fetch it again" in str(error)
    assert passed == [[], ["one"], ["one", "two"]]


def bad_files(folder, wets):
    (folder / "text.wet").write_text("Once upon a time.\n" * 100)
    (folder / "junk.wet.gz").write_bytes(b"\x1f\x8bjunk" * 100)
    (folder / "cut.wet.gz").write_bytes(wets[0].read_bytes()[:-50])
    (folder / "cut.wet").write_bytes(wets[1].read_bytes()[:-50])
    (folder / "empty.wet").write_bytes(b"")
    (folder / "folder.wet").mkdir()
    write_wet(folder / "html.warc.gz", ["<html>"], kind="response")
    write_wet(folder / "none.wet.gz", [])
    (folder / "empty.paths").write_text("\n")
    (folder / "warc.paths").write_text("crawl-data/X/a.warc.gz\n")
    (folder / "bad.paths.gz").write_bytes(b"\x1f\x8bjunk")
    (folder / "two.paths").write_text("a/x.wet\nb/x.wet\n")


BAD = {
    "missing.wet": "does not exist", "text.wet": "is not a WET file: it begins with b'Once '",
    "junk.wet.gz": "is damaged", "cut.wet.gz": "is cut short after", "cut.wet": "is cut short after",
    "empty.wet": "is empty", "folder.wet": "is a folder", "html.warc.gz": "a WARC with whole web pages",
    "none.wet.gz": "no page of 0 was kept", "missing.paths": "does not exist", "empty.paths": "lists no file",
    "warc.paths": "is no path of a WET file", "bad.paths.gz": "is not a listing", "two.paths": "is named twice",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_give_one_line_and_leave_nothing(wets, refused, tmp_path, name):
    """Guards: tracebacks, and half-made texts."""
    bad_files(tmp_path, wets)
    before = sorted(tmp_path.iterdir())
    assert BAD[name] in refused(name, "--out", "out.txt")
    assert sorted(tmp_path.iterdir()) == before


def test_what_was_done_before_a_bad_file_is_kept(wets, refused, tmp_path):
    """Guards: a night's work lost to the last file; the next start that begins anew."""
    (tmp_path / "last.wet.gz").write_bytes(wets[2].read_bytes()[:-50])
    assert "What is done is kept" in refused(wets[0], "last.wet.gz", "--out", "out.txt")
    assert sorted(p.name for p in (tmp_path / ".out.txt.work").iterdir()) == ["000000.json", "000000.txt",
                                                                              "settings.json"]


def test_a_bad_file_is_one_line_from_other_processes_too(wets, refused, tmp_path):
    """Guards: a worker's traceback before the one line; work that is lost with it."""
    bad_files(tmp_path, wets)
    before = sorted(tmp_path.iterdir())
    assert "is cut short" in refused("cut.wet", "cut.wet.gz", "--out", "o.txt", "--executor", "local", "--tasks", "2")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("args", "message"), [
    (("--language", "eng"), "'eng' is unknown; did you mean en"), (("--language", "zh"), "without blanks"),
    (("--min-probability", "65"), "65 is no probability"), (("--min-words", "0"), "out of range"),
    (("--limit", "0"), "leaves no file"), (("--tasks", "2"), "need an --executor"),
    (("--executor", "local", "--tasks", "0"), "expected 1 or more"), (("--executor", "slurm"), "--slurm-partition"),
    (("--executor", "slurm", "--slurm-partition", "p"), "sbatch is not on this machine"),
    (("--out", "here.txt"), "exists already"),
])
def test_bad_settings_give_one_line(wets, refused, tmp_path, args, message):
    """Guards: an hour of work under a language that does not exist."""
    (tmp_path / "here.txt").write_text("mine")
    assert message in refused(wets[0], "--out", "o.txt", *args)
    assert [p.name for p in tmp_path.iterdir()] == ["here.txt"]


def test_languages_are_those_of_the_model():
    """Guards: Aragonese, which few identifiers know."""
    check_language("an")
    with pytest.raises(UserError, match="140 codes"):
        check_language("klingon")


@pytest.mark.parametrize(("missing", "options"), [
    ("warcio", ()), ("py3langid", ()), ("datatrove", ("--executor", "local")), ("ray", ("--executor", "ray"))])
def test_a_missing_package_is_one_line_with_its_command(root, wets, tmp_path, missing, options):
    """Guards: ModuleNotFoundError; and plotarmour itself needing an extra."""
    code = ("import sys, importlib.util as u, runpy; find = u.find_spec\n"
            f"u.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
            f"sys.modules[{missing!r}] = None; sys.argv[0] = {str(root / 'tools' / 'prepare_common_crawl.py')!r}\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, str(wets[0]), "--out", "o.txt", *options], cwd=tmp_path,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"pip install {missing}\n" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SBATCH = """#!{python}
import os, re, subprocess, sys, json
script = open(sys.argv[-1]).read()
with open({log!r}, "a") as log:
    print(json.dumps([sys.argv[1:-1], re.findall("^#SBATCH (.*)$", script, re.M)]), file=log)
last = int(re.search("--array=0-([0-9]+)", script).group(1))
environment = dict(os.environ, SLURM_NODELIST="n1", RUN_OFFSET="0")
environment.pop("PYTHONPATH", None)
for task in range(last + 1):
    subprocess.run(["bash", sys.argv[-1]], env=dict(environment, SLURM_ARRAY_TASK_ID=str(task)), check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
print("Submitted batch job", sum(1 for _ in open({log!r})))
"""
SRUN = '#!/bin/sh\nwhile [ "$1" != "-n" ]; do shift; done; shift 2; exec "$@"\n'


@pytest.mark.skipif(sys.platform == "win32", reason="Slurm has no Windows")
def test_slurm_gets_jobs_that_run_and_join_after_the_filters(wets, run_tool, tmp_path, monkeypatch):
    """Guards: jobs that cannot import the package, relative paths, joining before the filters end. A stand-in for
    sbatch runs each job at once, from another folder and without PYTHONPATH."""
    import os
    import shutil

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
    options = ("--executor", "slurm", "--tasks", "2", "--slurm-partition", "cpu")
    code, out, err = run_tool(*wets, "--out", "slurm.txt", *options, env=os.environ | {
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"})
    assert code == 0 and "submitted" in out, err
    assert stories(tmp_path / "slurm.txt") == [page for page, kind in MADE if kind == "kept"]
    filters, merge, join, _ = [json.loads(line) for line in (tmp_path / "sbatch.log").read_text().splitlines()]
    assert {"partition=cpu", "array=0-1"} <= {option.removeprefix("--") for option in filters[1]}
    assert "--dependency=afterok:1" in join[0]
    shutil.rmtree(tmp_path / "slurm.logs")


def test_pages_with_a_separator_never_split(tmp_path):
    """Guards: one page counted as two stories by the pretokenizer."""
    one, two, three, four = (MADE[i][0] for i in (0, 1, 2, 12))
    path = write_wet(tmp_path / "a.wet", [one + "\n<|endoftext|>\n" + two, three, four + "\n<|endof"])
    prepare_common_crawl(Crawl((Wet(path),), tmp_path / "o.txt"))
    assert stories(tmp_path / "o.txt") == [three, four + "\n<|endof"]

