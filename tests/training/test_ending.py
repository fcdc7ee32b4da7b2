import json
import math
import re
from dataclasses import replace

import pytest

from plotarmour.training.ending import DONE, MEANINGS, Ending, Reason, ending_stamp, forget_ending, is_complete

ENDING = Ending(Reason.MAX_STEPS, step=8, tokens_seen=800, elapsed_s=1.5, train_loss=0.5, val_loss=0.6, best_step=8,
                best_val_loss=0.6, skipped_steps=0, scaler_overflows=0, peak_memory_mib=None, last_checkpoint=8,
                micro_batch_size=4, input_wait_s=0.25)


@pytest.mark.parametrize("reason", Reason)
def test_an_ending_is_read_as_it_was_written_and_its_file_says_whether_it_is_complete(reason, tmp_path):
    """Guards: a stopped run with a DONE.json; a number that is lost on the way; a reason without a label or advice."""
    ending = replace(ENDING, reason=reason, best_val_loss=math.inf)
    ending.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["DONE.json" if reason in DONE else "STOPPED.json"]
    assert Ending.read(tmp_path) == ending and is_complete(tmp_path) == ending.is_done
    label, code, advice = MEANINGS[reason]
    assert label.startswith("done") == ending.is_done == (advice == "") and (code == 0 or not ending.is_done)
    assert ending.is_done or "step 8" in ending.advice("A cell")
    before = ending_stamp(tmp_path)
    ending.write(tmp_path)
    assert ending_stamp(tmp_path) != before
    forget_ending(tmp_path)
    assert Ending.read(tmp_path) is None and ending_stamp(tmp_path) == ()


def test_a_damaged_ending_counts_as_none(tmp_path):
    """Guards: a traceback, or a run that counts as complete, after a loss of power."""
    for text in ('{"reason": "max_', "[]", '"max_steps"', '{"step": 3}', '{"reason": "tired"}', "\x00" * 40):
        (tmp_path / "DONE.json").write_text(text)
        assert Ending.read(tmp_path) is None and not is_complete(tmp_path)
    (tmp_path / "DONE.json").write_text(json.dumps({"reason": "max_steps", "step": 1, "threads": 2}))
    assert Ending.read(tmp_path).step == 1  # of a notebook of one's own


def test_the_best_evaluation_in_words():
    """Guards: the untrained model presented as the best that training gave."""
    assert ENDING.best == "validation loss 0.6000 (perplexity 1.82) at step 8"
    assert "before any training" in replace(ENDING, best_step=0).best
    assert replace(ENDING, best_val_loss=math.inf).best == "never evaluated"


def test_the_run_folders_page_names_every_reason(root):
    """Guards: a reason in a user's DONE.json that no page explains."""
    page = (root / "docs" / "run-folder.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \| `(?:DONE|STOPPED)", page, re.M) == list(Reason)


def test_nothing_else_opens_the_two_files(root):
    """Guards: a second reader with ideas of its own of what a damaged file means."""
    paths = [*(root / "plotarmour").rglob("*.py"), *(root / "tools").glob("*.py")]
    assert [path.name for path in paths if re.search(r'"(DONE|STOPPED)\.json"', path.read_text(encoding="utf-8"))] == [
        "ending.py"]
