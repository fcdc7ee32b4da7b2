"""Tables and sentences of README.md and docs/ that follow from the CSVs of results/reference, as Markdown."""

import csv
import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

from plotarmour.models import KINDS

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference"
BUDGETS = (800, 2200, 8000)  # steps of BDH: models_800.csv, ... have all runs of all kinds with that budget
TINY = {"gpt2-long_seed-1": "**GPT-2**, 18,000 steps, one seed", "bdh-long_seed-1": "**BDH**, 18,000 steps, one seed",
        "gpt2": "**GPT-2**, five seeds", "bdh": "**BDH**, five seeds"}
# Column of arms.csv -> its title and its format.
COLUMNS = {"core_params": ("core params", "{:,.0f}"), "params": ("all params", "{:,.0f}"),
           "train_tokens": ("training tokens", "{:,.0f}"), "train_flops": ("training TFLOPs", "{:.1f}"),
           "train_s": ("time, s", "{:,.0f}"), "loss": ("loss", "{:.3f}"), "perplexity": ("perplexity", "{:,.2f}"),
           "bits_per_byte": ("bits/byte", "{:.3f}"), "over_corpus": ("over the corpus", "{:+.1%}"),
           "recall_loss": ("loss on facts", "{:.3f}"), "other_loss": ("elsewhere", "{:.3f}")}


