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
# **What you get:** the verdict with its interval: perplexity and bits per byte of all runs on the test stories, beside
# n-gram baselines, as a table, figures, CSVs and one page to share, `report.html`.
#
# **Time:** a minute for `tiny`, a few for `laptop` on two CPU cores. **Hardware:** as for training.
# **Needs:** the results folder with trained runs, such as `bdh` and `gpt2`. **Leaves behind:** the folder `comparison`.

# %% [markdown]
# ## Set-up
# The next cell finds the package. On Kaggle and Colab it installs what is missing there, but never another torch.

# %% tags=["set-up"]
import set_up  # noqa: F401  (the notebook has the text of set_up.py here)

# %%
from IPython.display import Image, display

from plotarmour.machine import report

print(report())

# %% [markdown]
# ## Parameters
# Use the same recipe and results folder as before. On Kaggle, attach the outputs of the other notebooks (*Add Input >
# Your Work*) and leave `tokens` and `runs` empty: this notebook finds them and says which it took. Runs that differ
# only in their seed are compared as one arm.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
results = ""  # folder for the comparison; empty: results/RECIPE
tokens = ""  # folder that notebook 1 wrote; empty: the results folder, or an attached output
runs = ""  # run folders separated by ; each a path, or a name in the results folder; empty: all there and in inputs
unfinished = False  # True: also compare runs that are not complete; they are labelled

# %% [markdown]
# ## One real example
# How well each model predicted the first test story: the less probable a token, the more nats it costs. One nat is a
# factor of 2.7 in probability. The table has the 16 tokens that cost most, in the order of the story, with their
# position; the others cost little.

# %%
from pathlib import Path

from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.scoring import score_stories
from plotarmour.report.compare import check_together, compare_runs
from plotarmour.report.verdict import readable_table
from plotarmour.run import load_run
from plotarmour.suite.display import list_files
from plotarmour.suite.parameters import check_parameters, results_folder
from plotarmour.suite.steps import find_all_runs, find_prepared, find_tokens

given = check_parameters(globals(), recipe=str, results=Path, tokens=Path, runs=list, unfinished=bool)
folder = results_folder(given.recipe, given.results)
paths = find_prepared(find_tokens(folder, given.tokens))
run_folders = find_all_runs(folder, given.recipe, given.runs)
check_together(run_folders, given.unfinished)
test = TokenFile.open(paths["test"])

# %%
import pandas as pd

pieces = [test.tokenizer().decode([i]) for i in test.story(0)] + ["<|endoftext|>"]
example = {"token": pieces}
for run in map(load_run, run_folders[:4]):
    [(_, nats)] = score_stories(run.model, test, run.context_length, run.machine, stories=[0], name=run.name)
    example[f"nats ({run.name})"] = nats.round(2)
example = pd.DataFrame(example)
costly = example.drop(columns="token").max(axis="columns").nlargest(16).index.sort_values()
example.loc[costly].T

# %% [markdown]
# ## The work
# All runs score every test story on exactly the same tokens; each token is predicted from the story before it. Nats are
# added, tokens are counted, and one division follows. The n-gram baselines count the training tokens: none, single
# tokens, pairs, triples. Before anything is reported, every model is checked for leaks: does it see what it must
# predict?

# %%
table = compare_runs(run_folders, paths["test"], folder / "comparison", paths["train"], paths.get("facts"),
                     title=f"test stories of recipe {Path(given.recipe).stem}", unfinished=given.unfinished)
readable_table(table)

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
# This applies only if notebook 1 got an `extra_text`. Its stories that are also in the training text were left out.

# %%
if "extra" in paths:
    extra = compare_runs(run_folders, paths["extra"], folder / "comparison_extra", paths["train"],
                         title=f"second text, recipe {Path(given.recipe).stem}", unfinished=given.unfinished)
    display(readable_table(extra), Image(folder / "comparison_extra" / "perplexity.png"))

# %% [markdown]
# ## What it means
# Lower is better. A model that is not below the best baseline is no better than counting. For the built-in corpus, the
# first row is the corpus itself: no honest model can beat it, so a model above it has a leak. `loss on facts` covers
# only words that the story so far determines (who, where, which object); `loss elsewhere` covers all other words.

# %%
print((folder / "comparison" / "summary.txt").read_text(encoding="utf-8"))

# %% [markdown]
# ## Files written
# `report.html` holds all results in one page. `stories_*.csv` have a row per story (tokens, bytes, nats), so that you
# can recompute every number above. `pairs.csv` holds the differences with their intervals.

# %%
print(list_files(folder / "comparison"))

# %% [markdown]
# The link downloads one zip with the CSVs, figures and the page. On Kaggle, each also lies by itself under *Output*.

# %%
from plotarmour.suite.display import download_links

download_links(folder / "comparison", gather=given.results is None)
