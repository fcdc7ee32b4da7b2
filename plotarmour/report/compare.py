"""Comparison of runs: scores every story under each run, checks for leaks, and writes tables, figures and a report."""

import base64
import dataclasses
import json
import math
from pathlib import Path

import pandas as pd

from plotarmour.cli import AnyPath, UserError, as_path, warn
from plotarmour.data.tales import read_facts
from plotarmour.data.token_file import TokenFile, unknown_words
from plotarmour.evaluation.arms import compare_arms, group_runs, ladder_of, nats_of, pairs_of
from plotarmour.evaluation.leak_checks import check_run, check_stories, passed_checks, require
from plotarmour.evaluation.ngrams import ORDERS, counted_tokens, evaluate_baselines
from plotarmour.evaluation.scoring import (
    BASELINE,
    CORPUS,
    UNBOUNDED,
    check_stride,
    comparison_table,
    evaluate_run,
    story_tokens,
)
from plotarmour.evaluation.statistics import win_share_by_length
from plotarmour.files import write_text
from plotarmour.models import LADDER, REFERENCE
from plotarmour.report import figures
from plotarmour.report.examples import different_stories, samples_of
from plotarmour.report.page import render_page
from plotarmour.report.verdict import Comparison, arm_table, summary_text
from plotarmour.resume import read_info
from plotarmour.run import Run, check_same_tokenizer, load_run
from plotarmour.training.checkpoint import find_checkpoint, step_of
from plotarmour.training.ending import Ending, Reason, is_complete

OUTPUTS = ("report.html", "summary.txt", "totals.csv", "arms.csv", "pairs.csv", "checks.csv", "positions.csv",
           "win_shares.csv", "different_stories.csv", "samples.csv", "perplexity.png", "training_curves.png",
           "loss_by_position.png", "differences.png", "win_shares.png", "ladder.csv", "ladder.png", "gap.png")


