"""The third step of the suite: scores every story under some runs, checks for leaks, and writes tables and figures."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from plotarmour.cli import UserError
from plotarmour.config import Recipe
from plotarmour.data.tales import read_facts
from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.arms import Arm, compare_arms, group_runs, pairs_of
from plotarmour.evaluation.leak_checks import check_run, require
from plotarmour.evaluation.ngrams import ORDERS, counted_tokens, evaluate_baselines
from plotarmour.evaluation.scoring import UNBOUNDED, check_stride, comparison_table, evaluate_run, story_tokens
from plotarmour.evaluation.statistics import win_share_by_length
from plotarmour.files import write_text
from plotarmour.models import REFERENCE
from plotarmour.report import figures
from plotarmour.report.examples import COLUMNS, different_stories, samples_of
from plotarmour.report.page import write_report
from plotarmour.report.verdict import arm_table, summarise
from plotarmour.resume import read_info
from plotarmour.run import Run, check_same_tokenizer, load_run, recipe_of
from plotarmour.training.ending import Ending, is_complete
from plotarmour.training.log import read_log

OUTPUTS = ("report.html", "summary.txt", "totals.csv", "arms.csv", "pairs.csv", "checks.csv", "positions.csv",
           "win_shares.csv", "different_stories.csv", "samples.csv", "perplexity.png", "training_curves.png",
           "loss_by_position.png", "differences.png", "win_shares.png")


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; the report is made of it.

    Attributes:
        title: says on what text.
        table: totals, a row per run, baseline and corpus.
        arms: runs that differ only in their seed, together.
        by_arm: totals, a row per arm, baseline and corpus.
        pairs: arms, and runs seed by seed, with intervals.
        checks: for leaks.
        unequal: what differs between the runs, one line each.
        examples: stories where the first pair differs most.
        samples: what each arm writes, from the same prompts and seeds.
        runs: without their weights.
        stride: of sliding windows; None: half a context.
        same_order: whether runs of one seed have read the same tokens in the same order, by their hashes.
        part: of a split that the stories are: "train", "val" or "test"; None where that is not known.
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
    same_order: bool
    part: str | None


@dataclass(frozen=True)
class PlannedRun:
    """A run before it is loaded: enough to tell arms apart."""

    name: str
    config: Recipe
    info: dict


def compare_runs(folders: list[Path], data: Path, out: Path, train: Path | None = None, facts: Path | None = None,
                 stride: int | None = None, title: str = "", checkpoint: str | int = "best", device: str = "auto",
                 unfinished: bool = False) -> pd.DataFrame:
    """Score every story of a token file under some runs and the baselines, and write tables, figures and a report.

    Runs that differ only in their seed are one arm of the comparison. Where a leak check fails, nothing is written but
    checks.csv, and what an earlier comparison has left in the folder is gone.

    Args:
        folders: of the runs; their names must differ.
        data: token file to score.
        out: gets report.html, summary.txt, totals.csv (a row per run), arms.csv, pairs.csv (differences with
            intervals), checks.csv, stories_NAME.csv for runs and baselines, positions.csv, win_shares.csv,
            different_stories.csv, samples.csv and figures.
        train: training token file, for the n-gram baselines and the check that stories are held out; without it
            there are neither.
        facts: .facts.jsonl of the built-in corpus.
        stride: of sliding windows, in tokens; half a context by default.
        title: says on what text.
        checkpoint: "best" by validation loss, "latest" or a step.
        device: "auto", "cpu" or "cuda".
        unfinished: whether runs that have not ended may be compared; they are labelled.

    Returns:
        The table of totals.csv.

    Raises:
        UserError: one run twice, tokenizers that differ, stories that a run was trained on, baselines of another
            text, a run that has not ended, a model that sees what it must foresee.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for --out.")
    folders = [folder.resolve() for folder in folders]
    planned = check_together(folders, unfinished)
    arms = group_runs(planned)
    test, known = TokenFile.open(data), read_facts(facts) if facts else None
    if test.n_stories < min(2, len(folders)) or not test.n_stories:
        raise UserError(f"{data} holds {test.n_stories} stories; expected test stories, at least two for a comparison.")
    train_data = TokenFile.open(train) if train is not None else None
    for folder, run in zip(folders, planned, strict=True):
        check_same_tokenizer(test, run.info["tokenizer"]["sha256"], str(folder))
        check_stride(stride, run.config.training.context_length)
        _check_unseen(run, data, test, train, train_data)
    _clear(out)
    pairs = pairs_of(arms, REFERENCE)
    sampled = {arm.runs[0]: arm.name for arm in arms} if pairs else {}
    shown = [arm.runs[0] for arm in pairs[0]] if pairs else []  # side by side, word by word
    scores, positions, budgets, runs, checked, token_nats, samples = {}, [], {}, [], [], {}, {}
    for folder in folders:
        run = load_run(folder, checkpoint, device)
        budgets[run.name] = budget_of(run)
        for unbounded in (False, True) if _forgets_nothing(run, test) else (False,):
            name = run.name + UNBOUNDED * unbounded
            result = evaluate_run(run, test, known, stride, unbounded)
            scores[name] = result.stories
            positions.append(result.positions.assign(run=name))
            if name in shown:
                token_nats[name] = result.token_nats
            checked.append(check_run(run, test, result.stories, train_data, stride, unbounded))
            tested = pd.concat(checked, ignore_index=True)
            write_csv(tested, out / "checks.csv")
            require(tested)
        if run.name in sampled:
            samples[sampled[run.name]] = samples_of(run, sampled[run.name], test)
        runs.append(dataclasses.replace(run, model=None))
        del run  # one model in memory at a time
    print(f"{tested.passed.sum()} leak checks passed", flush=True)
    if train_data is not None:
        scores |= {f"{name} baseline": frame for name, frame in evaluate_baselines(train_data, test).items()}
        budgets |= {f"{order} baseline": {"train_tokens": counted_tokens(train_data)} for order in ORDERS}
    table, unequal = comparison_table(scores, budgets), differences(runs)
    orders = {(run.config.training.seed, run.info["train"].get("order_sha256")) for run in runs}
    same_order = len({seed for seed, _ in orders}) == len(orders) and None not in {order for _, order in orders}
    step = checkpoint if isinstance(checkpoint, str) else f"step-{checkpoint}"
    comparison = Comparison(
        title or f"{data.name}, {step} checkpoints", table, arms, arm_table(arms, table),
        compare_arms(pairs, scores, budgets, same_order) if pairs else pd.DataFrame(), tested, unequal,
        different_stories(shown, scores, token_nats, test, runs[0].tokenizer) if pairs else
        pd.DataFrame(columns=COLUMNS), pd.concat([samples[arm.name] for arm in arms]) if pairs else pd.DataFrame(),
        runs, stride, same_order, test.header.get("part"))
    _write(comparison, out, scores, pd.concat(positions, ignore_index=True), budgets)
    return table


