"""Verdict of a comparison: its sentences and tables for readers, with intervals, denominators and limits."""

import dataclasses

import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS, Arm
from plotarmour.evaluation.metrics import totals
from plotarmour.evaluation.scoring import UNBOUNDED
from plotarmour.report.figures import arm_label
from plotarmour.training.ending import DONE

NOT_CLAIMED = (
    "results of larger models, longer training or other texts: the table shows small models after little text",
    "results with another learning rate, schedule, width or depth; the protocol lists the settings",
    "equal budgets in everything: each pair matches in some budgets only, so read the pairs together",
    "quality of generated text: only the perplexity on stories of the same kind is measured",
)
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
           ("other_loss", "loss elsewhere", "{:.3f}"), ("params_non_embedding", "core params", "{:,.0f}"),
           ("params", "all params", "{:,.0f}"), ("params_per_token", "params used per token", "{:,.0f}"),
           ("train_tokens", "trained on", "{:,.0f} tokens"), ("train_flops", "FLOPs", "{:.2e}"),
           ("train_s", "seconds", "{:,.0f}"), ("peak_memory_mib", "MiB", "{:,.0f}"),
           ("checkpoint_step", "step scored", "{:,.0f}"))
BUDGETS = ("params_non_embedding", "params", "params_per_token", "train_tokens", "flops_per_token", "train_flops",
           "train_s", "peak_memory_mib")


def readable_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a comparison's totals that readers compare, as rounded text."""
    columns = {}
    for column, title, form in COLUMNS:
        if column in table:
            columns[title] = ["" if pd.isna(v) else form.format(v) if form else v for v in table[column]]
    if "ended" in table and not table["ended"].dropna().isin(DONE).all():
        columns["ended"] = ["" if pd.isna(v) or v in DONE else f"NOT FINISHED: {v}" for v in table["ended"]]
    return pd.DataFrame(columns, index=table.index, dtype=object)


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
    unbounded = [dataclasses.replace(arm, name=arm.name + UNBOUNDED, runs=tuple(run + UNBOUNDED for run in arm.runs))
                 for arm in arms if all(run + UNBOUNDED in by_name.index for run in arm.runs)]
    for arm in [*arms, *unbounded]:
        runs = by_name.loc[list(arm.runs)]
        used |= set(arm.runs)
        row = {"name": arm.name, "model": arm.model, "seeds": ", ".join(map(str, arm.seeds))}
        row |= {column: runs[column].mean() for column in BUDGETS if column in runs}
        row |= {"tokens": int(runs["tokens"].iloc[0]), "bytes": int(runs["bytes"].iloc[0]),
                **totals(runs["nats"].sum(), runs["tokens"].sum(), runs["bytes"].sum()),
                "loss_min": runs["loss"].min(), "loss_max": runs["loss"].max()}
        row |= {column: runs[column].mean() for column in ("over_corpus", "recall_loss", "other_loss")
                if column in runs}
        if "ended" in runs:  # of a run that is not complete, if there is one
            row["ended"] = next((reason for reason in runs["ended"] if reason not in DONE), runs["ended"].iloc[0])
        rows.append(row)
    others = table[~table["name"].isin(used)]
    columns = [c for c in ("name", "model", "train_tokens", "tokens", "bytes", "loss", "perplexity", "bits_per_byte",
                           "over_corpus", "recall_loss", "other_loss") if c in others]
    rows += others[columns].to_dict("records")
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")


def headline(pairs: pd.DataFrame, labels: dict[str, str]) -> str:
    """Return one sentence with the difference of each pair of arms, its interval and its budgets.

    Args:
        pairs: table of `compare_arms`.
        labels: by arm name, its label.

    Example:
        "BDH's perplexity on held-out stories is 24.0 % lower (95 % interval 22.1 to 25.9 %) than that of GPT-2, at the
        same core parameters and training tokens, with 2.08 times the training FLOPs and 1.66 times the time."
    """
    parts, previous = [], None
    for _, pair in arm_pairs(pairs).iterrows():
        a, b = labels.get(pair["a"], pair["a"]), labels.get(pair["b"], pair["b"])
        subject = f"{a}'s perplexity on held-out stories is " if a != previous else ""
        parts.append(f"{subject}{_change(pair)} {b}, {_budgets(pair)}")
        previous = a
    return "; ".join(parts) + "."


