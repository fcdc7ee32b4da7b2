# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6 · Batch size
#
# **What you get:** what the number of rows in a step does on your machine: to the speed, and to the loss after the
# same samples and after the same time, with learning rates that stay, grow with its square root, or grow with it.
#
# **Time:** three minutes on two CPU cores. **Hardware:** any; the same cells run on a GPU, and there also show what
# pinned memory brings. **Needs:** nothing; with a text of your own, its path. **Leaves behind:** `batch_times.csv`,
# `batch_readers.csv`, `batch_losses.csv`, figures and a run folder for each batch size in the results folder.

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
# `n_samples` is what each run learns from, in rows. The default is too little to decide anything: it shows how the
# comparison works. The full run, further down, was made by a grid on a CPU; on a GPU, raise `largest` to 1024 or
# more.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
text = ""  # path of a UTF-8 text; empty: the built-in corpus
results = ""  # folder for the runs; empty: results/batch_size
model = "gpt2"  # kind of model
n_samples = 256  # rows that each run learns from
largest = 32  # rows of the largest batch that is timed; from 1, doubled each time
overrides = ""  # settings of the recipe to override, separated by ;

# %%
from IPython.display import Image, display

from benchmarks.batch_size import REFERENCE, SMALL, arms, losses, notes, reader_times, step_times
from benchmarks.figures import batch_losses, batch_times
from plotarmour.config import load_recipe
from plotarmour.data.token_file import TokenFile
from plotarmour.suite.parameters import Path, check_parameters, results_folder
from plotarmour.suite.steps import prepare

given = check_parameters(globals(), recipe=str, text=Path, results=Path, model=str, n_samples=int, largest=int,
                         overrides=list)
folder = results_folder("batch_size", given.results)
overridden = ["windows=stream", *(SMALL if given.text is None else ()), *given.overrides]
settings = load_recipe(given.recipe, given.model, overridden)
paths = prepare(settings, folder, given.text)
train, base = TokenFile.open(paths["train"]), settings.training.rows_per_step

# %% [markdown]
# ## A step in time
# Forward, loss, backward, clipping and AdamW, for each batch size in turn: *memory* takes one batch again and again,
# *reader* reads new ones, as training does. While the line of the right panel rises, a larger batch is cheaper per
# row; where it is flat, the machine is full, and a larger batch only means fewer updates in the same time.

# %%
from plotarmour.report.compare import write_csv

around = {max(1, base // 2), base, 4 * base}  # for the runs below
sizes = sorted({2**i for i in range(given.largest.bit_length())} | around)
times = step_times(settings, train, sizes)
write_csv(times, folder / "batch_times.csv")
display(Image(batch_times(times, folder / "figures" / "batch_times.png")))

# %% [markdown]
# ## Pinned memory, workers, asynchronous copies
# What a step takes with each way to read its batches, and how long it waits for them. A thread that reads ahead is
# what training does here; worker processes are those of torch's `DataLoader`. On a GPU there are rows with pinned
# memory, from which batches are copied while the GPU computes. **On a CPU there is nothing to copy, and reading takes
# so little of a step that neither a thread nor workers can save much**: see `of_it_waiting_ms` of the row *in the
# loop*.

# %%
readers = reader_times(settings, train)
write_csv(readers, folder / "batch_readers.csv")
readers.round(2)

# %% [markdown]
# ## The work
# A run for each batch size around the recipe's own, *base*, for which its learning rate was chosen. *Equal samples*:
# a larger batch takes fewer steps. *Equal time*: as many steps as take the time of *base*, by the times above. A
# larger batch has a less noisy gradient, so that its rate may be higher; three rules say how much.

# %%
from plotarmour.run import train_run

runs = []
for name, chosen in arms(settings, sorted(around), given.n_samples, times):
    one = load_recipe(given.recipe, given.model, [*overridden, *chosen])
    runs.append(folder / name)
    train_run(one, paths["train"], paths["val"], runs[-1])

# %% [markdown]
# ## What came of it
# The loss on whole test stories. `less_base` is the difference to *base* with a 95 % interval over stories; it does
# not cover what another seed would change.

# %%
table = losses(runs, TokenFile.open(paths["test"]))
write_csv(table, folder / "batch_losses.csv")
columns = ["budget", "rule", "batch_size", "steps", "samples", "learning_rate", "loss", "less_base"]
table[columns].round(4)

# %%
display(Image(batch_losses(table, folder / "figures" / "batch_losses.png")))

# %% [markdown]
# ## Three batches of old
# The table that many tutorials have: batches of 50 for 5,000 steps, of 500 for 5,000 steps, of 500 for 500 steps. The
# second sees ten times as many samples as the others; the first and third see the same ones. Here with all of them
# smaller, batches divided by 10, steps by 500; of the full sizes we have no numbers to put beside these.

# %%
old = []
for name, chosen in notes(settings, 10, 500):
    one = load_recipe(given.recipe, given.model, [*overridden, *chosen])
    old.append(folder / name)
    train_run(one, paths["train"], paths["val"], old[-1])
losses(old, TokenFile.open(paths["test"]))[["batch_size", "steps", "samples", "elapsed_s", "loss"]].round(3)

# %% [markdown]
# ## The full run
# Speed of BDH and GPT-2 on one thread of a CPU, and losses of a GPT-2 on 5 MB of TinyStories: 2,048 rows of 128
# tokens for each run, base 8 rows, one seed. `plotarmour/recipes/batch_size.csv` is its grid; `docs/training.md` says
# how to repeat it.

# %%
import pandas as pd

speed = pd.read_csv(REFERENCE / "batch_times.csv")
display(Image(batch_times(speed, folder / "figures" / "batch_times_full.png")))

# %%
full = pd.read_csv(REFERENCE / "batch_losses.csv")
matched = full[full["budget"] != "notes"]
display(Image(batch_losses(matched, folder / "figures" / "batch_losses_full.png")))
matched[[*columns, "less_base_low", "less_base_high"]].round(3)

# %% [markdown]
# The three batches of old, with batches divided by 10 and steps by 25:

# %%
full.loc[full["budget"] == "notes", ["batch_size", "steps", "samples", "elapsed_s", "loss", "perplexity"]].round(2)

# %% [markdown]
# ## What it means
# **On a CPU** the rows per second hardly rise beyond 4 rows for BDH and 16 for GPT-2: a larger batch only takes fewer
# updates. After equal samples, 2 rows with the unchanged rate are 0.35 nats better than 8, and 32 rows are 0.83 to
# 1.29 worse with any rule; after equal time 2 rows are still 0.07 better. So on a CPU take few rows per step, 2 to 8,
# although the line of rows per second still rises there, and do not expect a rule of learning rates to make up for
# missing updates in a short run.
#
# **On a GPU** a step of these small models waits for Python: on an H100 BDH's takes 12 to 14 ms from 1 to 64 rows of
# 256 tokens, and 30 ms with 256. So up to 64 rows, more of them are free there, and the best batch by equal time is
# larger than here; losses have not been compared on a GPU. Run all cells on yours: take rows as long as the line still
# rises.

# %% [markdown]
# ## Files written

# %%
from plotarmour.suite.display import list_files

print(list_files(folder))
