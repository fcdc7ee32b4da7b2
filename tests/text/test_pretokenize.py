import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from plotarmour.errors import UserError
from plotarmour.text import chunks, pipeline, pretokenize
from plotarmour.text.pretokenize import pre_tokenize
from plotarmour.text.stories import part_of, story_hash
from plotarmour.text.tokenfile import TokenFile


def digest(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.fixture
def text(tmp_path):
    """2,000 stories, 120 KB, some of them twice."""
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(f"Story {i % 1900}. " + "The dog ran. " * (i % 7) for i in range(2000)))
    return path


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_a_start_stopped_at_any_chunk_goes_on_to_the_same_bytes(text, tmp_path, monkeypatch, capsys, spec):
    """Guards: stories lost or doubled where two starts meet; split, exclusion and counts carried over."""
    other = tmp_path / "other.txt"
    other.write_text("STORY 7!\n<|endoftext|>\nstory 1899")
    made = pre_tokenize([text, other], spec, tmp_path / "a.bin", "80:10:10", exclude=[other], block=9000)
    expected = digest(made)
    note = pipeline._Sink._note

    class Killed(BaseException):
        pass

    for stop in range(1, 15):
        left = [stop]

        def interrupt(sink, *args, left=left):
            note(sink, *args)
            left[0] -= 1
            if not left[0]:
                raise Killed

        monkeypatch.setattr(pipeline._Sink, "_note", interrupt)
        for _ in range(30):  # and the next start is stopped as soon as it has done something
            try:
                again = pre_tokenize([text, other], spec, tmp_path / "b.bin", "80:10:10", exclude=[other], block=9000)
                break
            except Killed:
                left[0] = stop
        assert [p.read_bytes() for p in again] == [p.read_bytes().replace(b"a.bin", b"b.bin") for p in made]
        assert digest(again) == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            [text.name, other.name, *(f"{n}.{part}.bin" for n in "ab" for part in ("train", "val", "test"))])
        for path in again:
            path.unlink()
    assert "going on where an earlier start was stopped" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["tokens", "index", "journal", "text", "settings", "missing"])
def test_leftovers_that_do_not_fit_are_not_continued(text, tmp_path, monkeypatch, capsys, damage):
    """Guards: a file made of two texts, of two settings, or of tokens that were lost with the power."""
    class Killed(BaseException):
        pass

    note, seen = pipeline._Sink._note, []

    def interrupt(sink, *args):
        note(sink, *args)
        seen.append(1)
        if len(seen) == 5:
            raise Killed

    monkeypatch.setattr(pipeline._Sink, "_note", interrupt)
    with pytest.raises(Killed):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000)
    monkeypatch.undo()
    work, stories = tmp_path / ".x.bin.unfinished", "endoftext"
    raw = bytearray((work / "x.bin").read_bytes())
    if damage == "tokens":
        raw[5000] ^= 1
        (work / "x.bin").write_bytes(raw)
    elif damage == "index":
        (work / "x.bin.lengths").write_bytes(bytes((work / "x.bin.lengths").stat().st_size))
    elif damage == "journal":
        (work / "journal.json").write_text("{")
    elif damage == "text":  # the same size, times, beginning and end would need a larger text: only the middle differs
        journal = json.loads((work / "journal.json").read_text())
        journal["read"][1] = "0" * 64
        (work / "journal.json").write_text(json.dumps(journal))
    elif damage == "settings":
        stories = "line"
    else:
        (work / "x.bin.offsets").unlink()
    [path] = pre_tokenize([text], "bytes", tmp_path / "x.bin", stories=stories, block=9000)
    assert "starting over" in capsys.readouterr().err
    [expected] = pre_tokenize([text], "bytes", tmp_path / "y.bin", stories=stories)
    assert path.read_bytes() == expected.read_bytes() and not work.exists()


