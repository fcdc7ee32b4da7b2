"""A grid: a CSV whose rows are runs and whose columns are parameters of a notebook. Reads, checks and plans it.

An empty cell leaves a parameter at the notebook's default, and a value has the type of that default. The column `run`
names the run folders. Where it is empty, the name is made of the row's own values, so that it does not change when rows
are moved or added. The suite without a CSV is a grid of one row per model.
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from plotarmour.cli import UserError, as_path
from plotarmour.config import DataConfig, Recipe, load_recipe
from plotarmour.data.readers import check_text
from plotarmour.machine import cores
from plotarmour.models import SUITE
from plotarmour.suite.multi_gpu import check_gpus
from plotarmour.suite.notebooks import ROOT, Value, parameters_of
from plotarmour.suite.parameters import require_text, typed

NO_COLUMNS = {"results", "tokens", "status", "reason"}  # --out sets two of them, and summary.csv has the others
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # a folder's name on every system, in every shell
TRAIN = ROOT / "notebooks" / "02_train.ipynb"


@dataclass(frozen=True)
class Row:
    """One run of a grid."""

    run: str  # name of the run folder
    values: dict[str, Value]  # the cells by column, typed; without empty cells and the run's name
    parameters: dict[str, Value]  # that papermill passes to the notebook
    folder: Path  # the run folder
    executed: Path  # the notebook with its outputs
    recipe: Recipe | None  # resolved; None where the notebook has no parameters recipe, model and overrides


@dataclass(frozen=True)
class Grid:
    """A checked grid."""

    notebook: Path  # that each row runs
    out: Path  # the results folder
    columns: list[str]  # of the CSV, in its order
    defaults: dict[str, Value]  # of the notebook's parameters
    rows: list[Row]  # in the order of the CSV
    data: dict[str, Value] | None  # parameters of notebook 1, which makes the token files; None where rows need none
    environments: list[dict[str, str]]  # variables for each of the rows that run at once


def plan_grid(path: Path | None, recipe: str, out: Path, notebook: Path = TRAIN, text: Path | None = None,
              extra_text: Path | None = None, overrides: list[str] = (), gpus: int = 1, at_once: int = 1,
              models: Sequence[str] = SUITE) -> Grid:
    """Read a grid, resolve each row and check everything that can be checked before a run starts.

    Args:
        path: CSV in UTF-8, with or without a byte order mark, separated by commas; None for one row per model.
        recipe: for rows that name none.
        out: results folder.
        notebook: .ipynb that each row runs, with a cell tagged `parameters`.
        text: UTF-8 text to learn from; None for the built-in corpus.
        extra_text: a second test set.
        overrides: "key=value" for all rows; a row's own overrides come after them.
        gpus: GPUs per row, for rows that do not say.
        at_once: rows that run at the same time.
        models: kinds of model, a row each, where `path` is None.

    Raises:
        UserError: a file that cannot be used, or the first mistake of each row, one per line.

    Example:
        A CSV of the lines `model,overrides` and `gpt2,learning_rate=0.004;seed=2` has one row, whose run is
        `gpt2_learning_rate-0.004_seed-2`.
    """
    defaults = parameters_of(notebook)
    has_recipe = {"recipe", "model", "overrides"} <= set(defaults)
    if not {"results", "run"} <= set(defaults):
        raise UserError(f"{notebook} has no parameters results and run; expected both, which name where its DONE.json "
                        "appears.")
    if (overrides or gpus != 1) and not has_recipe:
        raise UserError(f"{notebook} has no parameters recipe, model and overrides; leave out --set and --gpus.")
    for given in filter(None, (text, extra_text)):
        check_text(given)
    columns, records = (_read_csv(path, defaults) if path is not None else
                        (["model"], [(0, {"model": kind}) for kind in models]))
    rows, wrong = [], []
    for line, cells in records:
        try:
            if None in cells:
                raise UserError("more cells than columns; put a cell that has a comma in double quotes.")
            values = {column: typed(column, cell, type(defaults[column])) for column, cell in cells.items()
                      if cell.strip()}
            run = values.pop("run", "") or _run_name(values, defaults)
            if not SAFE.fullmatch(run):
                raise UserError(f"{run!r} cannot be the name of a run folder; expected at most 100 letters, digits, "
                                ". _ and -, a letter or digit first.")
            if run.casefold() in [row.run.casefold() for row in rows]:  # a file system may not tell Run and run apart
                raise UserError(f"an earlier row has the same run, {run}; leave one out, or name both in the "
                                "column run.")
            parameters, resolved = (_resolve(values, defaults, recipe, overrides, gpus, text) if has_recipe
                                    else ({}, None))
            if rows and resolved and resolved.data != rows[0].recipe.data:
                raise UserError("other [data] settings than in the first row; expected the same token files for all "
                                "rows. Put this row into a grid with another --out.")
        except UserError as error:
            wrong.append(f"{path}, line {line}: {error}" if path else str(error))
            continue
        rows.append(Row(run, values, values | parameters | {"results": str(out.resolve()), "run": run}, out / run,
                        out / "notebooks" / f"{notebook.stem}_{run}.ipynb", resolved))
    if wrong:
        raise UserError("\n".join(dict.fromkeys(wrong)))
    data = _data_parameters(rows[0], text, extra_text) if has_recipe else None
    return Grid(notebook, out, columns, defaults, rows, data, share_machine(at_once, rows))


def _read_csv(path: Path, defaults: dict[str, Value | None]) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the columns, and the cells of each row by column, beside its line; empty rows are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="", strict=True, skipinitialspace=True)
        try:
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
            rows = [(reader.line_num, row) for row in reader if any(row.values())]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {reader.line_num + 1}: {error}; expected a CSV in UTF-8, with a comma "
                            "between two cells, and double quotes around a cell that has a comma or a quote.") from None
    settable = [name for name, default in defaults.items() if name not in NO_COLUMNS and isinstance(default, Value)]
    wrong = [name for name in columns if name not in settable or columns.count(name) > 1]
    if wrong or not rows:
        found = f"{', '.join(map(repr, wrong))} in the header" if wrong else "no row"
        raise UserError(f"{path}: {found}; expected a row for each run below a header of parameters of the notebook, "
                        f"between commas and each once: {', '.join(settable)}.")
    return columns, rows


def _run_name(values: dict[str, Value], defaults: dict[str, Value]) -> str:
    """Return the name of a row's run folder: the model, then all other values by name, sorted."""
    parts = [f"{key}-{value}" for key, value in values.items() if key not in ("model", "overrides")]
    parts += [setting.strip().replace("=", "-", 1) for setting in _split_overrides(values.get("overrides", ""))]
    name = "_".join([str(values.get("model") or defaults.get("model") or "run"), *sorted(parts)])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]


