#!/usr/bin/env python3
"""Generate every notebook's .ipynb from its .py, check that they agree, or take over edits of an .ipynb."""

import argparse
import hashlib
import json
import sys
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.cli import UserError, as_path, run_command
from plotarmour.files import write_text

TAGS = ("set-up", "parameters")  # that a cell of every notebook has


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("edited", nargs="*", type=as_path, help="notebooks edited on Kaggle, Colab or in Jupyter, with "
                        "a name such as 02_train.ipynb; their .py gets their text, without outputs")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 2 where a pair differs")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    stale = out_of_step()
    if args.check and stale:
        raise UserError(f"{', '.join(p.name for p in stale)} is not what its .py gives; run tools/sync_notebooks.py, "
                        "with the notebook's path if it is the .ipynb that you have edited.")
    scripts = [(script_of(path), path) for path in args.edited]
    for script, text in [(script, taken_over(path, script)) for script, path in scripts]:
        write_text(script, text)
        print(f"wrote {script.name}")
    for path in out_of_step():
        sources = (path.with_suffix(".py"), path.with_name("set_up.py"), ROOT / "pyproject.toml", Path(__file__))
        if not args.edited and path.exists() and path.stat().st_mtime > max(s.stat().st_mtime for s in sources) + 1:
            raise UserError(f"{path.name} was edited after its .py; expected edits in the .py. Give its path to take "
                            "them over, or delete it to generate it anew.")
        write_text(path, generate_notebook(path.with_suffix(".py")))
        print(f"wrote {path.name}")
    if not stale and not args.edited:
        print("all notebooks agree with their scripts")


def notebook_scripts() -> list[Path]:
    """Return the .py of every notebook, in order."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))


def out_of_step() -> list[Path]:
    """Return the .ipynb files that are missing or differ from what their .py gives."""
    pairs = [(script, script.with_suffix(".ipynb")) for script in notebook_scripts()]
    return [notebook for script, notebook in pairs
            if not notebook.exists() or notebook.read_text(encoding="utf-8") != generate_notebook(script)]


def generate_notebook(script: Path, root: Path = ROOT) -> str:
    """Return the .ipynb of a percent script as text: without outputs and tool versions, with cell ids from content.

    A cell tagged `set-up` gets the text of notebooks/set_up.py, with the repository that pyproject.toml names. A cell's
    id depends on its text and on how often that text occurs before it, so that an edit of one cell leaves all other ids
    as they are.
    """
    import jupytext
    import nbformat

    notebook = jupytext.read(script, fmt="py:percent")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    set_up = script.with_name("set_up.py").read_text(encoding="utf-8").strip()
    if repository := project["tool"]["plotarmour"]["repository"]:
        notebook.cells[0].source += "\n\n" + _badges(script, repository)
        address = f"https://github.com/{repository}/archive/refs/heads/main.zip"
        set_up = set_up.replace('archive = ""', f'archive = "{address}"')
    seen = Counter()
    for cell in notebook.cells:
        if "set-up" in cell.metadata.get("tags", []):
            cell.source = set_up
        content = f"{cell.cell_type}\n{cell.source}"
        seen[content] += 1
        cell.id = hashlib.sha256(f"{seen[content]}\n{content}".encode()).hexdigest()[:12]
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cell.metadata = nbformat.NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _badges(script: Path, repository: str) -> str:
    """Return badges that open the notebook in Kaggle and Colab."""
    path = f"{repository}/blob/main/notebooks/{script.stem}.ipynb"
    return (f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
            f"(https://kaggle.com/kernels/welcome?src=https://github.com/{path}) "
            f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
            f"(https://colab.research.google.com/github/{path})")


def script_of(edited: Path) -> Path:
    """Return the .py to which an edited notebook belongs by its name, such as plot-armour-02-train-bdh.ipynb."""
    scripts = [script for script in notebook_scripts() if script.stem in edited.stem.replace("-", "_")]
    if len(scripts) != 1:
        raise UserError(f"{edited} does not say which notebook it is; expected a name with one of "
                        f"{', '.join(script.stem for script in notebook_scripts())}.")
    return scripts[0]


def taken_over(edited: Path, script: Path) -> str:
    """Return the text that a script gets from its edited notebook.

    What belongs to the notebook alone stays behind: outputs, ids, metadata other than tags, badges, the text of the
    set-up cell, and the parameters that papermill injected.
    """
    import jupytext
    import nbformat

    try:
        cells = nbformat.read(edited, as_version=4).cells
    except (OSError, ValueError, nbformat.ValidationError):
        raise UserError(f"{edited} is not a notebook; expected an .ipynb.") from None
    before, tags = script.read_text(encoding="utf-8"), Counter(tag for c in cells for tag in c.metadata.get("tags", []))
    if missing := [tag for tag in TAGS if tags[tag] != 1]:
        raise UserError(f"{edited} has no cell, or several, tagged {' and '.join(missing)}; expected one each, as in "
                        f"notebooks/{script.stem}.ipynb. Add the tag to the cell's metadata.")
    [set_up] = [c.source for c in jupytext.reads(before, "py:percent").cells if "set-up" in c.metadata.get("tags", [])]
    kept = []
    for cell in cells:
        own = [tag for tag in cell.metadata.get("tags", []) if tag in TAGS]
        source = set_up if "set-up" in own else "\n".join(
            line for line in cell.source.splitlines() if not line.startswith("[![Open in Kaggle]")).rstrip()
        if "injected-parameters" not in cell.metadata.get("tags", []) and source:
            make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
            kept.append(make(source, metadata={"tags": own} if own else {}))
    text = jupytext.writes(nbformat.v4.new_notebook(cells=kept), "py:percent")
    return before[:before.index("# %%")] + text[text.index("# %%"):]


if __name__ == "__main__":
    run_command(main)