def compare_runs(folders: list[AnyPath], data: AnyPath, out: AnyPath, train: AnyPath | None = None,
                 facts: AnyPath | None = None, stride: int | None = None, title: str | None = None,
                 checkpoint: str | int = "best", device: str = "auto", unfinished: bool = False) -> pd.DataFrame:
    """Score every story of a token file under runs and n-gram baselines, and write tables, figures and a report.

    Runs that differ only in their seed are one arm of the comparison. Results of an earlier comparison in `out` are
    removed. If a leak check fails, only checks.csv is written.

    Args:
        folders: run folders with different names.
        data: token file to score.
        out: folder for report.html, summary.txt, totals.csv (a row per run), arms.csv, pairs.csv (differences with
            intervals), checks.csv, stories_NAME.csv for runs and baselines, positions.csv, win_shares.csv,
            different_stories.csv, samples.csv and figures; docs/tables.md describes the columns. With one arm, there
            are no files about pairs.
        train: training token file; None skips the n-gram baselines and the checks that stories are held out.
        facts: .facts.jsonl of the built-in corpus, or None.
        stride: stride of sliding windows, in tokens; None: half a context.
        title: of figures and report; None: the names of token file and checkpoint.
        checkpoint: "best" by validation loss, "latest" or a step.
        device: "auto", "cpu" or "cuda".
        unfinished: whether to accept runs that are not complete; tables then label them.

    Returns:
        The table of totals.csv.

    Raises:
        UserError: the same run or the same weights twice, different tokenizers, stories that a run was trained on, a
            training file that is not the runs' own, a run that is not complete, or a failed leak check.
    """
    out, folders = as_path(out), [as_path(folder).resolve() for folder in folders]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; expected a folder for --out.")
    infos = check_together(folders, unfinished)
    arms = group_runs(infos)
    test, corpus_facts = TokenFile.open(data), read_facts(as_path(facts)) if facts else None
    if test.n_stories < min(2, len(folders)):
        raise UserError(f"{test.path} holds {test.n_stories} stories; expected test stories, at least two for a "
                        "comparison.")
    train_data = TokenFile.open(train) if train else None
    for folder, info in zip(folders, infos.values(), strict=True):
        check_same_tokenizer(test, info["tokenizer"]["sha256"], str(folder))
        check_stride(stride, info["recipe"]["training"]["context_length"])
        _check_unseen(folder.name, info, test, train_data)
    _check_different_weights(folders, checkpoint)
    _clear(out)
    checks = []
    if train_data is not None:
        checks.append(check_stories(train_data, test))
        write_csv(checks[0], out / "checks.csv")
        require(checks[0])
    endings = {folder.name: Ending.read(folder) for folder in folders}
    pairs = pairs_of(arms, REFERENCE, {name: ending.best_val_loss if ending else math.inf
                                       for name, ending in endings.items()})
    arm_of_first_run = {arm.runs[0]: arm.name for arm in arms} if pairs else {}
    first_pair = [arm.runs[0] for arm in pairs[0]] if pairs else []  # for the examples
    scores, positions, budgets, runs, token_nats, samples = {}, [], {}, [], {}, {}
    for folder in folders:
        run = load_run(folder, checkpoint, device)
        budgets[run.name] = _budget_of(run, endings[run.name])
        has_longer = run.model.context_length is None and story_tokens(test).max() > run.context_length
        for unbounded in (False, True)[:1 + has_longer]:
            name = run.name + UNBOUNDED * unbounded
            scores[name], by_position, nats = evaluate_run(run, test, corpus_facts, stride, unbounded)
            positions.append(by_position.assign(run=name))
            if name in first_pair:
                token_nats[name] = nats
            checks.append(check_run(run, test, scores[name], stride, unbounded))
            write_csv(pd.concat(checks), out / "checks.csv")
            require(checks[-1])
        if run.name in arm_of_first_run:
            arm = arm_of_first_run[run.name]
            samples[arm] = samples_of(run, arm, test)
        runs.append(dataclasses.replace(run, model=None))
        del run  # memory holds one model at a time
    checks = pd.concat(checks, ignore_index=True)
    print(passed_checks(checks), flush=True)
    if train_data is not None:
        scores |= {f"{name}{BASELINE}": frame for name, frame in evaluate_baselines(train_data, test).items()}
        budgets |= {f"{order}{BASELINE}": {"train_tokens": counted_tokens(train_data)} for order in ORDERS}
    table, same_order = comparison_table(scores, budgets), _same_order(runs)
    by_arm = arm_table(arms, table)
    ladder = ladder_of(pairs, by_arm, LADDER)
    step = checkpoint if isinstance(checkpoint, str) else f"step-{checkpoint}"
    comparison = Comparison(
        title or f"{test.path.name}, {step} checkpoints", arms, table, by_arm,
        *(compare_arms(each, scores, budgets, same_order) for each in (pairs, ladder)), checks,
        _differences(runs, budgets, same_order),
        different_stories(first_pair, scores, token_nats, test) if pairs else pd.DataFrame(),
        pd.concat([samples[arm.name] for arm in arms]) if pairs else pd.DataFrame(),
        runs, stride, same_order, test.header.get("part"), unknown_words(test))
    tables = {_file_of(name): frame for name, frame in scores.items()}
    tables |= {"totals.csv": table, "arms.csv": comparison.by_arm,
               "positions.csv": pd.concat(positions)[["run", "position", "tokens", "nats"]]}
    if pairs:
        tables |= {"pairs.csv": comparison.pairs, "different_stories.csv": comparison.examples,
                   "samples.csv": comparison.samples, "win_shares.csv": pd.concat(
                       [win_share_by_length(*nats_of(a, b, scores)).assign(
                           pair=f"{comparison.labels[a.name]} against {comparison.labels[b.name]}") for a, b in pairs])}
    if ladder:
        tables["ladder.csv"] = comparison.ladder
    for name, frame in tables.items():
        write_csv(frame, out / name)
    _draw(comparison, tables, out)
    write_text(out / "summary.txt", summary_text(comparison))
    images = {path.name: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
              for path in out.glob("*.png")}
    write_text(out / "report.html", render_page(comparison, out, images))
    return table