def describe_pair(pair: pd.Series, labels: dict[str, str]) -> str:
    """Return the difference of a pair of arms in nats, what its interval covers, and its sign test.

    Args:
        pair: row of the table of `compare_arms`.
        labels: by arm name, its label.
    """
    a, b = labels.get(pair["a"], pair["a"]), labels.get(pair["b"], pair["b"])
    difference = (f"{a} against {b}: {pair['difference']:+.4f} nats per token (95 % interval "
                  f"{pair['difference_low']:+.4f} to {pair['difference_high']:+.4f}).")
    means = " over stories, on means over seeds" if max(pair["seeds_a"], pair["seeds_b"]) > 1 else ""
    p = "below 1e-06" if pair["sign_p"] < 1e-6 else f"= {pair['sign_p']:.2g}"
    wins = (f"Of {pair['stories']:,} stories, {pair['a_better']:,} have fewer nats under {a} and {pair['b_better']:,} "
            f"under {b} (sign test{means}: p {p}).")
    return f"{difference} {SPEAKS_OF[pair['speaks_of']].format(**pair)} {wins}"


def arm_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of pairs.csv that compare arms."""
    return pairs[pairs["is_arms"]]


def summarise(table: pd.DataFrame, title: str, unequal: list[str], arms: list[Arm], by_arm: pd.DataFrame,
              pairs: pd.DataFrame, checks: pd.DataFrame) -> str:
    """Return the text of summary.txt: the table, its denominators, the verdicts and their limits.

    Args:
        table: totals, a row per run, baseline and corpus.
        title: first line.
        unequal: differences between the runs, from `compare.differences`.
        arms, by_arm, pairs, checks: see `compare.Comparison`.
    """
    runs = table[table["model"].notna()] if "model" in table else table.iloc[:0]
    several_seeds = any(len(arm.runs) > 1 for arm in arms)
    lines = [title, "", readable_table(by_arm if several_seeds else table).to_string(index=False), "",
             denominators(table)]
    if len(pairs):
        labels = arm_labels(arms)
        lines += ["", headline(pairs, labels)]
        lines += [describe_pair(pair, labels) for _, pair in arm_pairs(pairs).iterrows()]
    lines.append("")
    if "over_corpus" in table and len(runs):
        low, high = runs["over_corpus"].min(), runs["over_corpus"].max()
        lines.append(f"The models need {low:.1%} to {high:.1%} more nats than the corpus, whose nats are exact."
                     + (" A model with fewer nats than the corpus sees what it must predict: this is a LEAK."
                        if low < 0 else ""))
    baselines = table[table["name"].str.endswith(" baseline")]
    if len(baselines) and len(runs):
        best = baselines.iloc[0]  # the table is sorted by loss
        above = runs.loc[runs["loss"] >= best["loss"], "name"]
        baseline = f"the {best['name']} (perplexity {best['perplexity']:.2f})"
        lines.append(f"Not better than {baseline}: {', '.join(above)}." if len(above) else
                     f"Every run is better than {baseline}.")
    lines.append(f"{checks.passed.sum()} leak checks passed (checks.csv).")  # a failed check stops a comparison
    lines += [f"Not equal between the runs: {difference}." for difference in unequal]
    return "\n".join(lines) + "\n"


def denominators(table: pd.DataFrame) -> str:
    """Return a sentence with the numbers of tokens, stories and bytes of a table."""
    row = table.iloc[0]
    return (f"Loss is nats per token over {row['tokens']:,} tokens of {row['stories']:,} stories (with the closing "
            f"end-of-text of each story), bits per byte over {row['bytes']:,} bytes of their text.")


def arm_labels(arms: list[Arm]) -> dict[str, str]:
    """Return the label of each arm by its name."""
    return {arm.name: arm_label(arm.name, arm.model) for arm in arms}


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
    parts = ([f"at the same {_join(same)}"] if same else []) + ([f"with {_join(other)}"] if other else [])
    return ", ".join(parts) or "at unknown budgets"


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
