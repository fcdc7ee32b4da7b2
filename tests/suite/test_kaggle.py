"""Notebooks on simulated hosts: Kaggle, Colab, and a laptop's folders."""

import sys
import zipfile
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from plotarmour.suite import kaggle
from plotarmour.suite.notebooks import ROOT, generate_notebook, read_executed


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """Run the set-up cell as on Kaggle, up to its import; returns where it finds the package."""
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(kaggle, "set_up_notebook", lambda: None)

    def run(archive=""):
        text = (ROOT / "notebooks" / "set_up.py").read_text(encoding="utf-8")
        text = text.replace("/kaggle/input", (tmp_path / "input").as_posix())
        exec(text.replace('archive = ""', f"archive = {archive!r}"), {})
        return sys.path[0]

    return run


def attach(folder, text="version = 1"):
    (folder / "plotarmour").mkdir(parents=True)
    (folder / "plotarmour" / "__init__.py").write_text(text)
    return str(folder)


@pytest.mark.parametrize("layout", ["plot-armour", "datasets/me/plot-armour",
                                    "datasets/me/plot-armour/plot-armour-main"])
def test_the_package_is_found_in_every_layout_of_attached_datasets(set_up, tmp_path, layout):
    """Guards: a dataset that is attached by its owner's name, or packed with a folder around it, and is not found."""
    (tmp_path / "input" / "images").mkdir(parents=True)
    assert attach(tmp_path / "input" / layout) == set_up()


def test_a_dataset_that_is_attached_in_both_layouts_is_one_version(set_up, tmp_path):
    """Guards: a package that is refused as two, because Kaggle shows one dataset under two paths."""
    attach(tmp_path / "input" / "datasets" / "me" / "plot-armour")
    first = attach(tmp_path / "input" / "plot-armour")
    assert set_up() == first
    attach(tmp_path / "input" / "old", "version = 0")
    with pytest.raises(RuntimeError, match="is attached in 2 versions: .*old.*keep one input") as error:
        set_up()
    assert error.value._render_traceback_() == [f"error: {error.value}."]


@pytest.mark.parametrize("inputs", [[], ["images"]])
def test_without_the_package_one_line_says_what_to_attach(set_up, tmp_path, inputs):
    """Guards: an assertion with red frames; a line that does not say what is attached in its place."""
    for name in inputs:
        (tmp_path / "input" / name).mkdir(parents=True)
    with pytest.raises(RuntimeError, match=f"nor in {'images' if inputs else 'any input'}. On Kaggle, attach"):
        set_up()
    with pytest.raises(RuntimeError, match="nowhere.zip cannot be downloaded .*Switch the internet on, or attach"):
        set_up((tmp_path / "nowhere.zip").as_uri())


def test_the_package_is_downloaded_where_its_repository_is_named(set_up, tmp_path, monkeypatch):
    """Guards: a notebook opened by its badge on Colab, where nothing is attached; an address of another project."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "main.zip", "w") as archive:
        archive.writestr("plot-armour-main/plotarmour/__init__.py", "version = 1")
    assert set_up((tmp_path / "main.zip").as_uri()).endswith("plot-armour-main")
    (tmp_path / "pyproject.toml").write_text('[tool.plotarmour]\nrepository = "someone/plot-armour"\n')
    generated = generate_notebook(ROOT / "notebooks" / "02_train.py", tmp_path)
    assert "archive = \\\"https://github.com/someone/plot-armour/archive/refs/heads/main.zip\\\"" in generated


@pytest.mark.parametrize("code", [0, 1])
def test_only_what_is_missing_is_installed_and_never_a_torch(monkeypatch, tmp_path, capsys, code):
    """Guards: another torch on Kaggle, through a package that wants one; a page of pip's output; a notebook that stops
    because an optional package cannot be fetched."""
    commands, versions = [], {"torch": "2.11.0+cu128", "numpy": "1.25.0", "tqdm": "4.67"}

    def run(command, **_):
        constraints = command[command.index("-c") + 1]
        with open(constraints, encoding="utf-8") as file:
            commands.append((command[2:4], command[command.index("-c") + 2:], file.read()))
        return SimpleNamespace(returncode=code)

    def version(name):
        if name not in versions:
            raise kaggle.PackageNotFoundError(name)
        return versions[name]

    (tmp_path / "requirements.txt").write_text(
        "# ranges\ntorch>=2.12\nnumpy>=1.26\ntqdm>=4.66\npapermill>=2.6  # runs\n")
    monkeypatch.setattr(kaggle, "ROOT", tmp_path)
    monkeypatch.setattr(kaggle, "version", version)
    monkeypatch.setattr(kaggle.subprocess, "run", run)
    kaggle.install_missing()
    assert commands == [(["pip", "install"], ["numpy>=1.26", "papermill>=2.6"], "torch==2.11.0+cu128\n")]
    assert capsys.readouterr().out.startswith(f"{'not ' * code}installed{': ' if code else ' '}numpy>=1.26, papermill")
    versions |= {"numpy": "2.1", "papermill": "2.7"}
    kaggle.install_missing()
    assert len(commands) == 1


@pytest.mark.parametrize(("message", "words"), [
    ("Use --set stories=paragraph, or more text.", 'Use overrides = "stories=paragraph", or more text.'),
    ("was 0.1, now 1. Leave that, or add --extend.", "was 0.1, now 1. Leave that, or add extend = True."),
    ("Use another --out, or --from-step 7.", "Use another results (or run), or from_step 7."),
    ("Make one with tools/train.py, --max-new-tokens.", "Make one with notebook 02_train, max_new_tokens."),
    ("The same command continues.", "Run all continues.")])
def test_advice_is_in_the_words_of_a_notebook(message, words):
    """Guards: "add --extend" where the parameter is extend = True."""
    assert kaggle.notebook_words(message) == words


def test_a_mistake_in_a_notebook_is_one_line_and_keeps_its_kind(root, tmp_path, monkeypatch):
    """Guards: red frames around one readable line; a full disk told in frames; a failure whose kind or message is lost
    to whoever reads the executed notebook; our own failures without their frames."""
    cells = {"from plotarmour.suite.kaggle import *; set_up_notebook()": (None, None),
             "raise UserError('too short; add --extend.')": ("UserError", "error: too short; add extend = True."),
             "open('/nowhere/x')": ("UserError", "error: /nowhere/x: No such file or directory. Check the path, its "
                                    "permissions and the disk."),
             "raise OSError(28, 'No space left')": ("UserError", "error: No space left. Check the path, its "
                                                    "permissions and the disk."),
             "1 / 0": ("ZeroDivisionError", None)}
    monkeypatch.setenv("PYTHONPATH", str(root))
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    NotebookClient(notebook, allow_errors=True, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell, (kind, line) in zip(notebook.cells, cells.values(), strict=True):
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "x.ipynb")
        assert read_executed(tmp_path / "x.ipynb").error == (kind or "")
        [[*frames]] = [o.traceback for o in cell.outputs if o.output_type == "error"] or [[]]
        assert frames == [line] if line else (len(frames) > 2) == bool(kind)
    assert read_executed(tmp_path / "x.ipynb").message == "division by zero"
    assert notebook.cells[1].outputs[0].evalue == "too short; add --extend."
