import errno
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from plotarmour.cli import UserError
from plotarmour.data import pipeline, pretokenize, readers
from plotarmour.data.pipeline import Job, targets_of
from plotarmour.data.pretokenize import pre_tokenize, sample_stories
from plotarmour.data.readers import Source
from plotarmour.data.stories import PARTS, parts_of, story_hash
from plotarmour.data.token_file import TokenFile, unknown_words
from plotarmour.data.token_writer import TokenFileWriter
from plotarmour.data.tokenizer import make_tokenizer


def digest(paths):
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.fixture
def text(tmp_path):
    """2,000 stories, 120 KB, some of them twice."""
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(f"Story {i % 1900}. " + "The dog ran. " * (i % 7) for i in range(2000)))
    return path


def save_tokenizer(texts, path):
    path.write_text(make_tokenizer("bpe:260", texts).json)


def cut_at(size, monkeypatch):
    """Cut stories of more characters into pieces."""
    for module in ("stories", "pipeline", "pretokenize"):
        monkeypatch.setattr(f"plotarmour.data.{module}.PIECE", size)


class Killed(BaseException):
    pass


def stop_after(monkeypatch, n):
    """Kill each start after it has saved n times."""
    write, write_json, left = pretokenize.write_token_files, pipeline.write_json, [n]

    def begin(*args):
        left[0] = n
        return write(*args)

    def save(*args):
        write_json(*args)
        left[0] -= 1
        if not left[0]:
            raise Killed

    monkeypatch.setattr(pretokenize, "write_token_files", begin)
    monkeypatch.setattr(pipeline, "write_json", save)


def until_done(*args, **options):
    """Call `pre_tokenize` until it is not killed; return its result and the number of kills."""
    kills = 0
    while True:
        try:
            return pre_tokenize(*args, **options), kills
        except Killed:
            kills += 1


@pytest.mark.parametrize("spec", ["bytes", "words:40"])
def test_a_start_killed_after_it_saved_continues_to_the_same_bytes(text, tmp_path, monkeypatch, capsys, spec):
    """Guards: stories lost or doubled where two starts meet; split, exclusion and counts carried over."""
    other, split = tmp_path / "other.txt", "80:10:10"
    other.write_text("STORY 7!\n<|endoftext|>\nstory 1899")
    expected = digest(pre_tokenize([text, other], spec, tmp_path / "a.bin", split, exclude=[other]))
    for n, save_bytes in ((1, 20_000), (2, 9000), (1, 80_000), (3, 1)):
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            made, kills = until_done([text, other], spec, tmp_path / "b.bin", split, exclude=[other], block=9000,
                                     save_bytes=save_bytes)
        assert kills >= 1 and digest(made) == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            [text.name, other.name, *(f"{n}.{part}.bin" for n in "ab" for part in ("train", "val", "test"))])
        for path in made:
            path.unlink()
    assert "going on where an earlier start was stopped" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["txt.gz", "long.txt", "broken.txt", "jsonl", "parquet", "two"])
def test_every_kind_of_text_continues_where_it_was_stopped(tmp_path, monkeypatch, kind):
    """Guards: positions that count packed bytes, rows or pieces; replaced characters counted twice."""
    stories = [f"Story {i}. " + "The dog ran é. " * (i % 9) for i in range(300)]
    if kind == "long.txt":
        cut_at(200, monkeypatch)
        stories = [s * (1 + 30 * (i % 40 == 3)) for i, s in enumerate(stories)]
    plain = "<|endoftext|>".join(stories).encode()
    texts = [tmp_path / f"t.{kind}"]
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": stories}), texts[0])
        monkeypatch.setattr(readers, "PARQUET_ROWS", 10)
    elif kind == "two":
        texts = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"]
        for path, part in zip(texts, (plain[:9000], b"Hi", plain[9000:]), strict=True):
            path.write_bytes(part)
    else:
        lines = "".join(json.dumps({"text": s}) + "\n" for s in stories).encode()
        texts[0].write_bytes({"txt.gz": gzip.compress(plain), "jsonl": lines}.get(kind, plain.replace(
            "é".encode(), b"\xe9") if kind == "broken.txt" else plain))
    options = {"split": "60:20:20", "errors": "replace" if kind == "broken.txt" else "strict", "block": 700}
    made = pre_tokenize(texts, "bytes", tmp_path / "a.bin", **options)
    assert (TokenFile.open(made[0]).header["n_replaced"] > 0) == (kind == "broken.txt")
    assert sum(TokenFile.open(path).n_stories for path in made) == 300 + (2 if kind == "two" else 0)
    for n in (1, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, n)
            again, kills = until_done(texts, "bytes", tmp_path / "b.bin", **options, save_bytes=2000)
        assert kills and digest(again) == digest(made)
        for path in again:
            path.unlink()


