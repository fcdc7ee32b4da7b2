"""The third step of the suite: scores every story under some runs, checks for leaks, and writes tables and figures."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from plotarmour.errors import UserError
from plotarmour.evaluation.arms import UNBOUNDED, Arm, compare_arms, group_runs, pairs_of
from plotarmour.evaluation.checks import check_run, require
from plotarmour.evaluation.comparison import comparison_table, evaluate_floors, evaluate_run
from plotarmour.evaluation.facts import read_facts
from plotarmour.evaluation.scoring import check_stride
from plotarmour.evaluation.uncertainty import win_share_by_length
from plotarmour.files import write_text
from plotarmour.resuming import read_info
from plotarmour.runs import Run, check_same_tokenizer, load_run
from plotarmour.suite import figures
from plotarmour.suite.budgets import budget_of, differences
from plotarmour.suite.examples import different_stories, samples
from plotarmour.suite.report import write_report
from plotarmour.suite.verdict import arm_table, summarise
from plotarmour.text.tokenfile import TokenFile


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; the report is made of it.

    Attributes:
        title: says on what text.
        table: totals, a row per run, floor and corpus.
        arms: runs that differ only in their seed, together.
        by_arm: totals, a row per arm, floor and corpus.
        pairs: arms, and runs seed by seed, with intervals.
        checks: for leaks.
        unequal: what differs between the runs, one line each.
        examples: stories where the first pair differs most.
        samples: what each arm writes, from the same prompts and seeds.
        runs: without their weights.
        stride: of sliding windows; None: half a context.
    """

    title: str
    table: pd.DataFrame
    arms: list[Arm]
    by_arm: pd.DataFrame
    pairs: pd.DataFrame
    checks: pd.DataFrame
    unequal: list[str]
    examples: pd.DataFrame
    samples: pd.DataFrame
    runs: list[Run]
    stride: int | None


def compare_runs(folders: list[Path], data: Path, out: Path, train: Path | None = None, facts: Path | None = None,
                 stride: int | None = None, title: str = "", which: str = "best", device: str = "auto",
                 unfinished: bool = False) -> pd.DataFrame:
    """Score every story of a token file under some runs and the floors, and write tables, figures and a report.

    Runs that differ only in their seed are one arm of the comparison. Nothing is written where a leak check fails but
    checks.csv.

    Args:
        folders: of the runs; their names must differ.
        data: token file to score.
        out: gets report.html, summary.txt, totals.csv (a row per run), arms.csv, pairs.csv (differences with
            intervals), checks.csv, stories_NAME.csv for runs and floors, positions.csv, win_shares.csv,
            different_stories.csv, samples.csv and figures.
        train: training token file, for the floors and for what is held out; without it neither is told.
        facts: .facts.jsonl of the built-in corpus.
        stride: of sliding windows, in tokens; half a context by default.
        title: says on what text.
        which: checkpoint, "best" by validation loss or "latest".
        device: "auto", "cpu" or "cuda".
        unfinished: whether runs that have not ended may be compared; they are labelled.

    Returns:
        The table of totals.csv.

    Raises:
        UserError: one run twice, tokenizers that differ, stories that a run was trained on, floors of another text, a
            run that has not ended, a model that sees what it must foresee.
    """
    folders = [folder.resolve() for folder in folders]
    _check_names(folders)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for --out.")
    infos = {folder: read_info(folder) for folder in folders}
    if not unfinished:
        _check_ended(folders)
    _check_tokenizers(infos)
    test, known = TokenFile.open(data), read_facts(facts) if facts else None
    if not test.n_stories:
        raise UserError(f"{data} holds no story; expected test stories.")
    train_data = TokenFile.open(train) if train is not None else None
    for folder, info in infos.items():
        check_same_tokenizer(test, info["tokenizer"]["sha256"], str(folder))
        check_stride(stride, info["recipe"]["training"]["context_length"])
        _check_unseen(folder.name, info, data, test, train, train_data)
    scores, positions, budgets, checks, runs = {}, [], {}, [], []
    for folder in folders:  # one model in memory at a time
        run = load_run(folder, which, device)
        found = evaluate_run(run, test, known, stride)
        checks.append(check_run(run, test, found.stories, train_data, stride))
        scores[run.name], budgets[run.name] = found.stories, budget_of(run)
        positions.append(found.positions.assign(run=run.name))
        if _is_unbounded(run) and int(found.stories["tokens"].max()) > run.context_length:
            whole = evaluate_run(run, test, known, unbounded=True)
            scores[run.name + UNBOUNDED] = whole.stories
            positions.append(whole.positions.assign(run=run.name + UNBOUNDED))
        runs.append(dataclasses.replace(run, model=None))
    tested = pd.concat(checks, ignore_index=True)
    write_csv(tested, out / "checks.csv")
    require(tested)
    if train_data is not None:
        scores |= {f"{name} floor": frame for name, frame in evaluate_floors(train_data, test).items()}
    print(f"{len(tested)} leak checks passed", flush=True)
    table, arms = comparison_table(scores, budgets), group_runs(runs)
    same_order = len({run.info["train"].get("order_sha256", run.config.training.seed) for run in runs}) \
        <= len({run.config.training.seed for run in runs})
    pairs = compare_arms(arms, scores, budgets, same_order) if len(arms) > 1 else pd.DataFrame()
    found = Comparison(
        title or f"{data}: every story, {which} checkpoints", table, arms, arm_table(arms, table), pairs, tested,
        differences(runs), different_stories(arms, scores, test, which, device, folders),
        samples(arms, folders, which, device, test), runs, stride)
    _write(found, out, scores, pd.concat(positions, ignore_index=True), budgets)
    return table


