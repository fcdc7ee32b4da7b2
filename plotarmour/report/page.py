"""report.html: a comparison for someone who has ten minutes. One file, figures inside, nothing from the network.

The page itself is `page.html.j2`; this module computes what it shows. Jinja2 escapes every value.
"""

import base64
from pathlib import Path

import jinja2
import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS
from plotarmour.files import write_text
from plotarmour.models import colors_of, label_of
from plotarmour.report.verdict import (
    NOT_CLAIMED,
    arm_names,
    denominators,
    for_people,
    headline,
    how_sure,
    spoken_of,
)

TEMPLATE = Path(__file__).with_name("page.html.j2")
FIGURES = (
    ("differences.png", "How much better, and how sure",
     "Difference in perplexity of every pair, with its 95 % interval. Where the interval does not touch 0, other "
     "stories (and, where there are several seeds, other seeds) would be expected to show a difference, too."),
    ("training_curves.png", "What each budget buys",
     "Validation loss against training tokens, floating-point operations and time, on common axes. Which model is "
     "ahead may depend on the panel: that is why all three are here."),
    ("perplexity.png", "Models, n-gram baselines and ceiling",
     "Perplexity on the held-out stories. Gray: what counting single tokens, pairs and triples gives without a neural "
     "network."),
    ("loss_by_position.png", "Where in a story",
     "Loss by the place of a token in its story: stories begin alike, and get harder to foresee as they go on."),
    ("win_shares.png", "Which stories",
     "In how many stories the first model of a pair needs fewer nats, by length of story; 95 % intervals."),
)


def write_report(comparison, out: Path) -> Path:
    """Write report.html, with the comparison's figures inside.

    Args:
        comparison: a `plotarmour.report.compare.Comparison`.
        out: the comparison's folder; its figures are there.

    Returns:
        The path of report.html.
    """
    names, arms, pairs = arm_names(comparison.arms), comparison.arms, comparison.pairs
    kinds = dict.fromkeys(label_of(arm.model) for arm in arms)
    several = any(len(arm.runs) > 1 for arm in arms)
    protocol, protocol_text = _protocol(comparison)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        zip=zip, title=comparison.title, heading=" and ".join(names.values() if len(names) < 3 else kinds),
        headline=headline(pairs, names) if len(pairs) else "",
        verdicts=[how_sure(pair, names) for _, pair in spoken_of(pairs).iterrows()] if len(pairs) else [],
        numbers=for_people(comparison.by_arm if several else comparison.table),
        denominators=denominators(comparison.table),
        figures=[{"heading": heading, "caption": caption, "png": base64.b64encode((out / file).read_bytes()).decode()}
                 for file, heading, caption in FIGURES if (out / file).exists()],
        matchings=_matchings(pairs, names) if len(pairs) else None, several_kinds=len(kinds) > 1,
        not_claimed=NOT_CLAIMED, unequal=comparison.unequal, samples=_samples(comparison, names),
        examples=list(comparison.examples.itertuples()), protocol=protocol, protocol_text=protocol_text,
        checks=comparison.checks.assign(
            passed=comparison.checks["passed"].map({True: "yes", False: "NO"}).fillna("not checked")),
        every_run=for_people(comparison.table) if several else None)
    write_text(out / "report.html", page)
    return out / "report.html"


def _matchings(pairs: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """What each pair of arms has in common, and its budgets' ratios."""
    columns = {f"{column}_ratio": words for words, column, _ in MATCHINGS}
    rows = []
    for _, pair in spoken_of(pairs).iterrows():
        rows.append({"pair": f"{names.get(pair['a'], pair['a'])} against {names.get(pair['b'], pair['b'])}",
                     "the same": pair["matched"] or "nothing",
                     **{words: "" if pd.isna(pair[c]) else f"× {pair[c]:.2f}" for c, words in columns.items()},
                     "perplexity": f"{pair['perplexity_ratio'] - 1:+.1%} ({pair['perplexity_ratio_low'] - 1:+.1%} to "
                                   f"{pair['perplexity_ratio_high'] - 1:+.1%})"})
    return pd.DataFrame(rows)


def _samples(comparison, names: dict[str, str]) -> list[tuple[str, list[dict]]]:
    """By prompt, what each arm wrote."""
    if comparison.samples.empty:
        return []
    kinds = {arm.name: arm.model for arm in comparison.arms}
    return [(prompt, [{"color": colors_of(kinds[row.arm])[0], "name": names[row.arm], "text": row.text}
                      for row in rows.itertuples()])
            for prompt, rows in comparison.samples.groupby("prompt", sort=False)]


def _protocol(comparison) -> tuple[pd.DataFrame, str]:
    """The settings of each arm, and the protocol in words."""
    rows = []
    for arm in comparison.arms:
        run = next(run for run in comparison.runs if run.name == arm.runs[0])
        t, shape = run.config.training, ", ".join(f"{k} {v}" for k, v in run.config.architecture.items())
        orders = {r.info["train"].get("order_sha256", "not recorded")[:12] for r in comparison.runs
                  if r.name in arm.runs}
        rows.append({"arm": arm.name, "recipe": run.config.name, "shape": shape,
                     "learning rate": f"{t.learning_rate:g}", "schedule": t.schedule, "steps": f"{t.max_steps:,}",
                     "tokens a step": f"{t.tokens_per_step:,}",
                     "context": f"{t.context_length:,}", "seeds": ", ".join(map(str, arm.seeds)),
                     "order of the data (hash)": ", ".join(sorted(orders)), "dtype": run.info["dtype"],
                     "hardware": run.info["hardware"]})
    run, kind = comparison.runs[0], comparison.runs[0].info["tokenizer"]["kind"]
    strides = sorted({comparison.stride or r.context_length // 2 for r in comparison.runs})
    learned = " learned from the training part only," if kind.startswith("bpe:") else ""
    scored = {"test": "What is reported is the test part.", "val": "What is reported is the VALIDATION part, on which "
              "choices rest: no verdict."}.get(comparison.part, "What is reported is the text named above.")
    order = ("Runs of one seed read the same tokens in the same order (the same hash), as far as both go." if
             comparison.same_order else "That runs of one seed read the same tokens in the same order is NOT shown: "
             "hashes differ, or are missing.")
    seeds = (" With several seeds, the half-width of Student's t over seeds is added in quadrature, since drawing so "
             "few seeds anew would hold the truth in far fewer cases than it claims."
             if any(len(arm.runs) > 1 for arm in comparison.arms) else "")
    text = (f"Tokenizer {kind},{learned} {run.info['vocab_size']:,} entries, the same for all. Which checkpoint is "
            f"scored rests on the validation part. {scored} Each story is scored alone, from its first token; stories "
            f"longer than the context by sliding windows that go on by {', '.join(map(str, strides))} tokens, but in "
            f"rows called unbounded, where every token is given its whole story. {order} Intervals are 95 %, by a "
            f"bootstrap over stories that draws the same ones for both sides.{seeds}")
    return pd.DataFrame(rows), text
