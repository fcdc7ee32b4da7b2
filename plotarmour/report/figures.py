"""Figures (PNG) of a run's log, of story lengths, and of a comparison's tables.

Each function writes a figure to `path`. An arm has the same colour and dash in all figures of a comparison. Text is
drawn as it is: `$` does not begin a formula, and `_` hides no name. Figures use no global matplotlib state.
"""

import html
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from plotarmour.evaluation.arms import Arm
from plotarmour.evaluation.scoring import UNBOUNDED
from plotarmour.models import KINDS

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY_BLUE, GRAY, LIGHT_GRAY, DARK_GRAY = "#56B4E9", "#8A8A8A", "#C4C4C4", "#555555"
TINTS = ("#CFE3F1", "#FBE3C8", "#CFEDE3", "#F0D9E8")  # backgrounds of tokens, light enough for black text
DASHES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "D")  # distinguish arms of one kind
DOTTED = (0, (1, 2))
FONTS = ("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS",
         "Nirmala UI", "Noto Sans Devanagari")  # those installed are tried in this order for each character
MIN_STORIES = 20  # a curve by position ends where fewer stories (or less than a quarter of them) have a token


def styles(arms: list[Arm]) -> dict[str, dict]:
    """Return the colour, dash and marker of each arm by its name."""
    arms = sorted(arms, key=lambda arm: arm.name != arm.model)  # an arm named by its kind has the kind's first colour
    kinds, result = [arm.model for arm in arms], {}
    for i, arm in enumerate(arms):
        nth, palette = kinds[:i].count(arm.model), KINDS[arm.model].colors
        result[arm.name] = {"color": palette[nth % len(palette)], "linestyle": DASHES[nth % len(DASHES)],
                            "marker": MARKERS[nth % len(MARKERS)]}
    return result


def training_curves(arms: list[Arm], logs: dict[str, pd.DataFrame], path: Path,
                    flops_per_token: dict[str, float] | None = None, baseline: tuple[str, float] | None = None) -> Path:
    """Draw validation loss against training tokens, FLOPs and time: a thick line per arm, a thin line per seed.

    An arm of one run also has a faint line for its training loss.

    Args:
        arms: arms of the comparison, or one arm of one run.
        logs: by run name, the rows of log.csv.
        flops_per_token: by arm name, training FLOPs per token; None: no panel for FLOPs.
        baseline: name and loss of the best n-gram baseline on the test stories, drawn as a line, or None.
    """
    most_tokens, longest_s = (max(log[c].max() for log in logs.values()) for c in ("tokens_seen", "elapsed_s"))
    tokens, tokens_unit = (1e6, "million") if most_tokens >= 1e6 else (1e3, "thousand")
    seconds, time_unit = (60, "minutes") if longest_s >= 180 else (1, "seconds")
    x_axes = {f"training tokens ({tokens_unit})": lambda log, _: log["tokens_seen"] / tokens,
              "training FLOPs (10¹²)": lambda log, arm: log["tokens_seen"] * flops_per_token[arm.name] / 1e12,
              f"time ({time_unit})": lambda log, _: log["elapsed_s"] / seconds}
    if flops_per_token is None:
        del x_axes["training FLOPs (10¹²)"]
    faint = " (faint: training)" if any(len(arm.runs) == 1 for arm in arms) else ""
    figure, panels = new_figure(1 + 3.2 * len(x_axes), 3.8, f"Validation loss{faint}", "",
                                "validation loss (nats per token)", columns=len(x_axes), sharey=True)
    style, losses = styles(arms), [baseline[1]] if baseline else []
    for arm in arms:
        line = {key: style[arm.name][key] for key in ("color", "linestyle")}
        rows = [logs[run][logs[run]["val_loss"].notna()] for run in arm.runs]
        n = min(map(len, rows))
        if not n:
            continue  # no evaluation yet
        for log in rows:  # the axis excludes the loss before training, which would flatten the curves
            losses += log["val_loss"].iloc[int(len(log) > 3):].tolist()
        # The mean over the seeds of each evaluation: runs of one arm evaluate at the same steps.
        mean = np.mean([log["val_loss"].to_numpy()[:n] for log in rows], axis=0)
        for panel, x_of in zip(panels, x_axes.values(), strict=True):
            if len(rows) > 1:
                for log in rows:
                    panel.plot(x_of(log, arm), log["val_loss"], linewidth=0.8, alpha=0.35, **line)
            else:
                log = logs[arm.runs[0]]
                panel.plot(x_of(log, arm), log["train_loss"], color=line["color"], linewidth=1, alpha=0.25)
                losses += [log["train_loss"].min()] if log["train_loss"].notna().any() else []
            x = np.mean([x_of(log, arm).to_numpy()[:n] for log in rows], axis=0)
            panel.plot(x, mean, linewidth=2, markersize=3.5, marker=style[arm.name]["marker"],
                       label=f"{_label(arm)}: last {mean[-1]:.2f}", **line)
    for panel, label in zip(panels, x_axes, strict=True):
        if baseline:
            panel.axhline(baseline[1], color=GRAY, linewidth=1, linestyle=DOTTED)
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
    if baseline:
        panels[-1].annotate(f"{baseline[0]} (test)", (0.99, baseline[1]), xycoords=("axes fraction", "data"),
                            ha="right", va="bottom", color=DARK_GRAY, fontsize=9)
    margin = 0.08 * (max(losses) - min(losses)) + 0.01 if losses else 1.0
    panels[0].set_ylim(min(losses, default=0.0) - margin, max(losses, default=0.0) + margin)
    if len(arms) > 3:  # a legend of many arms covers their curves
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False,
                      fontsize=9)
    elif panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False, loc="upper right", fontsize=9)
    return save_figure(figure, path)


