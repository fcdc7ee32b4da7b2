import gzip
import json
import os
import threading

import pytest

from plotarmour.cli import UserError
from plotarmour.data import readers
from plotarmour.data.pretokenize import find_texts, pre_tokenize
from plotarmour.data.readers import HashingReader, Source, check_text, read_chunks
from plotarmour.data.token_file import TokenFile
from plotarmour.files import sha256_of

STORIES = [f"Story {i}: été." for i in range(50)]


def told(path):
    """The stories of a token file, as text."""
    data = TokenFile.open(path)
    return [data.tokenizer().decode(data.story(i)) for i in range(data.n_stories)]


def write(folder, kind):
    path = folder / f"stories.{kind}"
    plain = "\n<|endoftext|>\n".join(STORIES).encode()
    lines = "".join(json.dumps({"id": i, "text": s}) + "\n" for i, s in enumerate(STORIES)).encode()
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": STORIES, "id": list(range(50))}), path, row_group_size=7)
        return path
    data = lines if "jsonl" in kind else plain
    path.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]) if kind.endswith("gz") else data)
    return path


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_text_gives_the_same_tokens(tmp_path, kind):
    """Guards: a format that loses, joins or reorders stories. The .gz has two members, as concatenated files have."""
    path = write(tmp_path, kind)
    [made] = pre_tokenize([path], "bytes", tmp_path / "x.bin")
    assert told(made) == STORIES
    [source] = TokenFile.open(made).header["source"]
    assert (source["bytes"], source["sha256"]) == (path.stat().st_size, sha256_of(path))


def test_several_texts_and_patterns_are_read_in_order(tmp_path):
    """Guards: a pattern that Windows' shell leaves alone, read as a file name; eight sources overflow the header."""
    for i in range(8):
        (tmp_path / f"part{i}.txt").write_text(f"story {i}")
    [made] = pre_tokenize([tmp_path / "part*.txt"], "bytes", tmp_path / "x.bin")
    assert told(made) == [f"story {i}" for i in range(8)]
    [source] = TokenFile.open(made).header["source"]
    assert (source["name"], source["bytes"]) == ("part0.txt and 7 more files", 8 * 7)
    with pytest.raises(UserError, match="matches no file"):
        find_texts([tmp_path / "none*.txt"])


