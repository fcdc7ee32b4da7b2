import threading
import time

import pytest
import torch

from plotarmour.data.batches import Windows
from plotarmour.data.token_file import TokenFile
from plotarmour.training.distributed import Ranks
from plotarmour.training.prefetch import AHEAD, Batches


@pytest.fixture
def windows(token_files):
    return Windows(TokenFile.open(token_files["train"]), 24, "stories", 0, rows_per_step=8)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_reading_ahead_gives_what_reading_in_turn_gives(windows):
    """Guards: steps that are swapped, skipped or cut otherwise by the thread that reads."""
    batches = Batches(windows, 3, 9, micro_batch_size=2)
    for step in range(3, 9):
        n_tokens, micro_batches = batches.of(step)
        rows = windows.rows_of(step)
        assert n_tokens == sum(end - begin for begin, end in rows) and len(micro_batches) == 4
        for i, (inputs, targets) in enumerate(micro_batches):
            expected = windows.micro_batch(rows[2 * i:2 * i + 2])
            assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    batches.close()
    assert not threads()


def test_the_shares_of_two_processes_are_the_rows_of_one(windows):
    """Guards: rows that two GPUs both read, or none of them."""
    shares = [Batches(windows, 0, 1, 2, Ranks(rank, 2)) for rank in (0, 1)]
    read = [share.of(0) for share in shares]
    rows = windows.rows_of(0)
    assert read[0][0] == read[1][0] == sum(end - begin for begin, end in rows)
    micro_batches = [inputs for _, share in read for inputs, _ in share]
    expected = [windows.micro_batch(rows[i:i + 2])[0] for i in range(0, 8, 2)]
    assert all(torch.equal(a, b) for a, b in zip(micro_batches, expected, strict=True))
    for share in shares:
        share.close()


def test_reading_stays_a_few_steps_ahead_and_no_more(windows, monkeypatch):
    """Guards: a whole epoch in memory; a model that waits because nothing was read while it computed."""
    read, original = [], Windows.rows_of
    monkeypatch.setattr(Windows, "rows_of", lambda self, step: read.append(step) or original(self, step))
    batches = Batches(windows, 0, 100, 8)
    time.sleep(0.3)
    assert read == list(range(AHEAD))
    begun = time.perf_counter()
    batches.of(0)
    assert time.perf_counter() - begun < 0.1
    batches.close()
    assert not threads() and len(read) <= AHEAD + 1


def test_what_goes_wrong_in_the_thread_is_raised_where_batches_are_asked_for(windows, monkeypatch):
    """Guards: a damaged token file that makes training wait for ever."""
    def damaged(self, rows):
        raise OSError("block 7 is damaged")

    monkeypatch.setattr(Windows, "micro_batch", damaged)
    batches = Batches(windows, 0, 5, 8)
    with pytest.raises(OSError, match="block 7"):
        batches.of(0)
    batches.close()
    assert not threads()
