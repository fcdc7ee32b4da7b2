# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · Train one model
#
# **What you get:** a BDH or a GPT-2, trained from scratch on the token files of notebook 1, with its log and curves.
#
# **Time:** the recipe's first lines say: a minute or two for `tiny`, up to 20 for `laptop` on two CPU cores; after
# five steps the training itself says when it will end. **Hardware:** CPU, or one or more GPUs with 16 GB for the
# `kaggle_` recipes. **Needs:** the results folder of notebook 1. **Leaves behind:** a run folder named after the
# model, and beside it a small zip to download. Interrupt it whenever you like: it finishes its step and saves, and
# running the cells again goes on from there.

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
from plotarmour.machine import report

print(report())

# %% [markdown]
# ## Parameters
# Run this notebook once per model. Both runs read the same tokens in the same order, because that order follows from
# the recipe's seed alone. On Kaggle each notebook has its own disk: attach the output of notebook 1 and name its folder
# in `tokens`; to go on with a session that was cut, attach its output and name its run folder in `continue_from`.
#
# A finished run becomes longer with a higher `max_steps` in `overrides` and `extend = True`. `from_step` gives up what
# came after a kept step, at every run of the cell: set it back to -1 afterwards.

# %% tags=["parameters"]
model = "bdh"  # bdh or gpt2
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
results = ""  # folder for the run; empty: results/RECIPE
run = ""  # name of the run folder; empty: the model
tokens = ""  # folder that notebook 1 wrote, such as its output attached on Kaggle; empty: the results folder
continue_from = ""  # run folder of an earlier session to go on from, such as an attached output; empty: none
overrides = ""  # settings of the recipe to override, separated by ; (see tools/train.py, --set)
gpus = 1  # GPUs of this machine that train together; 2 on Kaggle's GPU T4 x2
extend = False  # True: go on with a run whose max_steps, schedule_minutes or patience were others
from_step = -1  # kept step to go back to; -1: go on from the latest

# %%
from plotarmour.config import load_recipe
from plotarmour.suite.messages import tell_ending, tell_recipe
from plotarmour.suite.multi_gpu import check_gpus
from plotarmour.suite.steps import find_prepared, list_files, results_folder, train_recipe

folder, changes = results_folder(recipe, results), [o for o in overrides.split(";") if o.strip()]
data_folder, run_folder = Path(tokens) if tokens else folder, folder / (run or model)
settings = load_recipe(recipe, model, changes)
check_gpus(gpus, settings)
print(tell_recipe(settings))

# %% [markdown]
# ## One real example
# What the model reads (inputs) and what it must predict at each place (targets): the same tokens, shifted by exactly
# one. Where the row begins with a new story, the end-of-text token comes first.

# %%
from plotarmour.data.batches import Windows
from plotarmour.data.token_file import TokenFile

data, t = TokenFile.open(find_prepared(data_folder)["train"]), settings.training
windows = Windows(data, t.context_length, t.windows, t.seed, t.rows_per_step)
inputs, targets = windows.micro_batch(windows.rows_of(0)[:1])
for name, ids in (("inputs ", inputs), ("targets", targets)):
    print(name, [data.tokenizer().decode([i]) for i in ids[0, :12].tolist()])

# %% [markdown]
# ## Will it fit?
# What training will hold in memory at its fullest moment, by arithmetic alone. Where a step does not fit after all, it
# is split into more and smaller micro-batches, and training goes on.

# %%
from plotarmour.memory import describe_here

print(describe_here(settings, data.header["vocab_size"], processes=gpus))

# %% [markdown]
# ## The work
# The loss should start near ln(vocabulary), which is guessing, and fall quickly. After five steps a line says when the
# run will be done; from then on, a line at most every half minute gives loss, tokens per second and the time left.
#
# The figure is redrawn as `log.csv` grows: left against tokens, right against time; points are validation, the faint
# line is training. Later it leaves out the first, steep part. Validation text is never trained on, so a widening gap
# between the two is overfitting.

# %%
final = train_recipe(recipe, model, data_folder, run_folder, changes,
                     Path(continue_from) if continue_from else None, gpus, extend, from_step)

# %% [markdown]
# ## How it ended
# The best checkpoint by validation loss is kept beside the latest; it is the one that notebook 3 scores.

# %%
print(tell_ending(final, run_folder))

# %%
import pandas as pd

log = pd.read_csv(run_folder / "log.csv", index_col="step")
measured = log[log["val_loss"].notna()].tail(12)
measured[["tokens_seen", "elapsed_s", "val_loss", "val_perplexity", "val_bits_per_byte"]].round(3)

# %% [markdown]
# ## What it writes
# The best checkpoint continues the beginning of a story. Same seed, same story.

# %%
from plotarmour.evaluation.generation import generate
from plotarmour.run import load_run

best = load_run(run_folder)
prompt = best.tokenizer.encode("Once upon a time")
new = generate(best.model, prompt, best.tokenizer.end_of_text_id, best.machine, max_new_tokens=160, top_p=0.95, seed=1)
print(best.tokenizer.decode([*prompt, *new]))

# %% [markdown]
# ## Files written
# The run folder is all one needs later: weights, tokenizer and settings travel together. On Kaggle, find it under
# *Output*.

# %%
print(list_files(run_folder))

# %% [markdown]
# To download, one small zip: log, settings, how it ended and figures, without weights. It is named after the run folder
# and the UTC time of the last row of the log.
#
# **Next:** the other model, then `03_compare`.

# %%
from plotarmour.suite.bundle import download_link

download_link(run_folder)