def test_nothing_is_saved_behind_a_write_that_failed(text, tmp_path, monkeypatch):
    """Guards: chunks queued behind one that could not be written, saved without it: stories lost in silence."""
    [expected] = pre_tokenize([text], "bytes", tmp_path / "y.bin")
    add, calls = TokenFileWriter.add, []

    def fail(writer, *args):
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.EIO, "Input/output error")
        time.sleep(0.01)
        add(writer, *args)

    monkeypatch.setattr(TokenFileWriter, "add", fail)
    with pytest.raises(OSError, match="Input/output"):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000, save_bytes=50_000)
    monkeypatch.undo()
    [path] = pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000)
    assert path.read_bytes() == expected.read_bytes()


def test_a_tokenizer_that_changed_meanwhile_is_not_continued_with(text, tmp_path, monkeypatch, capsys):
    """Guards: a file whose halves have different vocabularies."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    save_tokenizer(["the dog ran " * 50], folder / "tokenizer.json")
    stop_after(monkeypatch, 5)
    with pytest.raises(Killed):
        pre_tokenize([text], str(folder), tmp_path / "x.bin", block=9000, save_bytes=9000)
    monkeypatch.undo()
    save_tokenizer(["Story number nine " * 50], folder / "tokenizer.json")
    [path] = pre_tokenize([text], str(folder), tmp_path / "x.bin", block=9000)
    assert "starting over" in capsys.readouterr().err
    data = TokenFile.open(path)
    assert data.tokenizer().decode(data.story(5)).startswith("Story 5. The dog")


def test_a_text_that_changes_before_its_turn_is_refused(text, tmp_path, monkeypatch):
    """Guards: a header with the size of the old and the hash of the new text; a BPE of a text that is gone."""
    second = tmp_path / "b.txt"
    second.write_text("old")
    add = TokenFileWriter.add
    monkeypatch.setattr(TokenFileWriter, "add", lambda *args: (add(*args), second.write_text("newer")))
    with pytest.raises(UserError, match="b.txt changed while it was read"):
        pre_tokenize([text, second], "bytes", tmp_path / "x.bin", block=9000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.txt", "stories.txt"]


def test_another_column_is_another_text(tmp_path, monkeypatch):
    """Guards: stories of two columns in one file, or the old column taken for the new."""
    rows = tmp_path / "t.jsonl"
    rows.write_text("".join(json.dumps({"one": f"a {i}", "two": f"b {i}"}) + "\n" for i in range(50)))
    pre_tokenize([rows], "bytes", tmp_path / "x.bin", text_column="one")
    with pytest.raises(UserError, match="text_column one, now two"):
        pre_tokenize([rows], "bytes", tmp_path / "x.bin", text_column="two")


def test_a_text_without_separators_is_told_what_helps(tmp_path):
    """Guards: advice to use more text, where the separators are missing or all stories were left out."""
    plain = tmp_path / "t.txt"
    plain.write_text("One line.\nAnother.\n" * 50)
    with pytest.raises(UserError, match="t.txt, with 1 story in all, leaves the .* part empty; .* --stories line"):
        pre_tokenize([plain], "bytes", tmp_path / "x.bin", "80:10:10")
    plain.write_text("First Citizen:\nSpeak.\n\n" * 50)
    with pytest.raises(UserError, match="Then use --stories paragraph, or more"):
        pre_tokenize([plain], "bytes", tmp_path / "x.bin", "80:10:10")
    with pytest.raises(UserError, match="All its 1 stories are left out by --exclude"):
        pre_tokenize([plain], "bytes", tmp_path / "x.bin", exclude=[plain])
    with pytest.raises(UserError, match="named twice"):
        pre_tokenize([plain, plain], "bytes", tmp_path / "x.bin")


def test_what_is_read_is_not_written(text, tmp_path):
    """Guards: --force with the text's own name for --out."""
    before = text.read_bytes()
    with pytest.raises(UserError, match="both read and written"):
        pre_tokenize([text], "bytes", text, force=True)
    assert text.read_bytes() == before
    with pytest.raises(UserError, match="no name for a file"):
        pre_tokenize([text], "bytes", Path("."), "80:10:10")


