# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7 · What helps BDH
#
# **What you get:** BDH with one change at a time, beside plain BDH and a modern transformer: the loss on whole
# held-out stories, with intervals. Then the full run, with every public claim that this project has tested.
#
# **Time:** four minutes on two CPU cores. **Hardware:** any. **Needs:** nothing; with a text of your own, its path.
# **Leaves behind:** a run folder for each change, `bdh_options.csv` and a figure in the results folder.

# %% [markdown]
# ## Set-up
# The next cell finds the package. On Kaggle and Colab it installs what is missing there, but never another torch.

# %% tags=["set-up"]
import set_up  # noqa: F401  (the notebook has the text of set_up.py here)

# %%
from plotarmour.machine import report

print(report())

# %% [markdown]
# ## Parameters
# An option is one setting of BDH or of its training, key and value, or several joined by `+`; `docs/bdh-recipes.md`
# lists all of them. The default is too little training to decide anything: it shows how the comparison works.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
text = ""  # path of a UTF-8 text; empty: the built-in corpus
results = ""  # folder for the runs; empty: results/bdh_options
options = "decay 0.03; weights_per_pass true + mlp_internal_dim_multiplier 8; init_std 0.1"  # separated by ;
n_steps = 150  # steps of every run
overrides = ""  # settings of the recipe to override, separated by ;

# %%
from IPython.display import Image, display

from benchmarks.figures import option_losses, plus_curves
from benchmarks.grid_losses import REFERENCE, compared, readable
from benchmarks.windows import SMALL
from plotarmour.config import load_recipe
from plotarmour.data.token_file import TokenFile
from plotarmour.suite.parameters import Path, check_parameters, results_folder
from plotarmour.suite.steps import prepare

given = check_parameters(globals(), recipe=str, text=Path, results=Path, options=list, n_steps=int, overrides=list)
folder = results_folder("bdh_options", given.results)
steps = [f"max_steps={given.n_steps}", f"warmup_steps={given.n_steps // 20}"]
overridden = [*(SMALL if given.text is None else ()), *steps, *given.overrides]
paths = prepare(load_recipe(given.recipe, "bdh", overridden), folder, given.text)

# %% [markdown]
# ## The work
# Every run learns from the same tokens in the same order, with the learning rate of its kind in the recipe. An option
# may need another rate than plain BDH: where a claim depends on it, the full run has a row for each rate.

# %%
from plotarmour.run import train_run

runs = {name: load_recipe(given.recipe, name, overridden) for name in ("bdh", "modern")}
for option in given.options:
    settings = ["=".join(setting.split()) for setting in option.split("+")]
    runs[" + ".join(settings)] = load_recipe(given.recipe, "bdh", [*overridden, *settings])
for name, one in runs.items():
    train_run(one, paths["train"], paths["val"], folder / name)

# %% [markdown]
# ## What came of it
# The loss on whole test stories, each scored alone. `less_bdh` is the difference to plain BDH with a 95 % interval
# over stories; it does not cover what another seed would change.

# %%
from plotarmour.report.compare import write_csv

table = compared([folder / name for name in runs], TokenFile.open(paths["test"]), ["bdh", "modern"])
write_csv(table, folder / "bdh_options.csv")
readable(table)

# %%
display(Image(option_losses(table, folder / "figures" / "bdh_options.png")))

# %% [markdown]
# ## The full run
# Recipe `laptop` on 16 MB of TinyStories, 800 steps of 1,024 tokens, one seed. Rows with `-time` have as many steps as
# take the time of 800 steps of plain BDH, so that `less_modern` compares them with the modern transformer for the same
# time. `plotarmour/recipes/bdh_options.csv` is the grid, `docs/bdh-recipes.md` has the settings of each row.
# Differences below 0.02 say nothing: the same training on another machine ends that far away.

# %%
import pandas as pd

full = pd.read_csv(REFERENCE / "bdh_options.csv")
readable(full)

# %%
display(Image(option_losses(full, folder / "figures" / "bdh_options_full.png")))

# %% [markdown]
# ## The best together
# `bdh_plus`, a kind of model that every notebook takes: weights per pass, decay, differential scores and larger initial
# matrices. All rows have the time of 2,200 steps of plain BDH; `less_bdh` is the difference to `bdh_plus`, `less_llama`
# that to Llama without options. The transformers were given a smaller search, of decay, Muon and rates.

# %%
plus = pd.read_csv(REFERENCE / "bdh_plus.csv")
readable(plus)

# %%
curves = pd.read_csv(REFERENCE / "bdh_plus_curves.csv")
display(Image(plus_curves(curves, folder / "figures" / "bdh_plus.png")))

# %% [markdown]
# ## What it means
# Scores that decay with distance and, for the same time, weights per pass help BDH; most other claims do not hold at
# this size. With differential scores and larger initial matrices beside them, BDH is not clearly different from Llama
# for the same time. Llama with decay and Muon is ahead of both.

# %% [markdown]
# ## Files written

# %%
from plotarmour.suite.display import list_files

print(list_files(folder))
