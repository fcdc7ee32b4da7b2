"""What each row of a grid is going to do, checked as a whole before anything starts."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from plotarmour.cli import UserError
from plotarmour.config import DataConfig, Recipe, load_recipe
from plotarmour.data.readers import check_text
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.suite.grid import Grid, Row, read_grid, settings_of
from plotarmour.suite.multi_gpu import check_gpus
from plotarmour.suite.papermill import Value
from plotarmour.suite.steps import require_text

LOOKS = ("context_length", "windows")  # what notebook 1 reads of the training settings


@dataclass(frozen=True)
class Job:
    """A row and what its notebook gets.

    Attributes:
        row: of the grid.
        parameters: for papermill.
        folder: the run folder.
        executed: where the notebook goes with its outputs.
        recipe: resolved; None where the notebook knows no recipes.
    """

    row: Row
    parameters: dict[str, Value]
    folder: Path
    executed: Path
    recipe: Recipe | None


def plan_grid(path: Path, notebook: Path, recipe: str, out: Path, text: Path | None = None,
              extra_text: Path | None = None, overrides: list[str] = (), gpus: int = 1,
              at_once: int = 1) -> tuple[Grid, list[Job]]:
    """Read a grid and resolve each of its rows.

    Args:
        path: of the CSV.
        notebook: for its rows; one with the parameters recipe, model and overrides trains recipes.
        recipe: for rows that name none.
        out: results folder.
        text, extra_text: see `run_suite`.
        overrides: for all rows; a row's own come after them.
        gpus: for rows that do not say.
        at_once: rows at a time.

    Raises:
        UserError: all mistakes, a line each.
    """
    grid, wrong = read_grid(path, notebook)
    trains = {"recipe", "model", "overrides"} <= set(grid.defaults)
    if (overrides or gpus != 1) and not trains:
        wrong.append(f"{notebook} knows no recipes: it has no parameters recipe, model and overrides; leave out --set "
                     "and --gpus")
    jobs = []
    for row in grid.rows:
        try:
            parameters, resolved = _resolved(row, grid, recipe, overrides, gpus, text) if trains else ({}, None)
        except UserError as error:
            wrong.append(f"{path}, line {row.line}: {str(error).rstrip('.')}")
            continue
        parameters = row.values | parameters | {"results": str(out.resolve()), "run": row.run}
        jobs.append(Job(row, parameters, out / row.run, out / "notebooks" / f"{notebook.stem}_{row.run}.ipynb",
                        resolved))
    wrong += [f"{path}, line {mistake}" for mistake in _unequal(jobs) + _twice(jobs)]
    for given in (text, extra_text):
        try:
            if given is not None:
                check_text(given)
        except UserError as error:
            wrong.append(str(error).rstrip("."))
    try:
        slots(at_once, jobs)
        if jobs and jobs[0].recipe and jobs[0].recipe.data.tokenizer == "gpt2":
            make_tokenizer("gpt2")  # its vocabulary may be nowhere to be had
    except UserError as error:
        wrong.append(str(error).rstrip("."))
    if wrong:
        raise UserError("\n".join(f"{mistake}." for mistake in wrong))
    return grid, jobs


def data_parameters(jobs: list[Job], text: Path | None, extra_text: Path | None) -> dict[str, Value]:
    """Return the parameters of notebook 1 that make the token files of all rows.

    Of the overrides only those that it heeds: a shape of GPT-2 may be none for its BDH.
    """
    known = {field.name for field in fields(DataConfig)} | set(LOOKS)
    settings = [o for o in settings_of(jobs[0].parameters["overrides"]) if o.partition("=")[0] in known]
    return {"recipe": jobs[0].parameters["recipe"], "results": jobs[0].parameters["results"],
            "overrides": ";".join(settings), "text": str(text.resolve()) if text else "",
            "extra_text": str(extra_text.resolve()) if extra_text else ""}


def slots(at_once: int, jobs: list[Job], cpus: int = 1) -> list[dict[str, str]]:
    """Return the environment of each place in which a row runs: a GPU of its own, or its share of the CPU.

    Args:
        at_once: places.
        jobs: of the grid.
        cpus: to share out.

    Raises:
        UserError: fewer GPUs than places.
    """
    if at_once < 1:
        raise UserError(f"--at-once {at_once} is no number of runs; expected 1 or more.")
    if at_once == 1:
        return [{}]
    found = torch.cuda.device_count()
    on_gpus = found > 0 and any(job.recipe is None or job.recipe.training.device != "cpu" for job in jobs)
    if on_gpus and at_once > found:
        raise UserError(f"--at-once {at_once}, and torch sees {found} GPU{'s' * (found > 1)} here; expected at most "
                        f"one run for each. Set --at-once {found}.")
    several = [job.row.run for job in jobs if job.parameters.get("gpus", 1) != 1]
    if several:
        raise UserError(f"--at-once {at_once} gives each run one GPU or its share of the CPU, and {several[0]} asks "
                        "for several; leave out one of both.")
    threads = {"OMP_NUM_THREADS": str(max(1, cpus // at_once))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": _visible(i)} if on_gpus else {}) for i in range(at_once)]


def _resolved(row: Row, grid: Grid, recipe: str, overrides: list[str], gpus: int,
              text: Path | None) -> tuple[dict[str, Value], Recipe]:
    """Parameters of a notebook that trains recipes, and the recipe that it will train."""
    name, model = row.values.get("recipe", recipe), row.values.get("model", grid.defaults["model"])
    settings = [*overrides, *settings_of(row.values.get("overrides", grid.defaults["overrides"]))]
    resolved = load_recipe(name, model, settings)
    require_text(resolved, text)
    resolved.model_config(vocab_size=300)
    parameters = {"recipe": str(Path(name).resolve()) if name.endswith(".toml") else name, "model": model,
                  "overrides": ";".join(settings)}
    if "gpus" in grid.defaults:
        parameters["gpus"] = row.values.get("gpus", gpus)
        check_gpus(parameters["gpus"], resolved)
    if row.values.get("continue_from"):
        parameters["continue_from"] = str(Path(row.values["continue_from"]).resolve())  # papermill works elsewhere
    return parameters, resolved


def _unequal(jobs: list[Job]) -> list[str]:
    """Rows that would need other token files than the first."""
    if not jobs or jobs[0].recipe is None:
        return []
    first, wrong = asdict(jobs[0].recipe.data), []
    for job in jobs[1:]:
        differing = [f"{key} is {value}, there {first[key]}" for key, value in asdict(job.recipe.data).items()
                     if value != first[key]]
        if differing:
            wrong.append(f"{job.row.line}: it needs other token files than line {jobs[0].row.line}: "
                         f"{'; '.join(differing)}. Put it into a grid of its own, with another --out")
    return wrong


def _twice(jobs: list[Job]) -> list[str]:
    """Rows that say in other words what an earlier one says."""
    seen, wrong = {}, []
    for job in jobs:
        said = {key: value for key, value in job.parameters.items()
                if key not in ("run", "recipe", "model", "overrides")}
        what = json.dumps([said, job.recipe.to_dict() | {"name": ""}], sort_keys=True) if job.recipe else job.row.run
        if what in seen:
            wrong.append(f"{job.row.line}: it trains the same as line {seen[what]}; leave it out, or give it another "
                         "seed")
        seen.setdefault(what, job.row.line)
    return wrong


def _visible(i: int) -> str:
    """The name of the i-th GPU that torch sees here, for processes that shall see no other."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",")[i].strip() if given else str(i)
