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
# **Time:** seconds for the built-in corpus, minutes for the two gigabytes of TinyStories on two CPU cores; files that
# are there already are taken as they are, and a cut session goes on where it was. **Hardware:** any; no GPU.
# **Needs:** nothing, or a UTF-8 text with `<|endoftext|>` between stories (TinyStories has it), also gzipped, .jsonl or
# .parquet. **Leaves behind:** `tokens.train.bin`, `tokens.val.bin`, `tokens.test.bin` and `duplicates.csv` in the
# results folder.

# %% [markdown]
# ## Set-up
# The next cell finds the package: in the checkout around this notebook, in a clone beside it, or in an attached Kaggle
# dataset. It installs nothing, so Kaggle's and Colab's own torch stay as they are.

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
# With an empty `text` the built-in corpus is told: small tales from a grammar that knows the exact probability of each
# of its stories. With a text of yours, choose the recipe `laptop` or one of the `kaggle_` recipes.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
text = ""  # path of a UTF-8 text; empty: the built-in corpus
extra_text = ""  # path of a second text to test on; its stories that also stand in `text` are left out
results = ""  # folder for everything made; empty: results/RECIPE
overrides = ""  # settings of the recipe to override, separated by ; (see tools/train.py, --set)

# %%
from plotarmour.config import load_recipe
from plotarmour.suite.steps import list_files, prepare, results_folder

folder = results_folder(recipe, results)
settings = load_recipe(recipe, "bdh", [o for o in overrides.split(";") if o.strip()])
print(settings.data)

# %% [markdown]
# ## The work
# Every story goes to train, val or test by a hash of its words (lower-cased, without punctuation), so a copy that
# differs only in case, punctuation or spacing stands on the same side. A `bpe:N` tokenizer learns from the train part
# only.

# %%
paths = prepare(settings, folder, Path(text) if text else None, Path(extra_text) if extra_text else None)
print(list_files(folder))

# %% [markdown]
# ## One real story
# First as text, then as the model will see it: one tint per token. Words that are common in the
# training part are one piece; rare ones are spelled.

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
# `bytes_per_token` tells how much text one token carries. It is why perplexities of different tokenizers cannot be
# compared, while bits per byte can.

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
# A few tokens make up much of every text. A model that knows no more than these shares is the unigram baseline of
# `03_compare`.

# %%
from plotarmour.data.token_file import token_counts

counts = token_counts(files["train"])
top = np.argsort(-counts, kind="stable")[:15]
pd.DataFrame({"token": [repr(tokenizer.decode([i])) for i in top], "times": counts[top],
              "share": [f"{share:.1%}" for share in counts[top] / counts.sum()]})

# %% [markdown]
# ## Copies
# A test story that also stands in the training part measures memory, not skill. *Exact* copies have the same text,
# *normalised* ones differ in case, punctuation or spacing; both always land in one part. *Near* copies share at
# least 80 % of their sequences of five words (MinHash proposes pairs, and each is compared exactly); the split cannot
# know of them, so this is where a leak would show. `duplicates.csv` has examples. Two million stories take about three
# minutes.

# %%
from plotarmour.data.duplicates import find_duplicates

copies = find_duplicates(files, folder / "duplicates.csv")
print(copies.table())

# %% [markdown]
# ## What it means
# Stories left of the orange line fit into one context and are scored in one piece. Longer ones are scored by a sliding
# window, so each of their tokens still sees at least half a context of its past. If most stories are longer than the
# line, a recipe with a longer context will serve you better.
#
# **Next:** `02_train`, once with `model = "bdh"` and once with `model = "gpt2"`, with the same results folder.
