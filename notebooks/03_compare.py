# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · Compare on held-out stories
#
# **What you get:** the verdict with its interval: perplexity and bits per byte of all runs on every test story, beside
# what one gets without a neural network, as table, figures, CSVs and one page to hand on, `report.html`.
#
# **Time:** a minute for `tiny`, a few for `laptop` on two CPU cores. **Hardware:** as for training.
# **Needs:** the results folder with trained runs, such as `bdh` and `gpt2`. **Leaves behind:** the folder `comparison`.

# %% [markdown]
# ## Set-up
# Finds the package in the checkout, in a clone beside this notebook, or in an attached Kaggle dataset.

# %%
import sys
from pathlib import Path

here = Path.cwd().resolve()
places = [here, *here.parents, *here.glob("*")]
places += [p for depth in range(1, 5) for p in Path("/kaggle/input").glob("/".join("*" * depth))]
home = next((p for p in places if (p / "plotarmour" / "__init__.py").is_file()), None)
assert home, "plotarmour not found: clone its repository here, or attach it as a Kaggle dataset"
sys.path.insert(0, str(home))

# %%
from IPython.display import Image, display

from plotarmour.machine import report

print(report())

# %% [markdown]
# ## Parameters
# The same recipe and results folder as before. On Kaggle, attach the outputs of the other notebooks and name their
# run folders. Runs that differ only in their seed are put together.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
results = ""  # folder for the comparison; empty: results/RECIPE
tokens = ""  # folder that notebook 1 wrote; empty: the results folder
runs = ""  # run folders separated by ; each a path, or a name in the results folder; empty: all that are there
unfinished = False  # True: compare runs that have not ended, too; they are labelled

# %% [markdown]
# ## One real example
# The first test story, and how well each model foresaw every token of it: the less probable a token was, the more it
# costs. One nat is a factor of 2.7.

# %%
from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.scoring import score_stories
from plotarmour.report.compare import check_together, compare_runs, find_runs
from plotarmour.report.verdict import for_people
from plotarmour.run import load_run
from plotarmour.suite.steps import find_prepared, list_files, results_folder

folder = results_folder(recipe, results)
paths = find_prepared(Path(tokens) if tokens else folder)
run_folders = find_runs(folder, runs)
check_together(run_folders, unfinished)
test = TokenFile.open(paths["test"])

# %%
import pandas as pd

pieces = [test.tokenizer().decode([i]) for i in test.story(0)] + ["<|endoftext|>"]
example = {"token": pieces}
for run in map(load_run, run_folders[:4]):
    [score] = score_stories(run.model, test, run.context_length, run.machine, stories=[0], name=run.name)
    example[f"nats ({run.name})"] = score.token_nats.round(2)
pd.DataFrame(example).head(40).T

# %% [markdown]
# ## The work
# Every test story is scored by all runs on exactly the same tokens, given only its own story so far. Nats are added,
# tokens counted, divided once. The n-gram baselines count the training tokens: uniform, single, pairs, triples.
# Before anything is reported, every model is checked for leaks: does it see what it is to foresee?

# %%
table = compare_runs(run_folders, paths["test"], folder / "comparison", paths["train"], paths.get("facts"),
                     title=f"test stories of recipe {Path(recipe).stem}", unfinished=unfinished)
for_people(table)

# %%
display(Image(folder / "comparison" / "perplexity.png"))

# %%
display(Image(folder / "comparison" / "training_curves.png"))

# %%
if (folder / "comparison" / "differences.png").exists():
    display(Image(folder / "comparison" / "differences.png"), Image(folder / "comparison" / "win_shares.png"))

# %%
display(Image(folder / "comparison" / "loss_by_position.png"))

# %%
pd.read_csv(folder / "comparison" / "checks.csv")

# %% [markdown]
# ## A second text
# Only if notebook 1 was given an `extra_text`: its stories that also stand in the training text were left out.

# %%
if "extra" in paths:
    extra = compare_runs(run_folders, paths["extra"], folder / "comparison_extra", paths["train"],
                         title=f"second text, recipe {Path(recipe).stem}", unfinished=unfinished)
    display(for_people(extra), Image(folder / "comparison_extra" / "perplexity.png"))

# %% [markdown]
# ## What it means
# Lower is better, and a model that is not below the best baseline is no better than counting. On the built-in corpus
# the corpus itself stands first: no honest model can beat it, so a model listed above it has a leak. `loss on facts`
# counts only words that the story so far determines (who, where, which object), `loss elsewhere` the free choices.

# %%
print((folder / "comparison" / "summary.txt").read_text())

# %% [markdown]
# ## Files written
# `report.html` holds it all in one page, to hand on; `stories_*.csv` a row per story (tokens, bytes, nats), so that
# every number above can be recomputed; `pairs.csv` the differences with their intervals.

# %%
print(list_files(folder / "comparison"))
