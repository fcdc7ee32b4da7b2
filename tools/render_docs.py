#!/usr/bin/env python3
"""Write result tables, command help and the map between the markers of README.md and docs/, and the example report."""

import argparse
import ast
import dataclasses
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.tables import REFERENCE, TABLES, arms_of, points_of, rows_of, table
from plotarmour.cli import HelpFormatter, UserError, as_path, run_command
from plotarmour.config import DataConfig, TrainingConfig

EXAMPLE_REPORT = REFERENCE / "example" / "comparison" / "report.html"
MARKER = re.compile(r"(<!-- BEGIN ([\w-]+) -->\n)(.*?)(<!-- END \2 -->)", re.S)
EXAMPLE_RUNS = ("bdh", "gpt2")
EXAMPLE_TABLES = ("totals", "arms", "pairs", "checks", "different_stories", "samples", "positions")


def settings() -> str:
    """Return a table of all settings of [data] and [training], from the fields of the config dataclasses."""
    rows = []
    for section, config in (("data", DataConfig), ("training", TrainingConfig)):
        for f in dataclasses.fields(config):
            default = "required" if f.default is dataclasses.MISSING else f"`{f.default}`"
            rows.append([f"`{f.name}`", section, default, f.metadata["doc"]])
    return table(["setting", "section", "default", "meaning"], rows, text_columns=4)


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

    from benchmarks.figures import budget_losses, contradiction_curves, option_losses, plus_curves
    from plotarmour.evaluation.arms import Arm
    from plotarmour.report import figures

    contradiction_curves(pd.read_csv(REFERENCE / "contradictions_tales.csv"), REFERENCE / "contradictions_tales.png",
                         "misfit")
    seconds = {row["arm"]: float(row["ratio"]) for row in rows_of("same_time.csv")}
    bdh_tokens = float(arms_of(2200)["bdh"]["train_tokens"])
    budget_losses({kind: points_of(kind) for kind in ("gpt2", "gpt2_rope", "lstm", "modern", "bdh", "llama")}, seconds,
                  bdh_tokens, REFERENCE / "budgets.png")
    option_losses(pd.read_csv(REFERENCE / "bdh_options.csv"), REFERENCE / "bdh_options.png")
    plus_curves(pd.read_csv(REFERENCE / "bdh_plus_curves.csv"), REFERENCE / "bdh_plus.png")
    path = REFERENCE / "tiny"
    by_arm, by_run, pairs = (pd.read_csv(path / f"{name}.csv") for name in ("arms", "totals", "pairs"))
    order = [*dict.fromkeys(pairs["a"]), *dict.fromkeys(pairs["b"])]  # gives the colours of the comparison
    arms = []
    rows = by_arm[by_arm["params"].notna()]
    for row in rows.sort_values("name", key=lambda names: names.map(order.index)).itertuples(index=False):
        seeds = tuple(map(int, str(row.seeds).split(", ")))
        runs = (row.name,) if row.name in set(by_run["name"]) else tuple(f"{row.name}_seed-{s}" for s in seeds)
        arms.append(Arm(row.name, row.model, runs, seeds))
    figures.perplexities(arms, by_arm, by_run, path / "perplexity.png", "Built-in corpus, test part")


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


BLOCKS: dict[str, Callable[[], str]] = TABLES | {
    "settings": settings, "commands": commands, "map": project_map, "modules": modules}


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
