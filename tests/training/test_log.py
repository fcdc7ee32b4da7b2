import csv

import pytest

from plotarmour.training import log as runlog
from plotarmour.training.log import COLUMNS, HEADER, RunLog, last_step, read_log


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
    with pytest.raises(ValueError, match="perplexitty"):
        RunLog(tmp_path / "log.csv", 0).append(step=1, perplexitty=3.0)


def test_a_start_killed_while_it_cuts_keeps_every_row_once(tmp_path, monkeypatch):
    """Guards: rows that are lost, or stand twice in log.cut.csv, after kills between its two writes."""
    path = tmp_path / "log.csv"
    log = RunLog(path, 0)
    for step in (1, 2, 3, 4):
        log.append(step=step, elapsed_s=step / 7)
    write = runlog.write_text

    def killed(to, text):
        if to == path:
            raise KeyboardInterrupt
        write(to, text)

    for _ in range(3):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runlog, "write_text", killed)
            RunLog(path, 2)
        assert steps(path) == ["1", "2", "3", "4"] and steps(tmp_path / "log.cut.csv") == ["3", "4"]
    log = RunLog(path, 2)
    log.append(step=3, elapsed_s=9.0)
    RunLog(path, 2)
    assert steps(path) == ["1", "2"] and steps(tmp_path / "log.cut.csv") == ["3", "4", "3"]


@pytest.mark.parametrize("tail", ["{row}", "2026-01-01T00:00:00Z,thr", "\0\0\0\0", "\0" * 200_000, "\udcff\udc80,1,,\n",
                                  "a,b,c\n"])
def test_a_torn_or_rotten_tail_never_stays(tmp_path, tail):
    """Guards: half a number that looks whole; a log that cannot be read, so that a run cannot go on."""
    path = tmp_path / "log.csv"
    log = RunLog(path, 0)
    for step in (1, 2):
        log.append(step=step, scaler_overflows=123)
    whole = path.read_bytes()
    row = whole.decode().splitlines()[2][:-1]  # 12 of 123: as many columns as a whole row
    path.write_bytes(whole + tail.format(row=row).encode("utf-8", errors="surrogateescape"))
    RunLog(path, 2).append(step=3)
    assert steps(path) == ["1", "2", "3"] and path.read_bytes().startswith(whole)


def test_a_log_is_read_while_it_is_written_and_where_it_is_damaged(tmp_path):
    """Guards: half a number as a point of a curve; readers that each take damage for something else."""
    path = tmp_path / "log.csv"
    assert read_log(path).empty and list(read_log(path)) == list(COLUMNS) and last_step(path) is None
    log = RunLog(path, 0)
    assert read_log(path).empty and last_step(path) is None
    log.append(step=1, val_loss=2.5)
    log.append(step=20, train_loss=1.25)
    whole = path.read_text()
    for damage in ("2026-11-21T09:34:00Z,21,0,18,2.0,0.1,3", "a,b,c\n", "\0" * 5000 + "\n", whole.splitlines()[2][:-1]):
        path.write_text(whole + damage)
        rows = read_log(path)
        assert list(rows["step"]) == [1, 20] and last_step(path) == 20
        assert rows["val_loss"].iloc[0] == 2.5 and rows["val_loss"].isna().iloc[1] and rows["utc"].isna().all()


def test_a_text_in_place_of_a_number_is_not_measured(tmp_path):
    """Guards: a traceback of the figures for a cell that an editor has changed."""
    row = ["2026-01-01T00:00:00Z", "1", *["0"] * 5, "much", *["0"] * 7]
    (tmp_path / "log.csv").write_text("\n".join([HEADER, ",".join(row), ""]))
    log = read_log(tmp_path / "log.csv")
    assert log["grad_norm"].isna().all() and log["step"].tolist() == [1]