def budget_of(run) -> dict:
    """Return what a run cost, from its folder: parameters, training tokens, FLOPs, seconds, memory, hardware.

    Tokens, steps and seconds are those of the whole run; `checkpoint_step` is the step that was scored.
    """
    ending = Ending.read(run.folder)
    shape, tokens = run.model.config, ending and ending.tokens_seen
    flops = shape.flops_per_token(run.context_length)
    return {"model": run.config.model, "seed": run.config.training.seed, "params": run.info["params"],
            "params_non_embedding": run.info["params_non_embedding"], "params_per_token": shape.weights_per_token,
            "train_tokens": tokens, "flops_per_token": flops,
            # Backward has two products for each one of forward, the gradients of both its sides.
            "train_flops": None if tokens is None else 3 * flops * tokens,
            "steps": ending and ending.step, "checkpoint_step": run.step, "train_s": ending and ending.elapsed_s,
            "peak_memory_mib": ending and ending.peak_memory_mib, "hardware": run.info["hardware"],
            "ended": str(ending.reason) if ending else "unfinished"}


def differences(runs: list) -> list[str]:
    """Say what makes a comparison of these runs unequal, one line each; empty where nothing does.

    Example:
        "tokens: 926,179 (bdh), 463,000 (gpt2)".
    """
    looked_at = {"training text": lambda run: run.info["train"]["payload_sha256"][:12],
                 "context": lambda run: f"{run.context_length:,}",
                 "rows per step": lambda run: f"{run.config.training.rows_per_step:,}",
                 "windows": lambda run: run.config.training.windows,
                 "hardware": lambda run: run.info["hardware"], "dtype": lambda run: run.info["dtype"],
                 "processes": lambda run: run.info.get("processes", 1),
                 "tokens": lambda run: f"{ending.tokens_seen:,}" if (ending := Ending.read(run.folder)) else "unknown",
                 "end": lambda run: ending.reason if (ending := Ending.read(run.folder)) else "unfinished"}
    found = []
    for what, value in looked_at.items():
        names: dict[str, list[str]] = {}
        for run in runs:
            names.setdefault(str(value(run)), []).append(run.name)
        if len(names) > 1:
            found.append(f"{what}: " + ", ".join(f"{v} ({', '.join(who)})" for v, who in names.items()))
    seeds = {kind: sorted({run.config.training.seed for run in runs if run.config.model == kind})
             for kind in sorted({run.config.model for run in runs})}
    if len({str(each) for each in seeds.values()}) > 1:  # several are none where every kind of model has the same
        found.append("seeds: " + ", ".join(f"{kind} {', '.join(map(str, each))}" for kind, each in seeds.items()))
    orders = {run.config.training.seed: set() for run in runs}
    for run in runs:
        orders[run.config.training.seed].add(run.info["train"].get("order_sha256"))
    if any(len(each) > 1 for each in orders.values()):
        found.append("order of the tokens: runs of one seed have different hashes, or none (run.json, order_sha256)")
    return found


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