def perplexities(arms: list[Arm], by_arm: pd.DataFrame, by_run: pd.DataFrame, path: Path, title: str) -> Path:
    """Draw the perplexity of arms, baselines and corpus as bars, in the order of the table, and each seed as a point.

    Args:
        by_arm: name, model and perplexity of arms, baselines and corpus.
        by_run: name and perplexity of the runs.
    """
    seeds = "; points: seeds" * any(len(arm.runs) > 1 for arm in arms)
    figure, axes = new_figure(6.4, 1.1 + 0.42 * len(by_arm), _escape(title),
                              f"perplexity on the scored stories\n(logarithmic; lower is better{seeds})")
    style, arm_of = styles(arms), {arm.name: arm for arm in arms}
    points = by_run.set_index("name")["perplexity"]
    colors = [style[name]["color"] if name in style else GREEN if "corpus" in name else
              SKY_BLUE if "unbounded" in name else LIGHT_GRAY for name in by_arm["name"]]
    bars = axes.barh(range(len(by_arm)), by_arm["perplexity"], color=colors)
    axes.bar_label(bars, [f"{v:,.1f}" if v >= 10 else f"{v:.3f}" for v in by_arm["perplexity"]], padding=8)
    for i, name in enumerate(by_arm["name"]):
        if name in arm_of and len(arm_of[name].runs) > 1:
            values = points[list(arm_of[name].runs)]
            axes.plot(values, [i] * len(values), "o", color="black", markersize=3.5)
    axes.set_yticks(range(len(by_arm)), map(_escape, row_labels(by_arm)))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1, by_arm["perplexity"].max() * 2.2)
    return save_figure(figure, path)


def differences_forest(arms: list[Arm], pairs: pd.DataFrame, path: Path) -> Path:
    """Draw the difference in perplexity of each pair with its 95 % interval: arms thick, runs of one seed thin.

    Args:
        arms: arms of the comparison.
        pairs: table of `compare_arms`.
    """
    figure, axes = new_figure(6.4, 1.4 + 0.42 * len(pairs), "Differences and their intervals",
                              "difference in perplexity (%), 95 % interval\nbelow 0 the first of a pair is better")
    names = {arm.name: _label(arm) for arm in arms}
    several_seeds = pairs["speaks_of"] == "recipes"
    for i, (_, row) in enumerate(pairs.iterrows()):
        thick = several_seeds.iloc[i] or not several_seeds.any()
        ratio, low, high = (100 * row[f"perplexity_ratio{end}"] - 100 for end in ("", "_low", "_high"))
        color = BLUE if high < 0 else ORANGE if low > 0 else GRAY
        axes.plot([low, high], [i, i], color=color, linewidth=3 if thick else 1.2, solid_capstyle="butt")
        axes.plot(ratio, i, "o" if thick else ".", color=color, markersize=7 if thick else 5)
    axes.axvline(0, color=DARK_GRAY, linewidth=1)
    axes.set_yticks(range(len(pairs)), [
        f"{names.get(row['a'], _escape(row['a']))} against {names.get(row['b'], _escape(row['b']))}"
        + (f"\n({row['seeds_a']} and {row['seeds_b']} seeds)" if row["speaks_of"] == "recipes" else "")
        for _, row in pairs.iterrows()], fontsize=9)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -1), max(high, 1))
    return save_figure(figure, path)


