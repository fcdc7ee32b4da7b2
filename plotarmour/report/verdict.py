"""Verdict of a comparison, for readers: sentences and tables with intervals, denominators and limits (summary.txt)."""

import math
import textwrap
from dataclasses import dataclass, replace

import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS, Arm
from plotarmour.evaluation.leak_checks import LONG_OVERLAP, passed_checks
from plotarmour.evaluation.metrics import totals
from plotarmour.evaluation.scoring import BASELINE, CORPUS, UNBOUNDED
from plotarmour.models import SUITE
from plotarmour.report.figures import arm_label, row_labels
from plotarmour.run import Run
from plotarmour.training.ending import DONE

SPEAKS_OF = {
    "checkpoints": "With one seed each, the interval covers other stories only: it is about these two checkpoints, not "
                   "about their recipes.",
    "a recipe and a checkpoint": "With {seeds_a} and {seeds_b} seeds, the interval does not cover other seeds of the "
                                 "side with one seed: it is too narrow for a statement about both recipes.",
    "recipes": "With {seeds_a} and {seeds_b} seeds, the interval covers other stories and other seeds: it is about the "
               "recipes. Few seeds make it wide.",
}
# Columns that readers compare: column of the table, title, format.
COLUMNS = (("name", "name", ""), ("seeds", "seeds", ""), ("loss", "loss", "{:.4f}"),
           ("perplexity", "perplexity", "{:,.3f}"), ("bits_per_byte", "bits/byte", "{:.4f}"),
           ("over_corpus", "over corpus", "{:+.1%}"), ("recall_loss", "loss on facts", "{:.3f}"),
           ("other_loss", "loss elsewhere", "{:.3f}"), ("core_params", "core params", "{:,.0f}"),
           ("params", "all params", "{:,.0f}"), ("params_per_token", "params used per token", "{:,.0f}"),
           ("train_tokens", "trained on", "{:,.0f} tokens"), ("train_flops", "FLOPs", "{:.2e}"),
           ("train_s", "seconds", "{:,.0f}"), ("peak_memory_mib", "MiB", "{:,.0f}"),
           ("checkpoint_step", "step scored", "{:,.0f}"))
ONLY_IN_CSV = ["loss elsewhere", "all params", "params used per token", "FLOPs", "MiB", "step scored"]
BUDGETS = ("core_params", "params", "params_per_token", "train_tokens", "flops_per_token", "train_flops",
           "train_s", "peak_memory_mib")
