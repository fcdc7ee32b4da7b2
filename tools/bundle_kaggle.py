#!/usr/bin/env python3
"""Write what Kaggle needs to run the notebooks: a dataset with the package, and a kernel folder per notebook.

Kaggle unpacks the dataset's zip; the notebooks find the package in it, with internet off too. The metadata are checked
here and, where the package kaggle is installed, by its own code without a connection.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from plotarmour.cli import HelpFormatter, UserError, add_common, as_path, refuse_existing, run_command
from plotarmour.config import load_recipe, recipe_names
from plotarmour.files import publish, unfinished, write_json, write_text
from plotarmour.models import SUITE

DATASET, KERNEL = "dataset-metadata.json", "kernel-metadata.json"
PACKED = ("plotarmour", "tools", "notebooks", "benchmarks", "contrib", "docs", "data/gpt2", "README.md", "LICENSE",
          "pyproject.toml", "requirements.txt",
          *(f"results/reference/{name}.csv" for name in  # which notebooks 05 to 07 show
            ("window_losses", "batch_times", "batch_losses", "bdh_options", "bdh_plus", "bdh_plus_curves")))
ACCELERATORS = {"t4": "NvidiaTeslaT4", "none": ""}  # by name of --accelerator: machine_shape; Kaggle gives two T4
# Names that https://github.com/Kaggle/kaggle-api/blob/main/docs/datasets_metadata.md lists; MIT is not one of them.
LICENSES = {"CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-IGO", "CC-BY-4.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0",
            "CC-BY-NC-SA-3.0-IGO", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0", "GPL-2.0", "GPL-3.0",
            "LGPL-3.0", "AGPL-3.0", "FDL-1.3", "ODbL-1.0", "DbCL-1.0", "ODC-BY-1.0", "PDDL", "CDLA-Permissive-1.0",
            "CDLA-Sharing-1.0", "apache-2.0", "US-Government-Works", "EU-ODP-Legal-Notice", "copyright-authors",
            "unknown", "other"}
REFERENCE = re.compile(r"[a-z0-9][a-z0-9-]*/[a-z0-9][a-z0-9-]*", re.IGNORECASE)  # OWNER/SLUG


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--owner", required=True, help="your user name on Kaggle, as in kaggle.com/OWNER")
    parser.add_argument("--out", type=as_path, default=Path("dist/kaggle"), help="a new folder for the bundle")
    parser.add_argument("--slug", default="plot-armour", help="name of the dataset, and prefix of the kernels' names")
    parser.add_argument("--recipe", default="tiny", help=f"of all notebooks; one of {', '.join(recipe_names())}")
    parser.add_argument("--models", default=",".join(SUITE), metavar="KINDS", help="a kernel of notebook 02 for each")
    parser.add_argument("--tokens", type=as_path, metavar="FOLDER", help="token files that notebook 01 or run_suite.py "
                        "wrote into this folder; they go into the dataset, and no kernel runs notebook 01")
    parser.add_argument("--accelerator", choices=ACCELERATORS, default="t4", help="of notebooks 02 and 03")
    parser.add_argument("--internet", action="store_true", help="the kernels may use the internet, for example to "
                        "download GPT-2's vocabulary")
    add_common(parser, "set", "force")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    models = args.models.replace(" ", "").split(",")
    if args.recipe not in recipe_names():
        raise UserError(f"recipe {args.recipe} is not in the package; expected one of {', '.join(recipe_names())}, "
                        "changed by --set where necessary.")
    recipes = [load_recipe(args.recipe, model, args.overrides) for model in models]
    refuse_existing(args.out, args.force)
    if args.tokens is None and not recipes[0].data.corpus_stories:
        raise UserError(f"recipe {args.recipe} needs a text; expected --tokens FOLDER with the token files of your "
                        "text, which notebook 01 or run_suite.py writes.")
    draft = unfinished(args.out)
    try:
        write_dataset(draft / "dataset", args.owner, args.slug, args.tokens)
        kernels = list(write_kernels(draft / "kernels", args.owner, args.slug, args.recipe, models, args.overrides,
                                     ACCELERATORS[args.accelerator], args.internet, args.tokens is None))
        is_judged = [judge(folder) for folder in (draft / "dataset", *kernels)][0]
        shutil.rmtree(args.out, ignore_errors=True)
        publish(draft, args.out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"wrote {args.out}: a dataset and {len(kernels)} kernels; the metadata are valid"
          + ("" if is_judged else " by this tool's own checks; pip install kaggle for the commands below"))
    first, *others = [args.out / "kernels" / folder.name for folder in kernels]
    print(f"next: kaggle datasets create -p {args.out / 'dataset'}")
    print(f"then: kaggle kernels push -p {first}")
    print("each after the one before has ended: " + ", ".join(folder.name for folder in others))


def write_dataset(folder: Path, owner: str, slug: str, tokens: Path | None = None) -> None:
    """Write a dataset folder: the package as SLUG.zip, its metadata and, if given, the token files of a folder."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / f"{slug}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in packed_files():  # a fixed date: the same files give the same bytes
            entry = zipfile.ZipInfo(path.relative_to(ROOT).as_posix())
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    if tokens is not None:
        from plotarmour.suite.steps import find_prepared

        for path in find_prepared(tokens).values():
            shutil.copyfile(path, folder / path.name)
    write_json(folder / DATASET, {
        "title": title_of(slug), "id": f"{owner}/{slug}", "licenses": [{"name": "other"}],
        "subtitle": "Plot Armour: a Baby Dragon Hatchling and GPT-2 on the same text",
        "description": "The package plotarmour with its notebooks and tools (MIT License)."})


