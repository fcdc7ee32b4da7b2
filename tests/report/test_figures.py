import math

import pandas as pd
import pytest
from matplotlib.legend import Legend
from matplotlib.text import Text

from plotarmour.evaluation.arms import Arm
from plotarmour.report import figures

FORMULA = r"a $\foo$ run"
LOG = pd.DataFrame({"tokens_seen": [0, 1000, 2000], "elapsed_s": [0.0, 1.0, 2.0], "train_loss": [None, 2.5, 2.0],
                    "val_loss": [3.0, 2.0, 1.5]})
PAIR = {"a": FORMULA, "b": "b$x$", "speaks_of": "recipes", "seeds_a": 1, "seeds_b": 1, "perplexity_ratio": 0.9,
        "perplexity_ratio_low": 0.8, "perplexity_ratio_high": 0.95}
SHARES = pd.DataFrame({"min_tokens": [1], "max_tokens": [9], "share": [0.5], "low": [0.2], "high": [0.8]})


def arms(*names):
    return [Arm(name, "bdh", (name,), (0,)) for name in names]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order."""
    saved, save = [], figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: saved.append(figure) or save(figure, path))
    return saved


def draw_all(folder, name):
    own = arms(name, "plain")
    table = pd.DataFrame({"name": [name, "plain", "trigram baseline"], "model": ["bdh", "bdh", None],
                          "perplexity": [9.0, 11.0, 30.0]})
    positions = pd.DataFrame({"run": [name] * 3, "position": range(3), "tokens": [9, 9, 9], "nats": [9.0, 8.0, 7.0]})
    figures.training_curves(own, {name: LOG, "plain": LOG}, folder / "curves.png", {name: 1e9, "plain": 1e9},
                            ("trigram baseline", 2.2))
    figures.perplexities(own, table, table, folder / "perplexity.png", name)
    figures.differences_forest(own, pd.DataFrame([PAIR | {"a": name}]), folder / "differences.png")
    step = PAIR | {"a": name, "b": "plain", "is_arms": True, "loss_difference": -0.5, "loss_difference_low": -0.6,
                   "loss_difference_high": -0.4}
    losses = table.assign(loss=table["perplexity"].map(math.log))
    figures.ladder(own, pd.DataFrame([step]), losses, folder / "ladder.png")
    figures.gap_against_tokens(own[0], own[1:], {name: LOG, "plain": LOG}, folder / "gap.png")
    figures.loss_by_position(own, positions, folder / "positions.png")
    figures.win_shares(SHARES.assign(pair=f"{name} against b"), folder / "shares.png")
    figures.story_lengths([3, 4, 9], folder / "lengths.png", 8)


@pytest.mark.parametrize("name", [FORMULA, r"$\foo$", "a$b", r"\$5"])
def test_text_in_figures_is_text(tmp_path, drawn, name):
    """Guards: a comparison that ends in a parse error, hours later, because a title or a run's name holds two `$`."""
    draw_all(tmp_path, name)
    shown = [text._preprocess_math(text.get_text()) for figure in drawn for text in figure.findobj(Text)]
    assert len(list(tmp_path.iterdir())) == 8
    assert sum(name in text and not is_math for text, is_math in shown) >= 7  # all but shares; bars and title


def test_points_of_seeds_are_named_only_where_there_are_some(tmp_path, drawn):
    """Guards: "points: seeds" below a figure without a point."""
    for seeds in (["bdh"], ["bdh_1", "bdh_2"]):
        by_run = pd.DataFrame({"name": seeds, "perplexity": 9.0})
        figures.perplexities([Arm("bdh", "bdh", tuple(seeds), tuple(range(len(seeds))))],
                             pd.DataFrame({"name": ["bdh"], "model": ["bdh"], "perplexity": [9.0]}), by_run,
                             tmp_path / "perplexity.png", "title")
    assert ["points: seeds" in figure.axes[0].get_xlabel() for figure in drawn] == [False, True]


@pytest.mark.parametrize("name", ["_bdh", "狼_run", "हिन्दी"])
def test_no_name_is_left_out_of_a_figure(tmp_path, drawn, name):
    """Guards: a run whose name begins with `_` is missing from legends; a character without a glyph is a warning."""
    draw_all(tmp_path, name)
    legends = [legend for figure in drawn for legend in figure.findobj(Legend)]
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert sum(name in text for text in texts) == 3  # curves, positions, shares


def test_a_legend_of_win_shares_covers_no_point(tmp_path, drawn):
    """Guards: a legend on the curve that it names."""
    shares = pd.concat(SHARES.assign(pair=f"a against {share}", share=share) for share in (0.0, 0.5, 1.0))
    figures.win_shares(shares, tmp_path / "shares.png")
    [figure] = drawn
    [legend] = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())


def test_rows_of_a_table_have_the_names_of_the_figures():
    """Guards: `gpt2` in the table for what the figure names GPT-2."""
    table = pd.DataFrame({"name": ["gpt2", "bdh unbounded", "bdh", "mine", "trigram baseline"],
                          "model": ["gpt2", None, "bdh", "bdh", None]})
    assert figures.row_labels(table) == ["GPT-2", "BDH unbounded", "BDH", "mine (BDH)", "trigram baseline"]


def test_one_run_shows_its_training_loss_and_no_flops_unless_given(tmp_path, drawn):
    """Guards: live curves without the training loss, a panel of FLOPs that nobody counted, an empty log that fails."""
    figures.training_curves(arms("one"), {"one": LOG}, tmp_path / "one.png")
    figures.training_curves(arms("one"), {"one": LOG.assign(val_loss=None)}, tmp_path / "none.png")
    panels = drawn[0].axes
    assert [axes.get_xlabel() for axes in panels] == ["training tokens (thousand)", "time (seconds)"]
    assert [line.get_ydata()[-1] for line in panels[0].lines] == [2.0, 1.5]