@pytest.mark.parametrize("removed", [False, True])
def test_a_start_killed_while_files_get_their_names_gives_the_others_theirs(text, tmp_path, monkeypatch, removed):
    """Guards: a train part without its val part, refused for ever; files reported that somebody has removed."""
    expected = digest(pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10"))
    named, publish = [], pretokenize.publish

    def once(source, target):
        if named:
            raise KeyboardInterrupt
        named.append(target)
        publish(source, target)

    monkeypatch.setattr(pretokenize, "publish", once)
    with pytest.raises(KeyboardInterrupt):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10", force=True)
    monkeypatch.undo()
    if removed:
        named[0].unlink()
    assert digest(pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10")) == expected
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / ".x.bin.unfinished").mkdir()  # and one killed while it cleared up afterwards
    (tmp_path / ".x.bin.unfinished" / "x.train.bin.lengths").touch()
    assert digest(pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10")) == expected
    assert len(list(tmp_path.iterdir())) == 4


KILLED = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from plotarmour.text.pretokenize import pre_tokenize
pre_tokenize([Path({text!r})], "bpe:300", Path({out!r}), "80:10:10", block=20_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(root, tmp_path):
    """Guards: half-written files that look whole. 20 times SIGKILL here; benchmarks/kill_pretokenize.py has 200."""
    text, draw = tmp_path / "stories.txt", random.Random(1)
    text.write_text("\n<|endoftext|>\n".join(f"Story {i}. " + "The dog ran. " * (i % 60) for i in range(12000)))
    command = [sys.executable, "-c", KILLED.format(root=str(root), text=str(text), out=str(tmp_path / "x.bin"))]
    subprocess.run(command, check=True, capture_output=True)
    made = sorted(tmp_path.glob("x.*.bin"))
    expected = digest(made)
    kills = 0
    while kills < 20:
        for path in made:
            path.unlink(missing_ok=True)
        journal = tmp_path / ".x.bin.unfinished" / "journal.json"
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while process.poll() is None and not journal.exists():
                time.sleep(0.002)
            time.sleep(draw.random() * 0.3)
            process.send_signal(signal.SIGKILL)
            _, said = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, said.decode()
            kills += 1
        assert digest(made) == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["stories.txt", *(p.name for p in made)])


def test_an_existing_file_is_taken_only_if_it_is_of_this_text_and_these_settings(text, tmp_path, shared, capsys):
    """Guards: tokens of an old text under a new name; minutes spent on what is there already."""
    out = tmp_path / "x.bin"
    [path] = pre_tokenize([text], "bpe:300", out)
    before = path.stat().st_mtime_ns
    start = time.perf_counter()
    assert pre_tokenize([text], "bpe:300", out) == [path] and path.stat().st_mtime_ns == before
    assert time.perf_counter() - start < 2  # no tokenizer is learned
    assert "nothing to do" in capsys.readouterr().err
    assert pre_tokenize([text], "bpe:300", out, verify=True) == [path]
    for change, found in (({"tokenizer": "bpe:301"}, "tokenizer bpe:300, now bpe:301"),
                          ({"stories": "line"}, "stories endoftext, now line"),
                          ({"errors": "replace"}, "errors strict, now replace"),
                          ({"exclude": [text]}, "excluded None"), ({"bpe_bytes": 1000}, "bpe_bytes"),
                          ({"tokenizer": str(shared / "gpt2")}, "tokenizer bpe:300")):
        arguments = {"texts": [text], "tokenizer": "bpe:300", "out": out} | change
        with pytest.raises(UserError, match=found):
            pre_tokenize(**arguments)
    text.write_text(text.read_text() + " ")
    with pytest.raises(UserError, match="stories.txt of .* bytes, since changed"):
        pre_tokenize([text], "bpe:300", out)
    assert path.stat().st_mtime_ns == before
    pre_tokenize([text], "bpe:300", out, replace=True)
    assert path.stat().st_mtime_ns != before
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    assert pre_tokenize([text], "bpe:300", out) == [path]
    with pytest.raises(UserError, match="damaged"):
        pre_tokenize([text], "bpe:300", out, verify=True)


def test_verify_compares_the_whole_text(tmp_path, capsys):
    """Guards: a text with the same size, beginning and end, but another middle."""
    text = tmp_path / "t.txt"
    text.write_text("a " * 2**21)
    pre_tokenize([text], "bytes", tmp_path / "x.bin")
    text.write_text("a " * 2**20 + "b " + "a " * (2**20 - 1))
    assert pre_tokenize([text], "bytes", tmp_path / "x.bin")
    with pytest.raises(UserError, match="another text of the same size"):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", verify=True)


@pytest.mark.parametrize("split", [None, "50:25:25"])
def test_a_long_story_is_one_story_whatever_the_split(tmp_path, monkeypatch, split):
    """Guards: pieces counted as stories, put into several parts, or held in memory until their part is known."""
    monkeypatch.setattr(chunks, "PIECE", 500)
    words = "Tom saw a dog and ran. "
    stories = [f"{i} " + words * n for i, n in enumerate((3, 900, 2, 0, 400, 1, 77))]
    text = tmp_path / "t.txt"
    text.write_text("<|endoftext|>".join(stories))
    made = pre_tokenize([text], "bytes", tmp_path / "x.bin", split, block=1000)
    shares = (50, 25, 25)
    for path in made:
        data = TokenFile.open(path)
        data.verify()
        told = [data.tokenizer().decode(data.story(i)) for i in range(data.n_stories)]
        assert [len(t) for t in told] == data.story_bytes.tolist()
        part = data.header["part"]
        assert told == [s.strip() for s in stories if not split or part_of(story_hash(s), shares) == part]


def test_two_processes_do_not_write_one_file(text, tmp_path, monkeypatch):
    """Guards: two starts of one command that tear each other's file."""
    note, complaints = pipeline._Sink._note, []

    def second(sink, *args):
        note(sink, *args)
        if not complaints:
            with pytest.raises(UserError, match=f"is being written by process {os.getpid()}, since 20") as caught:
                pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000)
            complaints.append(caught)

    monkeypatch.setattr(pipeline._Sink, "_note", second)
    pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000)
    assert complaints and sorted(p.name for p in tmp_path.iterdir()) == ["stories.txt", "x.bin"]


