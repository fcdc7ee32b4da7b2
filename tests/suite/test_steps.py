"""The steps that notebooks and command lines call."""

import zipfile

import pytest

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.suite.steps import download_link, list_files, pack_run, prepare
from plotarmour.training.log import RunLog

SMALL = ["max_steps=2", "warmup_steps=0"]


def test_a_text_that_is_refused_removes_nothing(tmp_path):
    """Guards: facts of the corpus and the second test set unlinked before the new text is looked at."""
    kept = {tmp_path / name: name.encode() for name in ("tokens.extra.bin", "built-in.facts.jsonl", "built-in.txt")}
    for path, content in kept.items():
        path.write_bytes(content)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"Once upon a time\xff\xfe there was no UTF-8.")
    with pytest.raises(UserError, match="UTF-8"):
        prepare(load_recipe("tiny", "bdh", SMALL), tmp_path, bad)
    assert {path: path.read_bytes() for path in kept} == kept


def test_settings_of_the_corpus_beside_a_text_are_warned_of(tmp_path, token_files):
    """Guards: a corpus asked for with --set of which no story is in the token files; warnings about a recipe."""
    prepare(load_recipe("tiny", "bdh", ["tokenizer=bytes", "split=8:1:1"]), tmp_path, token_files["text"])
    overrides = ["tokenizer=bytes", "split=8:1:1", "corpus_stories=50"]
    with pytest.warns(UserWarning, match="^corpus_stories is ignored: .* takes the place of the built-in corpus"):
        prepare(load_recipe("tiny", "bdh", overrides), tmp_path, token_files["text"])


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "bdh"
    (folder / "figures").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001" / "model.safetensors").write_bytes(b"weights")
    (folder / "figures" / "training.png").write_bytes(b"png")
    for name in ("run.json", "DONE.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    RunLog(folder / "log.csv", -1).append(utc="2026-11-21T09:34:59Z", step=1)
    return folder


def test_the_zip_holds_what_is_small_and_no_weights(run):
    """Guards: gigabytes to download for a curve."""
    packed = pack_run(run)
    assert packed == run.parent / "bdh_20261121-0934.zip"
    with zipfile.ZipFile(packed) as bundle:
        files = [name for name in bundle.namelist() if not name.endswith("/")]
        assert sorted(files) == ["bdh/DONE.json", "bdh/figures/training.png", "bdh/log.csv", "bdh/run.json"]
        assert bundle.read("bdh/log.csv") == (run / "log.csv").read_bytes()


def test_a_notebook_links_to_the_zip_from_its_own_folder(run, monkeypatch):
    """Guards: a link to an absolute path, which no notebook server follows."""
    monkeypatch.chdir(run.parent)
    assert 'href=\'bdh_20261121-0934.zip\'' in download_link(run)._repr_html_()


def test_a_list_of_files_leaves_out_hidden_folders(tmp_path):
    """Guards: the lock of a grid among the results that a notebook lists."""
    for name in (".lock/owner.json", ".hidden", "run/log.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * 2**10)
    assert list_files(tmp_path).splitlines()[1:] == ["       0.001  run/log.csv"]


def test_a_run_that_has_not_begun_is_refused(tmp_path):
    """Guards: an empty zip with a made-up name."""
    with pytest.raises(UserError, match="has no row; expected"):
        pack_run(tmp_path)
