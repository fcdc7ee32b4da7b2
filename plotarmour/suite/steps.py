"""The steps of the suite that notebooks and command lines call: prepare the token files, train a recipe.

On Kaggle every notebook has a disk of its own, so what an earlier one wrote is also found in the attached inputs.
"""

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from plotarmour import machine
from plotarmour.cli import AnyPath, UserError, as_path, require_run
from plotarmour.config import Recipe, load_recipe, warn_ignored
from plotarmour.data.pretokenize import part_path, pre_tokenize
from plotarmour.data.readers import check_text
from plotarmour.data.stories import PARTS, SEPARATOR, parse_split
from plotarmour.data.tales import tell_stories, write_facts
from plotarmour.data.token_file import TokenFile
from plotarmour.files import publish, unfinished, write_text
from plotarmour.resume import EXTENDABLE, differences, read_info
from plotarmour.run import train_run
from plotarmour.suite.display import LiveCurves
from plotarmour.suite.multi_gpu import check_gpus, launch
from plotarmour.suite.parameters import require_text
from plotarmour.training.checkpoint import checkpoint_folders, step_of
from plotarmour.training.ending import Ending

OPTIONAL = {"extra": "tokens.extra.bin", "facts": "built-in.facts.jsonl"}  # not every recipe has them


def tell_corpus(path: AnyPath, n_stories: int, seed: int, events: tuple[int, int]) -> tuple[Path, Path]:
    """Write stories of the built-in corpus as text, and their facts and exact nats beside it; return both paths.

    Args:
        path: of the text.
        n_stories: at least 1.
        seed: of the stories.
        events: least and most events of a story.
    """
    if n_stories < 1:
        raise UserError(f"{n_stories} stories; expected at least 1.")
    path = as_path(path)
    facts = path.with_suffix(".facts.jsonl")
    temporary = unfinished(facts)
    try:
        texts = write_facts(temporary, tell_stories(n_stories, seed, events))
        write_text(path, f"\n{SEPARATOR.decode()}\n".join(texts) + "\n")
        publish(temporary, facts)
    finally:
        temporary.unlink(missing_ok=True)
    return path, facts


def prepare(recipe: Recipe, folder: AnyPath, text: AnyPath | None = None,
            extra_text: AnyPath | None = None) -> dict[str, Path]:
    """Write the token files of a recipe; files of the same text and settings are kept.

    Args:
        recipe: resolved; its data settings matter, and whether train and val are as long as a context.
        folder: for the token files.
        text: UTF-8 text to learn from; None for the built-in corpus.
        extra_text: a second test set; its stories that are also in `text` are left out.

    Returns:
        Paths by name: train, val and test; extra with `extra_text`, facts with the built-in corpus.

    Raises:
        UserError: a text that cannot be used; earlier files stay as they are.
    """
    folder, text, extra_text = (as_path(path) if path else None for path in (folder, text, extra_text))
    require_text(recipe, text)
    if extra_text is not None:
        check_text(extra_text)
    if 0 in parse_split(recipe.data.split):
        raise UserError(f"split {recipe.data.split} leaves a part empty; the suite needs train, val and test.")
    draft = unfinished(folder / "built-in") if text is None else None  # a start that is refused changes nothing
    try:
        if draft is not None:
            text, _ = tell_corpus(draft / "built-in.txt", recipe.data.corpus_stories, recipe.data.corpus_seed,
                                  (recipe.data.corpus_min_events, recipe.data.corpus_max_events))
        else:
            of_corpus = [name for name in vars(recipe.data) if name.startswith("corpus_")]
            warn_ignored(recipe, of_corpus, f"{text} takes the place of the built-in corpus")
        least = recipe.training.context_length if recipe.training.windows == "stream" else 1
        paths = dict(zip(PARTS, pre_tokenize([text], recipe.data.tokenizer, folder / "tokens.bin", recipe.data.split,
                                             recipe.data.stories, replace=True, least_tokens=least), strict=True))
        if draft is not None:
            text, paths["facts"] = folder / text.name, folder / OPTIONAL["facts"]
            for path in (text, paths["facts"]):
                publish(draft / path.name, path)
    except UserError as error:  # options of tools/pre_tokenize.py are settings here
        raise UserError(str(error).replace("--stories ", "--set stories=")) from None
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
    if extra_text is not None:
        [paths["extra"]] = pre_tokenize([extra_text], str(paths["train"]), folder / OPTIONAL["extra"], None,
                                        recipe.data.stories, exclude=[text], replace=True)
    for name in OPTIONAL.keys() - paths.keys():  # of an earlier start with other settings; only now that this succeeded
        (folder / OPTIONAL[name]).unlink(missing_ok=True)
    return paths


def find_prepared(folder: AnyPath) -> dict[str, Path]:
    """Return the paths of the files that `prepare` wrote into a folder."""
    folder = as_path(folder)
    paths = {part: part_path(folder / "tokens.bin", part) for part in PARTS}
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]} does not exist; expected the token files of notebook 01_pretokenize or "
                        "tools/run_suite.py in this folder. Run one of them first.")
    return paths | {name: folder / file for name, file in OPTIONAL.items() if (folder / file).exists()}


