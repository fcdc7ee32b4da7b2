"""The three steps of the suite, as the notebooks and the command lines call them: prepare, train, compare."""

import shutil
import warnings
from pathlib import Path

import pandas as pd

from plotarmour import plots
from plotarmour.config import Recipe, load_recipe
from plotarmour.errors import UserError
from plotarmour.evaluation.comparison import (
    budget_of,
    comparison_table,
    differences,
    evaluate_floors,
    evaluate_run,
    read_facts,
    write_facts,
)
from plotarmour.files import publish, unfinished, write_text
from plotarmour.machine import host
from plotarmour.resuming import read_info
from plotarmour.runs import check_same_tokenizer, load_run, train_run
from plotarmour.suite.launch import check_gpus, launch
from plotarmour.suite.live import LiveCurves
from plotarmour.text.batches import Windows
from plotarmour.text.grammar import tell_stories
from plotarmour.text.pretokenize import part_path, pre_tokenize
from plotarmour.text.stories import PARTS, SEPARATOR, parse_split
from plotarmour.text.tokenfile import TokenFile

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
    for name in OPTIONAL.values():
        (folder / name).unlink(missing_ok=True)  # of an earlier start with other settings
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
    return paths


def find_prepared(folder: Path) -> dict[str, Path]:
    """Return the paths that `prepare` made in a folder."""
    paths = {part: part_path(folder / "tokens.bin", part) for part in PARTS}
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        raise UserError(f"{missing[0]} does not exist; run notebook 01_pretokenize first, with the same folder.")
    return paths | {name: folder / file for name, file in OPTIONAL.items() if (folder / file).exists()}


def train_recipe(name: str, model: str, data_folder: Path, out: Path, overrides: list[str] = (),
                 continue_from: Path | None = None, gpus: int = 1, extend: bool = False, from_step: int = -1) -> dict:
    """Train one model of a recipe on prepared token files; see `plotarmour.runs.train_run`.

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


def compare_runs(folders: list[Path], data: Path, out: Path, train: Path | None = None, facts: Path | None = None,
                 stride: int | None = None, title: str = "", which: str = "best",
                 device: str = "auto") -> pd.DataFrame:
    """Score every story of a token file under some runs and the floors, and write tables and figures.

    Args:
        folders: of the runs; their names must differ.
        data: token file to score.
        out: gets totals.csv, summary.txt, stories_NAME.csv for runs and floors, perplexity.png, training_curves.png.
        train: training token file, for the floors; without it there are none.
        facts: .facts.jsonl of the built-in corpus.
        stride: of sliding windows, in tokens; half a context by default.
        title: of the figure with bars.
        which: checkpoint, "best" by validation loss or "latest".
        device: "auto", "cpu" or "cuda".

    Returns:
        The table of totals.csv.

    Raises:
        UserError: one run twice, tokenizers that differ, stories that a run was trained on, floors of another text.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"runs are told apart by folder name; found {', '.join(names)}. Name each run once.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for --out.")
    test, known = TokenFile.open(data), read_facts(facts) if facts else None
    runs = [load_run(folder.resolve(), which, device) for folder in folders]
    train_data = TokenFile.open(train) if train is not None else None
    for run in runs:
        check_same_tokenizer(test, run.tokenizer.sha256, str(run.folder))
        learned = run.info["train"]["payload_sha256"]
        if learned in _fingerprints(test):
            raise UserError(f"{run.name} was trained on {data}; expected stories it has not seen: the test part.")
        if run.info["val"]["payload_sha256"] in _fingerprints(test):
            warnings.warn(f"{data} is what {run.name}'s checkpoint was chosen on; a verdict needs the test part.",
                          stacklevel=2)
        if train_data is not None and learned not in _fingerprints(train_data):
            raise UserError(f"{train} is not what {run.name} was trained on ({run.info['train']['file']}); floors must "
                            "learn from the same tokens.")
    scores = {run.name: evaluate_run(run, test, known, stride) for run in runs}
    budgets = {run.name: budget_of(run) for run in runs}
    logs = {run.name: (run.config.model, pd.read_csv(run.folder / "log.csv")) for run in runs}
    if train_data is not None:
        scores |= {f"{name} floor": frame for name, frame in evaluate_floors(train_data, test).items()}
    table = comparison_table(scores, budgets)
    for stale in out.glob("stories_*.csv"):  # of an earlier comparison in this folder
        stale.unlink()
    for name, frame in scores.items():
        write_csv(frame, out / f"stories_{name.replace(' ', '_')}.csv")
    write_csv(table, out / "totals.csv")
    floor = table.loc[table["name"] == "bigram floor", "loss"]
    plots.perplexity_bars(table, out / "perplexity.png", title)
    what = title or f"{data}: every story, {which} checkpoints"
    write_text(out / "summary.txt", summarise(table, what, differences(runs)))
    plots.training_curves(logs, out / "training_curves.png", None if floor.empty else float(floor.iloc[0]))
    return table