def ladder(arms: list[Arm], steps: pd.DataFrame, by_arm: pd.DataFrame, path: Path) -> Path:
    """Draw the loss of the arms that lead from GPT-2 to BDH, and the difference of each to the one before it.

    Args:
        arms: arms of the comparison.
        steps: table of `compare_arms` for the pairs of `plotarmour.evaluation.arms.ladder_of`.
        by_arm: name and loss of arms.
    """
    steps, loss, style = steps[steps["is_arms"]], by_arm.set_index("name")["loss"], styles(arms)
    figure, axes = new_figure(8.4, 1.5 + 0.45 * len(steps), "From GPT-2 to BDH at the same training tokens",
                              "loss (nats per token)\nbars: difference to the arm above; lines: its 95 % interval")
    names = [steps["b"].iloc[0], *steps["a"]]
    axes.plot(loss[names[0]], 0, "o", color=style[names[0]]["color"])
    for i, (_, step) in enumerate(steps.iterrows(), 1):
        before, color = loss[step["b"]], style[step["a"]]["color"]
        axes.barh(i, step["loss_difference"], left=before, height=0.5, color=color, alpha=0.6)
        low, high = step["loss_difference_low"], step["loss_difference_high"]
        axes.plot([before + low, before + high], [i, i], color="black", linewidth=1.2)
        axes.annotate(f"  {step['loss_difference']:+.3f} ({low:+.3f} to {high:+.3f})", (max(before, before + high), i),
                      va="center", fontsize=9)
    labels = {arm.name: _label(arm) for arm in arms}
    axes.set_yticks(range(len(names)), [f"{labels[name]}: {loss[name]:.3f}" for name in names])
    axes.set_ylim(len(steps) + 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.45 * (high - low))  # room for the words
    return save_figure(figure, path)


def gap_against_tokens(reference: Arm, others: list[Arm], logs: dict[str, pd.DataFrame], path: Path) -> Path:
    """Draw validation loss less that of the reference arm against training tokens; bands show the range over seeds.

    Args:
        reference, others: arms; runs of one seed evaluate at the same steps.
        logs: by run name, the rows of log.csv.
    """
    name = _label(reference)
    figure, axes = new_figure(8.4, 3.8, f"Validation loss less that of {name}", "training tokens (million)",
                              f"difference (nats per token)\nabove 0 {name} is better")
    style, loss_of = styles([reference, *others]), {}
    for run, log in logs.items():
        rows = log[log["val_loss"].notna()]
        loss_of[run] = rows.set_index("tokens_seen")["val_loss"].iloc[int(len(rows) > 3):]  # not the untrained model's
    own = pd.concat([loss_of[run] for run in reference.runs], axis=1).mean(axis=1)
    for arm in others:
        gaps = pd.concat([loss_of[run] for run in arm.runs], axis=1).sub(own, axis=0).dropna()
        x, mean = gaps.index / 1e6, gaps.mean(axis=1)
        line = style[arm.name]
        axes.fill_between(x, gaps.min(axis=1), gaps.max(axis=1), color=line["color"], alpha=0.15, linewidth=0)
        axes.plot(x, mean, markersize=3.5, linewidth=1.8,
                  label=f"{_label(arm)}: last {mean.iloc[-1]:+.2f}" if len(mean) else _label(arm), **line)
    axes.axhline(0, color=DARK_GRAY, linewidth=1)
    axes.set_xlim(left=0)
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    return save_figure(figure, path)


def loss_by_position(arms: list[Arm], positions: pd.DataFrame, path: Path, context_length: int | None = None) -> Path:
    """Draw loss against the position in the story, on a logarithmic axis, in bins of increasing width.

    Args:
        positions: table with run, position, tokens, nats.
        context_length: drawn as a line, if given.
    """
    figure, axes = new_figure(8.4, 3.8, "Loss by position in a story",
                              f"position of the token in its story (at least {MIN_STORIES} stories)",
                              "loss (nats per token)")
    style = styles(arms)
    for arm in arms:
        sums = positions[positions["run"].isin(arm.runs)].groupby("position")[["tokens", "nats"]].sum()
        sums = sums[sums["tokens"] >= min(MIN_STORIES * len(arm.runs), sums["tokens"].max() / 4)]
        if sums.empty:
            continue
        edges = np.unique(np.round(np.geomspace(1, len(sums) + 1, 40)).astype(int)) - 1
        sums = np.add.reduceat(sums.to_numpy(dtype=float), edges[:-1], axis=0)
        axes.plot((edges[:-1] + edges[1:] + 1) / 2, sums[:, 1] / sums[:, 0], markersize=3.5, linewidth=1.8,
                  label=_label(arm), **style[arm.name])
    if context_length:
        axes.axvline(context_length, color=GRAY, linewidth=1, linestyle=DOTTED)
        axes.annotate(f"context {context_length} ", (context_length, 0.98), xycoords=("data", "axes fraction"),
                      ha="right", va="top", color=DARK_GRAY, fontsize=9)
    axes.set_xscale("log")
    figure.legend(frameon=False, fontsize=9, loc="outside right center")
    return save_figure(figure, path)


