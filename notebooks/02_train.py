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
# **What you get:** a model, such as a BDH or a GPT-2, trained from scratch on the token files of notebook 1, with its
# log and curves.
#
# **Time:** on two CPU cores a minute or two for the recipe `tiny` and 5 to 15 for `laptop`; the recipe's file
# says it for others. After five steps, training says when it will end. **Hardware:** a CPU, or one or more GPUs with
# 16 GB for the recipe `kaggle_t4`. **Needs:** the results folder of notebook 1. **Leaves behind:** a run folder named
# after the model, and beside it a small zip to download. You can interrupt training at any time: it finishes its step
# and saves, and the same cells, run again, continue from there.

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
# Run this notebook once per model. Both runs read the same tokens in the same order, because the order depends only on
# the recipe's seed. On Kaggle each notebook has its own disk: attach the output of notebook 1 (*Add Input > Your
# Work*), and to continue a session that was cut, its output. Leave `tokens` and `continue_from` empty there: this
# notebook finds both and says which it took.
#
# To make a finished run longer, set a higher `max_steps` in `overrides` and `extend = True`. `from_step` goes back to a
# kept checkpoint and discards all later steps, every time the cell runs: set it back to -1 afterwards.

# %% tags=["parameters"]
model = "bdh"  # bdh, bdh_plus, gpt2, gpt2_rope, llama, modern, moe or lstm
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
results = ""  # folder for the run; empty: results/RECIPE
run = ""  # name of the run folder; empty: the model
tokens = ""  # folder that notebook 1 wrote; empty: the results folder, or an attached output
continue_from = ""  # run folder of an earlier session to continue; empty: one in an attached output, if there is any
overrides = ""  # settings of the recipe to override, separated by ; (see tools/train.py, --set)
gpus = 1  # GPUs of this machine that train together; 2 on Kaggle's GPU T4 x2
extend = False  # True: continue a run that began with another max_steps, schedule_minutes or patience
from_step = -1  # step of a kept checkpoint to go back to; -1: continue from the latest

# %%
from pathlib import Path

from plotarmour.config import load_recipe
from plotarmour.suite.display import describe_ending, describe_recipe, list_files
from plotarmour.suite.multi_gpu import check_gpus
from plotarmour.suite.parameters import check_parameters, results_folder
from plotarmour.suite.steps import find_earlier, find_prepared, find_tokens, train_recipe

given = check_parameters(globals(), model=str, recipe=str, results=Path, run=str, tokens=Path, continue_from=Path,
                         overrides=list, gpus=int, extend=bool, from_step=int)
folder = results_folder(given.recipe, given.results)
data_folder, run_folder = find_tokens(folder, given.tokens), folder / (given.run or given.model)
settings = load_recipe(given.recipe, given.model, given.overrides)
earlier = find_earlier(run_folder, settings, data_folder, given.continue_from, given.extend)
check_gpus(given.gpus, settings)
print(describe_recipe(settings))

# %% [markdown]
# ## One real example
# The model reads the inputs and predicts the target at each position. Targets are the same tokens, shifted by exactly
# one. Where a row begins with a new story, the end-of-text token comes first.

# %%
from plotarmour.data.batches import Windows
from plotarmour.data.token_file import TokenFile
from plotarmour.loss import IGNORE

data, t = TokenFile.open(find_prepared(data_folder)["train"]), settings.training
windows = Windows(data, t.context_length, t.windows, t.seed, t.rows_per_step)
inputs, targets = windows.micro_batch(windows.rows_of(0)[:1])
for name, ids in (("inputs: ", inputs), ("targets:", targets)):
    print(name, "|".join(data.tokenizer().decode([i]) for i in ids[targets != IGNORE][:12].tolist()))

# %% [markdown]
# ## Will it fit?
# The next cell calculates the peak memory of training. If a step does not fit after all, it is split into smaller
# micro-batches, and training continues.

# %%
from plotarmour.memory import describe_memory

print(describe_memory(settings, data.header["vocab_size"], processes=given.gpus))

# %% [markdown]
# ## The work
# The loss should start near ln(vocabulary), which is guessing, and fall quickly. After five steps a line says when the
# run will be done; from then on, a line at most every half minute gives loss, tokens per second and the time left.
#
# The figure is redrawn as `log.csv` grows: on the left against tokens, on the right against time. The points are the
# validation loss, the faint line is the training loss. Later the figure leaves out the first, steep part. The model
# never trains on the validation text, so a widening gap between the two is overfitting.

# %%
final = train_recipe(given.recipe, given.model, data_folder, run_folder, given.overrides, earlier,
                     given.gpus, given.extend, given.from_step)

# %% [markdown]
# ## How it ended
# The checkpoint with the best validation loss is kept beside the latest one. Notebook 3 scores the best.

# %%
print(describe_ending(final, run_folder))

# %%
from plotarmour.training.log import read_log

log = read_log(run_folder / "log.csv").set_index("step")
measured = log[log["val_loss"].notna()].tail(12)
measured[["tokens_seen", "elapsed_s", "val_loss", "val_perplexity", "val_bits_per_byte"]].round(3)

# %% [markdown]
# ## What it writes
# How the model continued one prompt while it learned, at steps that double: first noise, then syllables, words,
# sentences. `samples_by_step.csv` holds them. A run of a few seconds takes no samples.

# %%
from plotarmour.suite.display import describe_samples

print(describe_samples(run_folder))

# %% [markdown]
# Now the best checkpoint continues the beginning of a story. The same seed gives the same story.

# %%
from plotarmour.run import load_run

best = load_run(run_folder)
print(best.generate("Once upon a time", max_new_tokens=120, top_p=0.95, seed=1))

# %% [markdown]
# ## Files written
# The run folder is all you need later: it holds weights, tokenizer and settings.

# %%
print(list_files(run_folder))

# %% [markdown]
# The links download small zips. The first, named after the run folder and the UTC time, has the log, settings, ending
# and figures. On Kaggle and Colab the second has the best weights too: unzip it, and `tools/generate.py` writes with
# them.
#
# **Next:** the other model, then `03_compare`.

# %%
from plotarmour.suite.display import download_links

download_links(run_folder, gather=given.results is None)
