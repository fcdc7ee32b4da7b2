import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from contrib import import_bin as importer
from contrib.import_bin import import_bin, split_documents
from plotarmour.cli import UserError
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import TokenFile

END = 256  # of the tokenizer "bytes"


@pytest.fixture
def write(tmp_path):
    def written(ids, dtype="<u2", header=()):
        path = tmp_path / "ids.bin"
        head = np.zeros(256 if len(header) else 0, dtype="<i4")
        head[:len(header)] = header
        path.write_bytes(head.tobytes() + np.array(ids).astype(dtype).tobytes())
        return path

    return written


def ids_of(path):
    data = TokenFile.open(path)
    return [data.story(i).tolist() for i in range(data.n_stories)]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("block", [1, 3, 2**20])
def test_our_tokens_written_as_bare_ids_come_back(tmp_path, monkeypatch, dtype, block):
    """Guards: stories cut at the edges of blocks, ids read with another width, bytes counted wrongly."""
    monkeypatch.setattr(importer, "BLOCK_TOKENS", block)
    text = tmp_path / "t.txt"
    text.write_text("One day,\nTom ran.<|endoftext|>Zwölf\u2026 end<|endoftext|>x", encoding="utf-8")
    [path] = pre_tokenize([text], "bpe:260", tmp_path / "ours.bin")
    ours = TokenFile.open(path)
    raw = tmp_path / "raw.bin"
    raw.write_bytes(np.asarray(ours.tokens).astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    result = import_bin(raw, str(path), tmp_path / "again.bin", dtype=dtype)
    again = TokenFile.open(tmp_path / "again.bin")
    again.verify()
    assert again.tokens.tolist() == ours.tokens.tolist() and again.offsets.tolist() == ours.offsets.tolist()
    assert again.story_bytes.tolist() == ours.story_bytes.tolist()
    assert (result.n_stories, result.n_tokens, result.header["n_empty_dropped"]) == (3, ours.n_tokens, 0)
    assert again.header["source"][0]["bytes"] == raw.stat().st_size


@pytest.mark.parametrize(("header", "dtype"), [((20240520, 1), "<u2"), ((20240801, 7), "<u4")])
def test_files_of_llm_c_open_their_documents_with_end_of_text(write, tmp_path, header, dtype):
    """Guards: an empty first story, a header read as ids, the last document dropped."""
    path = write([END, 72, 105, END, END, 33], dtype, (*header, 6))
    result = import_bin(path, "bytes", tmp_path / "x.bin")
    assert ids_of(tmp_path / "x.bin") == [[72, 105], [33]]
    assert (result.header["n_empty_dropped"], result.n_tokens) == (1, 5)


def test_a_file_without_separators_is_one_story(write, tmp_path, monkeypatch):
    """Guards: nanoGPT's Shakespeare refused, or its last tokens lost."""
    monkeypatch.setattr(importer, "BLOCK_TOKENS", 4)
    import_bin(write(range(10)), "bytes", tmp_path / "one.bin", "uint16")
    assert ids_of(tmp_path / "one.bin") == [list(range(10))]


def split(*blocks, separator=0):
    return [ids.tolist() for ids in split_documents(map(np.array, blocks), separator)]


def test_documents_are_cut_at_separators():
    """Guards: empty documents lost, or the gaps at both ends counted as such. The docstring's integers."""
    assert split([5, 0, 0, 6, 7]) == [[5], [], [6, 7]]
    assert split([0, 5, 0]) == split([0], [5], [0]) == [[5]]
    assert split([0, 0], [0, 5]) == [[], [], [5]]
    assert split([1, 2], [3, 0, 4]) == [[1, 2, 3], [4]]
    assert split([1, 9, 2], separator=9) == [[1], [2]]


def test_another_separator_is_replaced_by_the_tokenizers(write, tmp_path):
    """Guards: llm.c's files of Llama 3, whose documents begin with another id than the tokenizer's end-of-text."""
    import_bin(write([9, 1, 2, 9, 3]), "bytes", tmp_path / "x.bin", "uint16", end_of_text=9)
    assert TokenFile.open(tmp_path / "x.bin").tokens.tolist() == [1, 2, END, 3, END]


WRONG = {
    "id outside": (dict(ids=[1, 2, 300]), {}, r"id 300 at position 2 is outside the vocabulary of 257"),
    "negative id": (dict(ids=[1, -1], dtype="<i4"), {"dtype": "int32"}, "id -1 at position 1 is outside"),
    "big-endian": (dict(ids=[1, 2], dtype=">u2"), {}, "id 512 at position 1 .*little-endian uint16"),
    "another width": (dict(ids=[70000, 1], dtype="<u4"), {}, "id 4464 at position 0"),
    "odd length": (dict(ids=[1, 2, 3], dtype="u1"), {}, "is 1 uint16 ids and 1 bytes; expected a whole"),
    "empty": (dict(ids=[]), {}, "has 0 bytes"),
    "no dtype": (dict(ids=[1]), {"dtype": None}, "expected --dtype"),
    "only separators": (dict(ids=[END, END]), {}, "holds no story"),
    "foreign magic": (dict(ids=[1], header=[7, 1, 1]), {"format": "llm.c"}, "begins with 7, 1; expected .*20240520"),
    "other version": (dict(ids=[1], header=[20240520, 2, 1]), {"format": "llm.c"}, "begins with 20240520, 2"),
    "truncated": (dict(ids=[1], header=[20240520, 1, 2]), {"dtype": None}, "is 1 uint16 ids .* expected 2 ids"),
    "too long": (dict(ids=[1, 2], header=[20240520, 1, 1]), {"dtype": None}, "is 2 uint16 ids .* expected 1 ids"),
    "two separators": (dict(ids=[1, END, 2, 9]), {"end_of_text": 9}, "end-of-text id 256 inside a document"),
    "foreign separator": (dict(ids=[1]), {"end_of_text": 50256}, "--end-of-text 50256 is outside"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_line_and_leave_nothing(write, tmp_path, monkeypatch, case):
    """Guards: ids that wrap silently, a model trained on noise, half a token file."""
    monkeypatch.setattr(importer, "BLOCK_TOKENS", 2)
    file, options, message = WRONG[case]
    path = write(**file)
    with pytest.raises(UserError, match=message) as refused:
        import_bin(path, "bytes", tmp_path / "out" / "x.bin", **{"dtype": "uint16"} | options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_token_files_and_existing_files_are_refused(write, tmp_path):
    """Guards: a header of ours imported as ids; a file replaced without a word."""
    import_bin(write([1, 2]), "bytes", tmp_path / "x.bin", "uint16")
    with pytest.raises(UserError, match="is a token file of this program already"):
        import_bin(tmp_path / "x.bin", "bytes", tmp_path / "y.bin", "uint16")
    with pytest.raises(UserError, match="exists already"):
        import_bin(write([1, 2]), "bytes", tmp_path / "x.bin", "uint16")
    ids = write([1, 2])
    with pytest.raises(UserError, match="is both read and written"):
        import_bin(ids, "bytes", ids, "uint16", force=True)
    assert ids.stat().st_size == 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int64])
def test_a_tensor_of_ids_becomes_stories(tmp_path, dtype):
    """Guards: ids that have to be written as bare bytes first, with a dtype that one has to know."""
    torch.save(torch.tensor([65, 66, 255, 67], dtype=dtype), tmp_path / "ids.pt")
    import_bin(tmp_path / "ids.pt", "bytes", tmp_path / "x.bin", end_of_text=255)
    assert ids_of(tmp_path / "x.bin") == [[65, 66], [67]]


class Code:
    """What a pickle can do: write a file when it is read."""

    def __reduce__(self):
        return open, ("harm", "w")


NO_IDS = {
    "two.pt": ({"train": torch.arange(9)}, "holds a dict; expected one tensor"), "list.pt": ([1, 2], "holds a list"),
    "float.pt": (torch.ones(3), r"holds a tensor of torch.float32 \[3\]"), "none.pt": (torch.arange(0), r"int64 \[0\]"),
    "bool.pt": (torch.ones(3) > 0, "torch.bool"), "rows.pt": (torch.ones(2, 3, dtype=torch.int64), r"\[2, 3\]"),
    "code.pt": (Code(), "refuses .UnpicklingError"), "outside.pt": (torch.tensor([1, 300]), "id 300 at position 1"),
    "code.pkl": (Code(), "is a pickle"), "pickled.pt": (Code(), "refuses .UnpicklingError"), "cut.pt": ([], "refuses")}


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_tensor_of_ids_is_refused_and_runs_no_code(tmp_path, monkeypatch, name):
    """Guards: a downloaded file that runs its code; rows joined to one story; floats taken for ids."""
    monkeypatch.chdir(tmp_path)
    content, message = NO_IDS[name]
    if name in ("code.pkl", "pickled.pt"):
        Path(name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, name)
    if name == "cut.pt":
        Path(name).write_bytes(Path(name).read_bytes()[:-40])
    with pytest.raises(UserError, match=message) as refused:
        import_bin(name, "bytes", "x.bin")
    assert "\n" not in str(refused.value) and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_numpy_file_is_refused_in_one_line(tmp_path):
    """Guards: the header of a .npy file imported as the first story. The command in the message writes bare ids."""
    np.save(tmp_path / "my ids.npy", np.array([1, 2, END], np.uint16))
    with pytest.raises(UserError, match="is a .npy file of NumPy; .* python -c ") as refused:
        import_bin(tmp_path / "my ids.npy", "bytes", tmp_path / "x.bin", "uint16")
    subprocess.run([sys.executable, *shlex.split(str(refused.value).partition("python ")[2])], cwd=tmp_path, check=True)
    import_bin(tmp_path / "ids.bin", "bytes", tmp_path / "x.bin", "uint16")
    assert ids_of(tmp_path / "x.bin") == [[1, 2]]


def test_bytes_of_imported_stories_are_those_of_their_text(tmp_path, write):
    """Guards: entries' characters counted as bytes, where ##ed marks a continuation: 23 for a text of 20 bytes."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "<|endoftext|>", "walk", "##ing", "##ed", "café"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    backend.add_special_tokens(["<|endoftext|>"])
    (tmp_path / "words").mkdir()
    backend.save(str(tmp_path / "words" / "tokenizer.json"))
    ids = backend.encode("walking walked café").ids
    import_bin(write([*ids, 1, *ids[:2], 1]), str(tmp_path / "words"), tmp_path / "x.bin", dtype="uint16")
    data = TokenFile.open(tmp_path / "x.bin")
    assert data.story_bytes.tolist() == [20, 7]
    assert data.tokenizer().token_bytes is None
