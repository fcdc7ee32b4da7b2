#!/usr/bin/env python3
"""Write result tables, command help and the map between the markers of README.md and docs/, and the example report."""

import argparse
import ast
import csv
import dataclasses
import importlib.util
import itertools
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.cli import HelpFormatter, UserError, as_path, run_command
from plotarmour.config import DataConfig, TrainingConfig
from plotarmour.models import KINDS

REFERENCE = ROOT / "results" / "reference"
EXAMPLE_REPORT = REFERENCE / "example" / "comparison" / "report.html"
MARKER = re.compile(r"(<!-- BEGIN ([\w-]+) -->\n)(.*?)(<!-- END \2 -->)", re.S)
BUDGETS = (800, 2200, 8000)  # steps of BDH: models_800.csv, ... have all runs of all kinds with that budget
TINY = {"gpt2-long_seed-1": "**GPT-2**, 18,000 steps, one seed", "bdh-long_seed-1": "**BDH**, 18,000 steps, one seed",
        "gpt2": "**GPT-2**, five seeds", "bdh": "**BDH**, five seeds"}
EXAMPLE_RUNS = ("bdh", "gpt2")
EXAMPLE_TABLES = ("totals", "arms", "pairs", "checks", "different_stories", "samples", "positions")
# Column of arms.csv -> its title and its format.
COLUMNS = {"core_params": ("core params", "{:,.0f}"), "params": ("all params", "{:,.0f}"),
           "train_tokens": ("training tokens", "{:,.0f}"), "train_flops": ("training TFLOPs", "{:.1f}"),
           "train_s": ("time, s", "{:,.0f}"), "loss": ("loss", "{:.3f}"), "perplexity": ("perplexity", "{:,.2f}"),
           "bits_per_byte": ("bits/byte", "{:.3f}"), "over_corpus": ("over the corpus", "{:+.1%}"),
           "recall_loss": ("loss on facts", "{:.3f}"), "other_loss": ("elsewhere", "{:.3f}")}