def _budget_of(run: Run, ending: Ending | None) -> dict:
    """Return the budget of a run: parameters, training tokens, FLOPs, seconds, memory, hardware.

    Tokens, steps and seconds are those of the whole run; `checkpoint_step` is the step that is scored.
    """
    shape, T, tokens = run.model.config, run.context_length, ending and ending.tokens_seen
    return {"model": run.config.model, "seed": run.config.training.seed, "params": run.info["params"],
            "core_params": shape.core_params, "params_per_token": shape.weights_per_token,
            "train_tokens": tokens, "flops_per_token": shape.flops_per_token(T),
            "train_flops": None if tokens is None else round(tokens * shape.training_flops_per_token(T)),
            "steps": ending and ending.step, "checkpoint_step": run.step, "train_s": ending and ending.elapsed_s,
            "peak_memory_mib": ending and ending.peak_memory_mib, "hardware": run.info["hardware"],
            "ended": str(ending.reason) if ending else "unfinished"}


def _differences(runs: list[Run], budgets: dict[str, dict], same_order: bool) -> list[str]:
    """Return the settings and budgets in which runs differ, a line each: "tokens: 926,179 (bdh), 463,000 (gpt2)"."""
    by_label: dict[str, dict[str, list[str]]] = {}  # the names of the runs with each value
    for run in runs:
        t, info, budget = run.config.training, run.info, budgets[run.name]
        tokens, ended = budget["train_tokens"], budget["ended"]
        ended = Reason(ended).label if ended in set(Reason) else ended
        for label, value in (("training text", info["train"]["payload_sha256"][:12]),
                             ("context", f"{t.context_length:,}"), ("rows per step", f"{t.rows_per_step:,}"),
                             ("windows", t.windows), ("hardware", info["hardware"]), ("dtype", info["dtype"]),
                             ("processes", info["processes"]),
                             ("tokens", "unknown" if tokens is None else f"{tokens:,}"), ("end", ended)):
            by_label.setdefault(label, {}).setdefault(str(value), []).append(run.name)
    lines = [f"{label}: " + ", ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
             for label, values in by_label.items() if len(values) > 1]
    seeds = {kind: sorted({run.config.training.seed for run in runs if run.config.model == kind})
             for kind in sorted({run.config.model for run in runs})}
    if len({str(each) for each in seeds.values()}) > 1:
        lines.append("seeds: " + ", ".join(f"{kind} {', '.join(map(str, each))}" for kind, each in seeds.items()))
    if not same_order:
        lines.append("order of the tokens: runs of one seed have different hashes (run.json, order_sha256)")
    return lines


def check_together(folders: list[Path], unfinished: bool = False) -> dict[str, dict]:
    """Check that runs can be compared, before any model is loaded.

    Args:
        folders: run folders.
        unfinished: whether to accept runs that are not complete.

    Returns:
        By run name, the content of run.json.

    Raises:
        UserError: names that lead to the same files, no run folder, a run that is not complete, different tokenizers.
    """
    infos = {folder.name: read_info(folder) for folder in folders}
    if len(infos) < len(folders):
        raise UserError(f"found runs {', '.join(folder.name for folder in folders)}; expected different names. Name "
                        "each run once, and rename folders of the same name.")
    _check_names(list(infos))
    waiting = [folder.name for folder in folders if not is_complete(folder)]
    if waiting and not unfinished:
        raise UserError(f"{', '.join(waiting)}: not finished, no DONE.json; expected complete runs. Continue them with "
                        "the commands that started them, or add --unfinished.")
    tokenizers = {info["tokenizer"]["sha256"]: f"{name} has {info['tokenizer']['kind']} "
                  f"{info['tokenizer']['sha256'][:12]}" for name, info in infos.items()}
    if len(tokenizers) > 1:
        raise UserError(f"found runs of different tokenizers ({', '.join(tokenizers.values())}); losses per token of "
                        "different tokenizers cannot be compared. Score each run with tools/evaluate.py on its own "
                        "token file of one text, and compare bits_per_byte.")
    return infos


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write a table atomically, with nine significant digits."""
    write_text(path, frame.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def _draw(c: Comparison, tables: dict[str, pd.DataFrame], out: Path) -> None:
    """Draw the figures of a comparison."""
    baselines = c.table.loc[c.table["name"].str.endswith(BASELINE), ["name", "loss"]]  # sorted by loss
    contexts = {run.context_length for run in c.runs}
    figures.perplexities(c.arms, c.by_arm, c.table, out / "perplexity.png", c.title)
    logs = {run.name: run.log for run in c.runs}
    figures.training_curves(c.arms, logs, out / "training_curves.png",
                            {arm.name: run.config.model_config(run.info["vocab_size"]).training_flops_per_token(
                                run.context_length)
                             for arm in c.arms for run in c.runs if run.name == arm.runs[0]},
                            None if baselines.empty else tuple(baselines.iloc[0]))
    figures.loss_by_position(c.arms, tables["positions.csv"], out / "loss_by_position.png",
                             contexts.pop() if len(contexts) == 1 else None)
    if len(c.pairs):
        figures.differences_forest(c.arms, c.pairs, out / "differences.png")
        figures.win_shares(tables["win_shares.csv"], out / "win_shares.png")
    if len(c.ladder):
        figures.ladder(c.arms, c.ladder, c.by_arm, out / "ladder.png")
        [reference] = [arm for arm in c.arms if arm.name == c.pairs["a"].iloc[0]]
        figures.gap_against_tokens(reference, [arm for arm in c.arms if arm.name in c.level], logs, out / "gap.png")


def _clear(out: Path) -> None:
    """Remove the files of an earlier comparison from a folder; where there was none, such files are the user's."""
    if not any((out / name).exists() for name in ("checks.csv", "totals.csv")):
        return
    for path in [*out.glob("stories_*.csv"), *(out / name for name in OUTPUTS)]:
        path.unlink(missing_ok=True)