def check_together(folders: list[Path], unfinished: bool = False) -> list[PlannedRun]:
    """Check, before any model is loaded, that runs can be compared.

    Args:
        folders: of the runs.
        unfinished: whether runs that have not ended may be compared.

    Raises:
        UserError: one run twice, tokenizers that differ, a run that has not ended, no run folder.
    """
    folders = [folder.resolve() for folder in folders]
    _check_names(folders)
    infos = [read_info(folder) for folder in folders]
    if not unfinished:
        _check_ended(folders)
    runs = [PlannedRun(folder.name, recipe_of(info), info) for folder, info in zip(folders, infos, strict=True)]
    _check_tokenizers(runs)
    return runs


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table atomically, numbers with nine significant digits."""
    write_text(path, frame.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def _write(found: Comparison, out: Path, scores: dict[str, pd.DataFrame], positions: pd.DataFrame,
           budgets: dict[str, dict]) -> None:
    for name, frame in scores.items():
        write_csv(frame, _stories_path(out, name))
    positions = positions[["run", "position", "tokens", "nats"]]
    shares = {f"{a.name} against {b.name}": _shares(a, b, scores) for a, b in pairs_of(found.arms, REFERENCE)}
    for name, frame in (("totals", found.table), ("arms", found.by_arm), ("pairs", found.pairs),
                        ("positions", positions), ("different_stories", found.examples), ("samples", found.samples)):
        write_csv(frame, out / f"{name}.csv")
    if shares:
        write_csv(pd.concat([frame.assign(pair=name) for name, frame in shares.items()], ignore_index=True),
                  out / "win_shares.csv")
    baselines = found.table.loc[found.table["name"].str.endswith(" baseline"), ["name", "loss"]]  # the best first
    contexts = {run.context_length for run in found.runs}
    logs = {run.name: read_log(run.folder / "log.csv") for run in found.runs}
    per_token = {arm.name: 3 * budgets[arm.runs[0]]["flops_per_token"] for arm in found.arms}
    figures.perplexities(found.arms, found.by_arm, found.table, out / "perplexity.png", found.title)
    figures.training_curves(found.arms, logs, out / "training_curves.png", per_token,
                            None if baselines.empty else tuple(baselines.iloc[0]))
    figures.loss_by_position(found.arms, positions, out / "loss_by_position.png",
                             contexts.pop() if len(contexts) == 1 else None)
    if shares:
        figures.differences_forest(found.arms, found.pairs, out / "differences.png")
        figures.win_shares(shares, out / "win_shares.png")
    write_text(out / "summary.txt", summarise(found.table, found.title, found.unequal, found.arms, found.by_arm,
                                              found.pairs, found.checks))
    write_report(found, out)


def _clear(out: Path) -> None:
    """Remove what an earlier comparison has left in a folder, and nothing else."""
    if (out / "totals.csv").exists():
        for name in pd.read_csv(out / "totals.csv", usecols=["name"], dtype=str)["name"]:
            _stories_path(out, name).unlink(missing_ok=True)
    for name in OUTPUTS:
        (out / name).unlink(missing_ok=True)


def _stories_path(out: Path, name: str) -> Path:
    return out / f"stories_{name.replace(' ', '_')}.csv"


def _shares(a: Arm, b: Arm, scores: dict[str, pd.DataFrame]) -> pd.DataFrame:
    tokens = scores[a.runs[0]]["tokens"].to_numpy()
    nats = [sum(scores[run]["nats"].to_numpy() for run in arm.runs) / len(arm.runs) for arm in (a, b)]
    return win_share_by_length(tokens, *nats, n_bins=min(6, max(1, len(tokens) // 20)))


def _forgets_nothing(run: Run, data: TokenFile) -> bool:
    """Whether a model could see more of these stories than a context."""
    return run.model.context_length is None and int(story_tokens(data).max()) > run.context_length


def _check_names(folders: list[Path]) -> None:
    names = [folder.name for folder in folders]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice; name each run once.")
    if len(set(names)) < len(names):
        raise UserError(f"runs are told apart by folder name; found {', '.join(names)}. Name each run once, and rename "
                        "folders of one name.")


def _check_ended(folders: list[Path]) -> None:
    waiting = [folder.name for folder in folders if not is_complete(folder)]
    if waiting:
        raise UserError(f"{', '.join(waiting)}: not finished, no DONE.json; expected runs that have ended. Go on with "
                        "the commands that started them, or add --unfinished (in notebook 3: unfinished = True) to "
                        "compare what there is.")


def _check_tokenizers(runs: list[PlannedRun]) -> None:
    kinds = {run.info["tokenizer"]["sha256"]: f"{run.name} has {run.info['tokenizer']['kind']} "
             f"{run.info['tokenizer']['sha256'][:12]}" for run in runs}
    if len(kinds) > 1:
        raise UserError(f"runs of different tokenizers cannot be set side by side ({', '.join(kinds.values())}): their "
                        "tokens differ, and with them loss and perplexity. Score each by tools/evaluate.py on its own "
                        "token file of one text, and compare bits_per_byte.")


def _check_unseen(run: PlannedRun, data: Path, test: TokenFile, train: Path | None,
                  train_data: TokenFile | None) -> None:
    name, info, learned = run.name, run.info, run.info["train"]["payload_sha256"]
    if learned in _fingerprints(test):
        raise UserError(f"{name} was trained on {data}; expected stories it has not seen: the test part.")
    if info["val"]["payload_sha256"] in _fingerprints(test):
        warnings.warn(f"{data} is what {name}'s checkpoint was chosen on; a verdict needs the test part.", stacklevel=3)
    if train_data is not None and learned not in _fingerprints(train_data):
        raise UserError(f"{train} is not what {name} was trained on ({info['train']['file']}); baselines must learn "
                        "from the same tokens.")


def _fingerprints(data: TokenFile) -> set[str]:
    """Hashes by which a run may know these tokens: of the file, or of its text where a run was trained from text."""
    return {data.header["payload_sha256"], *(source["sha256"] for source in data.header["source"])}
