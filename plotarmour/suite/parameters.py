"""Parameters of notebooks: the values that papermill, a grid or a person gives, as the types that are expected."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plotarmour import machine
from plotarmour.cli import UserError
from plotarmour.config import Recipe

EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path",
            list: "texts, in a list or separated by ;"}


def check_parameters(values: dict[str, Any], **kinds: type) -> SimpleNamespace:
    """Return the parameters of a notebook, each as its kind.

    Args:
        values: by name, such as `globals()`.
        kinds: by name: a key of `EXPECTED`.

    Raises:
        UserError: values of which none of its kind can be meant, all in one message.

    Example:
        run=2024 of kind str is "2024", extend="false" of kind bool is False, runs="a; b" of kind list is ["a", "b"],
        text="" of kind Path is None.
    """
    checked, wrong = {}, []
    for name, kind in kinds.items():
        try:
            checked[name] = typed(name, values[name], kind)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError(" ".join(wrong))
    return SimpleNamespace(**checked)


def typed(name: str, value: Any, kind: type) -> Any:
    """Return one parameter, or a cell of a grid, as its kind; "~" at the beginning of a text is the home folder.

    papermill turns 2024 into a number, None into None, and leaves false a text. None is taken for an empty text.
    """
    if kind is list:
        parts = value if isinstance(value, list | tuple) else typed(name, value, str).split(";")
        return [text for text in (typed(name, part, str) for part in parts) if text]
    text = "" if value is None else str(value).strip()
    try:
        if isinstance(value, list | tuple | dict) or "\0" in text:  # no path and no process argument has a NUL
            raise ValueError
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (str, Path):
            text = os.path.expanduser(text)
            return text if kind is str else Path(text) if text else None
        return kind(text)
    except (ValueError, KeyError):
        raise UserError(f"{name} = {value!r} is not {EXPECTED[kind]}.") from None


def require_text(recipe: Recipe, text: Path | None) -> None:
    """Raise `UserError` where a recipe needs a text and none is given."""
    if text is None and not recipe.data.corpus_stories:
        raise UserError(
            f"recipe {recipe.name} needs a text; expected --text FILE. "
            "TinyStories: python tools/download_tinystories.py fetches 22 MB, enough for a laptop (--part train: 2.2 "
            "GB). Without a text: --recipe tiny.")


def results_folder(recipe: str, given: Path | None = None) -> Path:
    """Return the folder of a recipe's results: `given`, or results/RECIPE in the checkout or the host's own folder."""
    if given is not None:
        return given
    base = {"kaggle": machine.KAGGLE / "working", "colab": Path.cwd()}.get(machine.host(),
                                                                           Path(__file__).resolve().parents[2])
    return base / "results" / Path(recipe).stem
