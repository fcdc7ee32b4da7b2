"""A comparison in words and in tables for people: the verdict with its interval, its denominators and its limits."""

import dataclasses

import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS, Arm
from plotarmour.evaluation.metrics import totals
from plotarmour.evaluation.scoring import UNBOUNDED
from plotarmour.report.figures import arm_label
from plotarmour.training.ending import DONE

NOT_CLAIMED = (
    "what larger models, longer training or other texts would give: small models on little text, as in the table",
    "what another learning rate, schedule, width or depth would have made of either model; what was used is in the "
    "protocol",
    "that two models were given the same of everything, where a pair is not matched in it; read the pairs together",
    "anything about text that reads well: perplexity on stories of the same kind is all that is measured",
)
SPEAKS = {
    "checkpoints": "One seed each: the interval comes from drawing stories anew and speaks of these two checkpoints, "
                   "not of the recipes.",
    "a recipe and a checkpoint": "{seeds_a} and {seeds_b} seeds: of the side with one seed the interval knows this "
                                 "checkpoint alone, and so it is too narrow to speak of both recipes.",
    "recipes": "{seeds_a} and {seeds_b} seeds: the interval holds what other stories and other seeds would change, and "
               "speaks of the recipes. So few seeds make it wide.",
}
FORMATS = {"core params": "{:,.0f}", "all params": "{:,.0f}", "params used per token": "{:,.0f}",
           "trained on": "{:,.0f} tokens", "FLOPs": "{:.2e}", "step scored": "{:,.0f}", "seconds": "{:,.0f}",
           "MiB": "{:,.0f}", "loss": "{:.4f}", "perplexity": "{:,.3f}", "bits/byte": "{:.4f}",
           "over corpus": "{:+.1%}", "loss on facts": "{:.3f}", "loss elsewhere": "{:.3f}"}


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a comparison that people compare, rounded."""
    columns = {"name": "name", "seeds": "seeds", "loss": "loss", "perplexity": "perplexity",
               "bits_per_byte": "bits/byte", "over_corpus": "over corpus", "recall_loss": "loss on facts",
               "other_loss": "loss elsewhere", "params_non_embedding": "core params", "params": "all params",
               "params_per_token": "params used per token", "train_tokens": "trained on", "train_flops": "FLOPs",
               "train_s": "seconds", "peak_memory_mib": "MiB", "checkpoint_step": "step scored"}
    shown = table[[c for c in columns if c in table]].rename(columns=columns)
    for column, form in FORMATS.items():
        if column in shown:
            shown[column] = ["" if pd.isna(v) else form.format(v) for v in shown[column]]
    if "ended" in table and not table["ended"].dropna().isin(DONE).all():
        shown["ended"] = ["" if pd.isna(v) or v in DONE else f"NOT FINISHED: {v}" for v in table["ended"]]
    return shown.astype(object).where(shown.notna(), "")


def arm_table(arms: list[Arm], table: pd.DataFrame) -> pd.DataFrame:
    """Add up the runs of every arm: nats over all of its runs by all of their tokens; budgets are means.

    Args:
        arms: of the comparison.
        table: its totals, a row per run, baseline and corpus.

    Returns:
        A row per arm, baseline and corpus, best loss first: name, model, seeds, budgets, tokens, bytes, loss,
        perplexity, bits_per_byte, loss_min, loss_max (over seeds).
    """
    by_name, rows, used = table.set_index("name"), [], set()
    unbounded = [dataclasses.replace(arm, name=arm.name + UNBOUNDED, runs=tuple(run + UNBOUNDED for run in arm.runs))
                 for arm in arms if all(run + UNBOUNDED in by_name.index for run in arm.runs)]
    for arm in [*arms, *unbounded]:
        own = by_name.loc[list(arm.runs)]
        used |= set(arm.runs)
        row = {"name": arm.name, "model": arm.model, "seeds": ", ".join(map(str, arm.seeds))}
        row |= {column: own[column].mean() for column in
                ("params_non_embedding", "params", "params_per_token", "train_tokens", "flops_per_token", "train_flops",
                 "train_s", "peak_memory_mib") if column in own}
        row |= {"tokens": int(own["tokens"].iloc[0]), "bytes": int(own["bytes"].iloc[0]),
                **totals(own["nats"].sum(), own["tokens"].sum(), own["bytes"].sum()),
                "loss_min": own["loss"].min(), "loss_max": own["loss"].max()}
        for column in ("over_corpus", "recall_loss", "other_loss"):
            if column in own:
                row[column] = own[column].mean()
        if "ended" in own:  # the first that has not, if any
            row["ended"] = next((end for end in own["ended"] if end not in DONE), own["ended"].iloc[0])
        rows.append(row)
    rest = table[~table["name"].isin(used)]
    columns = [c for c in ("name", "model", "train_tokens", "tokens", "bytes", "loss", "perplexity", "bits_per_byte",
                           "over_corpus", "recall_loss", "other_loss") if c in rest]
    rows += rest[columns].to_dict("records")
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")


def headline(pairs: pd.DataFrame, names: dict[str, str]) -> str:
    """Say in one sentence what all pairs of a comparison found, each with its interval.

    Args:
        pairs: of `compare_arms`.
        names: by arm, as people know it.

    Example:
        "BDH's perplexity on held-out stories is 24 % lower (95 % interval 22 to 26 %) than that of GPT-2, at the same
        core parameters and training tokens, with 2.08 times the training FLOPs and 1.66 times the time."
    """
    told = spoken_of(pairs)
    parts = []
    for i, (_, pair) in enumerate(told.iterrows()):
        a, b = names.get(pair["a"], pair["a"]), names.get(pair["b"], pair["b"])
        who = f"{a}'s perplexity on held-out stories is " if i == 0 or pair["a"] != told.iloc[i - 1]["a"] else ""
        parts.append(f"{who}{_by_how_much(pair)} {b}, {_at_what_cost(pair)}")
    return "; ".join(parts) + "."


def how_sure(pair: pd.Series, names: dict[str, str]) -> str:
    """Say in nats what a row of pairs.csv found, and what its interval speaks of."""
    a, b = names.get(pair["a"], pair["a"]), names.get(pair["b"], pair["b"])
    found = (f"{a} against {b}: {pair['difference']:+.4f} nats per token (95 % interval "
             f"{pair['difference_low']:+.4f} to {pair['difference_high']:+.4f}).")
    of_these = " over stories, for these very runs" if max(pair["seeds_a"], pair["seeds_b"]) > 1 else ""
    wins = (f"Of {pair['stories']:,} stories, {pair['a_better']:,} cost the first one fewer nats and "
            f"{pair['b_better']:,} the second (sign test{of_these}: p {_p(pair['sign_p'])}).")
    return f"{found} {SPEAKS[pair['speaks_of']].format(**pair)} {wins}"


def spoken_of(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of pairs.csv that a verdict rests on: a pair of arms each."""
    return pairs[pairs["is_arms"]]


