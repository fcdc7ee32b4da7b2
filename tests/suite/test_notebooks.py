import ast
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jupytext
import nbformat
import pytest
from papermill.inspection import inspect_notebook

from plotarmour.cli import UserError
from plotarmour.suite.notebooks import read_executed, run_notebook, write_html
from tools import sync_notebooks
from tools.sync_notebooks import ROOT, generate_notebook, notebook_scripts, out_of_step, taken_over

SCRIPTS = notebook_scripts()


def test_every_notebook_is_what_its_script_gives():
    """Guards: an .ipynb edited by hand, or forgotten after its .py changed."""
    assert [p.stem for p in SCRIPTS] == ["01_pretokenize", "02_train", "03_compare", "04_desk", "05_windows",
                                         "06_batch_size", "07_bdh_options"]
    assert out_of_step() == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_notebooks_are_bare(script):
    """Guards: outputs, tool versions and random cell ids in the repository."""
    text = generate_notebook(script)
    assert text == generate_notebook(script)
    notebook = nbformat.reads(text, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not c.get("outputs") and c.get("execution_count") is None for c in notebook.cells)
    assert len({c.id for c in notebook.cells}) == len(notebook.cells)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_papermill_understands_every_parameter(script, tmp_path):
    """Guards: a second = on a parameter's line, after which papermill silently loses the parameter."""
    notebook = jupytext.read(script)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    names = {node.targets[0].id for node in ast.parse(cell.source).body}
    found = inspect_notebook(str(script.with_suffix(".ipynb")))
    assert set(found) == names and all(p["help"] for p in found.values())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_parameter_is_checked_before_it_is_used(script):
    """Guards: a text "false" that counts as True; a number as the name of a folder, which ends in a traceback."""
    cells = [c for c in jupytext.read(script).cells if c.cell_type == "code"]
    [position] = [i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", [])]
    names = {node.targets[0].id for node in ast.parse(cells[position].source).body}
    nodes = [node for cell in cells[position + 1:] for node in ast.walk(ast.parse(cell.source))]
    [call] = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "check_parameters"]
    assert {keyword.arg for keyword in call.keywords} == names
    assert not {n.id for n in nodes if isinstance(n, ast.Name)} & names, "only as an attribute of what was checked"


def test_a_folder_that_may_not_be_entered_does_not_hide_the_package(tmp_path, monkeypatch):
    """Guards: lost+found of a data disk, before which the set-up cell of every notebook ends in a PermissionError."""
    locked, stat = tmp_path / "disk" / "a", os.stat
    locked.mkdir(parents=True)
    (tmp_path / "disk" / "clone").symlink_to(ROOT)

    def may_not_enter(path, *args, **options):
        if locked in Path(os.fsdecode(path)).parents:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.chdir(tmp_path / "disk")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(os, "stat", may_not_enter)
    monkeypatch.setattr("plotarmour.suite.kaggle.set_up_notebook", lambda: None)
    exec((ROOT / "notebooks" / "set_up.py").read_text(encoding="utf-8"), {})
    assert Path(sys.path[0]).resolve() == ROOT


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_notebooks_tell_and_show_without_logic(script):
    """Guards: logic that hides in notebooks, where no test reaches it."""
    cells = [c for c in jupytext.read(script).cells]
    code = [c.source for c in cells if c.cell_type == "code"]
    nodes = [n for source in code for n in ast.walk(ast.parse(source))]
    assert not any(isinstance(n, ast.ClassDef | ast.FunctionDef | ast.While) for n in nodes)
    assert sorted(len(source.splitlines()) for source in code)[len(code) // 2] <= 6
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    assert words >= 3 * sum(len(source.splitlines()) for source in code)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_notebook_finds_the_package_with_the_code_of_set_up(script):
    """Guards: three copies of one cell that differ; a notebook that imports a file which Kaggle does not have."""
    cells = nbformat.reads(generate_notebook(script), as_version=4).cells
    assert [cell.source for cell in cells if "set-up" in cell.metadata.get("tags", [])] == [
        script.with_name("set_up.py").read_text(encoding="utf-8").strip()]
    assert not any("import set_up " in cell.source for cell in cells)


def test_badges_and_links_lead_to_files_that_exist(tmp_path):
    """Guards: links that lead nowhere, and badges before the repository is named."""
    (tmp_path / "pyproject.toml").write_text('[tool.plotarmour]\nrepository = "someone/plot-armour"\n')
    for script in SCRIPTS:
        assert "badge" not in generate_notebook(script)
        cells = nbformat.reads(generate_notebook(script, tmp_path), as_version=4).cells
        targets = re.findall(r"\]\(([^)]+)\)", "\n".join(c.source for c in cells if c.cell_type == "markdown"))
        ours = [target.rpartition("/blob/main/")[2] for target in targets if "someone/plot-armour" in target]
        assert ours == [f"notebooks/{script.stem}.ipynb"] * 2
        others = [target.partition("#")[0] for target in targets if "//" not in target]
        assert all((ROOT / path).exists() for path in ours) and all((script.parent / path).exists() for path in others)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters", "left"), [
    ("05_windows", {"models": "gpt2", "n_tokens": 700}, {"window_losses.csv": 10}),
    ("07_bdh_options", {"options": "decay 0.1; decay 0.1 + n_head 1", "n_steps": 20}, {"bdh_options.csv": 4}),
    ("06_batch_size", {"n_samples": 8, "largest": 2}, {"batch_times.csv": 8, "batch_readers.csv": 3,
                                                      "batch_losses.csv": 9})])
