# The package is in the checkout around this notebook, in a folder beside it, in an attached Kaggle dataset, or comes
# from its repository.
import sys
import tempfile
from os.path import isfile  # False where a folder may not be entered
from pathlib import Path
from shutil import unpack_archive
from urllib.request import urlretrieve

archive = ""  # address of the repository as a zip
here, attached, problem = Path.cwd().resolve(), Path("/kaggle/input"), ""
inputs = [folder for depth in range(1, 5) for folder in sorted(attached.glob("/".join("*" * depth)))]
homes = [folder for folder in [here, *here.parents, *sorted(here.glob("*"))]
         if isfile(folder / "plotarmour" / "__init__.py")]
if not homes:
    homes = [folder for folder in inputs if isfile(folder / "plotarmour" / "__init__.py")]
    sources = {b"".join(path.read_bytes() for path in sorted(home.glob("plotarmour/**/*.py"))) for home in homes}
    if len(sources) > 1:
        problem = f"plotarmour is attached in {len(sources)} versions: {', '.join(map(str, homes))}; keep one input"
if not homes and archive:
    try:
        downloaded, _ = urlretrieve(archive)
        unpack_archive(downloaded, folder := tempfile.mkdtemp(), "zip")
        homes = [path.parents[1] for path in Path(folder).glob("*/plotarmour/__init__.py")]
    except OSError as error:
        problem = f"{archive} cannot be downloaded ({error}). Switch the internet on, or attach plotarmour as a dataset"
if not homes and not problem:
    found = f"in {', '.join(path.name for path in inputs if path.parent == attached) or 'any input'}"
    problem = (f"plotarmour is neither in {here} nor {found}. On Kaggle, attach a dataset that has it (Add Input); "
               "elsewhere, clone its repository here")
if problem:
    error = RuntimeError(problem)
    error._render_traceback_ = lambda: [f"error: {problem}."]  # one line instead of red frames
    raise error
sys.path.insert(0, str(homes[0]))

from plotarmour.suite.kaggle import set_up_notebook  # noqa: E402

set_up_notebook()
