"""Figures of a comparison: PNGs from its tables. An arm has one colour and one dash in all of them."""

from pathlib import Path

import numpy as np
import pandas as pd

from plotarmour.evaluation.arms import Arm
from plotarmour.report.plots import BLUE, GRAY, GREEN, ORANGE, arm_label, new_figure, save_figure

# Okabe and Ito's, safe for the colour-blind: blues for BDH, warm ones for the others.
COLORS = {"bdh": (BLUE, "#56B4E9", "#004A75"), "gpt2": (ORANGE, "#CC79A7", "#E69F00", "#7A3500")}
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
FEW = 20  # stories: fewer than that reach a position, and the curve ends (with fewer stories in all: a quarter)


def styles(arms: list[Arm]) -> dict[str, dict]:
    """Return for every arm's name its colour, dash and marker; the same arms get the same ones."""
    kinds, found = [arm.model for arm in arms], {}
    for i, arm in enumerate(arms):
        nth = kinds[:i].count(arm.model)
        palette = COLORS.get(arm.model, (GRAY,))
        found[arm.name] = {"color": palette[nth % len(palette)], "linestyle": DASHES[nth % len(DASHES)],
                           "marker": MARKERS[nth % len(MARKERS)]}
    return found


def learning_curves(arms: list[Arm], logs: dict[str, pd.DataFrame], flops_per_token: dict[str, float], path: Path,
                    baseline: tuple[str, float] | None = None) -> Path:
    """Draw validation loss against training tokens, FLOPs and time: a thick line per arm, a thin one per seed.

    Args:
        arms: of the comparison.
        logs: by run name, the rows of log.csv.
        flops_per_token: by arm name, training FLOPs per token.
        path: of the PNG.
        baseline: name and loss of the best baseline on the test stories, drawn as a line.
    """
    figure, panels = new_figure(13, 4.4, columns=3, sharey=True)
    drawn, style = [], styles(arms)
    for arm in arms:
        own = {"color": style[arm.name]["color"], "linestyle": style[arm.name]["linestyle"]}
        rows = [logs[run][logs[run]["val_loss"].notna()] for run in arm.runs]
        if not min(map(len, rows)):
            continue  # a log without a validation
        for log in rows:
            drawn += log["val_loss"].iloc[int(len(log) > 3):].tolist()
        # The mean is taken by evaluations, which runs of one arm make at the same steps; a longer one is cut.
        n = min(map(len, rows))
        for panel, x in zip(panels, ("tokens", "flops", "time"), strict=True):
            along = [_along(log, x, flops_per_token[arm.name]) for log in rows]
            if len(rows) > 1:
                for log, values in zip(rows, along, strict=True):
                    panel.plot(values, log["val_loss"], linewidth=0.8, alpha=0.35, **own)
            mean = np.mean([log["val_loss"].to_numpy()[:n] for log in rows], axis=0)
            panel.plot(np.mean([values[:n] for values in along], axis=0), mean, linewidth=2, markersize=3.5,
                       marker=style[arm.name]["marker"], label=f"{arm_label(arm.name, arm.model)}: last {mean[-1]:.2f}",
                       **own)
    labels = ("training tokens (million)", "training FLOPs (10¹²)", "time (minutes)")
    for panel, label in zip(panels, labels, strict=True):
        if baseline:
            panel.axhline(baseline[1], color=GRAY, linewidth=1, linestyle=(0, (1, 2)))
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
    if baseline:
        panels[0].annotate(f"{baseline[0]} (test)", (0.99, baseline[1]), xycoords=("axes fraction", "data"), ha="right",
                           va="bottom", color="#555555", fontsize=9)
    shown = (drawn + ([baseline[1]] if baseline else [])) or [0.0]
    margin = 0.08 * (max(shown) - min(shown)) + 0.01
    panels[0].set_ylim(min(shown) - margin, max(shown) + margin)
    panels[0].set_ylabel("validation loss (nats per token)")
    for panel, title in zip(panels, ("Against tokens", "... against FLOPs", "... and against time"), strict=True):
        panel.set_title(title, loc="left", fontsize=11)
    panels[2].legend(frameon=False, loc="upper right", fontsize=9)
    return save_figure(figure, path)


def perplexities(arms: list[Arm], by_arm: pd.DataFrame, by_run: pd.DataFrame, path: Path, title: str = "") -> Path:
    """Draw the perplexity of arms, baselines and corpus as bars on a logarithmic axis, every seed a point; best on top.

    Args:
        arms: of the comparison.
        by_arm: table with name, perplexity: of arms and of what else there is.
        by_run: table with name, perplexity: of the runs.
        path: of the PNG.
        title: says on what text.
    """
    figure, axes = new_figure(8, 1.0 + 0.5 * len(by_arm))
    style, known = styles(arms), {arm.name: arm for arm in arms}
    points = by_run.set_index("name")["perplexity"]
    colors = [style[name]["color"] if name in style else GREEN if "corpus" in name else
              COLORS["bdh"][1] if "unbounded" in name else "#C4C4C4" for name in by_arm["name"]]
    bars = axes.barh(range(len(by_arm)), by_arm["perplexity"], color=colors)
    axes.bar_label(bars, [f"{v:,.1f}" if v >= 10 else f"{v:.3f}" for v in by_arm["perplexity"]], padding=8)
    for i, name in enumerate(by_arm["name"]):
        if name in known and len(known[name].runs) > 1:
            values = points[list(known[name].runs)]
            axes.plot(values, [i] * len(values), "o", color="black", markersize=3.5)
    axes.set_yticks(range(len(by_arm)), [arm_label(name, known[name].model) if name in known else name
                                         for name in by_arm["name"]])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, by_arm["perplexity"].max() * 2.2)
    axes.set_xlabel("perplexity on held-out stories (logarithmic; lower is better; points: seeds)")
    axes.set_title(title or "Perplexity: models in colour, baselines in gray", loc="left", fontsize=11)
    return save_figure(figure, path)


