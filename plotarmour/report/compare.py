"""Comparison of runs: scores every story under each run, checks for leaks, and writes tables, figures and a report."""

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
    """The results of a comparison.

    Attributes:
        title: title of figures and report.
        table: totals, a row per run, baseline and corpus.
        arms: arms of the runs.
        by_arm: totals, a row per arm, baseline and corpus.
        pairs: differences with intervals, a row per pair of arms and per pair of runs of equal seed.
        checks: leak checks, a row per run and check.
        unequal: differences between the runs' settings and budgets, one line each.
        examples: stories with the largest differences between the first pair.
        samples: continuations by each arm, from the same prompts and seeds.
        runs: the runs without their weights.
        stride: stride of sliding windows, in tokens; None: half a context.
        same_order: whether runs of one seed were trained on the same tokens in the same order.
        part: part of a split that was scored: "train", "val" or "test"; None: unknown.
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
    """A run before its model is loaded."""

    name: str
    config: Recipe
    info: dict


def compare_runs(folders: list[Path], data: Path, out: Path, train: Path | None = None, facts: Path | None = None,
                 stride: int | None = None, title: str = "", checkpoint: str | int = "best", device: str = "auto",
                 unfinished: bool = False) -> pd.DataFrame:
    """Score every story of a token file under runs and n-gram baselines, and write tables, figures and a report.

    Runs that differ only in their seed are one arm of the comparison. Results of an earlier comparison in `out` are
    removed. If a leak check fails, only checks.csv is written.

    Args:
        folders: run folders with different names.
        data: token file to score.
        out: folder for report.html, summary.txt, totals.csv (a row per run), arms.csv, pairs.csv (differences with
            intervals), checks.csv, stories_NAME.csv for runs and baselines, positions.csv, win_shares.csv,
            different_stories.csv, samples.csv and figures.
        train: training token file; None skips the n-gram baselines and the check that stories are held out.
        facts: .facts.jsonl of the built-in corpus, or None.
        stride: stride of sliding windows, in tokens; None: half a context.
        title: title of figures and report; by default the names of token file and checkpoint.
        checkpoint: "best" by validation loss, "latest" or a step.
        device: "auto", "cpu" or "cuda".
        unfinished: whether to accept runs that are not complete; tables then label them.

    Returns:
        The table of totals.csv.

    Raises:
        UserError: the same run twice, different tokenizers, stories that a run was trained on, a training file that is
            not the runs' own, a run that is not complete, or a failed leak check.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for --out.")
    folders = [folder.resolve() for folder in folders]
    planned = check_together(folders, unfinished)
    arms = group_runs(planned)
    test, corpus_facts = TokenFile.open(data), read_facts(facts) if facts else None
    if test.n_stories < min(2, len(folders)) or not test.n_stories:
        raise UserError(f"{data} holds {test.n_stories} stories; expected test stories, at least two for a comparison.")
    train_data = TokenFile.open(train) if train is not None else None
    for folder, run in zip(folders, planned, strict=True):
        check_same_tokenizer(test, run.info["tokenizer"]["sha256"], str(folder))
        check_stride(stride, run.config.training.context_length)
        _check_unseen(run, data, test, train, train_data)
    _clear(out)
    pairs = pairs_of(arms, REFERENCE)
    arm_of_first_run = {arm.runs[0]: arm.name for arm in arms} if pairs else {}
    first_pair = [arm.runs[0] for arm in pairs[0]] if pairs else []  # for the examples
    scores, positions, budgets, runs, check_tables, token_nats, samples = {}, [], {}, [], [], {}, {}
    for folder in folders:
        run = load_run(folder, checkpoint, device)
        budgets[run.name] = budget_of(run)
        for unbounded in (False, True) if _has_longer_context(run, test) else (False,):
            name = run.name + UNBOUNDED * unbounded
            result = evaluate_run(run, test, corpus_facts, stride, unbounded)
            scores[name] = result.stories
            positions.append(result.positions.assign(run=name))
            if name in first_pair:
                token_nats[name] = result.token_nats
            check_tables.append(check_run(run, test, result.stories, train_data, stride, unbounded))
            checks = pd.concat(check_tables, ignore_index=True)
            write_csv(checks, out / "checks.csv")
            require(checks)
        if run.name in arm_of_first_run:
            arm = arm_of_first_run[run.name]
            samples[arm] = samples_of(run, arm, test)
        runs.append(dataclasses.replace(run, model=None))
        del run  # memory holds one model at a time
    print(f"{checks.passed.sum()} leak checks passed", flush=True)
    if train_data is not None:
        scores |= {f"{name} baseline": frame for name, frame in evaluate_baselines(train_data, test).items()}
        budgets |= {f"{order} baseline": {"train_tokens": counted_tokens(train_data)} for order in ORDERS}
    table = comparison_table(scores, budgets)
    step = checkpoint if isinstance(checkpoint, str) else f"step-{checkpoint}"
    comparison = Comparison(
        title or f"{data.name}, {step} checkpoints", table, arms, arm_table(arms, table),
        compare_arms(pairs, scores, budgets, _same_order(runs)) if pairs else pd.DataFrame(), checks,
        differences(runs), different_stories(first_pair, scores, token_nats, test, runs[0].tokenizer) if pairs else
        pd.DataFrame(columns=COLUMNS), pd.concat([samples[arm.name] for arm in arms]) if pairs else pd.DataFrame(),
        runs, stride, _same_order(runs), test.header.get("part"))
    _write(comparison, out, scores, pd.concat(positions, ignore_index=True), budgets)
    return table


