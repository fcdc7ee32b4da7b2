"""Figures of the writing desk: blends of two runs against the slider, and how well drafts are checked."""

from pathlib import Path

import pandas as pd

from plotarmour.models import KINDS
from plotarmour.report.figures import BLUE, DARK_GRAY, ORANGE, new_figure, save_figure


def blend_curves(losses: pd.DataFrame, texts: pd.DataFrame, path: Path) -> Path:
    """Draw the loss of a blend, less that of the better run alone, and properties of what it writes, against its share.

    Args:
        losses, texts: of `plotarmour.evaluation.blending`.
        path: PNG to write.
    """
    figure, (left, right) = new_figure(9.6, 3.8, "Two models together", "", "", columns=2)
    for (blend, rows), color in zip(losses.groupby("blend", sort=False), (BLUE, ORANGE), strict=False):
        errors = rows["difference"] - rows["low"], rows["high"] - rows["difference"]
        left.errorbar(100 * rows["share"], rows["difference"], errors, color=color, marker="o", markersize=3.5,
                      linewidth=1.6, label=f"{blend} blend")
    left.axhline(0, color=DARK_GRAY, linewidth=1)
    left.set_xlabel("share of logic (%)")
    left.set_ylabel("nats per token above the better run")
    for column, label, color in (("distinct_2", "different pairs", BLUE), ("repetition", "repetition", ORANGE),
                                 ("contradictions", "contradicting words", DARK_GRAY)):
        right.plot(100 * texts["share"], 100 * texts[column], color=color, marker="o", markersize=3.5, label=label)
    right.set_xlabel("share of logic (%)")
    right.set_ylabel("share (%)")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def contradiction_curves(table: pd.DataFrame, path: Path, score: str) -> Path:
    """Draw how well each run tells drafts that break a fact from drafts that keep it, against the fact's distance.

    Args:
        table: of `plotarmour.evaluation.contradictions.measure`, of tales; a run has the colour of the kind it is
            named after.
        path: PNG to write.
        score: which of its scores; the trigrams have "nats" only.
    """
    facts = list(dict.fromkeys(table["fact"]))
    figure, panels = new_figure(2.2 * len(facts) + 0.8, 3.5, "How well a broken fact is found", "", "",
                                columns=len(facts))
    for axes, fact in zip(panels, facts, strict=True):
        rows = table[(table["fact"] == fact) & ((table["score"] == score) | (table["run"] == "trigram baseline"))]
        for run, own in rows.groupby("run", sort=False):
            label, color = (KINDS[run].label, KINDS[run].colors[0]) if run in KINDS else (run, DARK_GRAY)
            x = own["distance"].clip(lower=32)  # on a logarithmic axis; 0 is told by its tick
            axes.errorbar(x, own["auc"], (own["auc"] - own["low"], own["high"] - own["auc"]), color=color, marker="o",
                          markersize=3.5, linewidth=1.6, label=label)
        axes.axhline(0.5, color=DARK_GRAY, linewidth=1, linestyle=":")
        axes.set_xscale("log", base=4)
        distances = sorted(set(rows["distance"]))
        axes.set_xticks([max(distance, 32) for distance in distances], [f"{distance:,}" for distance in distances],
                        rotation=60, fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(0.3, 1.03)
        axes.set_xlabel(f"{fact}: tokens back")
    panels[0].set_ylabel("ROC AUC (0.5: chance)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False,
                  fontsize=9)
    return save_figure(figure, path)
