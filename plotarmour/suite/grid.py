"""A grid as it is written: a CSV whose rows are runs and whose columns are parameters of a notebook.

An empty cell leaves a parameter at the notebook's default, and a value has the default's type. A column `run` names run
folders; where it is empty, a name is made of the row's own values, so that it stays when rows are moved or added.
"""

import ast
import csv
import hashlib
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from plotarmour.cli import UserError
from plotarmour.suite.papermill import Value

EXPECTED = {bool: "True or False", int: "a whole number", float: "a number"}
OURS = {"results": "is what --out says", "tokens": "is what --out says", "status": "is a column of summary.csv",
        "reason": "is a column of summary.csv"}
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # on every system, in every shell
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # no names for folders on Windows
TAKEN = ("notebooks", "figures", "comparison", "comparison_extra", "learning_rates.csv", "summary.csv")
LONGEST_NAME = 64  # of those made here


@dataclass(frozen=True)
class Row:
    """One run of a grid.

    Attributes:
        line: of the CSV, from 1, where it begins.
        run: name of its run folder.
        values: by parameter, typed; empty cells and the run's name are left out.
    """

    line: int
    run: str
    values: dict[str, Value]


@dataclass(frozen=True)
class Grid:
    """A CSV and the notebook that it is for.

    Attributes:
        path: of the CSV.
        notebook: whose parameters the columns are.
        defaults: of the notebook's parameters, by name.
        columns: of the CSV.
        rows: in its order.
    """

    path: Path
    notebook: Path
    defaults: dict[str, Value]
    columns: list[str]
    rows: list[Row]


def read_grid(path: Path, notebook: Path) -> tuple[Grid, list[str]]:
    """Read a grid.

    Args:
        path: of the CSV: UTF-8, with or without byte order mark, separated by commas.
        notebook: .ipynb with a cell tagged `parameters`.

    Returns:
        The grid, and what is wrong with it, a line each.

    Raises:
        UserError: a file that cannot be read as what it should be, so that the rest cannot be judged.

    Example:
        A CSV of the lines `model,overrides` and `gpt2,learning_rate=0.004;seed=2` has one row, whose run is
        `gpt2_learning_rate-0.004_seed-2`.
    """
    defaults, (header, records) = parameters_of(notebook), _read_csv(path)
    wrong = [f"{notebook} has no parameter {name}; expected results and run, which say where DONE.json appears"
             for name in ("results", "run") if name not in defaults]
    for i, column in enumerate(header):
        if column in OURS:
            wrong.append(f"{path}, line 1: the column {column} {OURS[column]}; leave it out")
        elif column in header[:i]:
            wrong.append(f"{path}, line 1: the column {column} is there twice")
        elif column not in defaults:
            hint = "; cells are separated by commas" if ";" in column else ""
            wrong.append(f"{path}, line 1: unknown column {column!r}; the parameters of {notebook.name} are "
                         f"{', '.join(name for name in defaults if name not in OURS)}{hint}")
        elif type(defaults[column]) not in (*EXPECTED, str):
            wrong.append(f"{path}, line 1: {column} has the default {defaults[column]!r}; a grid gives numbers, True "
                         "or False, and text only")
    rows, seen = [], {}
    for line, cells in records:
        if len(cells) != len(header):
            wrong.append(f"{path}, line {line}: {len(cells)} cells; expected {len(header)}, as in the header (a cell "
                         "with a comma stands in quotes)")
            continue
        if not any(cells):
            wrong.append(f"{path}, line {line}: all cells are empty; expected a run, or no line")
            continue
        values, mistakes = _typed(dict(zip(header, cells, strict=True)), defaults)
        run = values.pop("run", "") or run_name(values, defaults)
        if not is_safe(run):
            mistakes.append(f"{run!r} cannot be the name of a run folder; expected letters, digits, . _ and -, a "
                            "letter or digit first, and no name that the results folder uses itself")
        key = run.casefold()  # a system may not tell Run and run apart
        if key in seen:
            line_before, values_before = seen[key]
            if values_before == values:
                wrong.append(f"{path}, line {line}: the same as line {line_before}; leave it out")
                continue
            mistakes.append(f"its run has the name {run} of the one in line {line_before}; name each otherwise in the "
                            "column run")
        seen.setdefault(key, (line, values))
        wrong += [f"{path}, line {line}: {mistake}" for mistake in mistakes]
        rows.append(Row(line, run, values))  # also with a mistake: there may be others in its recipe
    return Grid(path, notebook, defaults, header, rows), wrong


