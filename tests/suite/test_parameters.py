"""Parameters of notebooks as papermill, grids and people give them."""

from pathlib import Path

import pytest

from plotarmour.cli import UserError
from plotarmour.suite.parameters import check_parameters, typed

HOME = Path.home()


@pytest.mark.parametrize(("kind", "value", "meant"), [
    (str, 2024, "2024"), (str, None, ""), (str, " bdh ", "bdh"), (str, "~/r.toml", str(HOME / "r.toml")),
    (Path, 2024, Path("2024")), (Path, "", None), (Path, None, None), (Path, "~/x", HOME / "x"),
    (bool, "false", False), (bool, "TRUE", True), (bool, False, False), (int, "3", 3), (float, 1, 1.0),
    (list, "bdh; gpt2;", ["bdh", "gpt2"]), (list, ["bdh", 2024], ["bdh", "2024"]), (list, None, []), (list, "", []),
])
def test_a_parameter_becomes_what_is_meant(kind, value, meant):
    """Guards: `-p extend false` taken for True; tracebacks of pathlib and str.split; a folder that is called ~."""
    got = typed("x", value, kind)
    assert got == meant and type(got) is type(meant)


@pytest.mark.parametrize(("kind", "value"), [
    (bool, "no"), (bool, 1), (bool, None), (int, "two"), (int, True), (int, 1.5), (int, "1e309"), (float, "two"),
    (str, ["a"]), (str, "a\0b"), (Path, {"a": 1}), (list, [["a"]]), (list, "a\0b")])
def test_what_cannot_be_meant_is_refused(kind, value):
    """Guards: a value that a run takes for another one; a NUL, which ends a grid in a traceback of subprocess."""
    with pytest.raises(UserError, match="^x = .* is not "):
        typed("x", value, kind)


def test_all_wrong_parameters_are_named_at_once():
    """Guards: a notebook that is started again for each of its mistakes."""
    given = {"extend": "no", "gpus": "two", "run": 2024}
    with pytest.raises(UserError, match="^extend = 'no' is not True or False. gpus = 'two' is not a whole number.$"):
        check_parameters(given, extend=bool, gpus=int, run=str)
    assert check_parameters(given | {"other": 1}, run=str).run == "2024"