def _split_overrides(overrides: str) -> list[str]:
    """Split the parameter `overrides` into its settings, as the notebooks do."""
    return [setting for setting in overrides.split(";") if setting.strip()]


def _resolve(values: dict[str, Value], defaults: dict[str, Value], recipe: str, overrides: list[str], gpus: int,
             text: Path | None) -> tuple[dict[str, Value], Recipe]:
    """Return the parameters of a row that trains a recipe, and the resolved recipe."""
    name, model = values.get("recipe", recipe), values.get("model", defaults["model"])
    settings = [*overrides, *_split_overrides(values.get("overrides", defaults["overrides"]))]
    resolved = load_recipe(name, model, settings)
    require_text(resolved, text)
    parameters = {"recipe": str(as_path(name).resolve()) if name.endswith(".toml") else name, "model": model,
                  "overrides": ";".join(settings)}
    if "gpus" in defaults:
        parameters["gpus"] = values.get("gpus", gpus)
        check_gpus(parameters["gpus"], resolved)
    if values.get("continue_from"):
        # Absolute, because papermill runs in another folder.
        parameters["continue_from"] = str(as_path(values["continue_from"]).resolve())
    return parameters, resolved


def _data_parameters(row: Row, text: Path | None, extra_text: Path | None) -> dict[str, Value]:
    """Return the parameters of notebook 1, with the overrides that it reads: a shape of GPT-2 may be none for BDH."""
    known = {field.name for field in fields(DataConfig)} | {"context_length", "windows"}  # for the least length
    overrides = [o for o in _split_overrides(row.parameters["overrides"]) if o.partition("=")[0].strip() in known]
    return {"recipe": row.parameters["recipe"], "results": row.parameters["results"], "overrides": ";".join(overrides),
            "text": str(text.resolve()) if text else "", "extra_text": str(extra_text.resolve()) if extra_text else ""}


def share_machine(at_once: int, rows: list[Row]) -> list[dict[str, str]]:
    """Return environment variables for each of the rows that run at once: one GPU each, or a share of the CPU cores."""
    if at_once == 1:
        return [{}]
    import torch  # seconds, in which a mistake in a grid is not reported

    n_gpus = torch.cuda.device_count()
    on_gpus = n_gpus > 0 and any(row.recipe is None or row.recipe.training.device != "cpu" for row in rows)
    if at_once < 1 or (on_gpus and at_once > n_gpus):
        raise UserError(f"--at-once {at_once} is out of range; expected 1 or more, and at most one run per GPU (torch "
                        f"sees {n_gpus}).")
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // at_once))}
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = visible or [str(i) for i in range(n_gpus)]  # as this process numbers them, where it sees only some
    return [threads | ({"CUDA_VISIBLE_DEVICES": names[i]} if on_gpus else {}) for i in range(at_once)]
