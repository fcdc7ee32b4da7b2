"""Notebooks on simulated hosts: Kaggle, Colab, and a laptop's folders."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient

from plotarmour import machine
from plotarmour.cli import UserError
from plotarmour.config import load_recipe
from plotarmour.data.pretokenize import pre_tokenize
from plotarmour.data.token_file import TokenFile
from plotarmour.files import write_json
from plotarmour.run import load_run
from plotarmour.suite import kaggle, steps
from plotarmour.suite.notebooks import ROOT, read_executed
from tools.sync_notebooks import generate_notebook


@pytest.fixture
def set_up(tmp_path, monkeypatch):
    """Run the set-up cell as on Kaggle, up to its import; returns where it finds the package."""
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(sys, "path", list(sys.path))
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
        commands.append((command[2:4], [part for part in command if "=" in part]))
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
    assert commands == [(["pip", "install"], ["torch==2.11.0+cu128", "numpy>=1.26", "papermill>=2.6"])]
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


@pytest.fixture
def host(tmp_path, monkeypatch, token_files):
    """A Kaggle host; returns a function that attaches token files or a run as an input."""
    monkeypatch.setattr(machine, "KAGGLE", tmp_path)
    monkeypatch.setattr(machine, "host", lambda: "kaggle")
    headers = {part: TokenFile.open(token_files[part]).header for part in ("train", "val")}

    def attach_tokens(name, is_other=False):
        folder = tmp_path / "input" / name
        folder.mkdir(parents=True)
        for part in ("train", "val", "test"):
            shutil.copyfile(token_files[part], folder / f"tokens.{part}.bin")
        if is_other:
            pre_tokenize([token_files["text"]], "bytes", folder / "tokens.bin", "80:10:10", replace=True)
        return folder

    def attach_run(name, recipe, step):
        run = tmp_path / "input" / name
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        write_json(run / "run.json", {
            "format": 1, "recipe": asdict(recipe), "tokenizer": headers["train"]["tokenizer"], "vocab_size": 400,
            "params": 1, "core_params": 1, "hardware": "", "device": "cpu", "processes": 1, "dtype": "float32",
            "versions": {}, "train": {"file": "", "order_sha256": "", **headers["train"]},
            "val": {"file": "", **headers["val"]}})
        return run

    return SimpleNamespace(results=tmp_path / "working" / "results" / "tiny", tokens=attach_tokens, run=attach_run)


def test_token_files_of_an_attached_output_are_found(host, capsys):
    """Guards: a path that a person must guess; tokens of another text, taken without a word."""
    with pytest.raises(UserError, match="neither .* nor an attached input has token files.*Add Input > Your Work"):
        steps.find_tokens(host.results)
    first = host.tokens("notebooks/me/one/results/tiny")
    host.tokens("one/results/tiny")  # the same output in the other layout
    host.tokens("other/results/laptop", is_other=True)
    assert steps.find_tokens(host.results) == first and f"tokens: {first}" in capsys.readouterr().out
    assert steps.find_tokens(host.results, first.parent) == first.parent
    other = host.tokens("two/results/tiny", is_other=True)
    with pytest.raises(UserError, match=f"token files of 2 texts: .*{other}.*Set tokens to one"):
        steps.find_tokens(host.results)
    host.results.mkdir(parents=True)
    (host.results / "tokens.train.bin").touch()
    assert steps.find_tokens(host.results) == host.results


def test_a_run_of_an_attached_output_continues_if_it_is_the_same_run(host, capsys):
    """Guards: a session that begins anew beside its own checkpoints; an attached run of other settings, copied in place
    of the one that was asked for; of two outputs, the older one."""
    recipe, tokens = load_recipe("tiny", "bdh"), host.tokens("one")
    run = host.results / "bdh"
    assert steps.find_earlier(run, recipe, tokens) is None
    host.run("one/results/tiny/bdh", recipe, 400)
    later = host.run("notebooks/me/two/results/tiny/bdh", recipe, 800)
    write_json(host.run("x/data", recipe, 1) / "run.json", {"of": "others"})
    assert steps.find_earlier(run, recipe, tokens) == later and f"continuing {later}" in capsys.readouterr().out
    assert steps.find_earlier(run, recipe, tokens, tokens) == tokens
    assert steps.find_earlier(host.results / "seed2", recipe, tokens) is None
    longer = load_recipe("tiny", "bdh", ["max_steps=9000"])
    assert steps.find_earlier(run, longer, tokens, extend=True) == later
    assert steps.find_earlier(run, longer, tokens) is None
    assert "is another run (max_steps): a new one begins" in capsys.readouterr().out
    gpt2 = host.run("three/results/tiny/gpt2", load_recipe("tiny", "gpt2"), 400)
    assert steps.find_all_runs(host.results, "tiny") == [later, gpt2]
    assert steps.find_all_runs(host.results, "tiny", ["gpt2"]) == [gpt2]
    run.mkdir(parents=True)
    (run / "run.json").touch()
    assert steps.find_earlier(run, recipe, tokens) is None
    assert steps.find_all_runs(host.results, "tiny") == [run, gpt2]


SMALL = "corpus_stories=300; tokenizer=bpe:400; split=8:1:1; n_embd=16; max_steps=20; warmup_steps=2; eval_tokens=200"


OFFLINE = {"HF_HUB_OFFLINE": "1", **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"),
                                                  "http://127.0.0.1:9")}


def slow_on_posix(test):
    return pytest.mark.slow(pytest.mark.skipif(os.name != "posix", reason="no path begins with /kaggle")(test))


@pytest.fixture
def simulated(root, tmp_path):
    """A folder in place of /kaggle, in all files of the bundle, which is attached; the internet is off."""
    folder, bundle = tmp_path / "kaggle", tmp_path / "kaggle" / "input" / "datasets" / "me" / "plot-armour"
    done = subprocess.run([sys.executable, str(root / "tools" / "bundle_kaggle.py"), "--owner", "me", "--out",
                           str(tmp_path / "bundle")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(tmp_path / "bundle" / "dataset" / "plot-armour.zip", bundle)
    for path in [*bundle.rglob("*.py"), *bundle.rglob("*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"/kaggle', f'"{folder}').replace('\\"/kaggle', f'\\"{folder}'), encoding="utf-8")
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | OFFLINE | {
        "PATH": path, "KAGGLE_KERNEL_RUN_TYPE": "Batch", "PYTHONDONTWRITEBYTECODE": "1"}
    yield SimpleNamespace(folder=folder, bundle=bundle, environment=environment)
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}, "inputs are read-only"


def execute(notebook, working, environment, **parameters):
    """Run all of a notebook in a folder by papermill, and return what its cells printed."""
    options = [part for item in {"overrides": SMALL, **parameters}.items() for part in ("-r", *item)]
    ended = subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(working / "__notebook__.ipynb"),
                            "--kernel", "python3", *options, "--cwd", str(working)], env=environment,
                           capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    executed = nbformat.read(working / "__notebook__.ipynb", as_version=4)
    return "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", []))


@slow_on_posix
def test_the_notebooks_run_on_a_kaggle_host_from_the_bundle_alone(simulated, tmp_path):
    """Guards: a journey of four notebooks that only works in a checkout, with the internet on, on one disk, or with
    paths that a person must guess; results that lie where nobody looks."""
    kaggle_host, bundle = simulated.folder, simulated.bundle
    working = kaggle_host / "working"

    def run(name, output, **parameters):
        """Run all of one notebook on a new disk, and attach its output as `output`."""
        working.mkdir()
        text = execute(bundle / "notebooks" / f"{name}.ipynb", working, simulated.environment, **parameters)
        files = {path.name for path in working.iterdir()}
        (kaggle_host / "input" / output).parent.mkdir(parents=True, exist_ok=True)
        working.rename(kaggle_host / "input" / output)
        return text, files

    text, files = run("01_pretokenize", "notebooks/me/01-pretokenize")
    assert f"plotarmour 0.1.0 from {bundle}" in text and "host      kaggle" in text
    assert {"tiny_duplicates.csv", "tiny_story_lengths.png"} < files
    tokens = kaggle_host / "input" / "notebooks" / "me" / "01-pretokenize" / "results" / "tiny"
    for model, output in (("bdh", "02-train-bdh"), ("gpt2", "notebooks/me/02-train-gpt2")):
        text, files = run("02_train", output, model=model)
        assert f"tokens: {tokens}" in text and "all steps taken" in text
        assert {f"{model}_log.csv", f"{model}_training.png", f"{model}_best.zip", "results"} < files
    text, files = run("03_compare", "03-compare")
    runs = [kaggle_host / "input" / name / "results" / "tiny"
            for name in ("02-train-bdh", "notebooks/me/02-train-gpt2")]
    assert f"runs: {runs[0] / 'bdh'}, {runs[1] / 'gpt2'}" in text
    assert {"comparison_report.html", "comparison_totals.csv", "comparison_perplexity.png"} < files
    assert len([name for name in files if re.fullmatch(r"comparison_\d{8}-\d{4}\.zip", name)]) == 1
    best = tmp_path / "best"
    shutil.unpack_archive(kaggle_host / "input" / "02-train-bdh" / "bdh_best.zip", best)
    assert load_run(best / "bdh").generate("Once", max_new_tokens=2, seed=1).startswith("Once")
    longer = SMALL.replace("max_steps=20", "max_steps=24")
    text, _ = run("02_train", "02-train-bdh-longer", model="bdh", overrides=longer, extend="True")
    assert f"continuing {runs[0] / 'bdh'}" in text and "24 steps" in text


@slow_on_posix
def test_one_cell_runs_everything_on_a_kaggle_host(root, simulated):
    """Guards: a cell in the docs that does not find the dataset; a suite whose results nobody finds."""
    page = (root / "docs" / "kaggle-colab.md").read_text(encoding="utf-8")
    [cell] = [line for line in page.splitlines() if line.startswith("!")]
    working = simulated.folder / "working"
    working.mkdir()
    settings = " ".join(f"--set {setting}" for setting in SMALL.split("; "))
    command = f"{cell[1:].replace('/kaggle', str(simulated.folder))} --at-once 2 {settings}"
    ended = subprocess.run(command, shell=True, cwd=working, env=simulated.environment, capture_output=True, text=True,
                           check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {"comparison_report.html", "comparison_totals.csv", "bdh_log.csv", "gpt2_best.zip", "results"} <= {
        path.name for path in working.iterdir()}


@slow_on_posix
def test_a_notebook_opened_on_colab_fetches_the_package(simulated, tmp_path):
    """Guards: a badge whose notebook ends in its first cell, because Colab opens it without the repository; results in
    a temporary folder."""
    content, source = tmp_path / "content", simulated.bundle / "notebooks" / "01_pretokenize.ipynb"
    content.mkdir()
    archive = shutil.make_archive(str(tmp_path / "main"), "zip", simulated.bundle.parent, simulated.bundle.name)
    notebook = source.read_text(encoding="utf-8").replace('archive = \\"\\"', f'archive = \\"file://{archive}\\"')
    notebook = notebook.replace(str(simulated.folder / "input"), str(tmp_path / "nothing"))
    (tmp_path / "opened.ipynb").write_text(notebook, encoding="utf-8")
    environment = simulated.environment | {"COLAB_RELEASE_TAG": "1", "TMPDIR": str(tmp_path)}
    del environment["KAGGLE_KERNEL_RUN_TYPE"]
    text = execute(tmp_path / "opened.ipynb", content, environment)
    assert "host      colab" in text and "results on Google Drive stay" in text
    assert (content / "results" / "tiny" / "tokens.train.bin").exists()
