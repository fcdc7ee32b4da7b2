#!/usr/bin/env python3
"""Write result tables, command help and the map between the markers of README.md and docs/, and the example report."""

import argparse
import ast
import csv
import dataclasses
import importlib.util
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
FINALS = {"bdh": "**BDH**", "gpt2-time": "**GPT-2**, same time", "gpt2": "**GPT-2**, same tokens",
          "gpt2-flops": "**GPT-2**, same FLOPs per token"}
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


def answer() -> str:
    """Return the verdict at equal time in one sentence, from pairs.csv."""
    [pair] = [p for p in rows_of("finals/comparison/pairs.csv") if (p["a"], p["b"]) == ("bdh", "gpt2-time")]
    ratio, low, high = (float(pair[f"perplexity_ratio{end}"]) for end in ("", "_low", "_high"))
    stories, share = int(pair["stories"]), float(pair["train_tokens_ratio"])
    return (f"> **At the same core parameters and the same training time, BDH's perplexity on {stories} held-out "
            f"stories is {100 * (1 - ratio):.1f} % lower\n> than GPT-2's (95 % interval {100 * (1 - high):.1f} to "
            f"{100 * (1 - low):.1f} %), from {share:.2f} times the training tokens.**")


def verdict(folder: str) -> str:
    """Return the sentence that the report of a comparison opens with."""
    import pandas as pd

    from plotarmour.report.verdict import arm_pairs, headline

    names = {"bdh": "BDH", "gpt2": "GPT-2", "gpt2-time": "gpt2-time (GPT-2)", "gpt2-flops": "gpt2-flops (GPT-2)"}
    return "> " + headline(arm_pairs(pd.read_csv(REFERENCE / "finals" / folder / "pairs.csv"), names))


def learning_rates() -> str:
    """Return the validation loss of each learning rate that was tried."""
    rows = rows_of("learning_rates/summary.csv")
    return table(["model", "learning rate", "validation loss"],
                 [[r["model"], f"{float(r['learning_rate']):g}", f"{float(r['best_val_loss']):.3f}"] for r in rows])


def _arms_of_controls() -> dict[str, dict[str, str]]:
    """Return the arms of the controls by kind, without baselines and unbounded scores."""
    return {arm["model"]: arm for arm in rows_of("controls/comparison/arms.csv") if arm["train_s"]}


def controls() -> str:
    """Return the test loss of each kind with its best learning rate, and its difference to BDH's with the interval."""
    rates: dict[str, set[float]] = {}
    for row in rows_of("controls/summary.csv"):
        rates.setdefault(row["model"], set()).add(float(row["learning_rate"]))
    chosen = [row for row in rows_of("controls/learning_rates.csv") if row["chosen"] == "True"]
    best = {row["model"]: float(row["learning_rate"]) for row in chosen}
    pairs = {row["b"]: row for folder in ("comparison", "comparison_time")
             for row in rows_of(f"controls/{folder}/pairs.csv")}
    [timed] = [arm for arm in rows_of("controls/comparison_time/arms.csv") if arm["name"] == "modern-time"]
    seconds, lines = {row["arm"]: float(row["ratio"]) for row in rows_of("controls/same_time.csv")}, []
    for arm in [*_arms_of_controls().values(), timed]:
        kind, against = arm["model"], ""
        if pair := pairs.get(arm["name"]):  # BDH less the other: turned around, so that above 0 is worse than BDH
            numbers = (-float(pair[f"loss_difference{end}"]) for end in ("", "_high", "_low"))
            against = "{:+.3f} ({:+.3f} to {:+.3f})".format(*numbers)
        tried = (f"**{rate:g}**" if rate == best[kind] else f"{rate:g}" for rate in sorted(rates[kind]))
        lines.append([KINDS[kind].label + ", for BDH's time" * (arm is timed),
                      f"{float(arm['train_tokens']) / 1e6:.2f}", f"{float(arm['core_params']):,.0f}",
                      f"{float(arm['params']):,.0f}", ", ".join(tried), f"{float(arm['loss']):.3f}",
                      f"{float(arm['perplexity']):.2f}", against, f"{seconds[kind]:.2f}"])
    return table(["", "tokens, million", "core params", "all params", "learning rates tried (**best**)", "loss",
                  "perplexity", "nats above BDH", "time of a step"], lines)