def test_a_full_disk_gives_one_line_and_leaves_nothing(text, tmp_path, monkeypatch):
    """Guards: a run of hours that ends with half a file. First noticed before, then in the middle of writing."""
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10_000))
    with pytest.raises(UserError, match=r"has 0\.0 MB free; the token files need about 0\.\d MB"):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000)
    assert list(tmp_path.iterdir()) == [text]
    monkeypatch.undo()
    limited = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import signal; "
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = ['x', *sys.argv[1:]]; "
               "from plotarmour.errors import run_command; from plotarmour.text.pretokenize import pre_tokenize; "
               "from pathlib import Path; "
               "run_command(lambda: pre_tokenize([Path(sys.argv[1])], 'bytes', Path(sys.argv[2])))")
    if os.name == "posix":
        done = subprocess.run([sys.executable, "-c", limited, text, tmp_path / "x.bin"], capture_output=True, text=True,
                              cwd=pretokenize.__file__.split("plotarmour/text")[0])
        assert done.returncode == 2 and "Needed are about" in done.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == [text]


def test_links_and_folders_are_no_outputs(text, tmp_path):
    """Guards: a link that is replaced by a file, so that its target stays old."""
    (tmp_path / "target.bin").write_text("precious")
    (tmp_path / "link.bin").symlink_to(tmp_path / "target.bin")
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(UserError, match="symbolic link to"):
        pre_tokenize([text], "bytes", tmp_path / "link.bin", force=True)
    with pytest.raises(UserError, match="is a folder"):
        pre_tokenize([text], "bytes", tmp_path / "folder.bin")
    assert (tmp_path / "target.bin").read_text() == "precious"


def test_bpe_learns_from_a_bounded_sample_spread_over_the_text(tmp_path):
    """Guards: memory that grows with the text; a vocabulary of the first pages only; one that depends on blocks."""
    text = tmp_path / "t.txt"
    stories = [f"Tale {i} " + ("zyzzyva " if i > 1800 else "hippopotamus " if i < 200 else "dog ") * 20
               for i in range(2000)]
    text.write_text("<|endoftext|>".join(stories))
    tokenizers = [TokenFile.open(pre_tokenize([text], "bpe:400", tmp_path / f"{block}.bin", bpe_bytes=40_000,
                                              block=block)[0]).tokenizer() for block in (500, 2**20)]
    assert tokenizers[0].json == tokenizers[1].json
    assert {"Ġzyzzyva", "Ġhippopotamus"} <= set(tokenizers[0].backend.get_vocab())
    sample = list(pretokenize.sample_stories([pretokenize.Source(text, "t.txt")], chunks.Reading(), None, None, 40_000))
    assert 20_000 <= sum(map(len, sample)) <= 40_000