def budget_of(run) -> dict:
    """Return the budget of a run: parameters, training tokens, FLOPs, seconds, memory, hardware.

    Tokens, steps and seconds are those of the whole run; `checkpoint_step` is the step that is scored.
    """
    ending = Ending.read(run.folder)
    shape, tokens = run.model.config, ending and ending.tokens_seen
    flops = shape.flops_per_token(run.context_length)
    return {"model": run.config.model, "seed": run.config.training.seed, "params": run.info["params"],
            "params_non_embedding": run.info["params_non_embedding"], "params_per_token": shape.weights_per_token,
            "train_tokens": tokens, "flops_per_token": flops,
            # The backward pass has two products for each product of the forward pass.
            "train_flops": None if tokens is None else 3 * flops * tokens,
            "steps": ending and ending.step, "checkpoint_step": run.step, "train_s": ending and ending.elapsed_s,
            "peak_memory_mib": ending and ending.peak_memory_mib, "hardware": run.info["hardware"],
            "ended": str(ending.reason) if ending else "unfinished"}


def differences(runs: list) -> list[str]:
    """Return the settings and budgets in which runs differ, one line each.

    Example:
        "tokens: 926,179 (bdh), 463,000 (gpt2)".
    """
    endings = {run.name: Ending.read(run.folder) for run in runs}
    values = {"training text": lambda run: run.info["train"]["payload_sha256"][:12],
              "context": lambda run: f"{run.context_length:,}",
              "rows per step": lambda run: f"{run.config.training.rows_per_step:,}",
              "windows": lambda run: run.config.training.windows,
              "hardware": lambda run: run.info["hardware"], "dtype": lambda run: run.info["dtype"],
              "processes": lambda run: run.info["processes"],
              "tokens": lambda run: f"{ending.tokens_seen:,}" if (ending := endings[run.name]) else "unknown",
              "end": lambda run: ending.reason if (ending := endings[run.name]) else "unfinished"}
    lines = []
    for label, value in values.items():
        names: dict[str, list[str]] = {}
        for run in runs:
            names.setdefault(str(value(run)), []).append(run.name)
        if len(names) > 1:
            lines.append(f"{label}: " + ", ".join(f"{value} ({', '.join(of)})" for value, of in names.items()))
    seeds = {kind: sorted({run.config.training.seed for run in runs if run.config.model == kind})
             for kind in sorted({run.config.model for run in runs})}
    if len({str(each) for each in seeds.values()}) > 1:
        lines.append("seeds: " + ", ".join(f"{kind} {', '.join(map(str, each))}" for kind, each in seeds.items()))
    if not _same_order(runs):
        lines.append("order of the tokens: runs of one seed have different hashes (run.json, order_sha256)")
    return lines


def find_runs(folder: Path, named: str = "") -> list[Path]:
    """Return the run folders to compare.

    Args:
        folder: results folder.
        named: paths or names in `folder`, separated by ";". Empty: every run folder in `folder`.

    Raises:
        UserError: no run folder.
    """
    names = [name.strip() for name in named.split(";") if name.strip()]
    if names:
        return [folder / name if (folder / name).is_dir() else Path(name) for name in names]
    runs = sorted(path.parent for path in folder.glob("*/run.json"))
    if not runs:
        raise UserError(f"{folder} holds no run folder; expected one or more, of notebook 02_train. Name them.")
    return runs


