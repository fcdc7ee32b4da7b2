"""A comparison in words and in tables for people: the verdict with its interval, its denominators and its limits."""

import dataclasses
import math

import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS, UNBOUNDED, Arm
from plotarmour.plots import arm_label
from plotarmour.training.loop import DONE

NOT_CLAIMED = (
    "what larger models, longer training or other texts would give: small models on little text, as in the table",
    "what another learning rate, schedule, width or depth would have made of either model; what was tried is in the "
    "protocol",
    "that two models are equal in every respect: no single pair is matched in parameters, FLOPs and time at once, so "
    "read the pairs together",
    "anything about text that reads well: perplexity on stories of the same kind is all that is measured",
)
FORMATS = {"core params": "{:,.0f}", "all params": "{:,.0f}", "params used per token": "{:,.0f}",
           "trained on": "{:,.0f} tokens", "FLOPs": "{:.2e}", "step scored": "{:,.0f}", "seconds": "{:,.0f}",
           "MiB": "{:,.0f}", "loss": "{:.4f}", "perplexity": "{:,.3f}", "bits/byte": "{:.4f}",
           "over corpus": "{:+.1%}", "loss on facts": "{:.3f}", "loss elsewhere": "{:.3f}"}


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of a comparison that people compare, rounded."""
    columns = {"name": "name", "seeds": "seeds", "params_non_embedding": "core params", "params": "all params",
               "params_per_token": "params used per token", "train_tokens": "trained on", "train_flops": "FLOPs",
               "train_s": "seconds", "peak_memory_mib": "MiB", "checkpoint_step": "step scored", "loss": "loss",
               "perplexity": "perplexity", "bits_per_byte": "bits/byte", "over_corpus": "over corpus",
               "recall_loss": "loss on facts", "other_loss": "loss elsewhere"}
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
        table: its totals, a row per run, floor and corpus.

    Returns:
        A row per arm, floor and corpus, best loss first: name, model, seeds, budgets, tokens, bytes, loss, perplexity,
        bits_per_byte, loss_min, loss_max (over seeds).
    """
    by_name, rows, used = table.set_index("name"), [], set()
    unbounded = [dataclasses.replace(arm, name=arm.name + UNBOUNDED, runs=tuple(run + UNBOUNDED for run in arm.runs))
                 for arm in arms if all(run + UNBOUNDED in by_name.index for run in arm.runs)]
    for arm in [*arms, *unbounded]:
        own = by_name.loc[list(arm.runs)]
        used |= set(arm.runs)
        loss = own["nats"].sum() / own["tokens"].sum()
        row = {"name": arm.name, "model": arm.model, "seeds": ", ".join(map(str, arm.seeds))}
        row |= {column: own[column].mean() for column in
                ("params_non_embedding", "params", "params_per_token", "train_tokens", "flops_per_token", "train_flops",
                 "train_s", "peak_memory_mib") if column in own}
        row |= {"tokens": int(own["tokens"].iloc[0]), "bytes": int(own["bytes"].iloc[0]), "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "bits_per_byte": own["nats"].sum() / math.log(2) / own["bytes"].sum(),
                "loss_min": own["loss"].min(), "loss_max": own["loss"].max()}
        for column in ("over_corpus", "recall_loss", "other_loss"):
            if column in own:
                row[column] = own[column].mean()
        rows.append(row)
    rest = table[~table["name"].isin(used)]
    columns = [c for c in ("name", "model", "tokens", "bytes", "loss", "perplexity", "bits_per_byte", "over_corpus",
                           "recall_loss", "other_loss") if c in rest]
    rows += rest[columns].to_dict("records")
    return pd.DataFrame(rows).sort_values("loss", ignore_index=True, kind="stable")


def verdict(pair: pd.Series, names: dict[str, str]) -> str:
    """Say in one sentence what a row of pairs.csv found, with its interval and at what cost.

    Args:
        pair: a row of `compare_arms`.
        names: by arm, as people know it.
    """
    a, b = names.get(pair["a"], pair["a"]), names.get(pair["b"], pair["b"])
    low, high = pair["difference_low"], pair["difference_high"]
    about = (f"({_size(pair['difference'])} nats per token, 95 % interval {low:+.4f} to {high:+.4f}; perplexity "
             f"{pair['perplexity_ratio'] - 1:+.1%}, interval {pair['perplexity_ratio_low'] - 1:+.1%} to "
             f"{pair['perplexity_ratio_high'] - 1:+.1%})")
    found = (f"{a} foresees held-out stories better than {b}" if high < 0 else
             f"{a} foresees held-out stories worse than {b}" if low > 0 else
             f"Between {a} and {b} no difference can be told")
    return f"{found} {about}, {_at_what_cost(pair)}."