def find_runs(folder: Path, named: str = "") -> list[Path]:
    """Return the run folders to compare.

    Args:
        folder: results folder.
        named: separated by ; each a path or a name in `folder`. Empty: every run folder in `folder`.

    Raises:
        UserError: there is none.
    """
    names = [name.strip() for name in named.split(";") if name.strip()]
    found = [folder / name if (folder / name).is_dir() else Path(name) for name in names] if names else \
        sorted(path.parent for path in folder.glob("*/run.json"))
    if not found:
        raise UserError(f"{folder} holds no run folder; expected one or more, of notebook 02_train. Name them.")
    return found


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table atomically, numbers with nine significant digits."""
    write_text(path, frame.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def _write(found: Comparison, out: Path, scores: dict[str, pd.DataFrame], positions: pd.DataFrame,
           budgets: dict[str, dict]) -> None:
    for stale in (*out.glob("stories_*.csv"), *out.glob("*.png")):  # of an earlier comparison in this folder
        stale.unlink()
    for name, frame in scores.items():
        write_csv(frame, out / f"stories_{name.replace(' ', '_')}.csv")
    positions = positions[["run", "position", "tokens", "nats"]]
    shares = {f"{a.name} against {b.name}": _shares(a, b, scores) for a, b in pairs_of(found.arms)}
    for name, frame in (("totals", found.table), ("arms", found.by_arm), ("pairs", found.pairs),
                        ("positions", positions), ("different_stories", found.examples), ("samples", found.samples)):
        write_csv(frame, out / f"{name}.csv")
    if shares:
        write_csv(pd.concat([frame.assign(pair=name) for name, frame in shares.items()], ignore_index=True),
                  out / "win_shares.csv")
    floors = found.table.loc[found.table["name"].str.endswith(" floor"), ["name", "loss"]]  # the best first
    contexts = {run.context_length for run in found.runs}
    logs = {run.name: pd.read_csv(run.folder / "log.csv") for run in found.runs}
    per_token = {arm.name: 3 * budgets[arm.runs[0]]["flops_per_token"] for arm in found.arms}
    figures.perplexities(found.arms, found.by_arm, found.table, out / "perplexity.png", found.title)
    figures.learning_curves(found.arms, logs, per_token, out / "training_curves.png",
                            None if floors.empty else tuple(floors.iloc[0]))
    figures.loss_by_position(found.arms, positions, out / "loss_by_position.png",
                             contexts.pop() if len(contexts) == 1 else None)
    if shares:
        figures.differences_forest(found.arms, found.pairs, out / "differences.png")
        figures.win_shares(shares, out / "win_shares.png")
    write_text(out / "summary.txt", summarise(found.table, found.title, found.unequal, found.arms, found.pairs,
                                              found.checks))
    write_report(found, out)


def _shares(a: Arm, b: Arm, scores: dict[str, pd.DataFrame]) -> pd.DataFrame:
    tokens = scores[a.runs[0]]["tokens"].to_numpy()
    nats = [sum(scores[run]["nats"].to_numpy() for run in arm.runs) / len(arm.runs) for arm in (a, b)]
    return win_share_by_length(tokens, *nats, n_bins=min(6, max(1, len(tokens) // 20)))


def _is_unbounded(run: Run) -> bool:
    return run.model.context_length is None


def _check_names(folders: list[Path]) -> None:
    names = [folder.name for folder in folders]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice; name each run once.")
    if len(set(names)) < len(names):
        raise UserError(f"runs are told apart by folder name; found {', '.join(names)}. Name each run once, and rename "
                        "folders of one name.")


def _check_ended(folders: list[Path]) -> None:
    waiting = [folder.name for folder in folders if not (folder / "DONE.json").exists()]
    if waiting:
        raise UserError(f"{', '.join(waiting)}: not finished, no DONE.json; expected runs that have ended. Go on with "
                        "the commands that started them, or add --unfinished (in notebook 3: unfinished = True) to "
                        "compare what there is.")


def _check_tokenizers(infos: dict[Path, dict]) -> None:
    kinds = {info["tokenizer"]["sha256"]: f"{folder.name} has {info['tokenizer']['kind']} "
             f"{info['tokenizer']['sha256'][:12]}" for folder, info in infos.items()}
    if len(kinds) > 1:
        raise UserError(f"runs of different tokenizers cannot be set side by side ({', '.join(kinds.values())}): their "
                        "tokens differ, and with them loss and perplexity. Score each by tools/evaluate.py on its own "
                        "token file of one text, and compare bits_per_byte.")


def _check_unseen(name: str, info: dict, data: Path, test: TokenFile, train: Path | None,
                  train_data: TokenFile | None) -> None:
    learned = info["train"]["payload_sha256"]
    if learned in _fingerprints(test):
        raise UserError(f"{name} was trained on {data}; expected stories it has not seen: the test part.")
    if info["val"]["payload_sha256"] in _fingerprints(test):
        warnings.warn(f"{data} is what {name}'s checkpoint was chosen on; a verdict needs the test part.", stacklevel=3)
    if train_data is not None and learned not in _fingerprints(train_data):
        raise UserError(f"{train} is not what {name} was trained on ({info['train']['file']}); floors must learn from "
                        "the same tokens.")


def _fingerprints(data: TokenFile) -> set[str]:
    """Hashes by which a run may know these tokens: of the file, or of its text where a run was trained from text."""
    return {data.header["payload_sha256"], *(source["sha256"] for source in data.header["source"])}