def packed_files() -> Iterator[Path]:
    """Return the files of the checkout that a notebook or tool may need on Kaggle, in a fixed order."""
    for path in (ROOT / name for name in PACKED):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            hidden = any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(ROOT).parts)
            if file.is_file() and not hidden:
                yield file


def write_kernels(folder: Path, owner: str, slug: str, recipe: str, models: list[str], overrides: list[str],
                  accelerator: str, internet: bool, with_tokens: bool) -> Iterator[Path]:
    """Write the kernel folders of the notebooks in the order in which they run, and return each one.

    Notebook 02 has a kernel per model. Each kernel has the dataset and the outputs of all kernels before it attached,
    but no model has another model's.
    """
    base = {"recipe": recipe, "overrides": "; ".join(overrides)}
    tokens = ["01-pretokenize"] * with_tokens
    runs = {f"02-train-{model.replace('_', '-')}": model for model in models}
    plan = [(name, "01_pretokenize", base, "", []) for name in tokens]
    plan += [(name, "02_train", base | {"model": model}, accelerator, tokens) for name, model in runs.items()]
    plan += [("03-compare", "03_compare", base, accelerator, [*tokens, *runs])]
    plan += [(name.replace("_", "-"), name, {}, accelerator, []) for name in (
        "05_windows", "06_batch_size", "07_bdh_options")]
    for name, notebook, parameters, shape, sources in plan:
        source = (ROOT / "notebooks" / f"{notebook}.ipynb").read_text(encoding="utf-8")
        write_kernel(folder / name, f"{owner}/{slug}-{name}", notebook + ".ipynb", with_parameters(source, parameters),
                     shape, internet, [f"{owner}/{slug}"], [f"{owner}/{slug}-{name}" for name in sources])
        yield folder / name


def write_kernel(folder: Path, reference: str, code_file: str, code: str, accelerator: str, internet: bool,
                 datasets: list[str], kernels: list[str]) -> None:
    """Write a kernel folder: a notebook or a script, and its metadata.

    Args:
        folder: to write.
        reference: OWNER/SLUG of the kernel.
        code_file: name of the notebook (.ipynb) or script.
        code: its content.
        accelerator: a machine_shape of `ACCELERATORS`.
        internet: whether it may use the internet.
        datasets, kernels: OWNER/SLUG of the datasets, and of the kernels whose output it reads.
    """
    folder.mkdir(parents=True)
    write_text(folder / code_file, code)
    write_json(folder / KERNEL, {
        "id": reference, "title": title_of(reference.split("/")[1]), "code_file": code_file, "language": "python",
        "kernel_type": "notebook" if code_file.endswith(".ipynb") else "script", "is_private": True,
        "enable_gpu": accelerator == ACCELERATORS["t4"], "enable_tpu": False, "enable_internet": internet,
        "machine_shape": accelerator, "dataset_sources": datasets, "kernel_sources": kernels,
        "competition_sources": [], "model_sources": []})


def with_parameters(notebook: str, values: dict[str, str]) -> str:
    """Return a notebook's JSON with other defaults in its cell tagged `parameters`; names that it lacks are left out.

    The default itself changes: an injected cell would hide what a person then edits on Kaggle.
    """
    content = json.loads(notebook)
    [cell] = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    for name, value in values.items():
        line = f"{name} = {json.dumps(value)}  #"
        cell["source"] = re.sub(rf'^{name} = ".*?"  #', lambda match, line=line: line, cell["source"], flags=re.M)
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def title_of(slug: str) -> str:
    """Return the title that Kaggle turns into a slug."""
    return slug.replace("-", " ").capitalize()


