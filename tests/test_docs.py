"""README and docs: commands parse, links lead somewhere, tables and help are as rendered, speeds are as measured."""

import csv
import importlib.util
import re
import shlex
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def readme(root):
    return "\n".join(page.read_text(encoding="utf-8") for page in pages(root))


def pages(root):
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def described_tables(root):
    """The columns of each CSV that docs/tables.md describes, by the name of the file."""
    page = (root / "docs" / "tables.md").read_text(encoding="utf-8")
    return {name: re.findall(r"^\| `(\w+)` \|", section, re.M)
            for name, section in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.M | re.S)}


def commands(readme):
    """Every `python tools/...` in a code block, continuation lines joined."""
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", readme, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if part.strip().startswith("python tools/"):
                    yield shlex.split(part.strip(), comments=True)[1:]


def test_every_command_is_one_that_the_tools_accept(readme, root):
    """Guards: a README that shows options which no longer exist."""
    found = list(commands(readme))
    assert len(found) >= 6
    for tool, *args in found:
        spec = importlib.util.spec_from_file_location("tool", root / tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.build_parser().parse_args(args)  # ends the test with SystemExit where it does not parse


def test_ci_runs_the_readmes_own_test_command(readme, root):
    """Guards: an install step that only CI, or only the README, knows."""
    assert len(re.findall("requirements-dev.txt -c constraints.txt && python -m pytest", readme)) == 1
    assert "grep -m 1 'requirements-dev.txt -c constraints.txt' README.md" in (root / ".ci" / "run").read_text()


def test_the_speed_and_memory_of_bdh_are_the_committed_ones(readme, root):
    """Guards: a ratio that nobody measured, or that was measured of another version."""
    with (root / "results" / "reference" / "bdh_training.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    stated = {"25M": ("512", "1"), "1.8M": ("512", "4")}
    for shape, (T, B) in stated.items():
        of = {(row["form"], row["allocator"]): row for row in rows
              if (row["shape"], row["T"], row["B"]) == (shape, T, B)}
        for form in ("published", "compiled"):
            row, tuned = of[form, "default"], of[form, "tuned"]
            shown = (f"{float(row['ours_times_faster']):.2f} | {float(tuned['ours_times_faster']):.2f} | "
                     f"{float(row['activations_mib']):,.0f} MiB | {float(row['ours_times_leaner']):.1f}")
            assert shown in readme, (shape, shown)
        assert f"{float(of['tiled', 'default']['activations_mib']):,.0f} MiB" in readme


def test_the_cost_of_a_token_is_the_committed_one(readme, root):
    """Guards: a time per token of another version; activity of a run that nobody trained."""
    with (root / "results" / "reference" / "generation.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for what in ("BDH recurrent", "GPT-2 with cache", "BDH by full recomputation"):
        found = {row["context"]: float(row["ms_per_token"]) for row in rows if row["what"] == what}
        shown = " | ".join(f"{found[context]:,.0f}" if context in found else "" for context in
                           ("64", "256", "1024", "2048", "8192"))
        assert f"| {what} | {shown}".rstrip() in readme, shown
    for row in rows:
        if row["active_x"]:
            shown = " | ".join(f"{100 * float(row[f'active_{name}']):.1f} %" for name in ("x", "pairs", "y", "xy"))
            assert shown in readme, shown


def test_the_speed_of_the_desk_is_the_committed_one(readme, root):
    """Guards: a speed of another version."""
    with (root / "results" / "reference" / "desk_speed.csv").open(encoding="utf-8", newline="") as file:
        blend, first, bdh, _ = csv.DictReader(file)
    for shown in (f"a blend has {100 * float(blend['ratio']):.0f} %", f"tokens after {first['ms']} ms",
                  f"in {float(bdh['read_s']):.1f} s", f"40 tokens in {bdh['ms']} ms"):
        assert shown in readme, shown


def test_intervals_hold_as_often_as_is_said(readme, root):
    """Guards: a coverage that nobody simulated; scoring's speed likewise."""
    reference = root / "results" / "reference"
    with (reference / "bootstrap_coverage.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def held(method, seeds):
        found = [100 * float(r["holds_difference"]) for r in rows if (r["method"], r["seeds"]) == (method, seeds)]
        return f"{min(found):.1f} to {max(found):.1f} %" if len(found) > 1 else f"{found[0]:.1f} %"

    assert f"| one seed | {held('stories', '1')} |" in readme and f"| three seeds | {held('seeds', '3')} |" in readme
    assert f"| three seeds, resampled (not used) | {held('resampled', '3')} |" in readme
    assert all(93 <= 100 * float(r["holds_difference"]) <= 97 for r in rows if r["method"] in ("stories", "seeds"))
    with (reference / "scoring.csv").open(encoding="utf-8", newline="") as file:
        speed = {row["model"]: float(row["ratio"]) for row in csv.DictReader(file)}
    assert f"{speed['gpt2']:.2f} (GPT-2) and {speed['bdh']:.2f} times (BDH) the tokens/s" in readme


def test_every_link_leads_somewhere(root):
    """Guards: pages, figures and files that were moved; headings that were renamed."""
    for page in pages(root):
        links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        for path, _, anchor in (link.partition("#") for link in links if "://" not in link):
            target = page.parent / path if path else page
            assert target.exists(), (page.name, path)
            if anchor:
                headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
                anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in anchors, (page.name, anchor)


def test_every_page_is_linked_from_the_readme(root):
    """Guards: a page that nobody finds."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in pages(root)[1:] if f"docs/{page.name}" not in readme] == []


def test_the_readme_stays_short(root):
    """Guards: the README that became a manual of 36 kB."""
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.encode()) < 10_000


def test_tables_and_help_are_as_rendered(root):
    """Guards: a table that was not updated with its CSV, help of options that no longer exist, an outdated map."""
    command = [sys.executable, root / "tools" / "render_docs.py", "--check"]
    check = subprocess.run(command, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_the_columns_of_other_tables_are_documented(root, token_files, tmp_path):
    """Guards: a column of a CSV that only the code knows, or a unit that readers must guess."""
    from plotarmour.data.duplicates import EXAMPLE_COLUMNS, find_duplicates
    from plotarmour.data.token_file import TokenFile
    from plotarmour.suite import runner

    counts = find_duplicates({"val": TokenFile.open(token_files["val"])}, near=False).counts
    of = described_tables(root)
    assert of["summary.csv"] == ["run", "status", "reason", *runner.MEASURED]
    assert of["learning_rates.csv"] == runner.RATE_COLUMNS and of["X.csv"] == list(EXAMPLE_COLUMNS)
    assert of["X.counts.csv"] == list(counts[0])


def test_the_columns_of_the_log_are_documented(root):
    """Guards: a log column that only the code knows."""
    from plotarmour.training.log import COLUMNS
    page = (root / "docs" / "run-folder.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page.split("## log.csv")[1], re.M) == list(COLUMNS)