def summarise(table: pd.DataFrame, what: str, unequal: list[str], arms: list[Arm], by_arm: pd.DataFrame,
              pairs: pd.DataFrame, checks: pd.DataFrame) -> str:
    """Put a comparison into words: the table, then its denominators, verdicts and limits.

    Args:
        table: totals, a row per run and baseline.
        what: was scored.
        unequal: what differs between the runs, of `differences`.
        arms, by_arm, pairs, checks: of the comparison.
    """
    runs = table[table["model"].notna()] if "model" in table else table.iloc[:0]
    several = any(len(arm.runs) > 1 for arm in arms)
    lines = [what, "", for_people(by_arm if several else table).to_string(index=False), ""]
    lines.append(denominators(table))
    if len(pairs):
        names = arm_names(arms)
        lines += ["", headline(pairs, names)]
        lines += [how_sure(pair, names) for _, pair in spoken_of(pairs).iterrows()]
    lines.append("")
    if "over_corpus" in table and len(runs):
        low, high = runs["over_corpus"].min(), runs["over_corpus"].max()
        lines.append(f"The corpus knows its own exact nats: the models need {low:.1%} to {high:.1%} more."
                     + (" A model below the corpus sees what it must predict: this is a LEAK." if low < 0 else ""))
    baselines = table[table["name"].str.endswith(" baseline")]
    if len(baselines) and len(runs):
        best = baselines.iloc[0]  # the table is sorted
        above = [name for name, loss in zip(runs["name"], runs["loss"], strict=True) if loss >= best["loss"]]
        known = f"the {best['name']} ({best['perplexity']:.2f})"
        lines.append(f"{' and '.join(above)} did not beat {known}: no better than counting." if above else
                     f"Every run is below {known}.")
    lines.append(f"{checks.passed.sum()} leak checks passed (checks.csv).")  # or there is no comparison
    lines += [f"Not equal between the runs: {difference}." for difference in unequal]
    return "\n".join(lines) + "\n"


def denominators(table: pd.DataFrame) -> str:
    """State what all sums of a table are divided by."""
    row = table.iloc[0]
    return (f"Loss is nats per token over {row['tokens']:,} tokens of {row['stories']:,} stories (each story's closing "
            f"end-of-text included), bits per byte over {row['bytes']:,} bytes of their text.")


def arm_names(arms: list[Arm]) -> dict[str, str]:
    """Names of arms as people know them."""
    return {arm.name: arm_label(arm.name, arm.model) for arm in arms}


def _by_how_much(pair: pd.Series) -> str:
    change, ends = 100 * (pair["perplexity_ratio"] - 1), [100 * (pair[f"perplexity_ratio_{end}"] - 1)
                                                          for end in ("low", "high")]
    if ends[0] <= 0 <= ends[1]:
        return f"not to be told apart ({change:+.1f} %, 95 % interval {ends[0]:+.1f} to {ends[1]:+.1f} %) from that of"
    (low, high), word = sorted(map(abs, ends)), "lower" if change < 0 else "higher"
    return f"{abs(change):.1f} % {word} (95 % interval {low:.1f} to {high:.1f} %) than that of"


def _at_what_cost(pair: pd.Series) -> str:
    same = [words for words, _, _ in MATCHINGS if words in pair["matched"].split(", ")]
    known = [(words, pair[f"{column}_ratio"]) for words, column, _ in MATCHINGS if pd.notna(pair[f"{column}_ratio"])]
    other = [f"{ratio:.2f} times the {words}" for words, ratio in known if words not in same
             and not (words == "FLOPs per token" and "training tokens" in same)]  # the same as training FLOPs
    parts = ([f"at the same {_listed(same)}"] if same else []) + ([f"with {_listed(other)}"] if other else [])
    return ", ".join(parts) or "at budgets that are not known"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _p(value: float) -> str:
    return f"below {1e-6:.0e}" if value < 1e-6 else f"= {value:.2g}"