def contradictions(path: str, labels: dict[str, str]) -> str:
    """Return ROC AUC of the misfit (of trigrams, of their nats) by fact and distance, of each run in `labels`."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows_of(path):
        if row["score"] == ("nats" if row["run"] == "trigram baseline" else "misfit"):
            auc = f"{float(row['auc']):.2f}" if int(row["pairs"]) >= 20 else "too few"
            cells.setdefault((row["fact"], row["distance"]), {})[row["run"]] = auc
    facts, distances = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = [[fact, label, *(cells[fact, distance].get(run, "") for distance in distances)]
             for fact in facts for run, label in labels.items()]
    return table(["fact", "", *(f"{distance} tokens" for distance in distances)], lines, 2)


def rows_of(path: str) -> list[dict[str, str]]:
    """Return the rows of results/reference/`path`."""
    with (REFERENCE / path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Return a Markdown table whose first `text_columns` columns are aligned left, all others right."""
    rule = ["---" if i < text_columns else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def arms_table(path: str, labels: dict[str, str], leave_out: tuple[str, ...] = ()) -> str:
    """Return the arms of an arms.csv as a Markdown table, in the file's order (smallest loss first)."""
    arms = [arm for arm in rows_of(path) if arm["name"] not in leave_out]
    columns = [column for column in COLUMNS if column in arms[0] and not (labels is TINY and column == "train_s")]
    scale = {"train_flops": 1e-12}
    rows = [[labels.get(arm["name"], arm["name"])] +
            [COLUMNS[c][1].format(float(arm[c]) * scale.get(c, 1)) if arm[c] else "" for c in columns] for arm in arms]
    return table(["", *(COLUMNS[c][0] for c in columns)], rows)


def arms_of(steps: int) -> dict[str, dict[str, str]]:
    """Return the arms of a budget by name, such as "llama-time": of each that with the best rates on validation."""
    return {row["arm"].partition("_lr-")[0]: row for row in rows_of(f"models_{steps}.csv") if row["chosen"] == "True"}


def above_bdh(steps: int) -> dict[str, dict[str, float]]:
    """Return how many nats each arm of a budget is above BDH, with the 95 % interval."""
    return {name: {key: float(arm[f"less_bdh{end}"]) for key, end in (("nats", ""), ("low", "_low"), ("high", "_high"))}
            for name, arm in arms_of(steps).items() if arm["less_bdh"]}


def label_of(name: str) -> str:
    """Return what tables call an arm."""
    kind, _, budget = name.partition("-")
    return KINDS[kind].label + {"time": ", for BDH's time", "flops": ", for BDH's FLOPs"}.get(budget, "")


def than(difference: dict[str, float], whose: str) -> str:
    """Return how BDH's perplexity compares with that of `whose`, in words; `difference` is of `above_bdh`."""
    if difference["low"] <= 0 <= difference["high"]:
        return f"not clearly different from {whose}"
    percent = f"{100 * abs(math.expm1(-difference['nats'])):.1f}\u00a0%"
    return f"{percent} {'lower' if difference['nats'] > 0 else 'higher'} than {whose}"


def models_sentence() -> str:
    """Return what the comparison of all kinds says: the strongest transformer first, then GPT-2."""
    loss = {name: float(arm["loss"]) for name, arm in arms_of(2200).items()}
    share = 100 * (loss["gpt2"] - loss["gpt2_rope"]) / (loss["gpt2"] - loss["bdh"])
    of_time, of_tokens, tokens, gpt2 = {}, {}, {}, "GPT-2's"
    for steps in (2200, 8000):
        above, tokens[steps] = above_bdh(steps), float(arms_of(steps)["bdh"]["train_tokens"]) / 1e6
        first = min((name for name in above if name.endswith("-time")), key=lambda name: above[name]["nats"])
        label = KINDS[first.removesuffix("-time")].label
        named, again = ((f"that of the strongest transformer of its size ({label})", f"{label}'s") if steps == 2200 else
                        (f"that of the strongest ({label})", "that model's"))
        of_time[steps] = f"{than(above[first], named)} and {than(above['gpt2-time'], gpt2)}"
        of_tokens[steps] = f"{than(above[first.removesuffix('-time')], again)} and {than(above['gpt2'], gpt2)}"
    words = (f"**For the same training time, BDH's perplexity is {of_time[2200]}. For the same tokens, it is "
             f"{of_tokens[2200]}; {share:.0f}\u00a0% of the latter, in nats, is rotary positions.**")
    stories = int(rows_of("models_2200/comparison/pairs.csv")[0]["stories"])
    note = (f"{tokens[2200]:.2f} million training tokens for BDH, {stories:,} held-out stories of TinyStories, "
            f"{arms_of(2200)['bdh']['seeds']} seeds. After {tokens[8000]:.1f} million (one seed): {of_time[8000]}; for "
            f"the same tokens, {of_tokens[8000]}.")
    return "\n".join(textwrap.wrap(f"{words} {note}", 124, initial_indent="> ", subsequent_indent="> "))


def models(steps: int, leave_out: tuple[str, ...] = (), drop: tuple[str, ...] = ()) -> str:
    """Return a table of the arms of a budget but some, best first, without some columns; beside them, trigrams."""
    above, seconds, rows = above_bdh(steps), {row["arm"]: row["ratio"] for row in rows_of("same_time.csv")}, []
    [trigrams] = (row for row in rows_of("models_2200/comparison/arms.csv") if row["name"] == "trigram baseline")
    for name, arm in sorted((arms_of(steps) | {"trigram baseline": trigrams}).items(),
                            key=lambda item: float(item[1]["loss"])):
        if name in leave_out:
            continue
        row = {"": name, "loss": f"{float(arm['loss']):.3f}", "perplexity": f"{float(arm['perplexity']):.2f}",
               "bits/byte": f"{float(arm['bits_per_byte']):.3f}",
               "tokens, million": f"{float(arm['train_tokens']) / 1e6:.2f}"}
        if arm is not trigrams:
            row |= {"": f"**{label_of(name)}**", "seeds": arm["seeds"], "rates": rates_of(arm["overrides"]),
                    "core params": f"{float(arm['core_params']):,.0f}", "all params": f"{float(arm['params']):,.0f}",
                    "training FLOPs, 10¹²": f"{float(arm['train_flops']) * 1e-12:.1f}",
                    "time of a step, BDH = 1": f"{float(seconds[arm['model']]):.2f}",
                    "loss less BDH's": nats_of(above[name]) if name in above else ""}
        rows.append(row)
    header = ["", "seeds", "rates", "tokens, million", "core params", "all params", "training FLOPs, 10¹²",
              "time of a step, BDH = 1", "loss", "perplexity", "bits/byte", "loss less BDH's"]
    header = [column for column in header if column not in drop]
    return table(header, [[row.get(column, "") for column in header] for row in rows])


def rates_of(overrides: str) -> str:
    """Return the learning rates of matrices, embeddings and head of a run, "0.002, ×16, ×16"."""
    settings = dict(setting.split("=") for setting in overrides.split(";"))
    return ", ".join([settings["learning_rate"], *(f"×{settings.get(f'{part}_rate_fraction', '1')}"
                                                   for part in ("embedding", "head"))])


def second_text() -> str:
    """Return the arms on the second text, best first."""
    less = {row["b"]: {"nats": -float(row["loss_difference"]), "low": -float(row["loss_difference_high"]),
                       "high": -float(row["loss_difference_low"])}
            for row in rows_of("models_2200/comparison_extra/pairs.csv") if row["is_arms"] == "True"}
    lines = []
    for arm in rows_of("models_2200/comparison_extra/arms.csv"):
        if arm["params"] or arm["name"] == "trigram baseline":
            label = f"**{label_of(arm['name'].partition('_lr-')[0])}**" if arm["params"] else arm["name"]
            lines.append([label, f"{float(arm['loss']):.3f}", f"{float(arm['perplexity']):.2f}",
                          f"{float(arm['bits_per_byte']):.3f}",
                          nats_of(less[arm["name"]]) if arm["name"] in less else ""])
    return table(["", "loss", "perplexity", "bits/byte", "loss less BDH's"], lines)


def nats_of(difference: dict[str, float]) -> str:
    return "{nats:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference)


def budgets() -> str:
    """Return the loss of BDH with each budget, and how far every other arm is above it."""
    above, bdh = ({steps: of(steps) for steps in BUDGETS} for of in (above_bdh, lambda steps: arms_of(steps)["bdh"]))
    names = sorted(above[2200], key=lambda name: above[2200][name]["nats"])
    lines = [["BDH: loss", *(f"{float(arm['loss']):.3f}" for arm in bdh.values())]]
    lines += [[label_of(name), *(nats_of(each[name]) if name in each else "" for each in above.values())]
              for name in names]
    return table(["loss less BDH's", *(f"{steps:,} steps of BDH, {float(arm['train_tokens']) / 1e6:.2f} million tokens"
                                      for steps, arm in bdh.items())], lines)


def points_of(kind: str) -> list[tuple[float, float]]:
    """Return (training tokens, test loss) of every arm of a kind: each is a whole schedule of its own."""
    return sorted((float(arm["train_tokens"]), float(arm["loss"])) for steps in BUDGETS
                  for arm in arms_of(steps).values() if arm["model"] == kind)


def tokens_to_reach() -> str:
    """Return how many tokens, and how much time, each kind needs for the loss of BDH after 2,200 steps.

    Between two arms, the loss is taken to fall evenly with the logarithm of the tokens.
    """
    bdh = arms_of(2200)["bdh"]
    tokens, wanted = float(bdh["train_tokens"]), float(bdh["loss"])
    seconds, lines = {row["arm"]: float(row["ratio"]) for row in rows_of("same_time.csv")}, []
    for kind in KINDS:
        points, words = points_of(kind), []
        needed = [before * (after / before) ** ((loss - wanted) / (loss - lower))
                  for (before, loss), (after, lower) in itertools.pairwise(points) if lower <= wanted <= loss]
        if not points:
            continue
        for unit in (1e-6, seconds[kind] / tokens):
            words.append(f"{needed[0] * unit:.2f}" if needed else f"more than {points[-1][0] * unit:.2f}")
        lines.append([KINDS[kind].label, *words])
    return table([f"to reach a loss of {wanted:.3f}", "million tokens", "times BDH's training time"], lines)


def rates() -> str:
    """Return for each kind and budget how many rates were tried, the best, and what one rate for all would give."""
    lines = []
    for steps, rows in ((steps, rows_of(f"models_{steps}.csv")) for steps in BUDGETS):
        for name, best in sorted(arms_of(steps).items(), key=lambda item: list(KINDS).index(item[1]["model"])):
            tried = [row for row in rows if row["arm"].partition("_lr-")[0] == name]
            equal = [float(row["val_loss"]) for row in tried if rates_of(row["overrides"]).endswith(", ×1, ×1")]
            lines.append([label_of(name), f"{steps:,}", str(len(tried)), rates_of(best["overrides"]),
                          f"{float(best['val_loss']):.3f}", f"{min(equal):.3f}" if equal else ""])
    return table(["", "budget", "tried", "best: matrices, embeddings, head", "validation loss",
                  "with one rate for all"], lines)


def plus() -> str:
    """Return the arms of the grid bdh_plus.csv, which all have BDH's time, best first, with their settings."""
    lines = []
    for row in rows_of("bdh_plus.csv"):
        settings = [f"`{setting}`" for setting in row["overrides"].split(";")
                    if setting.partition("=")[0] not in ("max_steps", "warmup_steps", "seed")]
        lines.append([f"**{KINDS[row['model']].label}** {' '.join(settings)}", row["seeds"], f"{int(row['steps']):,}",
                      f"{float(row['loss']):.3f}", interval(row, "less_bdh"), interval(row, "less_llama")])
    return table(["", "seeds", "steps", "loss", "less `bdh_plus`", "less Llama's"], lines)


def pretokenize_speed() -> str:
    """Return speed and memory of the pretokenizer beside those of a plain script; medians."""
    rows = rows_of("pretokenize.csv")

    def median(what: str, mb: str, column: str = "mb_per_s") -> float:
        return statistics.median(float(row[column]) for row in rows if (row["what"], row["mb"]) == (what, mb))

    [plain] = [row for row in rows if row["what"] == "plain script"]
    [opened] = [row for row in rows if row["what"] == "open"]
    split = [float(row["mb_per_s"]) for row in rows if row["what"] == "ours with --split"]
    lines = []
    for mb in ("206", "1006"):
        ours = median("ours", mb)
        lines.append([f"{int(mb):,} MB", f"{ours:.0f} MB/s", f"{ours / float(plain['mb_per_s']):.1f}",
                      f"{median('fastokens alone', mb):,.0f} MB/s", f"{median('ours', mb, 'peak_rss_mib'):.0f} MiB"])
    return table(["TinyStories, repeated", "whole command", "times the plain script", "fastokens alone", "peak memory"],
                 lines, text_columns=0) + (
        f"\n\nThe plain script encodes {float(plain['mb_per_s']):.1f} MB/s with {float(plain['peak_rss_mib']):.0f} MiB."
        f" With `--split`, every story is hashed as well: {min(split):.0f} to {max(split):.0f} MB/s.\nA token file of "
        f"{float(opened['mb']) / 1000:.0f} GB opens in {float(opened['open_ms']):.1f} ms.")


def loop_cost() -> str:
    """Return what the training loop adds to a step, and how well it foresees its end."""
    rows, link = rows_of("training_loop.csv"), "../benchmarks"
    ratios = [float(row["ratio_cross_entropy"]) for row in rows]
    shares = [100 * sum(float(row[f"share_{part}"]) for part in ("batches", "logging", "checkpoints")) for row in rows]
    later = [row for row in rows_of("forecast.csv") if float(row["elapsed_s"]) >= 60]
    off = max(abs(float(row["shown_s"]) / float(row["real_s"]) - 1) for row in later)
    minutes = float(later[0]["real_s"]) / 60
    return table(["claim", "shown by", "measured"], [
        ["the loop adds little to a step", f"[benchmarks/training_loop.py]({link}/training_loop.py)",
         f"{min(ratios):.2f} to {max(ratios):.2f} times the tokens/s of a plain loop on a fixed batch; batches, log "
         f"and checkpoints take {min(shares):.1f} to {max(shares):.1f} % of the time"],
        ["the forecast of the end holds", f"[benchmarks/forecast.py]({link}/forecast.py)",
         f"a run of {minutes:.0f} minutes: from its first minute on within {math.ceil(100 * off)} % of the real end"]],
        text_columns=3)


def memory_plan() -> str:
    """Return how far the memory plan is from what torch allocates."""
    rows = rows_of("memory_plan.csv")
    off = max(abs(float(row["planned_of_measured"]) - 1) for row in rows)
    grown = max(float(row["resident_mib"]) / float(row["measured_mib"]) for row in rows)
    return (f"In {len(rows)} cases on a CPU the plan was within {math.ceil(100 * off)} % of the tensors that torch "
            f"allocated; the memory of the\nprocess grew by up to {grown:.1f} times as much, since the heap has gaps.")


def windows() -> str:
    """Return how fast windows are found, and what a mask of stories costs."""
    kinds, masked = rows_of("windows.csv"), rows_of("mask_stories.csv")
    slowest, most = (min(float(row["read_per_s"]) for row in kinds),
                     max(float(row["held_bytes_per_story"]) for row in kinds))
    times = ", ".join(f"{row['model']} {float(row['masked_of_unmasked']):.2f}" for row in masked)
    return (f"`packed` and the three kinds after it are read at {slowest / 1e5:.1f} · 10⁵ windows/s or more on one "
            f"core, with at most\n{most:.0f} bytes per story beside the token file. On a CPU a step with "
            f"`mask_stories` takes so many times the step without:\n{times} (the last with "
            f"`n_embd={masked[-1]['n_embd']}` and rows of {masked[-1]['context_length']} tokens).")


def options() -> str:
    """Return the runs with one change to BDH, its training or the modern transformer, best first."""
    lines, of_all = [], ("learning_rate=0.024", "embedding_rate_fraction=1", "head_rate_fraction=1")
    for row in rows_of("bdh_options.csv"):
        changes = [f"`{change}`" for change in row["overrides"].split(";") if change not in of_all
                   and change.partition("=")[0] not in ("max_steps", "warmup_steps")]
        lines.append([f"**{KINDS[row['model']].label}** {' '.join(changes)}".strip(), f"{int(row['steps']):,}",
                      f"{float(row['loss']):.3f}", interval(row, "less_bdh"),
                      interval(row, "less_modern") if row["arm"].endswith("-time") else ""])
    return table(["", "steps", "loss", "less BDH's", "for BDH's time: less the modern transformer's"], lines)


def interval(row: dict[str, str], column: str, digits: int = 3) -> str:
    """Return a difference with its 95 % interval, from a column and those of its ends; "" where it is empty."""
    ends = [float(row[f"{column}{end}"] or 0) for end in ("", "_low", "_high")]
    return "{1:+.{0}f} ({2:+.{0}f} to {3:+.{0}f})".format(digits, *ends) if row[column] else ""


def window_losses() -> str:
    """Return the loss of each kind of model, windows and mask, and its differences."""
    lines = [[KINDS[row["model"]].label, f"`{row['windows']}`", "yes" if row["mask"] == "True" else "",
              f"{float(row['padding_share']):.0%}", f"{float(row['tokens_per_s']):,.0f}",
              f"{float(row['distinct']):.0%}", f"{float(row['loss']):.3f}",
              interval(row, "less_stream"), interval(row, "less_unmasked")] for row in rows_of("window_losses.csv")]
    return table(["", "windows", "mask", "padding", "tokens/s", "distinct", "loss", "less `stream`",
                  "less the same unmasked"], lines, 3)


def batch_losses() -> str:
    """Return the loss of each batch size, budget and rule of learning rates."""
    lines = []
    for row in rows_of("batch_losses.csv"):
        budget, rule = ("tutorial", "") if row["budget"] == "notes" else (f"equal {row['budget']}", row["rule"])
        lines.append([budget, rule, row["batch_size"], f"{int(row['steps']):,}", f"{int(row['samples']):,}",
                      row["learning_rate"], f"{float(row['loss']):.3f}", interval(row, "less_base")])
    return table(["budget", "rate scaled by", "rows per step", "steps", "samples", "learning rate", "loss",
                  "less base"], lines, 2)


def words() -> str:
    """Return the bits per byte of tokenizers of one text."""
    lines = [[f"`{row['tokenizer']}`", f"{int(row['test_tokens']):,}",
              f"{float(row['runs_bits_per_byte']):.3f}", interval(row, "runs_less"),
              f"{float(row['trigrams_bits_per_byte']):.4f}", interval(row, "trigrams_less", 4)]
             for row in rows_of("words.csv")]
    return table(["tokenizer", "test tokens", "GPT-2", "less `bpe:4096`", "trigrams", "less `bpe:4096`"], lines)


def settings() -> str:
    """Return a table of all settings of [data] and [training], from the fields of the config dataclasses."""
    rows = []
    for section, config in (("data", DataConfig), ("training", TrainingConfig)):
        for f in dataclasses.fields(config):
            default = "required" if f.default is dataclasses.MISSING else f"`{f.default}`"
            rows.append([f"`{f.name}`", section, default, f.metadata["doc"]])
    return table(["setting", "section", "default", "meaning"], rows, text_columns=4)


def over_corpus() -> str:
    """Return sentences on how far the seeds of recipe `tiny` are above the corpus."""
    def sentence(kind: str, label: str) -> str:
        rows = [row for row in rows_of("tiny/totals.csv") if re.fullmatch(rf"{kind}_seed-\d+", row["name"])]
        above, facts, other = (sorted(float(row[column]) for row in rows) for column in
                               ("over_corpus", "recall_loss", "other_loss"))
        low, high = 100 * above[0], 100 * above[-1]
        return (f"The {len(rows)} seeds of {label} are {low:.1f} to {high:.1f} % above the corpus, "
                f"with a loss of {facts[0]:.2f} to {facts[-1]:.2f} on facts and {other[0]:.3f} to {other[-1]:.3f} "
                "elsewhere.")
    return f"{sentence('bdh', 'BDH')}\n{sentence('gpt2', 'GPT-2')}"


def copy_example(results: Path) -> None:
    """Copy tables, figures, logs and run.json of the suite's results to results/reference/example."""
    names = [f"comparison/{name}.csv" for name in EXAMPLE_TABLES] + ["comparison/win_shares.csv"]
    names += [path.relative_to(results).as_posix() for path in sorted((results / "comparison").glob("*.png"))]
    for name in [*names, *(f"{run}/{file}" for run in EXAMPLE_RUNS for file in ("run.json", "log.csv"))]:
        path = REFERENCE / "example" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((results / name).read_bytes())


def example_report() -> str:
    """Return results/reference/example/comparison/report.html, from the tables and with the figures beside it."""
    import pandas as pd

    from plotarmour.config import restored
    from plotarmour.evaluation.arms import group_runs
    from plotarmour.report.page import render_page
    from plotarmour.report.verdict import Comparison
    from plotarmour.resume import read_info
    from plotarmour.run import Run

    folder = REFERENCE / "example"
    infos = {name: read_info(folder / name) for name in EXAMPLE_RUNS}
    table, by_arm, pairs, checks, examples, samples, _ = (pd.read_csv(folder / "comparison" / f"{name}.csv")
                                                          for name in EXAMPLE_TABLES)
    runs = [Run(folder / name, None, None, restored(info["recipe"]), info, 0, None) for name, info in infos.items()]
    same_order = len({info["train"]["order_sha256"] for info in infos.values()}) == 1
    comparison = Comparison("test stories of recipe tiny", group_runs(infos), table, by_arm, pairs, pairs[:0], checks,
                            [], examples, samples, runs, None, same_order, "test")
    figures = sorted(path.name for path in (folder / "comparison").glob("*.png"))
    return render_page(comparison, folder / "comparison", {name: name for name in figures})


def draw_figures() -> None:
    """Draw the figures of results/reference that follow from committed tables."""
    import pandas as pd

    from benchmarks.figures import contradiction_curves, option_losses, plus_curves
    from plotarmour.evaluation.arms import Arm
    from plotarmour.report import figures

    contradiction_curves(pd.read_csv(REFERENCE / "contradictions_tales.csv"), REFERENCE / "contradictions_tales.png",
                         "misfit")
    seconds = {row["arm"]: float(row["ratio"]) for row in rows_of("same_time.csv")}
    bdh_tokens = float(arms_of(2200)["bdh"]["train_tokens"])
    figure, panels = figures.new_figure(9.6, 3.9, "Loss on held-out stories; each point is a whole training", "",
                                        "loss (nats per token)", columns=2)
    for axes, label, unit_of in ((panels[0], "training tokens (million, logarithmic)", lambda kind: 1e-6),
                                 (panels[1], f"training time (1: BDH with {bdh_tokens / 1e6:.2f} million tokens; "
                                  "logarithmic)",
                                  lambda kind: seconds[kind] / bdh_tokens)):
        for kind in ("gpt2", "gpt2_rope", "llama", "lstm", "modern", "bdh"):
            tokens, losses = zip(*points_of(kind), strict=True)
            axes.plot([n * unit_of(kind) for n in tokens], losses, color=KINDS[kind].colors[0], marker="o",
                      linewidth=2.4 if kind in ("modern", "bdh") else 1.2, label=KINDS[kind].label)
        axes.set_xscale("log")
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(label)
    panels[1].legend(frameon=False, fontsize=9)
    figures.save_figure(figure, REFERENCE / "budgets.png")
    option_losses(pd.read_csv(REFERENCE / "bdh_options.csv"), REFERENCE / "bdh_options.png")
    plus_curves(pd.read_csv(REFERENCE / "bdh_plus_curves.csv"), REFERENCE / "bdh_plus.png")
    path = REFERENCE / "tiny"
    by_arm, by_run, pairs = (pd.read_csv(path / f"{name}.csv") for name in ("arms", "totals", "pairs"))
    order = [*dict.fromkeys(pairs["a"]), *dict.fromkeys(pairs["b"])]  # gives the colours of the comparison
    arms = []
    rows = by_arm[by_arm["params"].notna()]
    for row in rows.sort_values("name", key=lambda names: names.map(order.index)).itertuples(index=False):
        seeds = tuple(map(int, str(row.seeds).split(", ")))
        runs = (row.name,) if row.name in set(by_run["name"]) else tuple(f"{row.name}_seed-{s}" for s in seeds)
        arms.append(Arm(row.name, row.model, runs, seeds))
    figures.perplexities(arms, by_arm, by_run, path / "perplexity.png", "Built-in corpus, test part")


def parser_of(tool: Path) -> argparse.ArgumentParser:
    """Return the parser of a command line in tools/, without running it."""
    spec = importlib.util.spec_from_file_location(tool.stem, tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser = module.build_parser()
    parser.prog = tool.name  # pytest's or this script's name otherwise
    return parser


def commands() -> str:
    """Return every tool's description and options. Not argparse's own layout, which differs between versions."""
    parts = []
    for tool in sorted((ROOT / "tools").glob("*.py")):
        parser = parser_of(tool)
        formatter = parser._get_formatter()
        lines = [f"### {tool.name}", "", " ".join((parser.description or "").split()), ""]
        for action in parser._actions:
            if action.help is None or action.help == argparse.SUPPRESS or "--help" in action.option_strings:
                continue
            name = ", ".join(action.option_strings)
            value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
            value = " ".join(value) if isinstance(value, tuple) else value
            text = " ".join(formatter._expand_help(action).split()).replace("<|", r"\<\|")
            lines.append(f"- `{' '.join(filter(None, (name, value)))}`: {text}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def summary(path: Path) -> str:
    """Return the first sentence of a module's docstring, without its full stop."""
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return re.split(r"\.(?=\s+[A-Z]|$)", " ".join(text.split()))[0]


def project_map() -> str:
    """Return the tree of the package: modules outside of folders with the first sentence of their docstrings."""
    package, lines = ROOT / "plotarmour", ["plotarmour/"]
    for path in sorted(package.glob("[!_]*.py")):
        lines.append(f"  {path.name:<16} {summary(path)}")
    for room in sorted(path for path in package.iterdir() if path.is_dir() and not path.name.startswith(("_", "."))):
        names = sorted(path.stem for path in room.glob("[!_]*.py")) or sorted(path.name for path in room.glob("*.toml"))
        lines += [f"  {room.name + '/':<16} {line}" if i == 0 else f"{'':<19}{line}"
                  for i, line in enumerate(textwrap.wrap(", ".join(names), 100))]
    return "```text\n" + "\n".join(lines) + "\n```"


def modules() -> str:
    """Return a table of all modules, each with the first sentence of its docstring."""
    package = ROOT / "plotarmour"
    paths = [*package.glob("[!_]*.py"), *package.glob("*/[!_]*.py"), package / "models" / "__init__.py"]
    names = {path.relative_to(package).as_posix(): path for path in paths}
    rows = [[f"[{name}](../plotarmour/{name})", summary(names[name])] for name in sorted(names)]
    return table(["module", "what it does"], rows, text_columns=2)


BLOCKS: dict[str, Callable[[], str]] = {
    "models-sentence": models_sentence,
    "models-2200": lambda: models(2200),
    "models-2200-short": lambda: models(2200, ("moe", "lstm", "llama-flops", "modern-time", "modern",
                                               "gpt2_rope-time"), ("rates", "core params", "all params", "bits/byte")),
    "models-2200-extra": second_text,
    "budgets": budgets,
    "tokens-to-reach": tokens_to_reach,
    "rates": rates,
    "options": options,
    "plus": plus,
    "tiny": lambda: arms_table("tiny/arms.csv", TINY),
    "over-corpus": over_corpus,
    "contradictions": lambda: contradictions("contradictions_tales.csv", {
        "bdh": "BDH", "gpt2": "GPT-2", "trigram baseline": "trigrams"}),
    "swaps": lambda: contradictions("contradictions_stories.csv", {
        "bdh_seed-1": "BDH", "gpt2_seed-1": "GPT-2", "modern-time_seed-1": "Modern transformer, for BDH's time",
        "trigram baseline": "trigrams"}),
    "pretokenize-speed": pretokenize_speed,
    "loop-cost": loop_cost,
    "memory-plan": memory_plan,
    "windows": windows,
    "window-losses": window_losses,
    "batch-losses": batch_losses,
    "words": words,
    "settings": settings,
    "commands": commands,
    "map": project_map,
    "modules": modules,
}


def render(text: str) -> str:
    """Return `text` with every block between its markers written anew.

    Raises:
        UserError: a marker names no block.
    """
    def write(match: re.Match) -> str:
        if match[2] not in BLOCKS:
            raise UserError(f"no block is named {match[2]}; expected one of {', '.join(BLOCKS)}. Mend the marker.")
        return f"{match[1]}{BLOCKS[match[2]]()}\n{match[4]}"
    return MARKER.sub(write, text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file differs")
    parser.add_argument("--figures", action="store_true", help="also draw the figures of results/reference that follow "
                        "from committed tables")
    parser.add_argument("--example", type=as_path, metavar="FOLDER", help="results of python tools/run_suite.py, to be "
                        "copied to results/reference/example first")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.figures:
        draw_figures()
    if args.example:
        copy_example(args.example)
    pages, differing = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], []
    for path, rendered in [*((page, render(page.read_text(encoding="utf-8"))) for page in pages),
                           (EXAMPLE_REPORT, example_report())]:
        if not path.exists() or rendered != path.read_text(encoding="utf-8"):
            differing.append(path.relative_to(ROOT).as_posix())
            if not args.check:
                path.write_text(rendered, encoding="utf-8", newline="\n")
    if differing and args.check:
        print(f"not as rendered: {', '.join(differing)}. Run python tools/render_docs.py.", file=sys.stderr)
        sys.exit(1)
    print(f"rendered: {', '.join(differing) or 'nothing has changed'}")


if __name__ == "__main__":
    run_command(main)
