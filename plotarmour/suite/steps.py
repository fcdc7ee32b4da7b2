"""The first two steps of the suite, as the notebooks and the command lines call them: prepare, train."""

import shutil
from pathlib import Path

from plotarmour.cli import UserError
from plotarmour.config import Recipe, load_recipe, warn_ignored
from plotarmour.data.batches import Windows
from plotarmour.data.pretokenize import part_path, pre_tokenize
from plotarmour.data.stories import PARTS, SEPARATOR, parse_split
from plotarmour.data.tales import tell_stories, write_facts
from plotarmour.data.token_file import TokenFile
from plotarmour.files import publish, unfinished, write_text
from plotarmour.machine import host
from plotarmour.resume import read_info
from plotarmour.run import train_run
from plotarmour.suite.live import LiveCurves
from plotarmour.suite.multi_gpu import check_gpus, launch
from plotarmour.training.ending import Ending

CORPUS_SETTINGS = ("corpus_stories", "corpus_seed", "corpus_min_events", "corpus_max_events")
OPTIONAL = {"extra": "tokens.extra.bin", "facts": "built-in.facts.jsonl"}  # not every recipe has them


def tell_corpus(path: Path, n_stories: int, seed: int, events: tuple[int, int]) -> tuple[Path, Path]:
    """Write stories of the built-in corpus as text, and beside it what the corpus knows of each.

    Returns:
        The paths of the text and of the .facts.jsonl.
    """
    if n_stories < 1:
        raise UserError(f"{n_stories} stories were asked for; expected at least 1.")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = path.with_suffix(".facts.jsonl")
    temporary = unfinished(facts)
    separator = f"\n{SEPARATOR.decode()}\n"
    try:
        texts = write_facts(temporary, tell_stories(n_stories, seed, events))
        write_text(path, separator.join(texts) + "\n")
        publish(temporary, facts)
    finally:
        temporary.unlink(missing_ok=True)
    return path, facts


def require_text(recipe: Recipe, text: Path | None) -> None:
    """Raise `UserError` where a recipe needs a text and none is given."""
    if text is None and not recipe.data.corpus_stories:
        raise UserError(
            f"recipe {recipe.name} needs a text; expected --text FILE (in a notebook: the parameter text). "
            "TinyStories: python tools/download_tinystories.py fetches 22 MB, enough for a laptop (--part train: 2.2 "
            "GB). Without a text: --recipe tiny.")


def prepare(recipe: Recipe, folder: Path, text: Path | None = None, extra_text: Path | None = None) -> dict[str, Path]:
    """Make the token files of a recipe in `folder`.

    Args:
        recipe: its `data` part counts.
        folder: for the token files.
        text: what to learn from; None tells the built-in corpus.
        extra_text: a second test set: only its stories that do not stand in `text` are kept.

    Returns:
        Paths by name: train, val, test; extra and facts where there are.
    """
    require_text(recipe, text)
    if 0 in parse_split(recipe.data.split):
        raise UserError(f"split {recipe.data.split} leaves a part empty; the suite needs train, val and test.")
    if text is not None:
        warn_ignored(recipe, CORPUS_SETTINGS, f"{text} takes the place of the built-in corpus")
    paths = {}
    if text is None:
        text, paths["facts"] = tell_corpus(folder / "built-in.txt", recipe.data.corpus_stories, recipe.data.corpus_seed,
                                           (recipe.data.corpus_min_events, recipe.data.corpus_max_events))
    made = pre_tokenize([text], recipe.data.tokenizer, folder / "tokens.bin", recipe.data.split, recipe.data.stories,
                        replace=True)
    paths |= dict(zip(PARTS, made, strict=True))
    t = recipe.training
    try:
        for part in ("train", "val"):  # a text too short for the recipe is noticed here, not after the set-up of a run
            Windows(TokenFile.open(paths[part]), t.context_length, t.windows, t.seed, t.rows_per_step)
    except UserError:
        for path in made:
            path.unlink()
        raise
    if extra_text is not None:
        [paths["extra"]] = pre_tokenize([extra_text], str(paths["train"]), folder / OPTIONAL["extra"], None,
                                        recipe.data.stories, exclude=[text], replace=True)
    for name in OPTIONAL.keys() - paths.keys():  # of an earlier start with other settings; only now that this succeeded
        (folder / OPTIONAL[name]).unlink(missing_ok=True)
    return paths


