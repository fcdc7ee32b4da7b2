"""Pairs of notebook files: the .py in percent format is the source, and the .ipynb is generated from it."""

import hashlib
import json
import tomllib
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook_scripts(root: Path = ROOT) -> list[Path]:
    """Return the .py of every notebook, in order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))


def generate_notebook(script: Path, root: Path = ROOT) -> str:
    """Return the .ipynb of a percent script as text: without outputs and tool versions, with cell ids from content.

    A cell tagged `set-up` gets the text of notebooks/set_up.py. A cell's id depends on its text and on how often that
    text occurs before it, so that an edit of one cell leaves all other ids as they are.
    """
    notebook = jupytext.read(script, fmt="py:percent")
    badges = _badges(script, root)
    if badges:
        notebook.cells[0].source += "\n\n" + badges
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        if "set-up" in cell.metadata.get("tags", []):
            cell.source = script.with_name("set_up.py").read_text(encoding="utf-8").strip()
        content = f"{cell.cell_type}\n{cell.source}"
        seen[content] = seen.get(content, 0) + 1
        cell.id = hashlib.sha256(f"{seen[content]}\n{content}".encode()).hexdigest()[:12]
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        cell.metadata = nbformat.NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags"})
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def out_of_step(root: Path = ROOT) -> list[Path]:
    """Return the .ipynb files that are missing or differ from what their .py gives."""
    return [script.with_suffix(".ipynb") for script in notebook_scripts(root)
            if not script.with_suffix(".ipynb").exists()
            or script.with_suffix(".ipynb").read_text(encoding="utf-8") != generate_notebook(script, root)]


def _badges(script: Path, root: Path) -> str:
    """Return badges that open the notebook in Kaggle and Colab, if pyproject.toml names the repository."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    repository = project["tool"]["plotarmour"]["repository"]
    if not repository:
        return ""
    path = f"{repository}/blob/main/notebooks/{script.stem}.ipynb"
    return (f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
            f"(https://kaggle.com/kernels/welcome?src=https://github.com/{path}) "
            f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
            f"(https://colab.research.google.com/github/{path})")
