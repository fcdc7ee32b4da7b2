import ast
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm

from plotarmour.cli import as_path, duration, progress, run_command, say, warn


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


def test_a_warning_is_printed_once_and_is_never_an_exception(capsys, warned):
    """Guards: work that ends in a traceback under PYTHONWARNINGS=error; a line for every model of a grid."""
    with warned(), warnings.catch_warnings(action="error"):
        for _ in range(2):
            warn("patience is ignored.")
    assert capsys.readouterr().err == "warning: patience is ignored.\n"


def test_the_package_warns_in_one_way(root):
    """Guards: a message to people through `warnings.warn`, which PYTHONWARNINGS=error turns into a traceback."""
    sources = [path for room in ("plotarmour", "contrib", "tools") for path in (root / room).rglob("*.py")]
    assert [path for path in sources if "warnings.warn(" in path.read_text(encoding="utf-8")] == []


def test_the_encoding_of_every_text_file_is_stated(root):
    """Guards: UTF-8 that Windows reads and writes as cp1252."""
    unstated, opens_others = [], ("os.open", "TokenFile.open")
    rooms = ("plotarmour", "contrib", "tools", "notebooks", "benchmarks")
    for path in (path for room in rooms for path in (root / room).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            name, values = ast.unparse(call.func), [*call.args, *(keyword.value for keyword in call.keywords)]
            is_binary = any("b" in str(getattr(value, "value", "")) for value in values)
            opens = name.split(".")[-1] in ("open", "read_text", "write_text") and name not in opens_others
            # Our own write_text is a plain name, and always UTF-8.
            if opens and name != "write_text" and not is_binary and "encoding" not in ast.unparse(call):
                unstated.append(f"{path.name}: {ast.unparse(call)}")
    assert unstated == []


def test_what_the_encoding_of_the_output_lacks_is_escaped(monkeypatch):
    """Guards: minutes of scoring that end in UnicodeEncodeError, where Windows writes cp1252 into a pipe."""
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="cp1252"))
    run_command(lambda: print("größe \u03bc \U0001f409"))
    assert output.getvalue().decode("cp1252").strip() == "größe \\u03bc \\U0001f409"


def test_a_closed_terminal_does_not_stop_the_work(monkeypatch):
    """Guards: training that ends before it has saved, because its terminal is gone."""
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    say("finishing the step")


@pytest.mark.skipif(os.name != "posix", reason="closes streams by the shell")
def test_a_command_without_stdout_and_stderr_does_its_work(root, tmp_path):
    """Guards: no token file and no word, because tqdm met None; all done, and then AttributeError."""
    (tmp_path / "s.txt").write_text("a\n<|endoftext|>\nb")
    tool = root / "tools" / "pre_tokenize.py"
    done = subprocess.run(f'exec "{sys.executable}" "{tool}" s.txt --tokenizer bytes --out x.bin >&- 2>&-', shell=True,
                          cwd=tmp_path)
    assert done.returncode == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["s.txt", "x.bin"]


def test_a_tilde_is_the_home_folder(root, monkeypatch, tmp_path):
    """Guards: --out=~/x.bin that writes into a folder named ~; a tool whose paths are not expanded."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert as_path("~/x.bin") == as_path(tmp_path / "x.bin") == tmp_path / "x.bin"
    assert as_path("a/~b") == Path("a/~b") and as_path("~nobody.at.all") == Path("~nobody.at.all")
    for tool in (root / "tools").glob("*.py"):
        assert "type=Path" not in tool.read_text(encoding="utf-8"), f"{tool}: expected as_path"
