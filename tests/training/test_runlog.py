import csv

import pytest

from plotarmour.training.runlog import COLUMNS, RunLog


def steps(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_a_resumed_log_is_cut_to_the_checkpoint_and_keeps_the_cut_rows_beside(tmp_path):
    """Guards: rows of steps that a resumed run repeats; a torn last line after a kill."""
    path = tmp_path / "log.csv"
    log = RunLog(path, 0)
    for step in (1, 2, 3, 4):
        log.append(step=step, train_loss=1.0 / 3.0)
    with path.open("a") as file:
        file.write("2026-01-01T00:00:00Z,5,0.1")  # killed while writing
    RunLog(path, 2).append(step=3)
    assert steps(path) == ["1", "2", "3"]
    assert steps(tmp_path / "log.cut.csv") == ["3", "4", "5"]
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert path.read_text().splitlines()[1].count("0.3333333") == 1


def test_a_column_that_does_not_exist_is_refused(tmp_path):
    """Guards: a number that is measured and silently dropped."""
    with pytest.raises(KeyError, match="perplexitty"):
        RunLog(tmp_path / "log.csv", 0).append(step=1, perplexitty=3.0)