def controls_sentence() -> str:
    """Return what the controls say: against the modern transformer at equal time and tokens, and against GPT-2."""
    arms = _arms_of_controls()
    loss = {kind: float(arm["loss"]) for kind, arm in arms.items()}
    share = 100 * (loss["gpt2"] - loss["gpt2_rope"]) / (loss["gpt2"] - loss["bdh"])
    pairs = {row["b"]: row for row in rows_of("controls/comparison_time/pairs.csv")}
    # Perplexity of BDH / perplexity of the other.
    by_time, by_tokens = ([float(pairs[name][f"perplexity_ratio{end}"]) for end in ("", "_low", "_high")]
                          for name in ("modern-time", "modern"))
    time, *time_ends = (100 * (1 - 1 / ratio) for ratio in by_time)
    tokens, *tokens_ends = (100 * (1 - ratio) for ratio in by_tokens)
    million, stories = float(arms["bdh"]["train_tokens"]) / 1e6, int(pairs["modern"]["stories"])
    ends = [f"{min(pair):.1f} to {max(pair):.1f} %" for pair in (time_ends, tokens_ends)]
    return (
        f"> **For the same training time, a modern transformer of BDH's size has {time:.1f} % lower perplexity than "
        f"BDH; for\n> the same tokens, BDH's is {tokens:.1f} % lower. {share:.0f} % of BDH's lead over GPT-2, in nats, "
        f"is rotary positions.**\n> {million:.1f} million tokens for BDH, {stories:,} held-out stories, one seed; 95 % "
        f"intervals {ends[0]} and {ends[1]}\n> ([controls](docs/results.md#controls-what-the-lead-is-made-of)).")


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
            f"`mask_stories` takes so many times the step without:\n{times}.")


def settings() -> str:
    """Return a table of all settings of [data] and [training], from the fields of the config dataclasses."""
    rows = []
    for section, config in (("data", DataConfig), ("training", TrainingConfig)):
        for f in dataclasses.fields(config):
            default = "required" if f.default is dataclasses.MISSING else f"`{f.default}`"
            rows.append([f"`{f.name}`", section, default, f.metadata["doc"]])
    return table(["setting", "section", "default", "meaning"], rows, text_columns=4)


def gap() -> str:
    """Return the validation losses of BDH and GPT-2 at equal training tokens, from three sets of runs."""
    def summary(path: str, kind: str) -> list[dict[str, str]]:
        return [row for row in rows_of(path) if row["run"].startswith(f"{kind}_")]

    rows = []
    for path, choose in (("learning_rates/summary.csv", min), ("finals/summary.csv", statistics.mean)):
        runs = {kind: summary(path, kind) for kind in ("bdh", "gpt2")}
        losses = [choose(float(run["best_val_loss"]) for run in runs[kind]) for kind in runs]
        rows.append((runs["bdh"][0]["tokens_seen"], len({run["seed"] for run in runs["bdh"]}), *losses))
    logs = [rows_of(f"laptop/log_{kind}.csv") for kind in ("bdh", "gpt2")]
    rows.append((logs[0][-1]["tokens_seen"], 1, *(min(float(row["val_loss"]) for row in log if row["val_loss"])
                                                  for log in logs)))
    return table(["training tokens", "seeds", "BDH", "GPT-2", "difference"],
                 [[f"{int(tokens):,}", str(seeds), f"{bdh:.3f}", f"{gpt2:.3f}", f"{gpt2 - bdh:.2f}"]
                  for tokens, seeds, bdh, gpt2 in rows], 0)


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

    from plotarmour.evaluation.arms import Arm
    from plotarmour.report import figures

    for folder, title in (("finals/comparison", "TinyStories V2, test part"), ("tiny", "Built-in corpus, test part")):
        path = REFERENCE / folder
        by_arm, by_run, pairs = (pd.read_csv(path / f"{name}.csv") for name in ("arms", "totals", "pairs"))
        order = [*dict.fromkeys(pairs["a"]), *dict.fromkeys(pairs["b"])]  # gives the colours of the comparison
        arms = []
        rows = by_arm[by_arm["params"].notna()]
        for row in rows.sort_values("name", key=lambda names: names.map(order.index)).itertuples(index=False):
            seeds = tuple(map(int, str(row.seeds).split(", ")))
            runs = (row.name,) if row.name in set(by_run["name"]) else tuple(f"{row.name}_seed-{s}" for s in seeds)
            arms.append(Arm(row.name, row.model, runs, seeds))
        figures.perplexities(arms, by_arm, by_run, path / "perplexity.png", title)
        if (path / "differences.png").exists():
            figures.differences_forest(arms, pairs, path / "differences.png")


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
    "answer": answer,
    "finals-short": lambda: arms_table("finals/comparison/arms.csv", FINALS, ("bdh unbounded", "bigram baseline",
                                       "unigram baseline", "uniform baseline")),
    "finals": lambda: arms_table("finals/comparison/arms.csv", FINALS),
    "finals-extra": lambda: arms_table("finals/comparison_extra/arms.csv", FINALS),
    "tiny": lambda: arms_table("tiny/arms.csv", TINY),
    "verdict": lambda: verdict("comparison"),
    "verdict-extra": lambda: verdict("comparison_extra"),
    "learning-rates": learning_rates,
    "controls": controls,
    "controls-sentence": controls_sentence,
    "gap": gap,
    "over-corpus": over_corpus,
    "pretokenize-speed": pretokenize_speed,
    "loop-cost": loop_cost,
    "memory-plan": memory_plan,
    "windows": windows,
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