def _same_order(runs: list[Run]) -> bool:
    """Return whether runs of one seed have the same hash of the order of their training tokens."""
    orders = {(run.config.training.seed, run.info["train"]["order_sha256"]) for run in runs}
    return len({seed for seed, _ in orders}) == len(orders)


def _check_names(names: list[str]) -> None:
    """Raise `UserError` where the rows or files of a run could be taken for those of another run or of a baseline."""
    for name in names:
        if name.casefold().endswith((UNBOUNDED, BASELINE)) or name == CORPUS:
            raise UserError(f"found a run named {name!r}, like a row of the tables; expected a name without "
                            f"{UNBOUNDED!r} or {BASELINE!r} at its end. Rename its folder.")
    by_file: dict[str, str] = {}  # on some disks, file names that differ only in case are the same
    others = [*(f"{name}{UNBOUNDED}" for name in names), *(f"{order}{BASELINE}" for order in ("uniform", *ORDERS))]
    for name in [*names, *others]:
        first = by_file.setdefault(_file_of(name).casefold(), name)
        if first != name:
            raise UserError(f"found {first!r} and {name!r}, whose files would have one name; expected names that "
                            "differ in more than blanks and case. Rename a run folder.")


def _file_of(name: str) -> str:
    """Return the name of the CSV of a run's or baseline's rows per story."""
    return f"stories_{'_'.join(name.split())}.csv"


def _check_different_weights(folders: list[Path], checkpoint: str | int) -> None:
    """Raise `UserError` where two runs have the same weights: one of them is a copy, whatever its run.json says."""
    names: dict[str, str] = {}  # by SHA-256 of the weights, which loading compares with the file's
    for folder in folders:
        weights = find_checkpoint(folder, checkpoint, [])
        manifest = json.loads((weights / "MANIFEST.json").read_text(encoding="utf-8"))
        first = names.setdefault(manifest["files"]["model.safetensors"], folder.name)
        if first != folder.name:
            untrained = " These are the weights of step 0, which the seed decides: no later evaluation was better." * (
                step_of(weights) == 0)
            raise UserError(f"{first} and {folder.name} have the same weights; expected runs that were trained "
                            f"separately.{untrained} Name only one of them.")


def _check_unseen(name: str, info: dict, test: TokenFile, train_data: TokenFile | None) -> None:
    """Check that a run was not trained on the test file, and that it was trained on the training file."""
    trained_on = info["train"]["payload_sha256"]
    if trained_on == test.header["payload_sha256"]:
        raise UserError(f"{name} was trained on {test.path}; expected stories that it has not seen: the test part.")
    if info["val"]["payload_sha256"] == test.header["payload_sha256"]:
        warn(f"The checkpoint of {name} was chosen on {test.path}; use the test part for a result.")
    if train_data is not None and trained_on != train_data.header["payload_sha256"]:
        raise UserError(f"{name} was trained on {info['train']['file']}, not on {train_data.path}; baselines must "
                        "learn from the same tokens. Name the run's training file.")
