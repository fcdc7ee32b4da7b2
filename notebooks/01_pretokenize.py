# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · From text to tokens
#
# **What you get:** three token files (train, val, test) that both models will read, and a look at what is in them.
#
# **Time:** seconds for the built-in corpus, minutes for the two gigabytes of TinyStories on two CPU cores. Token files
# of the same text and settings are kept, and a new session continues where the last one was cut. **Hardware:** any; no
# GPU. **Needs:** nothing, or a UTF-8 text with `<|endoftext|>` between stories, as in TinyStories. For prose with
# blank lines between paragraphs, set `overrides = "stories=paragraph"`. Gzipped text, .jsonl and .parquet work too.
# **Leaves behind:** `tokens.train.bin`, `tokens.val.bin`, `tokens.test.bin` and `duplicates.csv`
# in the results folder.

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
# If `text` is empty, this notebook writes the built-in corpus: short tales from a grammar that knows the exact
# probability of each story. For a text of your own, choose the recipe `laptop` or `kaggle_t4`.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
text = ""  # path of a UTF-8 text; empty: the built-in corpus
extra_text = ""  # path of a second text to test on; stories that are also in `text` are left out
results = ""  # folder for all results; empty: results/RECIPE
overrides = ""  # settings of the recipe to override, separated by ; (see tools/train.py, --set)

# %%
from pathlib import Path

from plotarmour.config import load_recipe
from plotarmour.suite.display import describe_recipe, list_files
from plotarmour.suite.parameters import check_parameters, results_folder
from plotarmour.suite.steps import prepare

given = check_parameters(globals(), recipe=str, text=Path, extra_text=Path, results=Path, overrides=list)
folder = results_folder(given.recipe, given.results)
settings = load_recipe(given.recipe, "bdh", given.overrides)
print(describe_recipe(settings, "data"))

# %% [markdown]
# ## The work
# A hash of its words (lower-cased, without punctuation) decides whether a story belongs to train, val or test. So two
# copies that differ only in case, punctuation or spacing are in the same part. A `bpe:N` tokenizer learns from the
# train part only.

# %%
paths = prepare(settings, folder, given.text, given.extra_text)
print(list_files(folder))

# %% [markdown]
# ## One real story
# First as text, then as the model sees it, with one tint per token. A word that is frequent in the training part is one
# token; a rare word is split into several.

# %%
from plotarmour.data.token_file import TokenFile

files = {part: TokenFile.open(path) for part, path in paths.items() if path.suffix == ".bin"}
tokenizer, story = files["test"].tokenizer(), files["test"].story(0)
print(tokenizer.decode(story))

# %%
from IPython.display import HTML

from plotarmour.report.figures import coloured_tokens

HTML(coloured_tokens([tokenizer.decode([i]) for i in story]))

# %% [markdown]
# ## How much there is
# `bytes_per_token` says how much text one token stands for. It differs between tokenizers, so their perplexities cannot
# be compared; bits per byte can.

# %%
import pandas as pd

rows = {part: {"stories": f.n_stories, "tokens": f.n_tokens, "left_out": f.header["n_excluded"],
               "bytes_per_token": round(f.story_bytes.sum() / f.n_tokens, 3)} for part, f in files.items()}
pd.DataFrame.from_dict(rows, orient="index")

# %%
import numpy as np

from plotarmour.report.figures import story_lengths

lengths = np.diff(np.append(files["train"].offsets, files["train"].n_tokens))
figure = story_lengths(lengths, folder / "figures" / "story_lengths.png", settings.training.context_length)
display(Image(figure))

# %% [markdown]
# ## The most frequent tokens
# A few tokens make up a large part of every text. A model that knows only these shares is the unigram baseline of
# `03_compare`.

# %%
from plotarmour.data.token_file import token_counts

counts = token_counts(files["train"])
top = np.argsort(-counts, kind="stable")[:15]
pd.DataFrame({"token": [repr(tokenizer.decode([i])) for i in top], "times": counts[top],
              "share": [f"{share:.1%}" for share in counts[top] / counts.sum()]})

# %% [markdown]
# ## Copies
# A test story that is also in the training part measures memory, not skill. *Exact* copies have the same text;
# *normalised* copies differ only in case, punctuation or spacing. The split puts both into one part. *Near* copies
# share at least 80 % of their sequences of five words (MinHash proposes pairs, and each pair is compared exactly). The
# split does not detect them, so look here for a leak. `duplicates.csv` has examples. Two million stories take about
# three minutes.

# %%
from plotarmour.data.duplicates import find_duplicates

copies = find_duplicates(files, folder / "duplicates.csv")
print(copies.table())

# %% [markdown]
# ## What it means
# Stories left of the orange line in the figure of lengths fit into one context and are scored in one piece. Longer
# stories are scored by a sliding window, in which each token still sees at least half a context before it. If most
# stories are longer than one context, use a recipe with a longer `context_length`.

# %% [markdown]
# ## Files written
# The link downloads one zip with the CSV and the figure. On Kaggle both also lie by themselves under *Output*; notebook
# 2 finds the token files when the output of this notebook is attached to it.
#
# **Next:** `02_train`, once with `model = "bdh"` and once with `model = "gpt2"`, with the same results folder.

# %%
from plotarmour.suite.display import download_links

download_links(folder, gather=given.results is None)