def find_prepared(folder: Path) -> dict[str, Path]:
    """Return the paths that `prepare` made in a folder."""
    paths = {part: part_path(folder / "tokens.bin", part) for part in PARTS}
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]} does not exist; run notebook 01_pretokenize first, with the same folder.")
    return paths | {name: folder / file for name, file in OPTIONAL.items() if (folder / file).exists()}


def train_recipe(name: str, model: str, data_folder: Path, out: Path, overrides: list[str] = (),
                 continue_from: Path | None = None, gpus: int = 1, extend: bool = False, from_step: int = -1) -> Ending:
    """Train one model of a recipe on prepared token files; see `plotarmour.run.train_run`.

    In a notebook, the curves are drawn meanwhile.

    Args:
        name, model, overrides: of the recipe.
        data_folder: that `prepare` wrote.
        out: the run folder.
        continue_from: run folder of an earlier session, which may be read-only: copied to `out` unless that exists.
        gpus: of this machine, that train together; with device=cpu as many processes.
        extend: whether the run may become longer than it began.
        from_step: kept step to go back to; negative: go on from the latest.
    """
    paths, recipe = find_prepared(data_folder), load_recipe(name, model, overrides)
    check_gpus(gpus, recipe)
    if not isinstance(extend, bool) or not isinstance(from_step, int):
        raise UserError(f"extend = {extend!r} and from_step = {from_step!r}; expected True or False, and a number "
                        "(papermill: -p, not -r, which makes text of them).")
    if continue_from is not None:
        _bring(continue_from, out)
    back_to = from_step if from_step >= 0 else None
    with LiveCurves(model, out) as live:
        if gpus == 1:
            return train_run(recipe, paths["train"], paths["val"], out, from_step=back_to, extend=extend,
                             on_row=live.row)
        return launch(recipe, name, paths["train"], paths["val"], out, list(overrides), gpus, extend, back_to, live.row)


def _bring(run: Path, out: Path) -> None:
    """Copy the run folder of an earlier session, which may be read-only, to where it can go on."""
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        print(f"{out} is there already: going on with it, not with another copy of {run}")
        return
    within = sorted(path.parent.name for path in run.glob("*/run.json")) if not (run / "run.json").exists() else []
    if within:
        raise UserError(f"{run} is no run folder, but holds {', '.join(within)}: name one of these in continue_from.")
    read_info(run)
    temporary = unfinished(out)
    try:
        shutil.copytree(run, temporary, copy_function=shutil.copyfile)
        for folder in [temporary, *(path for path in temporary.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)  # copied with the folder: the permissions of where it was
        publish(temporary, out)
    except shutil.Error as error:  # of all the files; one of them will do
        source, _, reason = error.args[0][0]
        raise UserError(f"{source} cannot be copied: {reason}. Check its permissions and the disk.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def results_folder(recipe: str, given: str = "") -> Path:
    """Return where a recipe's results go: as given, or results/RECIPE in the checkout (on Kaggle /kaggle/working)."""
    if given:
        return Path(given)
    base = Path("/kaggle/working") if host() == "kaggle" else Path(__file__).resolve().parents[2]
    return base / "results" / Path(recipe).stem


def list_files(folder: Path) -> str:
    """List the files below a folder with their sizes, one per line; hidden ones left out."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    sizes = [path.stat().st_size for path in files]
    lines = [(f"{size / 2**20:9,.1f} MiB" if size >= 2**20 else f"{size / 2**10:9,.1f} KiB")
             + f"  {path.relative_to(folder)}" for size, path in zip(sizes, files, strict=True)]
    return f"{folder}\n" + "\n".join(lines)