def win_shares(shares: pd.DataFrame, path: Path) -> Path:
    """Draw the share of stories that the first of a pair wins, by length of story.

    Args:
        shares: for every pair, the table of `win_share_by_length` and the column pair, "A against B".
    """
    figure, axes = new_figure(6.4, 3.8, "Share of stories for which the first of a pair has fewer nats",
                              "tokens in the story", "stories won (%)")
    colors = (BLUE, ORANGE, GREEN, PURPLE)
    tables = list(shares.groupby("pair", sort=False))
    for i, (name, table) in enumerate(tables):
        x = np.arange(len(table)) + 0.12 * (i - (len(tables) - 1) / 2)
        share = 100 * table["share"]
        errors = np.clip([share - 100 * table["low"], 100 * table["high"] - share], 0, None)
        axes.errorbar(x, share, yerr=errors, capsize=3, color=colors[i % len(colors)], marker=MARKERS[i % len(MARKERS)],
                      linestyle=DASHES[i % len(DASHES)], linewidth=1.5, label=_escape(name))
    axes.set_xticks(range(len(table)), [f"{low:,}–{high:,}" for low, high in
                                        zip(table["min_tokens"], table["max_tokens"], strict=True)])
    axes.axhline(50, color=DARK_GRAY, linewidth=1)
    axes.set_ylim(-3, 103)
    figure.legend(frameon=False, fontsize=9, loc="outside lower left")  # a curve can be anywhere in the axes
    return save_figure(figure, path)


def story_lengths(tokens_per_story: Sequence[int], path: Path, context_length: int) -> Path:
    """Draw a histogram of story lengths in tokens, with the context length as a line."""
    figure, axes = new_figure(6.4, 3.2, "Story lengths", "tokens per story", "stories")
    axes.hist(tokens_per_story, bins=min(60, max(10, len(tokens_per_story) // 50)), color=BLUE)
    axes.axvline(context_length, color=ORANGE, linewidth=2)
    axes.annotate(f" context {context_length}", (context_length, 0.95), xycoords=("data", "axes fraction"),
                  color=ORANGE, va="top")
    return save_figure(figure, path)


def coloured_tokens(pieces: Sequence[str]) -> str:
    """Return HTML with the tokens of a text on alternating backgrounds; a line break is shown as ⏎.

    Args:
        pieces: text of each token; a character that consists of several tokens is shown as �.
    """
    spans = []
    for i, piece in enumerate(pieces):
        text = html.escape(piece).replace("\n", "⏎<br>").replace(" ", "&nbsp;")
        spans.append(f'<span style="background:{TINTS[i % len(TINTS)]};color:#000;border-radius:3px;'
                     f'border-right:1px solid #fff">{text}</span><wbr>')
    return f'<div style="font-family:monospace;line-height:1.7;max-width:60em">{"".join(spans)}</div>'


def arm_label(name: str, kind: str) -> str:
    """Return the label of a run or arm: BDH for bdh, "BDH, seed 1" for bdh_seed-1, "NAME (BDH)" for other names."""
    label = KINDS[kind].label
    if match := re.fullmatch(rf"{kind}_seed-(\d+)", name):
        return f"{label}, seed {match[1]}"
    return label if name in (kind, label) else f"{name} ({label})"


def row_labels(table: pd.DataFrame) -> list[str]:
    """Return the label of each row of a table of totals: of runs and arms by `arm_label`, of others their name."""
    kinds = table.dropna(subset="model").set_index("name")["model"]
    labels = []
    for name in table["name"]:
        base = name.removesuffix(UNBOUNDED)
        labels.append(arm_label(base, kinds[base]) + name[len(base):] if base in kinds else name)
    return labels


def _label(arm: Arm) -> str:
    """Return the label of an arm, escaped for matplotlib."""
    return _escape(arm_label(arm.name, arm.model))


def _escape(text: str) -> str:
    """Escape text for matplotlib, which takes text between two `$` as a formula and leaves `_names` out of legends."""
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")  # a space of no width


def new_figure(width: float, height: float, title: str, x_label: str, y_label: str = "", columns: int = 1, **options):
    """Return a figure of this width and height in inches, and its axes: one, or `columns` with one title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False, **options)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="both" if columns > 1 else "x", color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(x_label)
    panels[0].set_ylabel(y_label)
    panels[0].set_title(title, loc="left", fontsize=11)
    return figure, panels if columns > 1 else panels[0]


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    installed = set(font_manager.get_font_names())
    for text in figure.findobj(Text):
        text.set_fontfamily([font for font in FONTS if font in installed])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a character that no font has is drawn as a box
        figure.savefig(path, dpi=130)
    return path