BAD = {
    "utf16.txt": ("Once upon a time.".encode("utf-16"), "is UTF-16"),
    "utf16le.txt": (("Once upon a time. " * 10).encode("utf-16-le"), "full of zero bytes, as UTF-16"),
    "noise.txt": (bytes(range(256)) * 40, "not UTF-8: byte 0x80 at offset 128"),
    "a.zip": (b"PK\x03\x04" + bytes(100), "a zip archive"),
    "cut.gz": (gzip.compress(b"Once upon a time." * 1000)[:-30], "cut short"),
    "not.gz": (b"Once upon a time.", "cut short"),
    "gzip.txt": (gzip.compress(b"Once"), "gzip data; expected UTF-8 text. .* named .gz"),
    "twice.txt.gz": (gzip.compress(gzip.compress(b"Once") + bytes(99)), r"inside gzip.* zcat /\S*/twice.txt.gz"),
    "a.json": (b'[{"text": "one"}]', "a table by its name; .* name it .jsonl .* convert it: python -c .*read_json"),
    "a.json.gz": (gzip.compress(b'{"text": "one"}\n'), "a table by its name; .* name it .jsonl .*gz if packed"),
    "a.csv": (b"text\none\n", "a table by its name; .*read_csv.*/a.csv.*to_json.'rows.jsonl'"),
    "a.tsv": (b"text\none\n", "a table by its name; .*read_table"),
    "my notes.txt": (b"It\x92s a \x93story\x94.", "byte 0x92 .* iconv -f cp1252 -t utf-8 '/.*/my notes.txt' >"),
    "packed.gz": (gzip.compress(b"It\x92s"), r"zcat /.*/packed.gz \| iconv -f cp1252 -t utf-8 > utf8.txt"),
    "empty.gz": (gzip.compress(b""), "is empty"),
    "a.parquet": (b"PAR1 and nothing", "cannot be read as Parquet"),
    "a.jsonl": (b'{"text": "one"}\nnonsense\n', "at byte 16 is no JSON .*Expecting value.*It begins .nonsense."),
    "b.jsonl": (b'{"story": "one"}\n', "no JSON object with text in 'text' .* begins .*story.*--text-column"),
    "d.jsonl": (b"[" * 100_000, "the line at byte 0 is no JSON"),
    "e.jsonl": (b'{"text": "caf\xe9"}\n', "not UTF-8: byte 0xe9 at offset 13"),
    "c.jsonl": (b'{"text": "\\ud800"}\n', "lone surrogate"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_text_is_refused_in_one_line_and_leaves_nothing(tmp_path, name):
    """Guards: UTF-16 or a zip tokenized as if it were a story; half of a gzip file taken for the whole."""
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(BAD[name][0])
    with pytest.raises(UserError, match=BAD[name][1]) as caught:
        pre_tokenize([path], "bytes", tmp_path / "x.bin")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_column_that_is_no_text_is_refused_whatever_its_first_row(tmp_path):
    """Guards: numbers from 0 on, whose first is as false as an empty story."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"id": [0, 1], "raw": [b"", b"a"], "text": [None, "one"]}), path)
    for column in ("id", "raw"):
        with pytest.raises(UserError, match=f"'{column}' holds .*; expected text"):
            pre_tokenize([path], "bytes", tmp_path / "x.bin", text_column=column)
    [made] = pre_tokenize([path], "bytes", tmp_path / "x.bin")
    assert told(made) == ["one"] and TokenFile.open(made).header["n_empty_dropped"] == 1
    rows = tmp_path / "t.jsonl"
    rows.write_text('{"text": null}\n{"text": "one"}\n')
    [made] = pre_tokenize([rows], "bytes", tmp_path / "y.bin")
    assert told(made) == ["one"] and TokenFile.open(made).header["n_empty_dropped"] == 1
    rows.write_text('{"text": 7}\n')
    with pytest.raises(UserError, match="the line at byte 0 .*'text' holds int; expected text"):
        pre_tokenize([rows], "bytes", tmp_path / "z.bin")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("block", [1, 2, 3, 5, 1000])
def test_paragraphs_are_stories(tmp_path, newline, block):
    """Guards: blank lines that join stories; paragraphs or counts that depend on the size of a block."""
    text = tmp_path / "t.txt"
    lines = ["", "Citizen:", "Speak.", "", "All:", "  So\u3000", "", " \t", "", "Last.", ""]
    text.write_bytes(newline.join(lines).encode())
    [made] = pre_tokenize([text], "bytes", tmp_path / "x.bin", stories="paragraph", block=block)
    assert told(made) == [f"Citizen:{newline}Speak.", f"All:{newline}  So\u3000", "Last."]
    assert TokenFile.open(made).header["n_empty_dropped"] == 0


def test_a_byte_order_mark_is_left_out_and_said(tmp_path, warned):
    """Guards: U+FEFF as the first token of the first story."""
    path = tmp_path / "bom.txt"
    path.write_bytes(b"\xef\xbb\xbfOnce")
    with warned("byte order mark"):
        [made] = pre_tokenize([path], "bytes", tmp_path / "x.bin")
    assert told(made) == ["Once"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_is_read(tmp_path):
    """Guards: text of a pipe, which can be read only once, checked and then gone."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_text("one\n<|endoftext|>\ntwo"))
    writer.start()
    [made] = pre_tokenize([fifo], "bytes", tmp_path / "x.bin")
    writer.join()
    assert told(made) == ["one", "two"] and sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "x.bin"]
    writer = threading.Thread(target=lambda: fifo.write_text(""))
    writer.start()
    with pytest.raises(UserError, match="fifo is empty"):
        pre_tokenize([fifo], "bytes", tmp_path / "z.bin")
    writer.join()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "x.bin"]
    packed = tmp_path / "rows.jsonl.gz"
    os.mkfifo(packed)
    writer = threading.Thread(target=lambda: packed.write_bytes(gzip.compress(b'{"text": "three"}')))
    writer.start()
    [made] = pre_tokenize([packed], "bytes", tmp_path / "y.bin")
    writer.join()
    assert told(made) == ["three"]  # a FIFO's name says what comes out of it


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Guards: a token file of half an old and half a new text, with the hash of neither."""
    path = tmp_path / "a.txt"
    path.write_text("one")
    read = HashingReader.read
    grown = []

    def grow(reader, size=-1):
        if not grown and reader.n_bytes:
            grown.append(path.write_text("one two"))
        return read(reader, size)

    monkeypatch.setattr(HashingReader, "read", grow)
    with pytest.raises(UserError, match="changed while it was read"):
        pre_tokenize([path], "bytes", tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == [path]


def test_folders_devices_and_token_files_are_no_texts(tmp_path):
    """Guards: tracebacks, and a token file tokenized again."""
    (tmp_path / "t.txt").write_text("one")
    [made] = pre_tokenize([tmp_path / "t.txt"], "bytes", tmp_path / "x.bin")
    for path, expected in ((tmp_path, "is a folder"), (made, "a token file"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=expected):
            check_text(path)


TEXT = b"\xef\xbb\xbf \nOne  day,\r\n\tTom ran.\n<|endoftext|>\n\n<|endoftext|>Two: \xc3\xa9t\xc3\xa9\n<|endoftext|>\n"


def read(path, policy="endoftext", **kinds):
    """Stories, dropped empty ones, and the SHA-256 of the file."""
    found, sha256 = chunks_of(path, stories=policy, **kinds)
    return [t for c in found for t in c.texts], sum(c.n_empty for c in found), sha256


def chunks_of(path, position=0, block=2**20, **options):
    source = Source(path, path.name, **options)
    with HashingReader(source) as reader:
        return list(read_chunks(source, reader, position, block)), reader.finish()


def test_blank_space_around_separators_goes_and_inside_stays(tmp_path):
    """Guards: stories that begin with the line break after a separator; empty ones counted as stories."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    assert read(path)[:2] == (["One  day,\r\n\tTom ran.", "Two: été"], 1)
    assert read(path, "line")[0] == ["One  day,", "Tom ran.", "<|endoftext|>", "<|endoftext|>Two: été", "<|endoftext|>"]
    assert len(read(path, "file")[0]) == 1