def check_together(folders: list[Path], unfinished: bool = False) -> list[PlannedRun]:
    """Check that runs can be compared, before any model is loaded.

    Args:
        folders: run folders.
        unfinished: whether to accept runs that are not complete.

    Raises:
        UserError: two folders of one name, no run folder, a run that is not complete, different tokenizers.
    """
    folders = [folder.resolve() for folder in folders]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"found runs {', '.join(names)}; expected different names. Name each run once, and rename "
                        "folders of the same name.")
    runs = [PlannedRun(folder.name, recipe_of(info), info) for folder, info in
            zip(folders, map(read_info, folders), strict=True)]
    waiting = [folder.name for folder in folders if not is_complete(folder)]
    if waiting and not unfinished:
        raise UserError(f"{', '.join(waiting)}: not finished, no DONE.json; expected complete runs. Continue them with "
                        "the commands that started them, or add --unfinished (in notebook 3: unfinished = True).")
    tokenizers = {run.info["tokenizer"]["sha256"]: f"{run.name} has {run.info['tokenizer']['kind']} "
                  f"{run.info['tokenizer']['sha256'][:12]}" for run in runs}
    if len(tokenizers) > 1:
        raise UserError(f"found runs of different tokenizers ({', '.join(tokenizers.values())}); losses per token of "
                        "different tokenizers cannot be compared. Score each run with tools/evaluate.py on its own "
                        "token file of one text, and compare bits_per_byte.")
    return runs


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table atomically, with nine significant digits."""
    write_text(path, frame.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def _write(comparison: Comparison, out: Path, scores: dict[str, pd.DataFrame], positions: pd.DataFrame,
           budgets: dict[str, dict]) -> None:
    c, positions = comparison, positions[["run", "position", "tokens", "nats"]]
    shares = {f"{a.name} against {b.name}": _shares(a, b, scores) for a, b in pairs_of(c.arms, REFERENCE)}
    tables = {f"stories_{name.replace(' ', '_')}": frame for name, frame in scores.items()}
    tables |= {"totals": c.table, "arms": c.by_arm, "pairs": c.pairs, "positions": positions,
               "different_stories": c.examples, "samples": c.samples}
    if shares:
        tables["win_shares"] = pd.concat([frame.assign(pair=name) for name, frame in shares.items()])
    for name, frame in tables.items():
        write_csv(frame, out / f"{name}.csv")
    baselines = c.table.loc[c.table["name"].str.endswith(" baseline"), ["name", "loss"]]  # sorted by loss
    contexts = {run.context_length for run in c.runs}
    logs = {run.name: read_log(run.folder / "log.csv") for run in c.runs}
    per_token = {arm.name: 3 * budgets[arm.runs[0]]["flops_per_token"] for arm in c.arms}
    figures.perplexities(c.arms, c.by_arm, c.table, out / "perplexity.png", c.title)
    figures.training_curves(c.arms, logs, out / "training_curves.png", per_token,
                            None if baselines.empty else tuple(baselines.iloc[0]))
    figures.loss_by_position(c.arms, positions, out / "loss_by_position.png",
                             contexts.pop() if len(contexts) == 1 else None)
    if shares:
        figures.differences_forest(c.arms, c.pairs, out / "differences.png")
        figures.win_shares(shares, out / "win_shares.png")
    write_text(out / "summary.txt", summarise(c.table, c.title, c.unequal, c.arms, c.by_arm, c.pairs, c.checks))
    write_report(c, out)


def _clear(out: Path) -> None:
    """Remove the files of an earlier comparison from a folder."""
    for path in [*out.glob("stories_*.csv"), *(out / name for name in OUTPUTS)]:
        path.unlink(missing_ok=True)


def _shares(a: Arm, b: Arm, scores: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the share of stories that arm a wins, by length of story; nats are means over seeds."""
    tokens = scores[a.runs[0]]["tokens"].to_numpy()
    nats = [sum(scores[run]["nats"].to_numpy() for run in arm.runs) / len(arm.runs) for arm in (a, b)]
    return win_share_by_length(tokens, *nats, n_bins=min(6, max(1, len(tokens) // 20)))


def _same_order(runs: list) -> bool:
    """Return whether runs of one seed have the same hash of the order of their training tokens."""
    orders = {(run.config.training.seed, run.info["train"]["order_sha256"]) for run in runs}
    return len({seed for seed, _ in orders}) == len(orders)


def _has_longer_context(run: Run, data: TokenFile) -> bool:
    """Return whether the model can use more tokens of these stories than fit its training context."""
    return run.model.context_length is None and int(story_tokens(data).max()) > run.context_length


def _check_unseen(run: PlannedRun, data: Path, test: TokenFile, train: Path | None,
                  train_data: TokenFile | None) -> None:
    """Check that a run was not trained on the test file, and that it was trained on the training file."""
    name, trained_on = run.name, run.info["train"]["payload_sha256"]
    if trained_on in _fingerprints(test):
        raise UserError(f"{name} was trained on {data}; expected stories that it has not seen: the test part.")
    if run.info["val"]["payload_sha256"] in _fingerprints(test):
        warnings.warn(f"The checkpoint of {name} was chosen on {data}; use the test part for a result.", stacklevel=3)
    if train_data is not None and trained_on not in _fingerprints(train_data):
        raise UserError(f"{name} was trained on {run.info['train']['file']}, not on {train}; baselines must learn from "
                        "the same tokens. Name the run's training file.")


def _fingerprints(data: TokenFile) -> set[str]:
    """Return the hashes of a token file and of its text; run.json has that of the text if a run was trained from it."""
    return {data.header["payload_sha256"], *(source["sha256"] for source in data.header["source"])}
