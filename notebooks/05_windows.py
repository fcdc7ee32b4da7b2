# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5 · Windows and packing
#
# **What you get:** pictures of the six ways to cut stories into rows, and what each one costs and brings: padding,
# speed, and the loss on whole held-out stories, with and without a mask at the borders of stories.
#
# **Time:** three minutes on two CPU cores. **Hardware:** any. **Needs:** nothing; with a text of your own, its path.
# **Leaves behind:** a run folder for each way, `window_losses.csv` and figures in the results folder.

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
# All runs of one kind of model learn from `n_tokens` targets. The default is too little to decide anything: it shows
# how the comparison works. The full run, further down, was made by a grid.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
text = ""  # path of a UTF-8 text; empty: the built-in corpus
results = ""  # folder for the runs; empty: results/windows
models = "bdh; gpt2"  # kinds of model, separated by ;
n_tokens = 20_000  # targets that each run learns from
overrides = ""  # settings of the recipe to override, separated by ;

# %%
from IPython.display import Image, display

from benchmarks.figures import mask_picture, window_losses, windows_picture
from benchmarks.windows import REFERENCE, SMALL, TOY, arms, compared, readable
from plotarmour.config import load_recipe
from plotarmour.data.batches import Windows
from plotarmour.data.token_file import TokenFile
from plotarmour.data.windows import CUTS
from plotarmour.suite.parameters import Path, check_parameters, results_folder
from plotarmour.suite.steps import prepare

given = check_parameters(globals(), recipe=str, text=Path, results=Path, models=list, n_tokens=int, overrides=list)
folder = results_folder("windows", given.results)
overridden = [*(SMALL if given.text is None else ()), *given.overrides]
settings = load_recipe(given.recipe, given.models[0], overridden)
paths = prepare(settings, folder, given.text)
train, T = TokenFile.open(paths["train"]), settings.training.context_length

# %% [markdown]
# ## Six ways to cut
# Six small stories, A to F, in rows of 8 tokens. `stream` cuts wherever a row is full, so most rows begin within a
# story; the first row begins elsewhere in every epoch, here with B. `stories` begins each row with a story and keeps
# their order; `packed` chooses stories that fit together. The last three give every place of a story a row of its own:
# the row that ends there (`left_pad`), the row that begins there (`slide_through`), or only full ones (`full`).

# %%
toy = [cut(TOY, 8, kind, 0) for kind, cut in CUTS.items()]
display(Image(windows_picture(toy, folder / "figures" / "windows.png")))

# %% [markdown]
# ## The mask
# Where a row holds several stories, a token of the second story also sees the first one, which it will not see when
# the story is scored alone. With `mask_stories` it does not: the triangle of attention falls apart into one triangle
# per story, and the number of inputs that a token sees is a sawtooth. For GPT-2 positions start again with each
# story; BDH and other rotary models need no reset, because they know only distances. One row of the text, four times
# as long as the recipe's, so that it holds more stories:

# %%
packed = Windows(train, 4 * T, "packed", seed=0, rows_per_step=20)
row = max(packed.rows_of(0), key=len)  # with the most stories of 20 rows
inputs, _ = packed.micro_batch([row])
picture = mask_picture(inputs[0].numpy(), train.header["end_of_text_id"], folder / "figures" / "mask.png")
display(Image(picture))

# %% [markdown]
# ## Padding
# Padding is never scored, but it is computed. How much of all places in the rows of an epoch it takes, for your text
# and for four context lengths around the recipe's:

# %%
import pandas as pd

lengths = [T // 2, T, 2 * T, 4 * T]
cuts = {kind: [CUTS[kind](train, length, kind, 0) for length in lengths] for kind in ("stream", "stories", "packed")}
pd.DataFrame({kind: [f"{each.padding_share:.1%}" for each in row] for kind, row in cuts.items()}, index=lengths)

# %% [markdown]
# ## The work
# Every run has the same model, the same number of targets and about the same number of targets in a step: windows
# with more padding have more rows in a step. So a difference in loss comes from what the rows hold, and what padding
# costs shows in the speed.

# %%
from plotarmour.run import train_run

runs = {}
for model in given.models:
    base = load_recipe(given.recipe, model, overridden)
    for name, chosen in arms(base, train, given.n_tokens):
        one = load_recipe(given.recipe, model, [*overridden, *chosen])
        runs[name] = folder / name
        train_run(one, paths["train"], paths["val"], runs[name])

# %% [markdown]
# ## What came of it
# The loss on whole test stories, each scored alone. `less_stream` is the difference to `stream` without a mask,
# `less_unmasked` that of the mask alone, each with a 95 % interval over stories; with several seeds it covers these
# too. `tokens_per_s` counts targets, without padding, for forward and backward of all runs in turn; `distinct` is the
# share of a run's targets that it had not read before.

# %%
from plotarmour.report.compare import write_csv

table = compared(list(runs.values()), folder)
write_csv(table, folder / "window_losses.csv")
readable(table)

# %%
display(Image(window_losses(table, folder / "figures" / "window_losses.png")))

# %% [markdown]
# ## The full run
# The same on 5 MB of TinyStories, with 400,000 targets for each run, rows of 384 tokens that hold one or two stories,
# and three seeds. `plotarmour/recipes/windows.csv` is its grid, and `docs/training.md` says how to repeat it.

# %%
full = pd.read_csv(REFERENCE / "window_losses.csv")
readable(full)

# %%
display(Image(window_losses(full, folder / "figures" / "window_losses_full.png")))

# %% [markdown]
# ## What it means
# Of the full run: take `stream` with `mask_stories=true`, which had the lowest loss for all three kinds of model,
# without any padding. The mask lowered the loss in 9 of 10 pairs, by 0.03 to 0.24 nats, for 3 to 6 % fewer tokens per
# second, 17 % for GPT-2 with `left_pad`. Leave `left_pad` and `slide_through`, which take 1.6 to 2.8 times as long for
# the same targets, and `full`, whose loss was the highest: of its targets only 38 % were distinct, against 79 to 100 %
# of the other windows; whether that is the cause was not measured.

# %% [markdown]
# ## Files written

# %%
from plotarmour.suite.display import list_files

print(list_files(folder))