def parameters_of(notebook: Path) -> dict[str, Value]:
    """Return the parameters of a notebook with their defaults, from its cell tagged `parameters`.

    Read as Python, not by `papermill.inspect_notebook`, which gives no values and loses a line with a second "=".

    Raises:
        UserError: no notebook, or none that can be read, or without such a cell.
    """
    if not notebook.is_file() or notebook.suffix != ".ipynb":
        found = "is no notebook" if notebook.exists() else "does not exist"
        raise UserError(f"{notebook} {found}; expected the .ipynb whose parameters are the columns of the grid.")
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception as error:  # whatever nbformat meets in a file that is no notebook
        raise UserError(f"{notebook} cannot be read as a notebook ({type(error).__name__}); expected a whole "
                        ".ipynb.") from None
    cell = next((c for c in cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])), None)
    if cell is None:
        raise UserError(f"{notebook} has no cell tagged parameters; expected one, with a default for each column of "
                        "the grid.")
    found = {}
    try:
        for node in ast.parse(cell.source).body:
            target = node.target if isinstance(node, ast.AnnAssign) else (getattr(node, "targets", None) or [None])[0]
            if isinstance(target, ast.Name) and node.value is not None:
                try:
                    found[target.id] = ast.literal_eval(node.value)
                except ValueError:  # an expression: its type is not known before it is run
                    found[target.id] = None
    except SyntaxError as error:
        raise UserError(f"{notebook}: its cell tagged parameters is not Python (line {error.lineno}: {error.msg}); "
                        "expected one literal per line.") from None
    return found


def settings_of(overrides: str) -> list[str]:
    """Split a parameter `overrides` into settings, as the notebooks do."""
    return [setting for setting in overrides.split(";") if setting.strip()]


def run_name(values: dict[str, Value], defaults: dict[str, Value]) -> str:
    """Make the name of a run of its row's values: the model, then everything else by name.

    Args:
        values: of the row.
        defaults: of the notebook.

    Example:
        {"overrides": "seed=2;learning_rate=0.004", "model": "gpt2"} gives gpt2_learning_rate-0.004_seed-2.
    """
    parts = [f"{key}-{value}" for key, value in values.items() if key not in ("model", "overrides")]
    parts += [setting.strip().replace("=", "-", 1) for setting in settings_of(str(values.get("overrides", "")))]
    name = "_".join([str(values.get("model") or defaults.get("model") or "run"), *sorted(parts)])
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")
    if safe == name and len(name) <= LONGEST_NAME and is_safe(name):
        return name
    return f"{safe[:LONGEST_NAME - 9].rstrip('._-') or 'run'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def is_safe(name: str) -> bool:
    """Whether a run folder can have this name everywhere, and no other file of the results folder has it."""
    ours = name.casefold() in TAKEN or name.casefold().startswith(("tokens.", "built-in."))
    return bool(SAFE.fullmatch(name)) and not DEVICES.fullmatch(name) and not name.endswith(".") and not ours


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows, each with the line on which it begins; blank lines are left out."""
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
        told = "a quote is opened and not closed" if "end of data" in str(error) else str(error)
        raise UserError(f"{path}, line {line}: {told}; expected cells with commas, quotes or line breaks in double "
                        'quotes, and a quote inside them twice ("").') from None
    if len(records) < 2:
        raise UserError(f"{path} {'has a header and no rows' if records else 'is empty'}; expected a header that names "
                        "parameters of the notebook, and a row for each run.")
    return records[0][1], records[1:]


def _typed(cells: dict[str, str], defaults: dict[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """Values of a row's cells that are not empty, and what is wrong with them."""
    values, wrong = {}, []
    for column, text in cells.items():
        kind = type(defaults.get(column))
        if not text or column not in defaults or column in OURS:
            continue
        try:
            values[column] = _parse(text, kind) if kind in EXPECTED else text
        except (ValueError, KeyError):
            wrong.append(f"{column} = {text!r} is not {EXPECTED[kind]}")
    return values, wrong


def _parse(text: str, kind: type) -> Value:
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]  # a spreadsheet writes TRUE
    value = kind(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
