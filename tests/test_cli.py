import sys

import pytest
from tqdm import tqdm

from plotarmour.cli import duration, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_where_there_is_no_terminal_progress_is_a_line_now_and_then(clock, capsys):
    """Guards: a log or an executed notebook with a line, or a control character, for each state of a bar."""
    with progress(200, "tokens", "score a") as bar:
        for _ in range(100):
            clock[0] += 1.0
            bar.update(2)
    err = capsys.readouterr().err
    assert err.splitlines() == ["score a: 30% of 200 tokens, 2 tokens/s, 70 s left",
                                "score a: 60% of 200 tokens, 2 tokens/s, 40 s left",
                                "score a: 90% of 200 tokens, 2 tokens/s, 10 s left"] and "\r" not in err


def test_a_line_of_work_that_gives_its_own_speed_ends_with_it(clock, capsys):
    """Guards: a time left by steps alone beside one that knows of evaluations; a line of a process that is not first;
    1,440 lines of a run of twelve hours."""
    for is_shown in (True, False):
        with progress(43_200, "steps", "bdh", initial=3600, is_timed=False, is_shown=is_shown) as bar:
            for _ in range(39_600):
                clock[0] += 1.0
                bar.set_postfix_str("loss 2.500, 10 min left", refresh=False)
                bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "bdh: 8% of 43,200 steps, loss 2.500, 10 min left" and 250 < len(lines) < 400


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    """Guards: a terminal that is filled with lines."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(10, "steps", "bdh") as bar:
        assert type(bar) is tqdm and bar.total == 10
    with progress(10, "steps", "bdh", is_shown=False) as bar:
        assert bar.disable


def test_durations_for_people():
    """Guards: "0 h 00 min" of a short run, and 3,600 s of a long one."""
    assert [duration(s) for s in (4.6, 89, 91, 11_100)] == ["5 s", "89 s", "2 min", "3 h 05 min"]