def rows_of(path: str) -> list[dict[str, str]]:
    """Return the rows of results/reference/`path`."""
    with (REFERENCE / path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(header: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """Return a Markdown table whose first `text_columns` columns are aligned left, all others right."""
    rule = ["---" if i < text_columns else "--:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


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


def arms_table(path: str, labels: dict[str, str], leave_out: tuple[str, ...] = ()) -> str:
    """Return the arms of an arms.csv as a Markdown table, in the file's order (smallest loss first)."""
    arms = [arm for arm in rows_of(path) if arm["name"] not in leave_out]
    columns = [column for column in COLUMNS if column in arms[0] and not (labels is TINY and column == "train_s")]
    scale = {"train_flops": 1e-12}
    rows = [[labels.get(arm["name"], arm["name"])] +
            [COLUMNS[c][1].format(float(arm[c]) * scale.get(c, 1)) if arm[c] else "" for c in columns] for arm in arms]
    return table(["", *(COLUMNS[c][0] for c in columns)], rows)


def name_of(row: dict[str, str]) -> str:
    """Return the name of a row's arm without its rates, such as "llama-time"."""
    return row["arm"].partition("_lr-")[0]


def arms_of(steps: int) -> dict[str, dict[str, str]]:
    """Return the arms of a budget by name, such as "llama-time": of each that with the best rates on validation."""
    return {name_of(row): row for row in rows_of(f"models_{steps}.csv") if row["chosen"] == "True"}


def above_bdh(steps: int) -> dict[str, dict[str, float]]:
    """Return how many nats each arm of a budget is above BDH, with the 95 % interval."""
    return {name: {key: float(arm[f"less_bdh{end}"]) for key, end in (("nats", ""), ("low", "_low"), ("high", "_high"))}
            for name, arm in arms_of(steps).items() if arm["less_bdh"]}


def label_of(name: str) -> str:
    """Return what tables call an arm."""
    kind, _, budget = name.partition("-")
    return KINDS[kind].label + {"time": ", for BDH's time", "flops": ", for BDH's FLOPs",
                                "untied": ", head untied", "1pass-time": ", one pass, for BDH's time"}.get(budget, "")


def than(difference: dict[str, float], whose: str) -> str:
    """Return how BDH's perplexity compares with that of `whose`, in words; `difference` is of `above_bdh`."""
    if difference["low"] <= 0 <= difference["high"]:
        return f"not clearly different from {whose}"
    percent = f"{100 * abs(math.expm1(-difference['nats'])):.1f}\u00a0%"
    return f"{percent} {'lower' if difference['nats'] > 0 else 'higher'} than {whose}"


def models_sentence() -> str:
    """Return what the comparison of all kinds says: the strongest transformer first, then GPT-2."""
    arms, above, gpt2 = arms_of(2200), above_bdh(2200), "GPT-2's"
    strongest = min((name for name, arm in arms.items() if name.endswith("-time") and arm["model"] != "bdh"),
                    key=lambda name: float(arms[name]["val_loss"]))
    same_tokens = strongest.removesuffix("-time")
    label, named = f"{KINDS[same_tokens].label}'s", f"the strongest transformer's ({KINDS[same_tokens].label})"
    share = 1 - above["gpt2_rope"]["nats"] / above["gpt2"]["nats"]
    stories = int(rows_of("models_2200/comparison/pairs.csv")[0]["stories"])
    words = (f"**For the same training time on a CPU, BDH's perplexity is {than(above[strongest], named)} and "
             f"{than(above['gpt2-time'], gpt2)}. For the same tokens, it is {than(above[same_tokens], label)} and "
             f"{than(above['gpt2'], gpt2)}.** Rotary positions alone close {100 * share:.0f}\u00a0% of the gap to "
             f"GPT-2, in nats. {float(arms['bdh']['train_tokens']) / 1e6:.2f} million training tokens for BDH, "
             f"{stories:,} held-out stories of TinyStories, {arms['bdh']['seeds']} seeds.")
    return "\n".join(textwrap.wrap(words, 124, initial_indent="> ", subsequent_indent="> "))


def models_percent() -> str:
    """Return how far BDH's perplexity is from that of each transformer, for each budget."""
    above = {steps: above_bdh(steps) for steps in BUDGETS}
    millions = {steps: f"{float(arms_of(steps)['bdh']['train_tokens']) / 1e6:.1f}" for steps in BUDGETS}
    columns = [(suffix, steps) for suffix in ("-time", "") for steps in BUDGETS]
    lines = [[f"**{KINDS[kind].label}**", *(percent_of(above[steps].get(kind + suffix)) for suffix, steps in columns)]
             for kind in ("llama", "modern", "gpt2_rope", "gpt2")]
    return table(["BDH's perplexity, against", *(f"same {'time' if suffix else 'tokens'}: {millions[steps]} M"
                                                     for suffix, steps in columns)], lines)


def percent_of(difference: dict[str, float] | None) -> str:
    """Return how far BDH's perplexity is from another arm's, with its interval; `difference` is of `above_bdh`."""
    if difference is None:
        return ""
    middle, low, high = (100 * math.expm1(-difference[end]) for end in ("nats", "high", "low"))
    return f"{middle:+.1f}\u00a0% ({low:+.0f} to {high:+.0f})"


def models(steps: int) -> str:
    """Return a table of the arms of a budget, best first; beside them, trigrams."""
    above, seconds, rows = above_bdh(steps), {row["arm"]: row["ratio"] for row in rows_of("same_time.csv")}, []
    [trigrams] = (row for row in rows_of("models_2200/comparison/arms.csv") if row["name"] == "trigram baseline")
    for name, arm in sorted((arms_of(steps) | {"trigram baseline": trigrams}).items(),
                            key=lambda item: float(item[1]["loss"])):
        row = {"": name, "loss": f"{float(arm['loss']):.3f}", "perplexity": f"{float(arm['perplexity']):.2f}",
               "bits/byte": f"{float(arm['bits_per_byte']):.3f}",
               "tokens, million": f"{float(arm['train_tokens']) / 1e6:.2f}"}
        if arm is not trigrams:
            passes = [setting for setting in arm["overrides"].split(";") if setting.startswith("n_layer=")]
            row |= {"": f"**{label_of(name)}**", "seeds": arm["seeds"], "rates": rates_of(arm["overrides"]),
                    "core params": f"{float(arm['core_params']):,.0f}", "all params": f"{float(arm['params']):,.0f}",
                    "training FLOPs, 10¹²": f"{float(arm['train_flops']) * 1e-12:.1f}",
                    "time of a step, BDH = 1": f"{float(seconds[';'.join([arm['model'], *passes])]):.2f}",
                    "loss less BDH's": nats_of(above[name]) if name in above else ""}
        rows.append(row)
    header = ["", "seeds", "rates", "tokens, million", "core params", "all params", "training FLOPs, 10¹²",
              "time of a step, BDH = 1", "loss", "perplexity", "bits/byte", "loss less BDH's"]
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
                  for name, arm in arms_of(steps).items() if name in (kind, f"{kind}-time", f"{kind}-flops"))


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
            tried = [row for row in rows if name_of(row) == name and "weight_decay" not in row["overrides"]]
            equal = [float(row["val_loss"]) for row in tried if rates_of(row["overrides"]).endswith(", ×1, ×1")]
            lines.append([label_of(name), f"{steps:,}", str(len(tried)), rates_of(best["overrides"]),
                          f"{float(best['val_loss']):.3f}", f"{min(equal):.3f}" if equal else ""])
    return table(["", "budget", "tried", "best: matrices, embeddings, head", "validation loss",
                  "with one rate for all"], lines)


def larger() -> str:
    """Return the arms with three times the width, best first."""
    lines = [[f"**{label_of(name_of(row))}**", rates_of(row["overrides"]), f"{int(row['steps']):,}",
              f"{float(row['train_tokens']) / 1e6:.2f}", f"{float(row['core_params']):,.0f}",
              f"{float(row['val_loss']):.3f}", f"{float(row['loss']):.3f}", interval(row, "less_bdh")]
             for row in rows_of("models_large.csv")]
    return table(["", "rates", "steps", "tokens, million", "core params", "validation loss", "loss", "less BDH's best"],
                 lines)


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


TABLES: dict[str, Callable[[], str]] = {
    "models-sentence": models_sentence,
    "models-2200": lambda: models(2200),
    "models-percent": models_percent,
    "models-2200-extra": second_text,
    "budgets": budgets,
    "tokens-to-reach": tokens_to_reach,
    "rates": rates,
    "larger": larger,
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
}