@pytest.mark.parametrize("block", [1, 2, 3, 5, 13, 14, 1000])
@pytest.mark.parametrize("policy", ["endoftext", "line", "file"])
def test_stories_do_not_depend_on_the_size_of_blocks_read(tmp_path, block, policy):
    """Guards: a separator, a character or a byte order mark cut by the edge of a block."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT * 3)
    assert read(path, policy, block=block) == read(path, policy)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_a_prefix_before_the_first_tab_goes_from_every_line_or_the_text_is_refused(tmp_path, block):
    """Guards: half of the Bible with its references, because some lines have spaces where others have a tab."""
    path = tmp_path / "kjv.txt"
    path.write_bytes(b"\xef\xbb\xbfGenesis 1:1\tIn the\tbeginning \r\n\nGenesis 1:2\t\r\nJohn 1:1\tIn it was the Word")
    texts, n_empty, _ = read(path, "line_without_prefix", block=block)
    assert (texts, n_empty) == (["In the\tbeginning", "In it was the Word"], 2)
    path.write_bytes(b"Genesis 1:1\tIn the beginning\nGenesis 1:2 And\n")
    with pytest.raises(UserError, match="line at byte 29 has no tab; .* It begins 'Genesis 1:2 And'"):
        read(path, "line_without_prefix", block=block)


def test_a_story_above_the_limit_is_refused_and_a_million_empty_stories_are_counted(tmp_path, monkeypatch):
    """Guards: memory without bound for a file that is no text; empty stories that become end-of-text alone."""
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>\n" * 10**6 + "end")
    assert read(path)[:2] == (["end"], 10**6)
    path.write_text("one<|endoftext|>" + "x y " * 1000)
    monkeypatch.setattr(readers, "LONGEST_STORY", 3000)
    with pytest.raises(UserError, match="story or line at byte 16 has more than .* --stories line"):
        read(path, block=100)


@pytest.mark.parametrize("block", [3, 10**6])
def test_text_that_is_not_utf8_is_refused_with_offset_and_line_or_replaced_and_counted(tmp_path, block):
    """Guards: replacement characters that slip into training."""
    path = tmp_path / "latin.txt"
    path.write_bytes(b"one\n<|endoftext|>\ntwo\nthr\xe9e\n<|endoftext|>\xef\xbf\xbd")
    with pytest.raises(UserError, match="byte 0xe9 at offset 25, line 4"):
        read(path, block=block)
    found, _ = chunks_of(path, block=block, errors="replace")
    assert [t for c in found for t in c.texts] == ["one", "two\nthr\ufffde", "\ufffd"]
    assert sum(c.n_replaced for c in found) == 1
    assert [s for c in found for s in c.sizes] == [3, 11, 3]


def test_text_with_lone_surrogates_is_refused(tmp_path):
    """Guards: text that no tokenizer can give back."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"a \xed\xa0\x80 b")
    with pytest.raises(UserError, match="not UTF-8: byte 0xed at offset 2, line 1"):
        read(path)


def test_reading_goes_on_at_any_chunk(tmp_path):
    """Guards: a resumed start that skips or repeats a story, or hashes another file."""
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT * 20)
    whole, sha256 = chunks_of(path, block=50)
    for i in range(len(whole) - 1):
        rest, again = chunks_of(path, whole[i].position, 50)
        assert [t for c in rest for t in c.texts] == [t for c in whole[i + 1:] for t in c.texts]
        assert again == sha256
