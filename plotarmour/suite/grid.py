"""A grid: a CSV whose rows are runs and whose columns are parameters of a notebook. Reads, checks and plans it.

An empty cell leaves a parameter at the notebook's default, and a value has the type of that default. The column `run`
names the run folders. Where it is empty, the name is made of the row's own values, so that it does not change when rows
are moved or added. The suite without a CSV is a grid of one row per model.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from plotarmour.cli import UserError
from plotarmour.config import DataConfig, Recipe, load_recipe
from plotarmour.data.readers import check_text
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.limits import cores
from plotarmour.models import KINDS
from plotarmour.suite.multi_gpu import check_gpus
from plotarmour.suite.notebooks import ROOT
from plotarmour.suite.papermill import Value, parameters_of
from plotarmour.suite.steps import require_text

EXPECTED = {bool: "True or False", int: "a whole number", float: "a number"}
OURS = {"results": "is set by --out", "tokens": "is set by --out", "status": "is a column of summary.csv",
        "reason": "is a column of summary.csv"}
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # a folder's name on every system, in every shell
RESERVED = ("notebooks", "figures", "comparison", "comparison_extra", "learning_rates.csv", "summary.csv")
LONGEST_NAME = 64  # characters of a name that is made here
TRAIN = ROOT / "notebooks" / "02_train.ipynb"


@dataclass(frozen=True)
class Row:
    """One run of a grid.

    Attributes:
        line: line of the CSV, from 1, on which the row begins.
        run: name of the run folder.
        values: the row's cells by column, typed; without empty cells and the run's name.
        parameters: what papermill passes to the notebook.
        folder: the run folder.
        executed: where papermill writes the notebook with its outputs.
        recipe: the resolved recipe; None where the notebook has no parameters recipe, model and overrides.
    """

    line: int
    run: str
    values: dict[str, Value]
    parameters: dict[str, Value]
    folder: Path
    executed: Path
    recipe: Recipe | None


@dataclass(frozen=True)
class Grid:
    """A checked grid.

    Attributes:
        notebook: what each row runs.
        out: the results folder.
        columns: of the CSV, in its order.
        defaults: of the notebook's parameters, by name.
        rows: in the order of the CSV.
        data: parameters of notebook 1, which makes the token files of all rows; None where rows have no recipe.
        environments: variables for each of the rows that run at once.
    """

    notebook: Path
    out: Path
    columns: list[str]
    defaults: dict[str, Value]
    rows: list[Row]
    data: dict[str, Value] | None
    environments: list[dict[str, str]]


def plan_grid(path: Path | None, recipe: str, out: Path, notebook: Path = TRAIN, text: Path | None = None,
              extra_text: Path | None = None, overrides: list[str] = (), gpus: int = 1, at_once: int = 1) -> Grid:
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

    Raises:
        UserError: all mistakes, one per line.

    Example:
        A CSV of the lines `model,overrides` and `gpt2,learning_rate=0.004;seed=2` has one row, whose run is
        `gpt2_learning_rate-0.004_seed-2`.
    """
    defaults = parameters_of(notebook)
    columns, cells = (["model"], [(1, [kind]) for kind in KINDS]) if path is None else _read_csv(path)
    wrong = [f"{notebook} has no parameter {name}; expected results and run, which say where DONE.json appears"
             for name in ("results", "run") if name not in defaults]
    has_recipe = {"recipe", "model", "overrides"} <= set(defaults)
    if (overrides or gpus != 1) and not has_recipe:
        wrong.append(f"{notebook} has no parameters recipe, model and overrides; leave out --set and --gpus")
    wrong += [f"{path}, line 1: {mistake}" for mistake in _wrong_columns(columns, defaults, notebook)]
    rows, lines_of_runs = [], {}
    for line, texts in cells:
        values, mistakes = _typed(columns, texts, defaults)
        prefix = f"{path}, line {line}: " if path else ""
        if not values:
            wrong += [prefix + mistake for mistake in mistakes]
            continue
        run = values.pop("run", "") or run_name(values, defaults)
        if not is_safe(run):
            mistakes.append(f"{run!r} cannot be the name of a run folder; expected letters, digits, . _ and -, a "
                            "letter or digit first, and no name that the results folder uses itself")
        if run.casefold() in lines_of_runs:  # a file system may not tell Run and run apart
            mistakes.append(f"its run has the same name as line {lines_of_runs[run.casefold()]}, {run}; leave the row "
                            "out, or name each run in the column run")
        lines_of_runs.setdefault(run.casefold(), line)
        parameters, resolved = dict(values), None
        try:
            if has_recipe:
                own, resolved = _resolve(values, defaults, recipe, overrides, gpus, text)
                parameters |= own
        except UserError as error:
            mistakes.append(str(error).rstrip("."))
        wrong += [prefix + mistake for mistake in mistakes]
        if not mistakes:
            rows.append(Row(line, run, values, parameters | {"results": str(out.resolve()), "run": run}, out / run,
                            out / "notebooks" / f"{notebook.stem}_{run}.ipynb", resolved))
    wrong += [f"{path}, line {mistake}" for mistake in _other_data(rows) + _same_training(rows)]
    environments = []
    try:
        for given in (text, extra_text):
            if given is not None:
                check_text(given)
        environments = share_machine(at_once, rows)
        if rows and rows[0].recipe and rows[0].recipe.data.tokenizer == "gpt2":
            make_tokenizer("gpt2")  # its vocabulary may have to be downloaded: fail now, not after hours
    except UserError as error:
        wrong.append(str(error).rstrip("."))
    if wrong:
        raise UserError("\n".join(f"{mistake}." for mistake in dict.fromkeys(wrong)))
    data = _data_parameters(rows[0], text, extra_text) if rows[0].recipe else None
    return Grid(notebook, out, columns, defaults, rows, data, environments)


