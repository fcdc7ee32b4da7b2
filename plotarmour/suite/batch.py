"""The suite as a batch: the notebooks through papermill, headless, into one results folder."""

import subprocess
import sys
import time
from pathlib import Path

from plotarmour.config import MODELS, load_recipe
from plotarmour.errors import UserError
from plotarmour.suite.notebooks import ROOT
from plotarmour.suite.steps import require_text
from plotarmour.text.stories import check_text


def run_suite(recipe: str, out: Path, text: Path | None = None, extra_text: Path | None = None,
              overrides: list[str] = ()) -> None:
    """Run 01, 02 for each model and 03.

    Args:
        recipe: its name.
        out: results folder: executed notebooks, token files, run folders, comparison.
        text: what to learn from; None for the built-in corpus.
        extra_text: a second test set.
        overrides: "key=value" for both models' training.

    Raises:
        UserError: wrong input, before anything is started; a notebook that failed.
    """
    for model in MODELS:
        require_text(load_recipe(recipe, model, overrides), text)
    for path in (text, extra_text):
        if path is not None:
            check_text(path)
    notebooks = out / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    shared = {"recipe": str(Path(recipe).resolve()) if recipe.endswith(".toml") else recipe,
              "results": str(out.resolve()), "overrides": ";".join(overrides)}
    texts = {"text": str(text.resolve()) if text else "", "extra_text": str(extra_text.resolve()) if extra_text else ""}
    plan = [("01_pretokenize", "01_pretokenize", shared | texts)]
    plan += [("02_train", f"02_train_{model}", shared | {"model": model}) for model in MODELS]
    plan += [("03_compare", "03_compare", {"recipe": shared["recipe"], "results": shared["results"]})]
    start = time.perf_counter()
    for i, (name, executed, parameters) in enumerate(plan, 1):
        before = time.perf_counter()
        print(f"[{i}/{len(plan)}] {executed} ...", flush=True)
        _execute(ROOT / "notebooks" / f"{name}.ipynb", notebooks / f"{executed}.ipynb", parameters)
        print(f"[{i}/{len(plan)}] {executed} done in {time.perf_counter() - before:.0f} s", flush=True)
    print(f"suite {recipe} done in {time.perf_counter() - start:.0f} s: {out}")


def _execute(source: Path, executed: Path, parameters: dict[str, str]) -> None:
    """Run one notebook in a papermill process of its own; its noise goes to a log beside the executed notebook."""
    command = [sys.executable, "-m", "papermill", str(source), str(executed), "--cwd", str(ROOT), "--kernel", "python3",
               "--no-progress-bar"]
    for name, value in parameters.items():
        command += ["-r", name, value]
    log = executed.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if ended.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise UserError(f"{executed.name} failed: {lines[-1] if lines else 'no output'}. See {executed} and {log}; the "
                        "same command goes on from there.")
