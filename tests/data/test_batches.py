import hashlib

import numpy as np
import pytest
import torch
from in_memory import data

from plotarmour.cli import UserError
from plotarmour.data.batches import Windows
from plotarmour.data.windows import BY_PLACE, CUTS
from plotarmour.loss import IGNORE


def test_a_batch_written_out_as_integers():
    """Guards: targets shifted twice, or not at all. Stories 5 6 7 and 8 9, end-of-text 0, windows of whole stories."""
    windows = Windows(data([5, 6, 7], [8, 9]), context_length=4, kind="stories", seed=0, rows_per_step=2)
    inputs, targets = windows.micro_batch([(0, 4), (4, 7)])
    assert inputs.tolist() == [[0, 5, 6, 7], [0, 8, 9, 0]]
    assert targets.tolist() == [[5, 6, 7, 0], [8, 9, 0, IGNORE]]
    assert inputs.dtype == targets.dtype == torch.int64


WRITTEN_OUT = {"left_pad": [(0, 1), (0, 2), (0, 3), (1, 4), (4, 5), (4, 6), (4, 7)],
               "slide_through": [(0, 3), (1, 4), (2, 4), (3, 4), (4, 7), (5, 7), (6, 7)],
               "full": [(0, 3), (1, 4), (4, 7)], "packed": [(0, 3), (4, 7), (3, 4)]}


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_windows_of_each_kind_written_out(kind):
    """Guards: a window too many or too few at the edges of a story; one that reaches into the next story."""
    windows = Windows(data([5, 6, 7], [8, 9]), context_length=3, kind=kind, seed=0, rows_per_step=1)
    rows = [windows.rows_of(step)[0] for step in range(windows.cut.per_epoch)]
    assert sorted(rows) == sorted(WRITTEN_OUT[kind])
    inputs, targets = windows.micro_batch([(0, 2), (1, 4)])
    pad = [[0, 0, 5], [IGNORE, 5, 6]] if kind == "left_pad" else [[0, 5, 0], [5, 6, IGNORE]]
    assert [inputs[0].tolist(), targets[0].tolist()] == pad
    assert [inputs[1].tolist(), targets[1].tolist()] == [[5, 6, 7], [6, 7, 0]]
    if kind == "packed":
        inputs, targets = windows.micro_batch([(3, 4, 4, 6)])  # what is left of the first story, and two of the second
        assert [inputs.tolist(), targets.tolist()] == [[[7, 0, 8]], [[0, 8, 9]]]


@pytest.mark.parametrize("place", [0, 3, 6])
def test_an_id_outside_the_vocabulary_is_a_damaged_file(place):
    """Guards: bits that flipped on the disk and become an index error in the model, on a GPU a dead process."""
    stories = data([5, 6, 399], [8, 9], vocab_size=400)
    windows = Windows(stories, context_length=4, kind="stories", seed=0, rows_per_step=2)
    windows.micro_batch([(0, 4), (4, 7)])  # 399 is one
    stories.tokens[place] = 400
    with pytest.raises(UserError, match=r"x.bin is damaged: found id 400 .* expected ids in \[0, 400\)"):
        windows.micro_batch([(0, 4), (4, 7)])


def test_the_input_of_every_target_is_the_token_before_it():
    """Guards: a loss that is not shifted by exactly one; a window that begins with end-of-text inside a story."""
    stories = data(*[list(range(1 + 7 * i, 8 + 7 * i)) for i in range(30)], vocab_size=400)
    stream = [0, *stories.tokens.tolist()]
    for kind in CUTS:
        windows = Windows(stories, 5, kind, seed=1, rows_per_step=3)
        rows = [row for step in range(windows.cut.per_epoch // 3) for row in windows.rows_of(step)]
        for row in rows:
            inputs, targets = (batch[0] for batch in windows.micro_batch([row]))
            scored = targets != IGNORE
            pieces = [*zip(row[::2], row[1::2], strict=True)]
            assert targets[scored].tolist() == [id for begin, end in pieces for id in stream[1 + begin:1 + end]]
            assert inputs[scored].tolist() == [id for begin, end in pieces for id in stream[begin:end]]
            assert not inputs[~scored].any()
        assert any(stream[row[0]] for row in rows)  # not only windows whose first input is end-of-text


@pytest.mark.parametrize("kind", ["stream", "stories"])
def test_a_step_that_ends_an_epoch_begins_the_next(kind):
    """Guards: windows left out, or read in the order of the wrong epoch, where the rows of a step are of two epochs."""
    stories = data(*[[1] * n for n in range(1, 20)])
    one, many = (Windows(stories, 16, kind, seed=3, rows_per_step=n) for n in (1, 29))
    expected = [one.rows_of(step)[0] for step in range(3 * many.rows_per_step)]
    assert [row for step in range(3) for row in many.rows_of(step)] == expected and one.cut.per_epoch < 29
    phases = {one.rows_of(epoch * one.cut.per_epoch)[0][0] % 16 for epoch in range(4)}
    assert kind == "stories" or len(phases) > 1  # a stream begins elsewhere in every epoch


@pytest.mark.parametrize("kind", CUTS)
def test_order_is_a_function_of_seed_and_step(kind):
    """Guards: a resumed run that reads other data; two models that read different tokens."""
    stories = data(*[[1] * (9 + i % 9) for i in range(50)])
    first = Windows(stories, 16, kind, seed=5, rows_per_step=4)
    ahead = [first.rows_of(step) for step in range(100)]
    for cut in range(99, 0, -5):  # 20 cuts
        resumed = Windows(stories, 16, kind, seed=5, rows_per_step=4)
        assert [resumed.rows_of(step) for step in (cut, cut - 1)] == [ahead[cut], ahead[cut - 1]]
    assert Windows(stories, 16, kind, seed=6, rows_per_step=4).rows_of(0) != ahead[0]


@pytest.mark.parametrize("kind", ["packed", *BY_PLACE])
def test_the_hash_of_a_computed_order_tells_runs_apart(kind):
    """Guards: one hash for runs that read other tokens, or two for runs that read the same ones in other steps."""
    texts = [data(*[[1 + i] * 9 for i in range(begin, begin + 30)]) for begin in (0, 1)]
    same, steps = (Windows(texts[0], 8, kind, 1, n).order_sha256() for n in (1, 4))
    others = [Windows(texts[0], 8, kind, 2, 1), Windows(texts[0], 7, kind, 1, 1), Windows(texts[1], 8, kind, 1, 1)]
    assert same == steps not in {other.order_sha256() for other in others}


@pytest.mark.parametrize("kind", ["stream", "stories"])
def test_the_hash_of_the_order_is_that_of_the_rows_as_they_are_read(kind):
    """Guards: a hash that claims the same order for runs that read another one."""
    stories = data(*[list(range(1 + 7 * i, 8 + 7 * i)) for i in range(30)], vocab_size=400)
    windows = Windows(stories, 10, kind, seed=1, rows_per_step=1)
    rows = [windows.rows_of(step)[0] for step in range(windows.cut.per_epoch)]
    expected = stories.header["payload_sha256"].encode() + np.array(rows, dtype="<i8").tobytes()
    assert windows.order_sha256() == hashlib.sha256(expected).hexdigest()
    same = Windows(stories, 10, kind, seed=1, rows_per_step=4)
    others = [Windows(stories, 10, kind, 2, 1), Windows(stories, 20, kind, 1, 1),
              Windows(data([5, 6, 7] * 80), 10, kind, 1, 1)]
    assert same.order_sha256() == windows.order_sha256() not in {other.order_sha256() for other in others}
