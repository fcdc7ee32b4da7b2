import os
import zipfile
from dataclasses import replace

import pytest

from plotarmour.cli import UserError
from plotarmour.suite.bundle import download_link, pack_run
from plotarmour.suite.messages import tell_ending
from plotarmour.training.ending import Ending, Reason
from plotarmour.training.log import RunLog

ENDING = Ending(Reason.MAX_STEPS, step=2200, tokens_seen=926179, elapsed_s=83.0, train_loss=0.5, val_loss=0.6,
                best_step=2000, best_val_loss=0.5, skipped_steps=0, scaler_overflows=0, peak_memory_mib=512.0,
                last_checkpoint=2200, micro_batch_size=4, input_wait_s=0.25)


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
        assert bundle.namelist() == ["bdh/log.csv", "bdh/run.json", "bdh/DONE.json", "bdh/figures/training.png"]
        assert bundle.read("bdh/log.csv") == (run / "log.csv").read_bytes()


def test_the_same_run_gives_the_same_zip_again(run):
    """Guards: another file, or other bytes, each time the cell is run or the folder is copied."""
    first = pack_run(run).read_bytes()
    for path in run.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert pack_run(run).read_bytes() == first
    assert sorted(path.name for path in run.parent.iterdir()) == ["bdh", "bdh_20261121-0934.zip"]
    (run / "DONE.json").write_text("{ }")
    assert pack_run(run).read_bytes() != first


def test_a_notebook_links_to_the_zip_from_its_own_folder(run, monkeypatch):
    """Guards: a link to an absolute path, which no notebook server follows."""
    monkeypatch.chdir(run.parent)
    assert 'href=\'bdh_20261121-0934.zip\'' in download_link(run)._repr_html_()


def test_a_run_that_has_not_begun_is_refused(tmp_path):
    """Guards: an empty zip with a made-up name."""
    with pytest.raises(UserError, match="has no row yet"):
        pack_run(tmp_path)


def test_an_ending_is_told_with_what_to_do_next(tmp_path):
    """Guards: a dict that the reader must decode; a stopped run that nobody knows how to go on with."""
    told = tell_ending(ENDING, tmp_path / "bdh").splitlines()
    assert told == ["bdh      done: all steps taken", "trained  2,200 steps, 926,179 tokens, 83 s over all sessions",
                    "best     validation loss 0.5000 (perplexity 1.65) at step 2,000",
                    "waited   0.2 s for batches, in the last session",
                    "memory   0.50 GiB at most, in micro-batches of 4 rows"]
    stopped = " ".join(tell_ending(replace(ENDING, reason=Reason.SIGINT), tmp_path / "bdh").split())
    assert "stopped by signal SIGINT" in stopped and "continues from the checkpoint of step 2,200" in stopped
    assert "set continue_from to its run folder bdh" in stopped
    failed = " ".join(tell_ending(replace(ENDING, reason=Reason.NON_FINITE), tmp_path / "bdh").split())
    assert "with a lower learning_rate" in failed and "continue_from" not in failed
