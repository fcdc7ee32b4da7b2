"""report.html: a comparison on one page, with its figures inside and nothing from the network.

The page is the template `page.html.j2`; this module computes the values that it shows. Jinja2 escapes every value.
"""

import base64
from pathlib import Path

import jinja2
import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS
from plotarmour.files import write_text
from plotarmour.models import KINDS
from plotarmour.report.verdict import (
    NOT_CLAIMED,
    arm_labels,
    arm_pairs,
    denominators,
    describe_pair,
    headline,
    readable_table,
)

TEMPLATE = Path(__file__).with_name("page.html.j2")
FIGURES = (  # file, heading, caption
    ("differences.png", "Differences and their intervals",
     "Difference in perplexity of every pair, with its 95 % interval. If the interval does not contain 0, a difference "
     "is to be expected with other stories (and with other seeds, if there are several), too."),
    ("training_curves.png", "Loss and budgets",
     "Validation loss against training tokens, floating-point operations and time. Which model is better can depend on "
     "the budget."),
    ("perplexity.png", "Models and n-gram baselines",
     "Perplexity on the held-out stories. Gray: baselines that count single tokens, pairs and triples, without a "
     "neural network."),
    ("loss_by_position.png", "Loss by position in a story",
     "Loss by the position of a token in its story: beginnings are similar, and later tokens are harder to predict."),
    ("win_shares.png", "Share of stories by length",
     "Share of the stories for which the first model of a pair has fewer nats, by length of story; 95 % intervals."),
)


def write_report(comparison, out: Path) -> Path:
    """Write report.html with the figures of a comparison.

    Args:
        comparison: a `plotarmour.report.compare.Comparison`.
        out: folder of the comparison, with its figures.

    Returns:
        The path of report.html.
    """
    labels, arms, pairs = arm_labels(comparison.arms), comparison.arms, comparison.pairs
    kinds = dict.fromkeys(KINDS[arm.model].label for arm in arms)
    several = any(len(arm.runs) > 1 for arm in arms)
    protocol, protocol_text = _protocol(comparison)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        zip=zip, title=comparison.title, heading=" and ".join(labels.values() if len(labels) < 3 else kinds),
        headline=headline(pairs, labels) if len(pairs) else "",
        verdicts=[describe_pair(pair, labels) for _, pair in arm_pairs(pairs).iterrows()] if len(pairs) else [],
        numbers=readable_table(comparison.by_arm if several else comparison.table),
        denominators=denominators(comparison.table),
        figures=[{"heading": heading, "caption": caption, "png": base64.b64encode((out / file).read_bytes()).decode()}
                 for file, heading, caption in FIGURES if (out / file).exists()],
        matchings=_matchings(pairs, labels) if len(pairs) else None, several_kinds=len(kinds) > 1,
        not_claimed=NOT_CLAIMED, unequal=comparison.unequal, samples=_samples(comparison, labels),
        examples=list(comparison.examples.itertuples()), protocol=protocol, protocol_text=protocol_text,
        checks=comparison.checks.assign(
            passed=comparison.checks["passed"].map({True: "yes", False: "NO"}).fillna("not checked")),
        every_run=readable_table(comparison.table) if several else None)
    write_text(out / "report.html", page)
    return out / "report.html"


def _matchings(pairs: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Return the budgets in which each pair of arms matches, and the ratios of all budgets."""
    rows = []
    for _, pair in arm_pairs(pairs).iterrows():
        ratios = {label: pair[f"{column}_ratio"] for label, column, _ in MATCHINGS}
        change, low, high = (pair[f"perplexity_ratio{end}"] - 1 for end in ("", "_low", "_high"))
        rows.append({"pair": f"{labels.get(pair['a'], pair['a'])} against {labels.get(pair['b'], pair['b'])}",
                     "the same": pair["matched"] or "nothing",
                     **{label: "" if pd.isna(ratio) else f"× {ratio:.2f}" for label, ratio in ratios.items()},
                     "perplexity": f"{change:+.1%} ({low:+.1%} to {high:+.1%})"})
    return pd.DataFrame(rows)


def _samples(comparison, labels: dict[str, str]) -> list[tuple[str, list[dict]]]:
    """Return by prompt the continuation by each arm."""
    if comparison.samples.empty:
        return []
    kinds = {arm.name: arm.model for arm in comparison.arms}
    return [(prompt, [{"color": KINDS[kinds[row.arm]].colors[0], "name": labels[row.arm], "text": row.text}
                      for row in rows.itertuples()])
            for prompt, rows in comparison.samples.groupby("prompt", sort=False)]


def _protocol(comparison) -> tuple[pd.DataFrame, str]:
    """Return the settings of each arm as a table, and the protocol of the comparison as text."""
    rows = []
    for arm in comparison.arms:
        runs = [run for run in comparison.runs if run.name in arm.runs]
        config, t, info = runs[0].config, runs[0].config.training, runs[0].info
        orders = sorted({run.info["train"]["order_sha256"][:12] for run in runs})
        rows.append({"arm": arm.name, "recipe": config.name,
                     "shape": ", ".join(f"{name} {value}" for name, value in config.architecture.items()),
                     "learning rate": f"{t.learning_rate:g}", "schedule": t.schedule, "steps": f"{t.max_steps:,}",
                     "tokens per step": f"{t.tokens_per_step:,}",
                     "context": f"{t.context_length:,}", "seeds": ", ".join(map(str, arm.seeds)),
                     "order of the data (hash)": ", ".join(orders), "dtype": info["dtype"],
                     "hardware": info["hardware"]})
    info, kind = comparison.runs[0].info, comparison.runs[0].info["tokenizer"]["kind"]
    strides = sorted({comparison.stride or run.context_length // 2 for run in comparison.runs})
    learned = ", learned from the training part only" if kind.startswith("bpe:") else ""
    scored = {"test": "The scores are those of the test part.",
              "val": "The scores are those of the VALIDATION part, on which choices rest: they are not a result.",
              }.get(comparison.part, "The scores are those of the text in the title.")
    order = ("Runs of one seed read the same tokens in the same order (equal hashes), up to the shorter run's end."
             if comparison.same_order else
             "Runs of one seed did NOT read the same tokens in the same order: their hashes differ.")
    seeds = (" For arms with several seeds, the half-width of Student's t over seeds is added in quadrature, because "
             "resampling few seeds gives intervals that are too narrow."
             if any(len(arm.runs) > 1 for arm in comparison.arms) else "")
    text = (f"All runs use the tokenizer {kind} with {info['vocab_size']:,} entries{learned}. The validation part "
            f"decides which checkpoint is scored. {scored} Each story is scored alone, from its first token. Stories "
            f"longer than the context are scored with sliding windows, with a stride of "
            f"{', '.join(map(str, strides))} tokens; in rows called unbounded, each token has its whole story as "
            f"context. {order} Intervals are 95 %, from a bootstrap that draws the same stories for both sides.{seeds}")
    return pd.DataFrame(rows), text
