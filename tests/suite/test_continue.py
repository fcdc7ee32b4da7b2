import json
from dataclasses import asdict

import pytest

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.suite import steps
from plotarmour.suite.steps import train_recipe

INFO = {"format": 1, "recipe": asdict(load_recipe("tiny", "bdh")), "tokenizer": {"sha256": "0"}, "vocab_size": 1,
        "train": {"payload_sha256": "1"}, "val": {"payload_sha256": "2"}, "dtype": "float32"}


@pytest.fixture
def called(monkeypatch):
    """Train nothing; returns what training was asked for, and what was there by then."""
    calls = []
    monkeypatch.setattr(steps, "find_prepared", lambda folder: {"train": folder, "val": folder})
    monkeypatch.setattr(steps, "train_run", lambda recipe, train, val, out, **options: calls.append(
        options | {"found": sorted(p.name for p in out.rglob("*")) if out.exists() else None}))
    return calls


@pytest.fixture
def attached(tmp_path):
    run = tmp_path / "input" / "bdh"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(INFO))
    (run / "checkpoints" / "state.json").write_text("{}")
    for path in (run / "run.json", run / "checkpoints" / "state.json", run / "checkpoints", run):
        path.chmod(path.stat().st_mode & ~0o222)
    yield run
    for path in (run, run / "checkpoints"):
        path.chmod(0o755)  # so that it can be removed


def test_an_attached_output_is_brought_once_and_can_be_written_to(called, attached, tmp_path, capsys):
    """Guards: a run that starts anew beside its own checkpoints; a read-only copy that no checkpoint goes into."""
    out = tmp_path / "out"
    out.mkdir()  # of a start that came to nothing
    train_recipe("tiny", "bdh", tmp_path, out, continue_from=attached)
    assert called[0]["found"] == ["checkpoints", "run.json", "state.json"]
    assert all(path.stat().st_mode & 0o200 for path in [out, *out.rglob("*")])
    (out / "later").touch()
    train_recipe("tiny", "bdh", tmp_path, out, continue_from=attached)
    assert "later" in called[1]["found"] and "exists already: continuing it" in capsys.readouterr().out
    assert not [path for path in tmp_path.iterdir() if "unfinished" in path.name]


def test_a_folder_of_runs_names_those_within(called, attached, tmp_path):
    """Guards: an attached output that holds the run folder, of which is said that it is none."""
    with pytest.raises(UserError, match=f"is not a run folder: it has no run.json. It holds {attached.name}: name"):
        train_recipe("tiny", "bdh", tmp_path, tmp_path / "out", continue_from=attached.parent)
    assert not called


def test_parameters_reach_training_as_what_they_are(called, tmp_path):
    """Guards: step 0 taken for no step."""
    train_recipe("tiny", "bdh", tmp_path, tmp_path / "out")
    train_recipe("tiny", "bdh", tmp_path, tmp_path / "out", extend=True, from_step=0)
    assert [(call["extend"], call["from_step"]) for call in called] == [(False, None), (True, 0)]