def judge(folder: Path) -> bool:
    """Check the metadata of a dataset or kernel folder; return whether kaggle's own code, too, has accepted them.

    Raises:
        UserError: what is wrong, all in one line.
    """
    is_kernel = (folder / KERNEL).exists()
    complaints = (_kernel_complaints if is_kernel else _dataset_complaints)(folder)
    if complaints:
        raise UserError(f"{folder.name}/{KERNEL if is_kernel else DATASET}: {'; '.join(complaints)}.")
    try:
        ask_kaggle(folder)
    except ImportError:
        return False
    return True


def _name_complaints(meta: dict) -> Iterator[str]:
    """Name and title: what Kaggle's server refuses or renames, and the client at most prints."""
    reference, title = str(meta.get("id", "")), str(meta.get("title", ""))
    if not REFERENCE.fullmatch(reference):
        yield f"id is {reference!r}, expected OWNER/SLUG of letters, digits and -"
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    if slug != reference.rpartition("/")[2]:
        yield f"title {title!r} becomes the slug {slug!r}, expected that of the id, or status and output are refused"


def _dataset_complaints(folder: Path) -> list[str]:
    """What is wrong with a dataset folder, of which the client says nothing."""
    content = (folder / DATASET).read_bytes()
    if not content.isascii():  # the client reads it in the encoding of the system, such as cp1252
        return ["it has characters beyond ASCII, expected \\u escapes"]
    meta = json.loads(content)
    complaints = list(_name_complaints(meta))
    names = [each.get("name") for each in meta.get("licenses", [])]
    complaints += [f"licence {name!r} is unknown to Kaggle, expected one such as other or CC0-1.0" for name in names
                   if name not in LICENSES]
    complaints += [f"folder {path.name} would stay behind without a word in the dataset, expected files only"
                   for path in sorted(folder.iterdir()) if path.is_dir()]
    if not any("plotarmour/__init__.py" in zipfile.ZipFile(path).namelist() for path in folder.glob("*.zip")):
        complaints.append("the dataset lacks the package, expected a zip with plotarmour/ at its top")
    return complaints


def _kernel_complaints(folder: Path) -> list[str]:
    """What is wrong with a kernel folder, of which the client says nothing."""
    meta = json.loads((folder / KERNEL).read_text(encoding="utf-8"))
    complaints, shape = list(_name_complaints(meta)), meta.get("machine_shape", "")
    if shape not in ACCELERATORS.values():
        complaints.append(f"machine_shape {shape!r} is unknown or retired, expected {ACCELERATORS['t4']}, or \"\" for "
                          "no GPU")
    if (str(meta.get("enable_gpu", False)).lower() == "true") != bool(shape):
        complaints.append(f"enable_gpu and machine_shape {shape!r} contradict each other")
    if not meta.get("dataset_sources") and str(meta.get("enable_internet")).lower() != "true":
        complaints.append("no dataset is attached and the internet is off, so that it cannot find the package")
    code = folder / meta.get("code_file", "")
    if code.suffix == ".ipynb" and code.is_file():
        import nbformat

        try:
            nbformat.validate(json.loads(code.read_text(encoding="utf-8")))
        except (ValueError, nbformat.ValidationError):
            complaints.append(f"{code.name} is not a notebook")
    return complaints


def ask_kaggle(folder: Path) -> object:
    """Let the package kaggle check a folder as before an upload, without a connection; return its request.

    Raises:
        UserError: what it refuses.
        ImportError: it is not installed.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # on import it says how to log in
        from kaggle.api.kaggle_api_extended import KaggleApi
    from requests import HTTPError

    requests = []
    receive = SimpleNamespace(save_kernel=requests.append, create_dataset=requests.append)
    client = SimpleNamespace(kernels=SimpleNamespace(kernels_api_client=receive),
                             datasets=SimpleNamespace(dataset_api_client=receive))

    def is_new(reference: str) -> None:
        raise HTTPError

    class Offline(KaggleApi):
        """The client with a server that accepts everything; what it checks by itself stays."""

        def __init__(self):
            self.config_values = {self.CONFIG_NAME_USER: ""}

        build_kaggle_client = staticmethod(lambda: contextlib.nullcontext(client))
        dataset_status = staticmethod(is_new)
        upload_files = staticmethod(lambda *arguments: None)
        with_retry = staticmethod(lambda call: lambda request: call(request) or SimpleNamespace(error=None))

    push = Offline().kernels_push if (folder / KERNEL).exists() else Offline().dataset_create_new
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            push(str(folder))
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder.name}: kaggle refuses it: {error}") from None
    return requests[-1]


if __name__ == "__main__":
    run_command(main)
