# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · The writing desk
#
# **What you get:** a slider between your two models, which write together, and a reader that marks the words of a draft
# that do not fit the story so far.
#
# **Time:** three minutes. **Hardware:** any. **Needs:** two runs of `02_train` with one tokenizer, and the token files
# of `01_pretokenize`. **Leaves behind:** `desk.csv`, `desk_texts.csv`, `desk.png` and
# `contradictions.csv` in the results folder.

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
# *Logic* and *creativity* are the names of the slider's ends, no more: below, this notebook measures whether the two
# models deserve them.

# %% tags=["parameters"]
recipe = "tiny"  # name of a file in plotarmour/recipes, without .toml
results = ""  # folder of the runs; empty: results/RECIPE
tokens = ""  # folder that notebook 1 wrote; empty: the results folder, or an attached output
logic = "bdh"  # run at 100 % of the slider; it also reads the story and checks the draft
creativity = "gpt2"  # run at 0 % of the slider
prompt = "Once upon a time there was a brave girl named Lily."  # how a story begins
story = "Once upon a time there was a shy girl named Lily. Lily lived near the old park with a little dog."  # so far
draft = "One morning he found his dear ball at the old mill."  # what is to be checked against the story

# %%
from dataclasses import replace
from pathlib import Path

from plotarmour.run import load_run
from plotarmour.suite.desk import Pair, calibrated, check_draft, desk_strip, draft_html, writing_desk
from plotarmour.suite.parameters import check_parameters, results_folder
from plotarmour.suite.steps import find_all_runs, find_prepared, find_tokens

given = check_parameters(globals(), recipe=str, results=Path, tokens=Path, logic=str, creativity=str, prompt=str,
                         story=str, draft=str)
folder = results_folder(given.recipe, given.results)
tokens_folder = find_tokens(folder, given.tokens)
pair = Pair(*map(load_run, find_all_runs(folder, given.recipe, [given.logic, given.creativity])))
threshold = calibrated(pair.logic, tokens_folder)

# %% [markdown]
# ## One prompt, five positions
# At every token the two models' probabilities are blended by the slider's share, and one token is drawn from the blend.
# The tint of a token says which model gave it more probability. All five texts have the same seed.

# %%
from IPython.display import HTML, Image, display

HTML(desk_strip(pair, given.prompt, max_new_tokens=80, top_p=0.95, seed=1))

# %% [markdown]
# ## A draft against its story
# A word fits badly if it costs a model that has read the story many more nats than the model expects at this place. The
# threshold is the misfit above which only 1 % of the words of validation stories are. Below a marked word stands the
# sentence without which it would fit best.

# %%
from plotarmour.evaluation.surprise import Memory

*_, (words, reasons) = check_draft(Memory.of(pair.logic, given.story), given.draft, threshold)
HTML(draft_html(given.draft, words, threshold, reasons))

# %% [markdown]
# ## The desk
# The same with widgets, for a notebook that runs in a browser. `python tools/desk.py` opens it as a page of its own.

# %%
display(writing_desk(pair, threshold, given.prompt, given.story, given.draft))

# %% [markdown]
# ## Is the pair better than either?
# The loss of the blend on held-out stories against the share of logic. A *linear* blend lets one of the models decide
# at each token, with the slider's probability; a *logarithmic* one multiplies both, so that both must agree. Below 0,
# the pair predicts better than the better of the two alone; bars are 95 % intervals over stories.

# %%
from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.blending import blend_losses, blend_texts
from plotarmour.report.compare import write_csv

test = TokenFile.open(find_prepared(tokens_folder)["test"])
losses = blend_losses((pair.logic, pair.creativity), test, [i / 10 for i in range(11)])
write_csv(losses, folder / "desk.csv")
losses.round(4)

# %% [markdown]
# ## Are the names deserved?
# What the pair writes at five shares: different pairs of tokens (more of them: more varied), repetition of four tokens,
# and the share of words in the last sentence that contradict the text before it, as the logic run sees it.

# %%
texts = blend_texts((pair.logic, pair.creativity), [given.prompt] * 10, [0, 0.25, 0.5, 0.75, 1], threshold, top_p=0.95)
write_csv(texts, folder / "desk_texts.csv")
texts.round(4)

# %%
from benchmarks.figures import blend_curves

display(Image(blend_curves(losses, texts, folder / "desk.png")))

# %% [markdown]
# ## Does the check find contradictions?
# Pairs of drafts differ in one fact: one keeps what the story says, one breaks it. Of the built-in corpus: the hero,
# the place, the animal, the object and who holds it, with other events in between; of your text: names and things of
# the test stories, swapped. The score is the share of pairs in the right order (ROC AUC): 1 is perfect, 0.5 is chance,
# and *nats* is the plain surprise, without a look at how unsure the model is.

# %%
from plotarmour.evaluation.contradictions import FILLERS, measure, swaps, tale

tokenizer = pair.logic.tokenizer
if (tokens_folder / "built-in.txt").exists():
    drafts = [tale(fact, distance, 1000, i, tokenizer) for fact in FILLERS for distance in (0, 64) for i in range(15)]
else:
    drafts = [replace(each, distance=0) for each in swaps(test, tokenizer)][:200]
contradictions = measure((pair.logic, pair.creativity), drafts)
write_csv(contradictions, folder / "contradictions.csv")
contradictions[contradictions["score"].isin(["misfit", "nats"])].pivot_table(
    values="auc", index=["fact", "distance"], columns=["run", "score"]).round(2)

# %% [markdown]
# ## What it means
# If the curve of losses has its lowest point inside, the two models know different things. If variety falls and
# contradictions fall with the share of logic, the names are deserved for these runs; if not, they are only names.

# %% [markdown]
# ## Files written

# %%
for name in ("desk.csv", "desk_texts.csv", "desk.png", "contradictions.csv"):
    print(folder / name)