OF_FACTS = ("over_corpus", "recall_loss", "other_loss")  # columns of the built-in corpus only


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison."""

    title: str
    arms: list[Arm]
    table: pd.DataFrame  # totals, a row per run, baseline and corpus
    by_arm: pd.DataFrame  # totals, a row per arm, baseline and corpus
    pairs: pd.DataFrame  # of `compare_arms`, the strongest opponent first
    ladder: pd.DataFrame  # of `compare_arms`: from GPT-2 to BDH, each arm with the one before it; may be empty
    checks: pd.DataFrame  # leak checks, a row per run and check; none failed, but a long overlap is possible
    unequal: list[str]  # differences between the runs' settings and budgets
    examples: pd.DataFrame  # stories with the largest differences between the first pair
    samples: pd.DataFrame  # continuations by each arm, from the same prompts and seeds
    runs: list[Run]  # without their weights
    stride: int | None  # of sliding windows, in tokens; None: half a context
    same_order: bool  # whether runs of one seed were trained on the same tokens in the same order
    part: str | None  # of a split that was scored: "train", "val" or "test"; None: unknown
    unknown: str = ""  # what the tokenizer does not know of the scored stories, of `unknown_words`

    @property
    def labels(self) -> dict[str, str]:
        """The label of each arm by its name."""
        return {arm.name: arm_label(arm.name, arm.model) for arm in self.arms}

    @property
    def level(self) -> set[str]:
        """Names of the arms with the training tokens of the first one, which all others are compared with."""
        own = self.pairs[self.pairs["is_arms"] & (self.pairs["a"] == self.pairs["a"].iloc[0])]
        return set(own.loc[own["matched"].str.contains("training tokens"), "b"])

    @property
    def several_seeds(self) -> bool:
        return any(len(arm.runs) > 1 for arm in self.arms)

    @property
    def stories(self) -> str:
        """What to call the scored stories."""
        return "held-out stories" if self.checks["passed"].fillna(True).all() else "test stories"


def summary_text(c: Comparison) -> str:
    """Return summary.txt."""
    pairs, numbers = arm_pairs(c.pairs, c.labels), readable_table(c.by_arm if c.several_seeds else c.table)
    checked = " ".join([*_calibration(c), f"{passed_checks(c.checks)} (checks.csv)."])
    prose = [denominators(c), answer(c, pairs), *(describe(pair) for _, pair in pairs.iterrows()), checked,
             *(f"Not equal between the runs: {difference}." for difference in c.unequal)]
    wrapped = (textwrap.fill(text, 80, break_long_words=False, break_on_hyphens=False) for text in prose)
    return "\n\n".join([c.title, text_table(numbers), *wrapped]) + "\n"


def readable_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a comparison's totals that readers compare, as rounded text."""
    columns = {}
    for column, title, form in COLUMNS:
        if column in table:
            values = row_labels(table) if column == "name" else table[column]
            columns[title] = ["" if pd.isna(v) else form.format(v) if form else v for v in values]
    if "ended" in table and not table["ended"].dropna().isin(DONE).all():
        columns["ended"] = ["" if pd.isna(v) or v in DONE else f"NOT FINISHED: {v}" for v in table["ended"]]
    return pd.DataFrame(columns, index=table.index, dtype=object)


def denominators(c: Comparison) -> str:
    """Return a sentence with the tokens, stories and bytes that losses are means over, and words left out of them."""
    first = c.table.iloc[0]
    return (f"Loss is nats per token over {first['tokens']:,} tokens of {first['stories']:,} stories (with the "
            f"closing end-of-text of each story), bits per byte over {first['bytes']:,} bytes of their text."
            f"{c.unknown and ' '}{c.unknown}")


def text_table(numbers: pd.DataFrame) -> str:
    """Return a table of `readable_table` as text of at most 80 columns, without columns that only totals.csv has.

    Columns that do not fit beside the others follow in a block below them; seconds are left out if that saves a block.
    """
    shown = numbers.drop(columns=ONLY_IN_CSV, errors="ignore").set_index("name").rename_axis(None)
    tables = [frame.to_string(line_width=80) for frame in (shown, shown.drop(columns="seconds", errors="ignore"))]
    shortest = min(tables, key=lambda table: table.count("\n\n"))
    return "\n".join(line.rstrip(" \\") for line in shortest.splitlines())


def arm_table(arms: list[Arm], table: pd.DataFrame) -> pd.DataFrame:
    """Return the totals of each arm: its metrics from the summed nats and tokens of its runs, its budgets as means.

    Args:
        arms: arms of the comparison.
        table: totals, a row per run, baseline and corpus.

    Returns:
        A row per arm, baseline and corpus, sorted by loss: name, model, seeds, budgets, tokens, bytes, loss,
        perplexity, bits_per_byte, loss_min, loss_max (over seeds).
    """
    by_name, rows, used = table.set_index("name"), [], set()
    unbounded = [replace(arm, name=arm.name + UNBOUNDED, runs=tuple(run + UNBOUNDED for run in arm.runs))
                 for arm in arms if all(run + UNBOUNDED in by_name.index for run in arm.runs)]
    for arm in [*arms, *unbounded]:
        runs = by_name.loc[list(arm.runs)]
        used |= set(arm.runs)
        row = {"name": arm.name, "model": arm.model, "seeds": ", ".join(map(str, arm.seeds))}
        row |= {column: runs[column].mean() for column in BUDGETS}
        row |= {"tokens": int(runs["tokens"].iloc[0]), "bytes": int(runs["bytes"].iloc[0]),
                **totals(runs["nats"].sum(), runs["tokens"].sum(), runs["bytes"].sum()),
                "loss_min": runs["loss"].min(), "loss_max": runs["loss"].max()}
        row |= {column: runs[column].mean() for column in OF_FACTS if column in runs}
        # Of a run that is not complete, if there is one.
        row["ended"] = next((reason for reason in runs["ended"] if reason not in DONE), runs["ended"].iloc[0])
        rows.append(row)
    others = table[~table["name"].isin(used)].filter([
        "name", "model", "train_tokens", "tokens", "bytes", "loss", "perplexity", "bits_per_byte", *OF_FACTS])
    rows += others.to_dict("records")
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")


