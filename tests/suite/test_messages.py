"""A run in words."""

from dataclasses import replace

from plotarmour.suite.messages import describe_ending
from plotarmour.training.ending import Ending, Reason

ENDING = Ending(Reason.MAX_STEPS, step=2200, tokens_seen=926179, elapsed_s=83.0, train_loss=0.5, val_loss=0.6,
                best_step=2000, best_val_loss=0.5, skipped_steps=0, scaler_overflows=0, peak_memory_mib=512.0,
                last_checkpoint=2200, micro_batch_size=4, input_wait_s=0.25)


def test_an_ending_comes_with_what_to_do_next(tmp_path):
    """Guards: a dict that the reader must decode; a stopped run that nobody knows how to continue."""
    lines = describe_ending(ENDING, tmp_path / "bdh").splitlines()
    assert lines == ["bdh      done: all steps taken", "trained  2,200 steps, 926,179 tokens, 83 s over all sessions",
                    "best     validation loss 0.5000 (perplexity 1.65) at step 2,000",
                    "waited   0.2 s for batches, in the last session",
                    "memory   0.50 GiB at most, in micro-batches of 4 rows"]
    stopped = " ".join(describe_ending(replace(ENDING, reason=Reason.SIGINT), tmp_path / "bdh").split())
    assert "stopped by signal SIGINT" in stopped and "continues from the checkpoint of step 2,200" in stopped
    assert "set continue_from to its run folder bdh" in stopped
    failed = " ".join(describe_ending(replace(ENDING, reason=Reason.NON_FINITE), tmp_path / "bdh").split())
    assert "with a lower learning_rate" in failed and "continue_from" not in failed
