"""What goes to Kaggle, as the client's own code and our checks judge it, without a connection."""

import json
import re
import runpy
import shutil
import zipfile
from types import SimpleNamespace

import pytest

from plotarmour.cli import UserError
from plotarmour.data.token_file import TokenFile


@pytest.fixture(scope="module")
def tool(root):
    return SimpleNamespace(**runpy.run_path(str(root / "tools" / "bundle_kaggle.py")))


@pytest.fixture(scope="module")
def bundle(tool, tmp_path_factory):
    """A dataset folder and a kernel folder per notebook."""
    folder = tmp_path_factory.mktemp("bundle")
    tool.write_dataset(folder / "dataset", "someone", "plot-armour")
    list(tool.write_kernels(folder / "kernels", "someone", "plot-armour", "tiny", ["bdh", "gpt2_rope"],
                            ["max_steps=60"], "NvidiaTeslaT4", False, True))
    return folder


def test_kaggle_accepts_every_folder_of_a_bundle(tool, bundle):
    """Guards: a kernel that is refused after the upload, runs without its dataset, or trains another model."""
    kernels = {folder.name: tool.ask_kaggle(folder) for folder in sorted((bundle / "kernels").iterdir())}
    assert list(kernels) == ["01-pretokenize", "02-train-bdh", "02-train-gpt2-rope", "03-compare", "05-windows",
                             "06-batch-size", "07-bdh-options"]
    assert all(tool.judge(bundle / "kernels" / name) for name in kernels) and tool.judge(bundle / "dataset")
    assert {request.slug for request in kernels.values()} == {f"someone/plot-armour-{name}" for name in kernels}
    assert all(request.dataset_data_sources == ["someone/plot-armour"] and not request.enable_internet
               and request.is_private for request in kernels.values())
    assert [request.machine_shape for request in kernels.values()] == ["", *["NvidiaTeslaT4"] * 6]
    train = kernels["02-train-gpt2-rope"]
    assert train.kernel_data_sources == ["someone/plot-armour-01-pretokenize"]
    [source] = [cell["source"] for cell in json.loads(train.text)["cells"]
                if "parameters" in cell["metadata"].get("tags", [])]
    assert 'model = "gpt2_rope"  # bdh' in source and 'overrides = "max_steps=60"  #' in source
    assert len(kernels["03-compare"].kernel_data_sources) == 3
    dataset = tool.ask_kaggle(bundle / "dataset")
    assert (dataset.owner_slug, dataset.slug, dataset.title, dataset.is_private) == (
        "someone", "plot-armour", "Plot armour", True)


def test_the_dataset_holds_what_the_notebooks_need(bundle, root):
    """Guards: a recipe, tool or table that stays behind; caches, tests and own results that are published."""
    names = zipfile.ZipFile(bundle / "dataset" / "plot-armour.zip").namelist()
    packaged = {path.relative_to(root).as_posix() for path in (root / "plotarmour").rglob("*")
                if path.is_file() and path.suffix != ".pyc"}
    shown = {f"results/reference/{name}" for path in (root / "notebooks").glob("*.py")
             for name in re.findall(r'REFERENCE / "([^"]+)"', path.read_text(encoding="utf-8"))}
    assert packaged | shown | {"tools/run_suite.py", "notebooks/set_up.py", "LICENSE", "pyproject.toml",
                               "benchmarks/windows.py"} <= set(names) and len(shown) == 6
    assert not [name for name in names if name.startswith(("tests", ".")) or "__pycache__" in name
                or (name.startswith("results") and not name.startswith("results/reference/"))]


def test_token_files_travel_in_place_of_notebook_1(run_main, token_files, tmp_path):
    """Guards: a recipe that waits on Kaggle for a text that nobody attached; half a bundle after a mistake."""
    made = tmp_path / "made"
    made.mkdir()
    for part in ("train", "val", "test"):
        shutil.copyfile(token_files[part], made / f"tokens.{part}.bin")
    command = ("bundle_kaggle", "--owner", "someone", "--recipe", "kaggle_t4", "--out", tmp_path / "b")
    code, _, err = run_main(*command)
    assert code == 2 and "needs a text; expected --tokens FOLDER" in err
    assert run_main(*command, "--tokens", tmp_path / "nowhere")[0] == 2
    assert run_main(*command, "--tokens", made, "--models", "bhd")[0] == 2
    code, _, err = run_main(*command, "--tokens", made, "--owner", "Some One")
    assert code == 2 and "expected OWNER/SLUG" in err and [path.name for path in tmp_path.iterdir()] == ["made"]
    code, out, _ = run_main(*command, "--tokens", made)
    assert code == 0 and f"next: kaggle datasets create -p {tmp_path / 'b' / 'dataset'}\n" in out
    assert f"then: kaggle kernels push -p {tmp_path / 'b' / 'kernels' / '02-train-bdh'}\n" in out
    assert TokenFile.open(tmp_path / "b" / "dataset" / "tokens.test.bin").n_stories
    code, _, err = run_main(*command, "--tokens", made)
    assert code == 2 and "exists already" in err