def test_notebooks_that_train_many_runs_go_through(tmp_path, name, parameters, left):
    """Guards: a cell that fails on another machine; a kind of windows or a batch size without its row."""
    executed = tmp_path / f"{name}.ipynb"
    run_notebook(ROOT / "notebooks" / f"{name}.ipynb", executed, parameters | {"results": str(tmp_path)})
    assert read_executed(executed).is_complete
    assert {file: len((tmp_path / file).read_text().splitlines()) - 1 for file in left} == left


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the notebooks, on which tools/sync_notebooks.py works."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    monkeypatch.setattr(sync_notebooks, "ROOT", tmp_path)

    def sync(*arguments):
        monkeypatch.setattr(sys, "argv", ["sync_notebooks.py", *map(str, arguments)])
        sync_notebooks.main()

    return tmp_path / "notebooks", sync


def test_a_notebook_edited_on_kaggle_comes_back_into_its_script(checkout, tmp_path):
    """Guards: edits that are copied by hand, with outputs, injected parameters and the text of the set-up cell."""
    folder, sync = checkout
    assert [taken_over(script.with_suffix(".ipynb"), script) for script in SCRIPTS] == [
        script.read_text(encoding="utf-8") for script in SCRIPTS]
    notebook = nbformat.read(folder / "02_train.ipynb", as_version=4)
    notebook.metadata["kaggle"] = {"accelerator": "nvidiaTeslaT4"}
    for i, cell in enumerate(notebook.cells):
        cell.metadata["trusted"], cell.id = True, f"kaggle-{i}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="0 s")], i
    notebook.cells[0].source = notebook.cells[0].source.replace("Train one model", "Train a größeres model")
    [at] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("model = 7", metadata={"tags": ["injected-parameters"]}))
    edited = tmp_path / "plot-armour-02-train-bdh.ipynb"
    nbformat.write(notebook, edited)
    sync(edited)
    before, after = (path.read_text(encoding="utf-8") for path in (SCRIPTS[1], folder / "02_train.py"))
    assert after == before.replace("Train one model", "Train a größeres model") != before
    assert out_of_step() == [] and "größeres" in (folder / "02_train.ipynb").read_text(encoding="utf-8")


def test_an_edited_notebook_is_not_overwritten(checkout, tmp_path):
    """Guards: an afternoon's edits in Jupyter that tools/sync_notebooks.py replaces by the .py; a wrong file taken."""
    folder, sync = checkout
    path = folder / "02_train.ipynb"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["cells"][0]["source"] += " Mine."
    path.write_text(json.dumps(content), encoding="utf-8")
    os.utime(path, (2**31, 2**31))
    with pytest.raises(UserError, match="02_train.ipynb was edited after its .py"):
        sync()
    sync(path)
    assert "Mine." in (folder / "02_train.py").read_text(encoding="utf-8")
    for name, text, message in (("other.ipynb", "{}", "does not say which"), ("02_train.ipynb", "{}", "not a notebook"),
                                ("03_compare.ipynb", json.dumps(content | {"cells": []}), "tagged set-up and param")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            sync(tmp_path / name)


def test_a_running_notebook_shows_its_last_line(tmp_path):
    """Guards: a comparison of an hour of which the terminal says nothing."""
    path, cell = tmp_path / "03_compare.ipynb", nbformat.v4.new_code_cell
    assert read_executed(path).last_line == ""
    cells = [cell("1", outputs=[nbformat.v4.new_output("stream", text="bdh: 34% of 900 rows, 2 min left\n2 runs\n")]),
             cell("2", outputs=[nbformat.v4.new_output("display_data", {"text/plain": "figure"})])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert read_executed(path).last_line == "bdh: 34% of 900 rows, 2 min left"


def test_an_executed_notebook_is_written_as_html_where_nbconvert_is_installed(tmp_path, monkeypatch, warned):
    """Guards: a suite that needs nbconvert, or ends because of it."""
    path, page = tmp_path / "02_train.ipynb", tmp_path / "02_train.html"
    monkeypatch.setitem(sys.modules, "nbconvert", None)
    write_html(path)
    assert not page.exists()
    exporter = SimpleNamespace(from_filename=lambda name: (f"<p>{Path(name).read_text(encoding='utf-8')}</p>", {}))
    monkeypatch.setitem(sys.modules, "nbconvert", SimpleNamespace(HTMLExporter=lambda: exporter))
    write_html(path)  # has not begun
    path.write_bytes(b"\xff")
    with warned("02_train.ipynb could not be written as HTML .UnicodeDecodeError"):
        write_html(path)
    path.write_text("größer", encoding="utf-8")
    write_html(path)
    assert page.read_text(encoding="utf-8") == "<p>größer</p>"


def test_a_checkout_with_windows_line_ends_is_in_step(checkout):
    """Guards: a Windows checkout in which every notebook differs from its script."""
    folder, sync = checkout
    for path in [*folder.glob("*.py"), *folder.glob("*.ipynb"), folder.parent / "pyproject.toml"]:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    sync("--check")
    assert generate_notebook(folder / "02_train.py") == generate_notebook(SCRIPTS[1])
