"""report.html: a comparison for someone who has ten minutes. One file, figures inside, nothing from the network."""

import base64
import html
from pathlib import Path

import pandas as pd

from plotarmour.evaluation.arms import MATCHINGS
from plotarmour.files import write_text
from plotarmour.report.figures import COLORS, GRAY, MODEL_NAMES
from plotarmour.report.verdict import (
    NOT_CLAIMED,
    arm_names,
    denominators,
    for_people,
    headline,
    how_sure,
    spoken_of,
)

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { border-left: 5px solid #0072B2; background: #EFF5FA; padding: .8rem 1rem; }
.verdict p { margin: .3rem 0; } .small { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; min-width: 12rem; }
figure { margin: 1rem 0; } img { width: 100%; min-width: 34rem; height: auto; }
figcaption { font-size: .9rem; color: #444; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; }
.side { border-top: 4px solid #888; padding-top: .3rem; font-size: .92rem; white-space: pre-wrap; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""
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

BUDGETS = ("FLOPs are counted from the structure: two for every multiply-add of a matrix product, shared weights "
           "once per pass, attention included, backward twice the forward; recomputation is not counted. Seconds and "
           "memory are as measured, so they depend on the machine and on what else it did.")


def write_report(found, out: Path) -> Path:
    """Write report.html beside the figures it takes in.

    Args:
        found: a `plotarmour.report.compare.Comparison`.
        out: the comparison's folder; its figures are there.
    """
    names = arm_names(found.arms)
    several = any(len(arm.runs) > 1 for arm in found.arms)
    kinds = dict.fromkeys(MODEL_NAMES.get(arm.model, arm.model) for arm in found.arms)
    parts = [f"<h1>{_t(' and '.join(names.values() if len(names) < 3 else kinds))}: {_t(found.title)}</h1>"]
    parts.append(_verdicts(found, names))
    parts += ["<h2>The numbers</h2>", _table(for_people(found.by_arm if several else found.table)),
              f'<p class="small">{_t(denominators(found.table))} Perplexity is exp(loss). '
              f"{_t(BUDGETS)}</p>"]
    for file, heading, caption in FIGURES:
        if (out / file).exists():
            parts.append(_figure(out / file, heading, caption))
    if len(found.pairs):
        parts += ["<h2>Three ways to be fair</h2>", _matchings(found, names)]
    parts += ["<h2>What is not claimed</h2>", "<ul>", *(f"<li>{_t(line)}</li>" for line in NOT_CLAIMED),
              *(f"<li>not equal between the runs: {_t(line)}</li>" for line in found.unequal), "</ul>"]
    parts += _samples(found, names)
    parts += _examples(found)
    parts += ["<h2>Protocol</h2>", _protocol(found), "<h2>Leak checks</h2>",
              _table(found.checks.assign(passed=found.checks["passed"].map({True: "yes", False: "NO"})),
                     text=("expected", "found"))]
    if several:
        parts += ["<h2>Every run</h2>", _table(for_people(found.table))]
    page = (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_t(found.title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n")
    write_text(out / "report.html", page)
    return out / "report.html"


def _verdicts(found, names: dict[str, str]) -> str:
    if not len(found.pairs):
        return '<div class="verdict"><p>One arm alone: nothing to compare.</p></div>'
    details = "".join(f"<li>{_t(how_sure(pair, names))}</li>" for _, pair in spoken_of(found.pairs).iterrows())
    return (f'<div class="verdict"><p><strong>{_t(headline(found.pairs, names))}</strong></p></div>\n'
            f'<ul class="small">{details}</ul>')


def _matchings(found, names: dict[str, str]) -> str:
    columns = {f"{column}_ratio": words for words, column, _ in MATCHINGS}
    rows = []
    for _, pair in spoken_of(found.pairs).iterrows():
        rows.append({"pair": f"{names.get(pair['a'], pair['a'])} against {names.get(pair['b'], pair['b'])}",
                     "the same": pair["matched"] or "nothing",
                     **{words: "" if pd.isna(pair[c]) else f"× {pair[c]:.2f}" for c, words in columns.items()},
                     "perplexity": f"{pair['perplexity_ratio'] - 1:+.1%} ({pair['perplexity_ratio_low'] - 1:+.1%} to "
                                   f"{pair['perplexity_ratio_high'] - 1:+.1%})"})
    return (_table(pd.DataFrame(rows), text=("the same",))
            + '<p class="small">Budgets of the first as a multiple of the second\'s'
            + (". BDH goes through one set of weights several times: equal parameters are more work, and equal work is "
               "fewer parameters" if len({arm.model for arm in found.arms}) > 1 else "") + ".</p>")


def _samples(found, names: dict[str, str]) -> list[str]:
    if found.samples.empty:
        return []
    kinds = {arm.name: arm.model for arm in found.arms}
    parts = ["<h2>What they write</h2>", '<p class="small">Same prompt, same seed; one draw each, not chosen.</p>']
    for prompt, rows in found.samples.groupby("prompt", sort=False):
        sides = "".join(f'<div class="side" style="border-color:{COLORS.get(kinds[row.arm], (GRAY,))[0]}"><strong>'
                        f"{_t(names[row.arm])}</strong>\n<em>{_t(prompt)}</em>{_t(row.text)}</div>"
                        for row in rows.itertuples())
        parts.append(f'<div class="sides">{sides}</div>')
    return parts


def _examples(found) -> list[str]:
    if found.examples.empty:
        return []
    parts = ["<h2>Where they differ most</h2>",
             f'<p class="small">{_t(found.examples["a"].iat[0])} against {_t(found.examples["b"].iat[0])}: the stories '
             "with the largest gaps in nats per token, and the words that cost the worse one most more.</p>"]
    for row in found.examples.itertuples():
        parts.append(f"<details><summary>Story {row.story:,}, {row.tokens:,} tokens: {_t(row.better)} is better, "
                     f"{row.nats_a:,.1f} against {row.nats_b:,.1f} nats. {_t(row.words)}</summary>"
                     f'<div class="side">{_t(row.text)}</div></details>')
    return parts


def _protocol(found) -> str:
    rows = []
    for arm in found.arms:
        run = next(run for run in found.runs if run.name == arm.runs[0])
        t, shape = run.config.training, ", ".join(f"{k} {v}" for k, v in run.config.architecture.items())
        orders = {r.info["train"].get("order_sha256", "not recorded")[:12] for r in found.runs if r.name in arm.runs}
        rows.append({"arm": arm.name, "recipe": run.config.name, "shape": shape,
                     "learning rate": f"{t.learning_rate:g}", "schedule": t.schedule, "steps": f"{t.max_steps:,}",
                     "tokens a step": f"{t.tokens_per_step:,}",
                     "context": f"{t.context_length:,}", "seeds": ", ".join(map(str, arm.seeds)),
                     "order of the data (hash)": ", ".join(sorted(orders)), "dtype": run.info["dtype"],
                     "hardware": run.info["hardware"]})
    run, kind = found.runs[0], found.runs[0].info["tokenizer"]["kind"]
    strides = sorted({found.stride or r.context_length // 2 for r in found.runs})
    learned = " learned from the training part only," if kind.startswith("bpe:") else ""
    scored = {"test": "What is reported is the test part.", "val": "What is reported is the VALIDATION part, on which "
              "choices rest: no verdict."}.get(found.part, "What is reported is the text named above.")
    order = ("Runs of one seed read the same tokens in the same order (the same hash), as far as both go." if
             found.same_order else "That runs of one seed read the same tokens in the same order is NOT shown: hashes "
             "differ, or are missing.")
    seeds = (" With several seeds, the half-width of Student's t over seeds is added in quadrature, since drawing so "
             "few seeds anew would hold the truth in far fewer cases than it claims."
             if any(len(arm.runs) > 1 for arm in found.arms) else "")
    told = (f"Tokenizer {kind},{learned} {run.info['vocab_size']:,} entries, the same for all. Which checkpoint is "
            f"scored rests on the validation part. {scored} Each story is scored alone, from its first token; stories "
            f"longer than the context by sliding windows that go on by {', '.join(map(str, strides))} tokens, but in "
            f"rows called unbounded, where every token is given its whole story. {order} Intervals are 95 %, by a "
            f"bootstrap over stories that draws the same ones for both sides.{seeds}")
    return _table(pd.DataFrame(rows), text=("shape", "order of the data (hash)")) + f"<p>{_t(told)}</p>"


def _figure(path: Path, heading: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<h2>{_t(heading)}</h2><figure><div class="scroll">'
            f'<img src="data:image/png;base64,{data}" alt="{_t(heading)}: {_t(caption)}">'
            f"</div><figcaption>{_t(caption)}</figcaption></figure>")


def _table(frame: pd.DataFrame, text: tuple[str, ...] = ()) -> str:
    head = "".join(f"<th>{_t(column)}</th>" for column in frame.columns)
    def cell(column: str, value: object) -> str:
        return f'<td class="text">{_t(value)}</td>' if column in text else f"<td>{_t(value)}</td>"

    body = "\n".join("<tr>" + "".join(map(cell, frame.columns, row)) + "</tr>" for row in frame.itertuples(index=False))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _t(value: object) -> str:
    return html.escape(str(value))