def _fingerprints(data: TokenFile) -> set[str]:
    """Hashes by which a run may know these tokens: of the file, or of its text where a run was trained from text."""
    return {data.header["payload_sha256"], *(source["sha256"] for source in data.header["source"])}


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table atomically, numbers with nine significant digits."""
    write_text(path, frame.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a comparison that people compare, rounded."""
    columns = {"name": "name", "params_non_embedding": "core params", "train_tokens": "trained on",
               "checkpoint_step": "step scored", "train_s": "seconds", "loss": "loss", "perplexity": "perplexity",
               "bits_per_byte": "bits/byte", "over_corpus": "over corpus", "recall_loss": "loss on facts",
               "other_loss": "loss elsewhere"}
    shown = table[[c for c in columns if c in table]].rename(columns=columns)
    formats = {"core params": "{:,.0f}", "trained on": "{:,.0f} tokens", "step scored": "{:,.0f}", "seconds": "{:,.0f}",
               "loss": "{:.4f}", "perplexity": "{:,.3f}", "bits/byte": "{:.4f}", "over corpus": "{:+.1%}",
               "loss on facts": "{:.3f}", "loss elsewhere": "{:.3f}"}
    for column, form in formats.items():
        if column in shown:
            shown[column] = ["" if pd.isna(v) else form.format(v) for v in shown[column]]
    return shown


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


def summarise(table: pd.DataFrame, what: str, unequal: list[str]) -> str:
    """Put a comparison into words: the table, then its denominators, verdict and limits."""
    runs = table[table["model"].notna()] if "model" in table else table.iloc[:0]
    lines = [what, "", for_people(table).to_string(index=False), ""]
    row = table.iloc[0]
    lines.append(f"Loss is nats per token over {row['tokens']:,} tokens of {row['stories']:,} stories (each story's "
                 f"closing end-of-text included), bits per byte over {row['bytes']:,} bytes of their text.")
    if len(runs) > 1:
        best, second = runs.iloc[0], runs.iloc[1]
        lines.append(f"{best['name']} is ahead of {second['name']} by {second['loss'] - best['loss']:.4f} nats per "
                     f"token ({best['perplexity']:.3f} against {second['perplexity']:.3f}). One seed each: this speaks "
                     "of these checkpoints, not of the architectures.")
    if "over_corpus" in table and len(runs):
        low, high = runs["over_corpus"].min(), runs["over_corpus"].max()
        lines.append(f"The corpus knows its own exact nats: the models need {low:.1%} to {high:.1%} more."
                     + (" A model below the corpus sees what it must predict: this is a LEAK." if low < 0 else ""))
    floor = table.loc[table["name"] == "bigram floor", "loss"]
    if len(floor) and len(runs):
        above = [name for name, loss in zip(runs["name"], runs["loss"], strict=True) if loss >= float(floor.iloc[0])]
        lines.append(f"{' and '.join(above)} did not beat the bigram floor: trained too briefly." if above else
                     "Every run is below the bigram floor.")
    lines += [f"Not equal between the runs: {difference}." for difference in unequal]
    return "\n".join(lines) + "\n"