def broken(bundle, tmp_path, name, changes):
    """Copy a folder of a bundle and change its metadata; return the copy."""
    folder = shutil.copytree(bundle / name, tmp_path / "broken")
    [path] = folder.glob("*-metadata.json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("kernels/02-train-bdh", {"language": "Python"}, "valid language"),
    ("kernels/02-train-bdh", {"kernel_type": "Notebook"}, "valid kernel type"),
    ("kernels/02-train-bdh", {"code_file": "nowhere.ipynb"}, "not found"),
    ("kernels/02-train-bdh", {"kernel_sources": ["01-pretokenize"]}, "must be specified in the form"),
    ("kernels/02-train-bdh", {"enable_tpu": "yes"}, "Invalid boolean"),
    ("dataset", {"licenses": [{"name": "other"}, {"name": "CC0-1.0"}]}, "exactly one license"),
    ("dataset", {"title": "Armed", "id": "someone/armed"}, "between 6 and 50"),
    ("dataset", {"subtitle": "Too short"}, "between 20 and 80"),
    ("dataset", {"resources": [{"path": "plot-armour.zip"}] * 2}, "more than once")])
def test_kaggle_refuses_broken_metadata(tool, bundle, tmp_path, name, changes, message):
    """Guards: a check that asks nobody, and lets everything pass."""
    with pytest.raises(UserError, match=f"kaggle refuses it: .*{message}"):
        tool.judge(broken(bundle, tmp_path, name, changes))


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("kernels/02-train-bdh", {"machine_shape": "NvidiaTeslaP100"}, "retired"),
    ("kernels/02-train-bdh", {"machine_shape": ""}, "contradict"),
    ("kernels/02-train-bdh", {"title": "Plot Armour: BDH"}, "becomes the slug 'plot-armour-bdh'"),
    ("kernels/02-train-bdh", {"id": "plot-armour-02-train-bdh"}, "expected OWNER/SLUG"),
    ("kernels/02-train-bdh", {"dataset_sources": []}, "cannot find the package"),
    ("dataset", {"licenses": [{"name": "MIT"}]}, "licence 'MIT' is unknown"),
    ("dataset", {"title": "Something else"}, "becomes the slug"),
    ("dataset", {"id": "some_one/plot-armour"}, "expected OWNER/SLUG")])
def test_our_checks_refuse_what_kaggle_lets_pass(tool, bundle, tmp_path, name, changes, message):
    """Guards: a P100 that becomes another GPU, status answers that are refused, a licence that the server rejects."""
    folder = broken(bundle, tmp_path, name, changes)
    tool.ask_kaggle(folder)
    with pytest.raises(UserError, match=message):
        tool.judge(folder)


def test_our_checks_refuse_files_that_would_not_arrive(tool, bundle, tmp_path):
    """Guards: folders that the client skips, metadata that it reads as cp1252 on Windows, a notebook cut in half."""
    dataset = broken(bundle, tmp_path, "dataset", {})
    (dataset / "gpt2").mkdir()
    (dataset / "plot-armour.zip").rename(dataset / "plot-armour.zipped")
    tool.ask_kaggle(dataset)
    with pytest.raises(UserError, match="folder gpt2 would stay behind.*lacks the package"):
        tool.judge(dataset)
    path = dataset / "dataset-metadata.json"
    path.write_text(path.read_text(encoding="utf-8").replace("same text", "größeren Text"), encoding="utf-8")
    with pytest.raises(UserError, match="beyond ASCII"):
        tool.judge(dataset)
    kernel = shutil.copytree(bundle / "kernels" / "03-compare", tmp_path / "kernel")
    (kernel / "03_compare.ipynb").write_text('{"cells": []}', encoding="utf-8")
    tool.ask_kaggle(kernel)
    with pytest.raises(UserError, match="03_compare.ipynb is not a notebook"):
        tool.judge(kernel)