def arm_pairs(pairs: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Return the rows of pairs.csv that compare arms, with labels in place of their names."""
    return pairs[pairs["is_arms"]].replace({"a": labels, "b": labels}) if len(pairs) else pairs


def headline(pairs: pd.DataFrame, stories: str) -> str:
    """Return one sentence with the difference of each pair of arms, its interval and its budgets.

    Args:
        pairs: from `arm_pairs`.
        stories: what to call the scored stories.

    Example:
        "BDH's perplexity on held-out stories is 24.0 % lower (95 % interval 22.1 to 25.9 %) than that of GPT-2, at the
        same core parameters and training tokens, with 2.08 times the training FLOPs and 1.66 times the time."
    """
    parts, previous = [], None
    for _, pair in pairs.iterrows():
        subject = f"{pair['a']}'s perplexity on {stories} is " if pair["a"] != previous else ""
        parts.append(f"{subject}{_change(pair)} {pair['b']}, {_budgets(pair)}")
        previous = pair["a"]
    return "; ".join(parts) + "."


def describe(pair: pd.Series) -> str:
    """Return the difference of a pair of arms in nats, what its interval covers, and its sign test."""
    difference = (f"{pair['a']} against {pair['b']}: {pair['loss_difference']:+.4f} nats per token (95 % interval "
                  f"{pair['loss_difference_low']:+.4f} to {pair['loss_difference_high']:+.4f}).")
    means = " over stories, on means over seeds" if max(pair["seeds_a"], pair["seeds_b"]) > 1 else ""
    p = "below 1e-06" if pair["sign_p"] < 1e-6 else f"= {pair['sign_p']:.2g}"
    wins = (f"Of {pair['stories']:,} stories, {pair['a_better']:,} have fewer nats under {pair['a']} and "
            f"{pair['b_better']:,} under {pair['b']} (sign test{means}: p {p}).")
    return f"{difference} {SPEAKS_OF[pair['speaks_of']].format(**pair)} {wins}"


def answer(c: Comparison, pairs: pd.DataFrame) -> str:
    """Return the sentences that a report opens with: against the strongest other kind first, then against GPT-2."""
    if pairs.empty:
        return " ".join([*_reservations(c), "One arm only: there is no comparison."])
    kinds = pairs["b"].map({c.labels[arm.name]: arm.model for arm in c.arms})
    return " ".join([*_reservations(c), *_scope(c), headline(pairs[kinds.isin({kinds.iloc[0], *SUITE})], c.stories)])


def _reservations(c: Comparison) -> list[str]:
    """Return the sentences that stand before the differences, because they decide what these are worth."""
    lines, (baseline, _, others) = [], _against_counting(c)
    for check in c.checks[(c.checks["check"] == LONG_OVERLAP) & c.checks["passed"].eq(False)].itertuples():
        lines.append(f"NOT HELD OUT: {check.found} have half of their tokens, in one piece, in one training story, so "
                     "a model can recall them. tools/find_duplicates.py lists copies; remove them, and what many "
                     "stories share.")
    if others:
        lines.append(f"NO BETTER THAN COUNTING: {join_words(others)} {'are' if len(others) > 1 else 'is'} not better "
                     f"than {baseline}.")
    return lines


def _scope(c: Comparison) -> list[str]:
    """Return what a comparison with one seed each can show and what it cannot, and what of it other seeds repeat."""
    lines = []
    if "other_loss" in c.by_arm:
        losses = c.by_arm.set_index("name")[["other_loss", "recall_loss"]]
        own = losses.loc[list(c.labels)]
        # In steps of 5 %, so that every seed gives the same sentence.
        within = 5 * math.ceil(20 * (own["other_loss"].max() / losses.at[CORPUS, "other_loss"] - 1))
        facts = ", ".join(f"{label} {own.at[name, 'recall_loss']:.3f}" for name, label in c.labels.items())
        lines = [f"Where a story leaves the next word open, all models are within {within} % of the corpus's own nats. "
                 "Facts that a story determines are learned suddenly, at a step that varies with seed and threads, and "
                 f"decide the perplexity here (loss on facts: {facts})."]
    if not c.several_seeds:
        lines.append("This comparison has one seed each and generated tales: it shows that everything works, not which "
                     "model is better. The difference that follows is another one with another seed or number of "
                     "threads." if "over_corpus" in c.table else
                     "This comparison has one seed each: it shows which of these checkpoints predicts these stories "
                     "better, not which model is better.")
    return lines


def _against_counting(c: Comparison) -> tuple[str | None, list[str], list[str]]:
    """Return the best n-gram baseline, and the labels of the arms that are better and of those that are not."""
    baselines = c.table[c.table["name"].str.endswith(BASELINE)]
    if baselines.empty:
        return None, [], []
    best = baselines.iloc[0]  # the table is sorted by loss
    losses = c.by_arm.set_index("name")["loss"]
    better = [label for name, label in c.labels.items() if losses[name] < best["loss"]]
    others = [label for label in c.labels.values() if label not in better]
    return f"the {best['name']} (perplexity {best['perplexity']:.2f})", better, others


def _calibration(c: Comparison) -> list[str]:
    """Return sentences that compare the arms with the corpus, whose nats are exact, and with the best baseline."""
    lines, (baseline, better, _) = [], _against_counting(c)
    if "over_corpus" in c.table:
        of_runs = c.table.loc[c.table["model"].notna(), "over_corpus"]
        low, high = of_runs.min(), of_runs.max()
        lines.append(f"The models need {low:.1%} to {high:.1%} more nats than the corpus, whose nats are exact."
                     + (" A model with fewer nats than the corpus sees what it must predict: this is a LEAK."
                        if low < 0 else ""))
    if better:
        lines.append(f"Better than {baseline}: {', '.join(better)}.")
    if baseline is None:
        lines.append("Without a training file (--train), nothing says whether the models are better than counting, or "
                     "whether the stories stand in the training text.")
    return lines


def _change(pair: pd.Series) -> str:
    """Return the change of perplexity with its interval, before the name of b."""
    change, low, high = (100 * (pair[f"perplexity_ratio{end}"] - 1) for end in ("", "_low", "_high"))
    if low <= 0 <= high:
        return f"not clearly different ({change:+.1f} %, 95 % interval {low:+.1f} to {high:+.1f} %) from that of"
    (low, high), word = sorted((abs(low), abs(high))), "lower" if change < 0 else "higher"
    return f"{abs(change):.1f} % {word} (95 % interval {low:.1f} to {high:.1f} %) than that of"


def _budgets(pair: pd.Series) -> str:
    """Return the budgets in which a pair matches, and the ratios of the others."""
    same = [label for label, _, _ in MATCHINGS if label in pair["matched"].split(", ")]
    known = [(label, pair[f"{column}_ratio"]) for label, column, _ in MATCHINGS if pd.notna(pair[f"{column}_ratio"])]
    other = [f"{ratio:.2f} times the {label}" for label, ratio in known if label not in same
             and not (label == "FLOPs per token" and "training tokens" in same)]  # the same ratio as training FLOPs
    parts = ([f"at the same {join_words(same)}"] if same else []) + ([f"with {join_words(other)}"] if other else [])
    return ", ".join(parts) or "at unknown budgets"


def join_words(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
