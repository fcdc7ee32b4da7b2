"""Figures of the writing desk: what a blend of two runs predicts and writes against the slider."""

from pathlib import Path

import pandas as pd

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