def run_name(values: dict[str, Value], defaults: dict[str, Value]) -> str:
    """Return the name of a run folder: the model, then all other values of the row by name, sorted.

    Args:
        values: of the row.
        defaults: of the notebook.

    Example:
        {"overrides": "seed=2;learning_rate=0.004", "model": "gpt2"} gives gpt2_learning_rate-0.004_seed-2.
    """
    parts = [f"{key}-{value}" for key, value in values.items() if key not in ("model", "overrides")]
    parts += [setting.strip().replace("=", "-", 1) for setting in split_overrides(str(values.get("overrides", "")))]
    name = "_".join([str(values.get("model") or defaults.get("model") or "run"), *sorted(parts)])
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")
    if safe == name and len(name) <= LONGEST_NAME and is_safe(name):
        return name
    return f"{safe[:LONGEST_NAME - 9].rstrip('._-') or 'run'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def is_safe(name: str) -> bool:
    """Return whether a run folder can have this name on every system, beside the other files of the results folder."""
    reserved = name.casefold() in RESERVED or name.casefold().startswith(("tokens.", "built-in."))
    return bool(SAFE.fullmatch(name)) and not name.endswith(".") and not reserved


def split_overrides(overrides: str) -> list[str]:
    """Split the parameter `overrides` into its settings, as the notebooks do."""
    return [setting for setting in overrides.split(";") if setting.strip()]


def share_machine(at_once: int, rows: list[Row]) -> list[dict[str, str]]:
    """Return environment variables for each of the rows that run at once: one GPU each, or a share of the CPU cores.

    Args:
        at_once: rows that run at the same time.
        rows: of the grid.

    Raises:
        UserError: fewer GPUs than rows at once, or a row that trains on several GPUs itself.
    """
    if at_once < 1:
        raise UserError(f"--at-once {at_once} is not a number of runs; expected 1 or more.")
    if at_once == 1:
        return [{}]
    n_gpus = torch.cuda.device_count()
    on_gpus = n_gpus > 0 and any(row.recipe is None or row.recipe.training.device != "cpu" for row in rows)
    if on_gpus and at_once > n_gpus:
        raise UserError(f"--at-once {at_once}, and torch sees {n_gpus} GPU{'s' * (n_gpus > 1)} here; expected at most "
                        f"one run for each. Set --at-once {n_gpus}.")
    several = [row.run for row in rows if row.parameters.get("gpus", 1) != 1]
    if several:
        raise UserError(f"--at-once {at_once} gives each run one GPU or a share of the CPU cores, and {several[0]} "
                        "asks for several GPUs; leave out one of the two.")
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // at_once))}
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = visible or [str(i) for i in range(n_gpus)]  # as this process numbers them, where it sees only some
    return [threads | ({"CUDA_VISIBLE_DEVICES": names[i]} if on_gpus else {}) for i in range(at_once)]


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and the rows, each with the line on which it begins; blank lines are left out."""
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected a CSV for --grid.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}; save it "
                        "as CSV UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    records, line = [], 1
    try:
        for cells in reader:
            if cells:
                records.append((line, [cell.strip() for cell in cells]))
            line = reader.line_num + 1
    except csv.Error as error:
        mistake = "a quote is opened and not closed" if "end of data" in str(error) else str(error)
        raise UserError(f"{path}, line {line}: {mistake}; expected cells with commas, quotes or line breaks in double "
                        'quotes, and a quote inside them twice ("").') from None
    if len(records) < 2:
        raise UserError(f"{path} {'has a header and no rows' if records else 'is empty'}; expected a header that names "
                        "parameters of the notebook, and a row for each run.")
    return records[0][1], records[1:]


def _wrong_columns(columns: list[str], defaults: dict[str, Value], notebook: Path) -> list[str]:
    """Return the mistakes in the header of a grid."""
    wrong = []
    for i, column in enumerate(columns):
        if column in OURS:
            wrong.append(f"the column {column} {OURS[column]}; leave it out")
        elif column in columns[:i]:
            wrong.append(f"the column {column} appears twice")
        elif column not in defaults:
            hint = "; cells are separated by commas" if ";" in column else ""
            wrong.append(f"unknown column {column!r}; the parameters of {notebook.name} are "
                         f"{', '.join(name for name in defaults if name not in OURS)}{hint}")
        elif type(defaults[column]) not in (*EXPECTED, str):
            wrong.append(f"{column} has the default {defaults[column]!r}; a grid can set numbers, True or False, and "
                         "text only")
    return wrong


def _typed(columns: list[str], texts: list[str], defaults: dict[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """Return the values of a row's cells that are not empty, and the mistakes in them."""
    if len(texts) != len(columns):
        return {}, [f"{len(texts)} cells; expected {len(columns)}, as in the header (a cell with a comma stands in "
                    "quotes)"]
    if not any(texts):
        return {}, ["all cells are empty; expected a run, or no line"]
    values, wrong = {}, []
    for column, text in zip(columns, texts, strict=True):
        kind = type(defaults.get(column))
        if not text or kind not in (*EXPECTED, str) or column in OURS:
            continue
        try:
            values[column] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            if kind is float and not math.isfinite(values[column]):
                raise ValueError(text)
        except (ValueError, KeyError):
            wrong.append(f"{column} = {text!r} is not {EXPECTED[kind]}")
    return values, wrong