def find_tokens(folder: Path, given: Path | None = None) -> Path:
    """Return the folder with the token files: `given`, else the results folder, else an input of Kaggle.

    Raises:
        UserError: on Kaggle, none has them, or inputs have those of different texts.
    """
    name = part_path(folder / "tokens.bin", "train").name
    if given is not None or machine.host() != "kaggle" or (folder / name).exists():
        return given or folder
    found = _attached(name)
    found = [path for path in found if path.name == folder.name] or found  # of this recipe, if there are any
    texts = {TokenFile.open(path / name).header["payload_sha256"]: path for path in reversed(found)}
    if not texts:
        raise UserError(f"neither {folder} nor an attached input has token files; expected those of notebook "
                        "01_pretokenize. Attach its output (Add Input > Your Work), or run it in this session.")
    if len(texts) > 1:
        raise UserError(f"inputs have token files of {len(texts)} texts: {', '.join(map(str, texts.values()))}; "
                        "expected one. Set tokens to one of these folders, or remove an input.")
    [path] = texts.values()
    print(f"tokens: {path}")
    return path


def find_earlier(run: Path, recipe: Recipe, tokens: Path, given: Path | None = None,
                 extend: bool = False) -> Path | None:
    """Return the run folder of an earlier session to continue: `given`, or the same run in an input of Kaggle."""
    if given is not None or (run / "run.json").exists() or machine.host() != "kaggle":
        return given
    earlier = _attached_runs(recipe.name).get(run.name)
    if earlier is None:
        return None
    differing = [key for key in different_settings(earlier, recipe, tokens) if not (extend and key in EXTENDABLE)]
    print(f"{earlier} is another run ({', '.join(differing)}): a new one begins" if differing else
          f"continuing {earlier}")
    return None if differing else earlier


def find_all_runs(folder: Path, recipe: str, named: list[str] = ()) -> list[Path]:
    """Return the run folders to compare: of the results folder and, on Kaggle, those of a recipe in the inputs.

    Args:
        folder: results folder.
        recipe: name of the recipe, or its TOML file.
        named: names of these run folders, or paths. Empty: all of these run folders.

    Raises:
        UserError: no run folder.
    """
    attached = _attached_runs(Path(recipe).stem) if machine.host() == "kaggle" else {}
    runs = attached | {path.parent.name: path.parent for path in folder.glob("*/run.json")}
    if not (named or runs):
        raise UserError(f"{folder} holds no run folder; expected one or more, of notebook 02_train. Name them, or "
                        "on Kaggle attach their outputs (Add Input > Your Work).")
    chosen = [runs.get(name) or (folder / name if (folder / name).is_dir() else as_path(name))
              for name in named or sorted(runs)]
    if attached:
        print(f"runs: {', '.join(map(str, chosen))}")
    return chosen


def different_settings(run: Path, recipe: Recipe, data_folder: Path) -> list[str]:
    """Return the names of the settings, tokenizer and texts in which a run differs from one of a recipe and tokens.

    Raises:
        UserError: there is no run, or there are no token files.
    """
    before, prepared = read_info(run), find_prepared(data_folder)
    headers = {part: TokenFile.open(prepared[part]).header for part in ("train", "val")}
    dtype = recipe.training.dtype
    wanted = {"recipe": asdict(recipe), "tokenizer": headers["train"]["tokenizer"],
              "dtype": before["dtype"] if dtype == "auto" else dtype}
    return differences(run, before | wanted | headers)


def train_recipe(name: str, model: str, data_folder: AnyPath, out: AnyPath, overrides: list[str] = (),
                 continue_from: AnyPath | None = None, gpus: int = 1, extend: bool = False,
                 from_step: int = -1) -> Ending:
    """Train one model of a recipe on prepared token files; see `plotarmour.run.train_run`.

    A notebook shows the curves during training.

    Args:
        name, model, overrides: see `load_recipe`.
        data_folder: folder with the token files of `prepare`.
        out: the run folder.
        continue_from: run folder of an earlier session, which may be read-only; copied to `out` unless that exists.
        gpus: GPUs of this machine that train together; with device=cpu the number of processes.
        extend, from_step: see `train_run`; a negative step continues from the latest checkpoint.
    """
    paths, recipe, out = find_prepared(data_folder), load_recipe(name, model, overrides), as_path(out)
    check_gpus(gpus, recipe)
    if continue_from is not None:
        copy_run(as_path(continue_from), out)
    back_to = from_step if from_step >= 0 else None
    with LiveCurves(model, out) as live:
        if gpus == 1:
            return train_run(recipe, paths["train"], paths["val"], out, from_step=back_to, extend=extend,
                             on_row=live.row)
        return launch(name, model, overrides, paths["train"], paths["val"], out, gpus, extend, back_to, live.row)


def _attached(name: str) -> list[Path]:
    """Return the folders in Kaggle's inputs, such as notebooks/OWNER/SLUG/results/tiny, that hold a file of a name."""
    return sorted(path.parent for path in (machine.KAGGLE / "input").rglob(name))


def _attached_runs(recipe: str) -> dict[str, Path]:
    """Return the run folders of a recipe in Kaggle's inputs by name; of one name, that with the latest checkpoint."""
    runs = {}
    for folder in _attached("run.json"):
        with suppress(UserError):  # a file of that name which others wrote
            if read_info(folder)["recipe"]["name"] == recipe:
                runs.setdefault(folder.name, []).append(folder)
    return {name: max(folders, key=lambda folder: max(map(step_of, checkpoint_folders(folder)), default=-1))
            for name, folders in runs.items()}


def copy_run(run: Path, out: Path) -> None:
    """Copy the run folder of an earlier session, which may be read-only, to a folder where it can continue."""
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        print(f"{out} exists already: continuing it, not another copy of {run}")
        return
    require_run(run)
    temporary = unfinished(out)
    try:
        shutil.copytree(run, temporary, copy_function=shutil.copyfile)
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)  # copytree copies the permissions of a read-only folder too
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