def how_sure(pair: pd.Series) -> str:
    """Say what the interval of a row of pairs.csv speaks of."""
    wins = (f"Of {pair['stories']:,} stories, {pair['a_better']:,} cost {pair['a']} fewer nats and "
            f"{pair['b_better']:,} cost {pair['b']} fewer (sign test: p {_p(pair['sign_p'])}).")
    if pair["speaks_of"] == "checkpoints":
        return (f"One seed each: the interval comes from drawing stories anew and speaks of these two checkpoints, not "
                f"of the recipes. {wins}")
    few = min(pair["seeds_a"], pair["seeds_b"])
    return (f"{pair['seeds_a']} and {pair['seeds_b']} seeds: the interval holds what other stories and other seeds "
            f"would change, and speaks of the recipes; {few} seeds are few, and it is as wide as they make it. {wins}")


def summarise(table: pd.DataFrame, what: str, unequal: list[str], arms: list[Arm] = (),
              pairs: pd.DataFrame | None = None, checks: pd.DataFrame | None = None) -> str:
    """Put a comparison into words: the table, then its denominators, verdicts and limits.

    Args:
        table: totals, a row per run and floor.
        what: was scored.
        unequal: what differs between the runs, of `differences`.
        arms, pairs, checks: of the comparison.
    """
    runs = table[table["model"].notna()] if "model" in table else table.iloc[:0]
    several = any(len(arm.runs) > 1 for arm in arms)
    lines = [what, "", for_people(arm_table(arms, table) if several else table).to_string(index=False), ""]
    lines.append(denominators(table))
    names = arm_names(arms)
    for _, pair in (pairs if pairs is not None else pd.DataFrame()).iterrows():
        if pair["speaks_of"] == "recipes" or not several:
            lines += ["", f"{verdict(pair, names)} {how_sure(pair)}"]
    lines.append("")
    if "over_corpus" in table and len(runs):
        low, high = runs["over_corpus"].min(), runs["over_corpus"].max()
        lines.append(f"The corpus knows its own exact nats: the models need {low:.1%} to {high:.1%} more."
                     + (" A model below the corpus sees what it must predict: this is a LEAK." if low < 0 else ""))
    floor = table.loc[table["name"] == "bigram floor", "loss"]
    if len(floor) and len(runs):
        above = [name for name, loss in zip(runs["name"], runs["loss"], strict=True) if loss >= float(floor.iloc[0])]
        lines.append(f"{' and '.join(above)} did not beat the bigram floor: trained too briefly." if above else
                     "Every run is below the bigram floor.")
    if checks is not None:
        lines.append(f"{len(checks)} leak checks passed (checks.csv)." if checks["passed"].all() else
                     f"{(~checks['passed']).sum()} of {len(checks)} leak checks FAILED (checks.csv).")
    lines += [f"Not equal between the runs: {difference}." for difference in unequal]
    return "\n".join(lines) + "\n"


def denominators(table: pd.DataFrame) -> str:
    """State what all sums of a table are divided by."""
    row = table.iloc[0]
    stories = f"{int(row['stories']):,}" if "stories" in row and pd.notna(row["stories"]) else "all"
    return (f"Loss is nats per token over {int(row['tokens']):,} tokens of {stories} stories (each story's closing "
            f"end-of-text included), bits per byte over {int(row['bytes']):,} bytes of their text.")


def arm_names(arms: list[Arm]) -> dict[str, str]:
    """Names of arms as people know them."""
    return {arm.name: arm_label(arm.name, arm.model) for arm in arms}


def _at_what_cost(pair: pd.Series) -> str:
    same = [words for words, _, _ in MATCHINGS if words in pair["matched"].split(", ")]
    other = [f"{pair[f'{column}_ratio']:.2f} times the {words}" for words, column, _ in MATCHINGS
             if words not in same and pd.notna(pair[f"{column}_ratio"])]
    parts = ([f"at the same {_listed(same)}"] if same else []) + ([f"with {_listed(other)}"] if other else [])
    return " and ".join(parts) or "at budgets that are not known"


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _size(value: float) -> str:
    return f"{value:+.4f}"


def _p(value: float) -> str:
    return f"below {1e-6:.0e}" if value < 1e-6 else f"= {value:.2g}"

