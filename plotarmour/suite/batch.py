"""The suite as a batch: the notebooks through papermill, headless, into one results folder."""

import csv
import shutil
import time
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.data.readers import check_text
from plotarmour.data.tokenizer import make_tokenizer
from plotarmour.models import KINDS
from plotarmour.suite.multi_gpu import check_gpus
from plotarmour.suite.notebooks import ROOT
from plotarmour.suite.papermill import run_notebook
from plotarmour.suite.steps import require_text


def run_suite(recipe: str, out: Path, text: Path | None = None, extra_text: Path | None = None,
              overrides: list[str] = (), gpus: int = 1) -> None:
    """Run 01, 02 for each model and 03.

    Args:
        recipe: its name.
        out: results folder: executed notebooks, token files, run folders, comparison.
        text: what to learn from; None for the built-in corpus.
        extra_text: a second test set.
        overrides: "key=value" for both models' training.
        gpus: of this machine, that train each model together.

    Raises:
        UserError: wrong input, before anything is started; a notebook that failed.
    """
    for model in KINDS:
        settings = load_recipe(recipe, model, overrides)
        require_text(settings, text)
        settings.model_config(vocab_size=300)
        check_gpus(gpus, settings)
    for path in (text, extra_text):
        if path is not None:
            check_text(path)
    if settings.data.tokenizer == "gpt2":
        make_tokenizer("gpt2")  # its vocabulary may be nowhere to be had
    notebooks, new = out / "notebooks", not out.exists()
    notebooks.mkdir(parents=True, exist_ok=True)
    shared = {"recipe": str(Path(recipe).resolve()) if recipe.endswith(".toml") else recipe,
              "results": str(out.resolve()), "overrides": ";".join(overrides)}
    texts = {"text": str(text.resolve()) if text else "", "extra_text": str(extra_text.resolve()) if extra_text else ""}
    plan = [("01_pretokenize", "01_pretokenize", shared | texts)]
    plan += [("02_train", f"02_train_{model}", shared | {"model": model, "gpus": gpus}) for model in KINDS]
    plan += [("03_compare", "03_compare", {"recipe": shared["recipe"], "results": shared["results"],
                                            "runs": ";".join(KINDS)})]
    start = time.perf_counter()
    for i, (name, executed, parameters) in enumerate(plan, 1):
        before, label = time.perf_counter(), f"[{i}/{len(plan)}] {executed}"
        print(f"{label} ...", flush=True)
        log = out / parameters["model"] / "log.csv" if "model" in parameters else None
        try:
            run_notebook(ROOT / "notebooks" / f"{name}.ipynb", notebooks / f"{executed}.ipynb", parameters,
                         (lambda log=log: _progress(log)) if log else None)
        except UserError:
            if i == 1 and new:  # nothing was made yet: a mistake in the text leaves nothing behind
                shutil.rmtree(out)
            raise
        print(f"{label} done in {time.perf_counter() - before:.0f} s", flush=True)
    print(f"suite {recipe} done in {time.perf_counter() - start:.0f} s: {out}")


def _progress(run_log: Path) -> str:
    """Say how far a run is, from its log."""
    if not run_log.exists():
        return ""
    with run_log.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not rows[-1]["tokens_per_s"]:
        return ""
    last, seen = rows[-1], [row["val_loss"] for row in rows if row["val_loss"]]
    return (f"    step {int(last['step']):,}, {float(last['elapsed_s']):,.0f} s, training loss "
            f"{float(last['train_loss'] or 'nan'):.3f}, validation {float(seen[-1]):.3f}, "
            f"{float(last['tokens_per_s']):,.0f} tokens/s")
