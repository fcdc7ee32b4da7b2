"""The page of a comparison (report.html): one file with its figures inside and nothing from the network.

It is the template `page.html.j2`, which escapes every value; the sentences are those of `verdict.py`.
"""

from pathlib import Path

import jinja2
import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS
from plotarmour.evaluation.leak_checks import passed_checks
from plotarmour.models import KINDS, REFERENCE
from plotarmour.report.figures import row_labels
from plotarmour.report.verdict import (
    BUDGETS,
    COLUMNS,
    Comparison,
    answer,
    arm_pairs,
    denominators,
    describe,
    headline,
    join_words,
    readable_table,
)

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render_page(c: Comparison, out: Path, images: dict[str, str]) -> str:
    """Return report.html.

    Args:
        c: comparison.
        out: folder with positions.csv and win_shares.csv.
        images: by the name of a figure's file, where the page finds it: the image itself as a data URL, or a path.
    """
    labels, pairs = c.labels, arm_pairs(c.pairs, c.labels)
    kinds = {arm.name: KINDS[arm.model] for arm in c.arms}
    kind_labels = dict.fromkeys(kind.label for kind in kinds.values())
    results, costs = _results_and_costs(c.by_arm if c.several_seeds else c.table)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        zip=zip, c=c, heading=join_words(list(labels.values() if len(labels) < 3 else kind_labels)),
        answer=answer(c, pairs), verdicts=[describe(pair) for _, pair in pairs.iterrows()],
        results=results, costs=costs, denominators=denominators(c), images=images,
        findings=_findings(c, pairs, out), matchings=_matchings(pairs),
        has_reference=len(kind_labels) > 1 and KINDS[REFERENCE] in kinds.values(),
        several_seeds=c.several_seeds, labels=labels,
        colors={name: kind.colors[0] for name, kind in kinds.items()},
        run_labels={run: labels[arm.name] for arm in c.arms for run in arm.runs},
        examples=list(c.examples.itertuples()), protocol=_protocol(c), info=c.runs[0].info,
        strides=sorted({c.stride or run.context_length // 2 for run in c.runs}),
        passed_checks=passed_checks(c.checks),
        checks=c.checks.assign(passed=c.checks["passed"].map({True: "yes", False: "NO"}).fillna("not checked")),
        every_run=_results_and_costs(c.table))


def _results_and_costs(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the columns of `readable_table` as two tables that fit on a page: metrics, and budgets where known."""
    numbers = readable_table(table)
    titles = [title for column, title, _ in COLUMNS if column in (*BUDGETS, "checkpoint_step") and title in numbers]
    costs = numbers[["name", *titles]]
    return numbers.drop(columns=titles), costs[(numbers[titles] != "").any(axis=1)]


def _findings(c: Comparison, pairs: pd.DataFrame, out: Path) -> dict[str, str]:
    """Return what each figure shows, as a sentence for readers who cannot see it, by the name of its file."""
    rows = zip(row_labels(c.by_arm), c.by_arm["perplexity"], strict=True)
    findings = {"perplexity.png": "Perplexity: " + ", ".join(f"{name} {value:,.3f}" for name, value in rows)}
    logs = {run.name: run.log["val_loss"].dropna() for run in c.runs}
    last = {arm.name: [logs[run].iloc[-1] for run in arm.runs if len(logs[run])] for arm in c.arms}
    findings["training_curves.png"] = "Last validation loss: " + ", ".join(
        f"{c.labels[name]} {sum(values) / len(values):.3f}" for name, values in last.items() if values)
    positions = pd.read_csv(out / "positions.csv")
    tokens = positions.groupby("position")["tokens"].sum().cumsum()
    middle = tokens.index[tokens >= tokens.iloc[-1] / 2][0]  # half of all tokens are at positions up to this one
    parts = []
    for arm in c.arms:
        own = positions[positions["run"].isin(arm.runs)]
        halves = own.groupby(own["position"] > middle)[["nats", "tokens"]].sum()
        losses = [f"{loss:.3f}" for loss in halves["nats"] / halves["tokens"]]
        parts.append(f"{c.labels[arm.name]} {', then '.join(losses)}")
    findings["loss_by_position.png"] = f"Mean loss up to position {middle}, and after it: {'; '.join(parts)}"
    if len(pairs):
        shares = pd.read_csv(out / "win_shares.csv").groupby("pair", sort=False)["share"].agg(["min", "max"])
        findings |= {"differences.png": headline(pairs, c.stories).removesuffix("."), "win_shares.png":
                     "Stories won by the first of a pair, from the lowest to the highest share: " + "; ".join(
                         f"{pair} {100 * low:.0f} to {100 * high:.0f} %" for pair, low, high in shares.itertuples())}
    if len(c.ladder):
        steps = c.ladder[c.ladder["is_arms"]]
        findings["ladder.png"] = "Loss, step by step: " + "; ".join(
            f"{c.labels[row.a]} {row.loss_difference:+.3f} ({row.loss_difference_low:+.3f} to "
            f"{row.loss_difference_high:+.3f}) against {c.labels[row.b]}" for row in steps.itertuples())
        base = last.get(c.pairs["a"].iloc[0])
        findings["gap.png"] = "Last differences in validation loss: " + ", ".join(
            f"{c.labels[name]} {sum(values) / len(values) - sum(base) / len(base):+.2f}"
            for name, values in last.items() if values and name in c.level)
    return findings


def _matchings(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the budgets in which each pair of arms matches, and the ratios of all budgets: a column per pair."""
    columns = {}
    for _, pair in pairs.iterrows():
        ratios = {label: pair[f"{column}_ratio"] for label, column, _ in MATCHINGS}
        change, low, high = (pair[f"perplexity_ratio{end}"] - 1 for end in ("", "_low", "_high"))
        columns[f"{pair['a']} against {pair['b']}"] = {
            "the same": pair["matched"] or "nothing",
            **{label: "" if pd.isna(ratio) else f"× {ratio:.2f}" for label, ratio in ratios.items()},
            "perplexity": f"{change:+.1%} ({low:+.1%} to {high:+.1%})"}
    return pd.DataFrame(columns).rename_axis("").reset_index()


def _protocol(c: Comparison) -> pd.DataFrame:
    """Return the settings: a column per arm."""
    columns = {}
    for arm in c.arms:
        runs = [run for run in c.runs if run.name in arm.runs]
        config, t, info = runs[0].config, runs[0].config.training, runs[0].info
        orders = sorted({run.info["train"]["order_sha256"][:12] for run in runs})
        columns[c.labels[arm.name]] = {
            "recipe": config.name, "shape": ", ".join(f"{name} {value}" for name, value in config.architecture.items()),
            "learning rate": f"{t.learning_rate:g}", "schedule": t.schedule, "steps": f"{t.max_steps:,}",
            "tokens per step": f"{t.tokens_per_step:,}", "context": f"{t.context_length:,}",
            "seeds": f"{len(arm.seeds)} ({', '.join(map(str, arm.seeds))})",
            "order of the data (hash)": ", ".join(orders), "dtype": info["dtype"], "hardware": info["hardware"]}
    return pd.DataFrame(columns).rename_axis("").reset_index()