def differences_forest(arms: list[Arm], pairs: pd.DataFrame, path: Path) -> Path:
    """Draw every pair's perplexity ratio with its 95 % interval, recipes thick, single seeds thin.

    Args:
        arms: of the comparison.
        pairs: of `compare_arms`.
        path: of the PNG.
    """
    figure, axes = new_figure(9, 1.3 + 0.42 * len(pairs))
    names = {arm.name: arm_label(arm.name, arm.model) for arm in arms}
    whole = pairs["speaks_of"] == "recipes"
    for i, (_, row) in enumerate(pairs.iterrows()):
        thick = whole.iloc[i] or not whole.any()
        color = BLUE if row["perplexity_ratio_high"] < 1 else ORANGE if row["perplexity_ratio_low"] > 1 else GRAY
        axes.plot([100 * row["perplexity_ratio_low"] - 100, 100 * row["perplexity_ratio_high"] - 100], [i, i],
                  color=color, linewidth=3 if thick else 1.2, solid_capstyle="butt")
        axes.plot(100 * row["perplexity_ratio"] - 100, i, "o" if thick else ".", color=color,
                  markersize=7 if thick else 5)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set_yticks(range(len(pairs)), [
        f"{names.get(row['a'], row['a'])} against {names.get(row['b'], row['b'])}"
        + (f"\n({row['seeds_a']} and {row['seeds_b']} seeds)" if row["speaks_of"] == "recipes" else "")
        for _, row in pairs.iterrows()], fontsize=9)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1), max(high, 1))
    axes.set_xlabel("difference in perplexity (%), 95 % interval: left of 0, the first one is better")
    axes.set_title("How much better, and how sure", loc="left", fontsize=11)
    return save_figure(figure, path)


def loss_by_position(arms: list[Arm], positions: pd.DataFrame, path: Path, context_length: int | None = None) -> Path:
    """Draw loss against the place in the story, on a logarithmic axis, in bins that widen.

    Args:
        arms: of the comparison.
        positions: run, position, tokens, nats.
        path: of the PNG.
        context_length: drawn as a line.
    """
    figure, axes = new_figure(8, 4.2)
    style = styles(arms)
    for arm in arms:
        own = positions[positions["run"].isin(arm.runs)].groupby("position")[["tokens", "nats"]].sum()
        own = own[own["tokens"] >= min(FEW * len(arm.runs), own["tokens"].max() / 4)]
        if own.empty:
            continue
        edges = np.unique(np.round(np.geomspace(1, len(own) + 1, 40)).astype(int)) - 1
        sums = np.add.reduceat(own.to_numpy(dtype=float), edges[:-1], axis=0)
        axes.plot((edges[:-1] + edges[1:] + 1) / 2, sums[:, 1] / sums[:, 0], markersize=3.5, linewidth=1.8,
                  label=arm_label(arm.name, arm.model), **style[arm.name])
    if context_length:
        axes.axvline(context_length, color=GRAY, linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(f"context {context_length} ", (context_length, 0.98), xycoords=("data", "axes fraction"),
                      ha="right", va="top", color="#555555", fontsize=9)
    axes.set_xscale("log")
    axes.set_xlabel(f"place of the token in its story (to where {FEW} stories reach)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Where in a story the nats are spent", loc="left", fontsize=11)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def win_shares(shares: dict[str, pd.DataFrame], path: Path) -> Path:
    """Draw in how many of the stories the first of a pair is better, by length of story.

    Args:
        shares: by "A against B", the table of `win_share_by_length`.
        path: of the PNG.
    """
    figure, axes = new_figure(8, 3.8)
    colors = (BLUE, ORANGE, GREEN, "#CC79A7")
    for i, (name, table) in enumerate(shares.items()):
        x = np.arange(len(table)) + 0.12 * (i - (len(shares) - 1) / 2)
        share = 100 * table["share"]
        around = np.clip([share - 100 * table["low"], 100 * table["high"] - share], 0, None)
        axes.errorbar(x, share, yerr=around, capsize=3, color=colors[i % len(colors)], marker=MARKERS[i % len(MARKERS)],
                      linestyle=DASHES[i % len(DASHES)], linewidth=1.5, label=name)
    first = next(iter(shares.values()))
    axes.set_xticks(range(len(first)), [f"{low:,}–{high:,}" for low, high in
                                        zip(first["min_tokens"], first["max_tokens"], strict=True)])
    axes.axhline(50, color="#555555", linewidth=1)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tokens in the story")
    axes.set_ylabel("stories won (%)")
    axes.set_title("Share of stories that the first one foresees better", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return save_figure(figure, path)


def _along(log: pd.DataFrame, what: str, flops_per_token: float) -> np.ndarray:
    if what == "time":
        return log["elapsed_s"].to_numpy() / 60
    tokens = log["tokens_seen"].to_numpy()
    return tokens / 1e6 if what == "tokens" else tokens * flops_per_token / 1e12