@pytest.mark.parametrize("damage", ["none", "truncated", "middle", "text", "settings"])
def test_unfinished_work_of_something_else_is_not_continued(text, tmp_path, monkeypatch, capsys, damage):
    """Guards: a file made of two texts or of two settings, or with a hole; what came behind the last save kept."""
    stop_after(monkeypatch, 3)
    with pytest.raises(Killed):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000, save_bytes=20_000)
    monkeypatch.undo()
    work, stories = tmp_path / ".x.bin.unfinished", "endoftext"
    body = work / "x.bin"
    body.write_bytes(body.read_bytes() + b"written after the last save")
    if damage == "truncated":
        body.write_bytes(body.read_bytes()[:9000])
        with pytest.raises(UserError, match="truncated"):
            pre_tokenize([text], "bytes", tmp_path / "x.bin")
        assert not work.exists()
    elif damage == "middle":  # the same size, beginning and end
        text.write_text(text.read_text().replace("Story 900.", "Story 9oo."))
    elif damage == "text":
        text.write_text(text.read_text() + "more")
    elif damage == "settings":
        stories = "line"
    [path] = pre_tokenize([text], "bytes", tmp_path / "x.bin", stories=stories, block=9000)
    assert {"none": "going on", "truncated": ""}.get(damage, "starting over") in capsys.readouterr().err
    [expected] = pre_tokenize([text], "bytes", tmp_path / "y.bin", stories=stories)
    assert path.read_bytes() == expected.read_bytes() and not work.exists()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_start_stopped_while_it_completes_its_files_continues(text, tmp_path, monkeypatch, capsys, n):
    """Guards: a file with its index taken for tokens; an index removed with the first complete file."""
    expected = digest(pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10"))
    publish, calls = TokenFileWriter.complete, []

    def stop(writer, *args):
        publish(writer, *args)
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenFileWriter, "complete", stop)
    with pytest.raises(KeyboardInterrupt):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10", force=True, block=9000, save_bytes=20_000)
    monkeypatch.undo()
    assert digest(pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10", force=True)) == expected
    assert "going on" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 4


def test_a_refused_command_leaves_unfinished_work(text, tmp_path, monkeypatch, capsys):
    """Guards: hours of work removed by a misspelt name."""
    stop_after(monkeypatch, 3)
    with pytest.raises(Killed):
        pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000, save_bytes=20_000)
    monkeypatch.undo()
    before = sorted((tmp_path / ".x.bin.unfinished").rglob("*"))
    for wrong in ({"texts": [tmp_path / "none.txt"]}, {"tokenizer": "none"}, {"split": "1"}):
        with pytest.raises(UserError):
            pre_tokenize(**{"texts": [text], "tokenizer": "bytes", "out": tmp_path / "x.bin"} | wrong)
    assert sorted((tmp_path / ".x.bin.unfinished").rglob("*")) == before
    pre_tokenize([text], "bytes", tmp_path / "x.bin")
    assert "going on" in capsys.readouterr().err


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
        pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10", force=True, block=9000, save_bytes=20_000)
    monkeypatch.undo()
    if removed:
        named[0].unlink()
    assert digest(pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10")) == expected
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / ".x.bin.unfinished").mkdir()  # and one killed while it cleared up afterwards
    (tmp_path / ".x.bin.unfinished" / "x.train.bin").touch()
    assert digest(pre_tokenize([text], "bytes", tmp_path / "x.bin", "80:10:10")) == expected
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / ".y.bin.unfinished").mkdir()  # a tokenizer that nobody answers for
    save_tokenizer(["zyzzyva " * 50], tmp_path / ".y.bin.unfinished" / "tokenizer.json")
    [path] = pre_tokenize([text], "bpe:260", tmp_path / "y.bin")
    assert "zy" not in TokenFile.open(path).tokenizer().json


