"""A small part of benchmarks/resume_training.py, in one process that has imported torch once.

It is a process of its own since it forks, which this one, with its threads, must not.
"""

import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")]


@pytest.fixture(scope="module")
def said(root):
    """What the script says of each part, by the words that its line begins with, and all of it."""
    command = [sys.executable, str(root / "benchmarks" / "resume_training.py"), "--parts", "each-step,signals,kills",
               "--max-steps", "12", "--steps", "1,7", "--signals", "6", "--kills", "20", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    starts = ("each-step:", "signals:", "20 kills")
    found = {begin: "".join(re.findall(f"^{begin}.*", done.stdout, re.MULTILINE)) for begin in starts}
    return found | {"all": done.stdout + done.stderr}


def test_runs_stopped_by_a_signal_and_resumed_end_with_the_same_bits(said):
    """Guards: data order, dropout, accumulation, optimizer state, log sums or patience that a stop changes, files left
    over. Both models, cut after 2 of 12 steps, and where early stopping ends them; the script cuts after each of 60."""
    assert said["each-step:"].startswith("each-step: 4 runs of 12 steps"), said["all"]
    assert ": 0 ended otherwise" in said["each-step:"], said["all"]


def test_a_signal_at_any_moment_leaves_a_checkpoint_of_the_step_under_way(said):
    """Guards: SIGTERM or Ctrl-C in training, evaluation or a save that costs a step, a file or the run; 6 of 100."""
    assert said["signals:"].startswith("signals: 6 signals"), said["all"]
    assert ": 0 wrong" in said["signals:"], said["all"]


def test_runs_that_are_killed_again_and_again_end_with_the_same_bits(said):
    """Guards: files left over, rows twice or never, more than one interval lost; 20 of the script's 200 kills."""
    assert " 0 runs ended otherwise" in said["20 kills"], said["all"]
