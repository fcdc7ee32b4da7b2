# The package is in the checkout around this notebook, in a clone beside it, or in an attached Kaggle dataset.
import sys
from os.path import isfile  # False where a folder may not be entered
from pathlib import Path

here = Path.cwd().resolve()
places = [here, *here.parents, *sorted(here.glob("*"))]
places += [p for depth in range(1, 5) for p in Path("/kaggle/input").glob("/".join("*" * depth))]
home = next((p for p in places if isfile(p / "plotarmour" / "__init__.py")), None)
assert home, "plotarmour not found: clone its repository here, or attach it as a Kaggle dataset"
sys.path.insert(0, str(home))