def _resolve(values: dict[str, Value], defaults: dict[str, Value], recipe: str, overrides: list[str], gpus: int,
             text: Path | None) -> tuple[dict[str, Value], Recipe]:
    """Return the parameters of a row that trains a recipe, and the resolved recipe."""
    name, model = values.get("recipe", recipe), values.get("model", defaults["model"])
    settings = [*overrides, *split_overrides(values.get("overrides", defaults["overrides"]))]
    resolved = load_recipe(name, model, settings)
    require_text(resolved, text)
    resolved.model_config(vocab_size=300)  # refuses an impossible shape
    parameters = {"recipe": str(Path(name).resolve()) if name.endswith(".toml") else name, "model": model,
                  "overrides": ";".join(settings)}
    if "gpus" in defaults:
        parameters["gpus"] = values.get("gpus", gpus)
        check_gpus(parameters["gpus"], resolved)
    if values.get("continue_from"):
        parameters["continue_from"] = str(Path(values["continue_from"]).resolve())  # papermill runs in another folder
    return parameters, resolved


def _data_parameters(row: Row, text: Path | None, extra_text: Path | None) -> dict[str, Value]:
    """Return the parameters of notebook 1, with the overrides that it reads: a shape of GPT-2 may be none for BDH."""
    known = {field.name for field in fields(DataConfig)} | {"context_length", "windows"}
    overrides = [o for o in split_overrides(row.parameters["overrides"]) if o.partition("=")[0].strip() in known]
    return {"recipe": row.parameters["recipe"], "results": row.parameters["results"], "overrides": ";".join(overrides),
            "text": str(text.resolve()) if text else "", "extra_text": str(extra_text.resolve()) if extra_text else ""}


def _other_data(rows: list[Row]) -> list[str]:
    """Return a complaint for each row that needs other token files than the first row."""
    if not rows or rows[0].recipe is None:
        return []
    first, wrong = asdict(rows[0].recipe.data), []
    for row in rows[1:]:
        differing = [f"{key} is {value}, there {first[key]}" for key, value in asdict(row.recipe.data).items()
                     if value != first[key]]
        if differing:
            wrong.append(f"{row.line}: it needs other token files than line {rows[0].line}: {'; '.join(differing)}. "
                         "Put it into a grid of its own, with another --out")
    return wrong


def _same_training(rows: list[Row]) -> list[str]:
    """Return a complaint for each row whose resolved recipe is the same as that of an earlier row."""
    lines, wrong = {}, []
    for row in rows:
        if row.recipe is None:
            continue
        others = {key: value for key, value in row.parameters.items()
                  if key not in ("run", "recipe", "model", "overrides")}
        key = json.dumps([others, row.recipe.to_dict() | {"name": ""}], sort_keys=True)
        if key in lines:
            wrong.append(f"{row.line}: it trains the same as line {lines[key]}; leave it out, or set another seed")
        lines.setdefault(key, row.line)
    return wrong