KILLED = """
import sys; sys.path.insert(0, {root!r})
from pathlib import Path
from plotarmour.data.pretokenize import pre_tokenize
pre_tokenize([Path({text!r})], "bpe:300", Path({out!r}), "80:10:10", block=20_000, save_bytes=500_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(root, tmp_path):
    """Guards: half-written files that look whole. 20 times SIGKILL here; benchmarks/kill_pretokenize.py has 200."""
    text, draw = tmp_path / "stories.txt", random.Random(1)
    text.write_text("\n<|endoftext|>\n".join(f"Story {i}. " + "The dog ran. " * (i % 60) for i in range(12000)))
    command = [sys.executable, "-c", KILLED.format(root=str(root), text=str(text), out=str(tmp_path / "x.bin"))]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.perf_counter() - start
    made = sorted(tmp_path.glob("x.*.bin"))
    expected = digest(made)
    kills = 0
    while kills < 20:
        for path in made:
            path.unlink(missing_ok=True)
        while True:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            time.sleep(draw.random() * 1.3 * whole)
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
                          ({"tokenizer": "bpe:300:all"}, "tokenizer bpe:300, now bpe:300:all"),
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
    cut_at(500, monkeypatch)
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
        parts = parts_of(np.array(list(map(story_hash, stories)), np.uint64), shares)
        assert told == [s.strip() for s, i in zip(stories, parts, strict=True) if not split or PARTS[i] == part]


def test_two_processes_do_not_write_one_file(text, tmp_path, monkeypatch):
    """Guards: two starts of one command that tear each other's file."""
    add, complaints = TokenFileWriter.add, []

    def second(writer, *args):
        add(writer, *args)
        if not complaints:
            with pytest.raises(UserError, match=f"is being written by process {os.getpid()}, since 20") as caught:
                pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000)
            complaints.append(caught)

    monkeypatch.setattr(TokenFileWriter, "add", second)
    pre_tokenize([text], "bytes", tmp_path / "x.bin", block=9000)
    assert complaints and sorted(p.name for p in tmp_path.iterdir()) == ["stories.txt", "x.bin"]


def test_a_full_disk_gives_one_line_and_leaves_nothing(text, tmp_path, monkeypatch):
    """Guards: a run of hours that ends with half a file."""
    limited = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); import signal; "
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.argv = ['x', *sys.argv[1:]]; "
               "from plotarmour.cli import run_command; from plotarmour.data.pretokenize import pre_tokenize; "
               "from pathlib import Path; "
               "run_command(lambda: pre_tokenize([Path(sys.argv[1])], 'bytes', Path(sys.argv[2])))")
    if os.name == "posix":
        done = subprocess.run([sys.executable, "-c", limited, text, tmp_path / "x.bin"], capture_output=True, text=True,
                              cwd=pretokenize.__file__.split("plotarmour/data")[0])
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
    job = Job([Source(text, "t.txt")], {})
    sample = list(sample_stories(job, 40_000))
    assert 5_000 <= sum(map(len, sample)) <= 40_000


@pytest.mark.parametrize("spec", ["bpe:290", "words:12"])
def test_held_out_words_are_learned_only_by_choice_and_unknown_ones_are_counted(tmp_path, spec):
    """Guards: a vocabulary that knows the test part; bits per byte that claim words which no model predicted."""
    stories = [story for i in range(60) for word in ("hippopotamus", "zyzzyva")
               if (parts_of(np.array([story_hash(story := f"{word} ran {i} é")], np.uint64), (1, 1, 0))[0] == 0)
               == (word == "hippopotamus")]
    (tmp_path / "t.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    for name, knows in ((spec, False), (f"{spec}:all", True)):
        for path in pre_tokenize([tmp_path / "t.txt"], name, tmp_path / f"{knows}.bin", "1:1:0"):
            data = TokenFile.open(path)
            data.verify()
            known = {word.removeprefix("Ġ") for word in data.tokenizer().backend.get_vocab()}
            assert "hippopotamus" in known and ("zyzzyva" in known) == knows
            assert data.header["tokenizer"]["kind"] == name
            mine = [story for story in stories if ("hippo" in story) == (data.header["part"] == "train")]
            lost = [word for story in mine for word in story.split() if word not in known]
            if spec == "words:12":
                assert unknown_words(data).startswith(f"{len(lost)} of ")
                assert data.header["n_unknown_bytes"] == len("".join(lost))
                assert data.story_bytes.sum() + data.header["n_unknown_bytes"] == len("".join(mine).encode())
            else:
                assert "n_unknown_bytes" not in data.header and not unknown_words(data)


def test_stories_go_to_the_file_of_their_part_and_excluded_ones_nowhere():
    """Guards: the file of another part where a part has no share."""
    hashes = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    for shares in ((90, 5, 5), (1, 0, 1), (7, 2, 0)):
        names = [part for part, share in zip(("train", "val", "test"), shares, strict=True) if share]
        targets = targets_of(hashes, Job([], dict.fromkeys(names), shares, {}, np.sort(hashes[:10])))
        assert targets[:10].tolist() == [-1] * 10
        assert [names[i] for i in targets[10:]] == [PARTS[i] for i in parts_of(hashes[10:], shares)]
