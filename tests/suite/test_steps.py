"""The steps that notebooks and command lines call."""

import re

import pytest

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.suite.steps import find_all_runs, find_prepared, prepare, tell_corpus

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


@pytest.mark.parametrize("wrong", ["a tokenizer", "a second text"])
def test_a_refused_start_leaves_the_built_in_corpus_as_it_was(tmp_path, wrong):
    """Guards: text and facts of another corpus written beside the token files of the first, before the tokenizer or
    the second text is looked at."""
    small = [*SMALL, "corpus_stories=60", "tokenizer=bytes", "split=8:1:1"]
    prepare(load_recipe("tiny", "bdh", small), tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"built-in.txt", "built-in.facts.jsonl"} < {path.name for path in kept}
    changes = ["corpus_seed=1", *["tokenizer=bpe:3"] * (wrong == "a tokenizer")]
    with pytest.raises(UserError, match="bpe:3" if wrong == "a tokenizer" else "nowhere.txt does not exist"):
        prepare(load_recipe("tiny", "bdh", [*small, *changes]), tmp_path,
                extra_text=tmp_path / "nowhere.txt" if wrong == "a second text" else None)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_a_text_too_short_for_one_context_leaves_the_built_in_corpus_as_it_was(tmp_path):
    """Guards: token files that no run can be trained on in place of those of the corpus, whose facts are removed."""
    small = [*SMALL, "tokenizer=bytes", "split=8:1:1"]
    prepare(load_recipe("tiny", "bdh", [*small, "corpus_stories=60"]), tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    text = tmp_path.parent / f"{tmp_path.name}.txt"
    text.write_text("\n".join(f"Story {i}." for i in range(40)))
    short = [*small, "stories=line", "context_length=200"]
    with pytest.raises(UserError, match="val part would hold .* tokens, fewer than one context of 200"):
        prepare(load_recipe("tiny", "bdh", [*short, "windows=stream"]), tmp_path, text)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    prepare(load_recipe("tiny", "bdh", [*short, "windows=stories"]), tmp_path, text)  # whose windows may be shorter


def test_settings_of_the_corpus_beside_a_text_are_warned_of(tmp_path, token_files, warned):
    """Guards: a corpus asked for with --set of which no story is in the token files; warnings about a recipe."""
    prepare(load_recipe("tiny", "bdh", ["tokenizer=bytes", "split=8:1:1"]), tmp_path, token_files["text"])
    overrides = ["tokenizer=bytes", "split=8:1:1", "corpus_stories=50"]
    with warned("^corpus_stories is ignored: .* takes the place of the built-in corpus"):
        prepare(load_recipe("tiny", "bdh", overrides), tmp_path, token_files["text"])


def test_a_message_of_the_suite_names_options_of_the_suite(tmp_path, token_files, capsys):
    """Guards: --stories or --force as the remedy, which run_suite does not know."""
    recipe = load_recipe("tiny", "bdh", ["tokenizer=bytes", "split=8:1:1"])
    plain = tmp_path / "t.txt"
    plain.write_text("First Citizen:\nSpeak.\n\n" * 50)
    with pytest.raises(UserError, match="with 1 story in all.*Then use --set stories=paragraph, or more text"):
        prepare(recipe, tmp_path, plain)
    for _ in range(2):
        prepare(recipe, tmp_path, token_files["text"])
    assert "nothing to do (delete them, or use another --out, to make them again)" in capsys.readouterr().err


def test_the_paths_of_a_step_may_be_text_that_begins_with_a_tilde(tmp_path, monkeypatch):
    """Guards: AttributeError for a path that is text; a folder named ~."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert find_all_runs(tmp_path, "tiny", ["~/results/bdh"]) == [tmp_path / "results" / "bdh"]
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "tokens"))):
        find_prepared("~/tokens")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "tales.txt"))):
        prepare(load_recipe("tiny", "bdh", SMALL), "~/results", "~/tales.txt")
    assert tell_corpus("~/built-in.txt", 1, 0, (0, 1))[1] == tmp_path / "built-in.facts.jsonl"
