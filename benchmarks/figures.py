"""Figures of what the benchmarks measure, for notebooks 04 to 07 and docs."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.ticker import LogLocator, NullLocator

from plotarmour.data.windows import Cut
from plotarmour.models import KINDS
from plotarmour.report.figures import (
    BLUE,
    DARK_GRAY,
    GREEN,
    LIGHT_GRAY,
    MARKERS,
    ORANGE,
    PURPLE,
    TINTS,
    new_figure,
    save_figure,
)


def windows_picture(cuts: list[Cut], path: Path, rows: int = 5) -> Path:
    """Draw the first windows of each kind, in the order of the text: a cell is a token, a tint its story, gray padding.

    Args:
        cuts: of one small text and context length, a kind each.
        path: PNG to write.
        rows: drawn of each kind.
    """
    T, starts = cuts[0].context_length, cuts[0].data.offsets.astype(int)
    figure, axes = new_figure(8.4, 0.6 + 0.28 * (rows + 0.5) * len(cuts), f"The first {rows} rows of each way to cut",
                              "place in the row (letter: story, number: place in it, ■: its end, gray: padding)")
    y, middles = 0.0, []
    for each in cuts:
        epoch = each.rows(0, 0, each.per_epoch)
        middles.append(y + min(rows, len(epoch)) / 2)
        axes.annotate(f"  {len(epoch)} windows, {each.padding_share:.0%} padding", (T, middles[-1]), va="center",
                      fontsize=9)
        for pieces in sorted(epoch)[:rows]:
            targets = [t for begin, end in zip(pieces[::2], pieces[1::2], strict=True) for t in range(begin, end)]
            axes.broken_barh([(0, T)], (y, 0.9), facecolor=LIGHT_GRAY)
            for x, target in enumerate(targets, T - len(targets) if each.kind == "left_pad" else 0):
                story = int(np.searchsorted(starts, target, side="right")) - 1
                is_last = target + 1 in (*starts, each.data.n_tokens)
                axes.broken_barh([(x, 1)], (y, 0.9), facecolor=TINTS[story % len(TINTS)], edgecolor="white")
                axes.annotate("■" if is_last else f"{chr(65 + story)}{target - starts[story] + 1}", (x + 0.5, y + 0.45),
                              ha="center", va="center", fontsize=8)
            y += 1
        y += 0.5
    axes.set_yticks(middles, [each.kind for each in cuts])
    axes.set_xlim(0, 1.4 * T)
    axes.set_ylim(y, 0)
    axes.set_xticks(range(0, T + 1, 2))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    return save_figure(figure, path)


def mask_picture(inputs: np.ndarray, end_of_text: int, path: Path) -> Path:
    """Draw which inputs each token of a row sees, without and with a mask of stories, and how many these are.

    Args:
        inputs: (T,) ids; a story begins at each `end_of_text`.
        end_of_text: id.
        path: PNG to write.
    """
    T, story = len(inputs), np.cumsum(inputs == end_of_text)
    causal = np.tril(np.ones((T, T), dtype=bool))
    masked = causal & (story[:, None] == story)
    figure, panels = new_figure(10.4, 3.6, "Seen without a mask", "input", "token", columns=3)
    for axes, seen, color, title in zip(panels, (causal, masked), (DARK_GRAY, GREEN), ("", "Seen with mask_stories"),
                                        strict=False):
        axes.imshow(seen, cmap=ListedColormap(["white", color]), interpolation="nearest")
        axes.set_title(title or axes.get_title("left"), loc="left", fontsize=11)
        axes.grid(visible=False)
    panels[2].plot(causal.sum(axis=1), color=DARK_GRAY, label="without a mask")
    panels[2].plot(masked.sum(axis=1), color=GREEN, label="with mask_stories")
    panels[2].set_xlabel("token")
    panels[2].set_title("How many inputs a token sees", loc="left", fontsize=11)
    panels[2].legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def window_losses(table: pd.DataFrame, path: Path) -> Path:
    """Draw the loss of each kind of windows less that of stream without a mask, with its 95 % interval.

    Args:
        table: of `benchmarks/windows.py`: model, windows, mask, less_stream and its ends.
        path: PNG to write.
    """
    models, kinds = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["windows"]))
    figure, panels = new_figure(1.6 + 3.2 * len(models), 4.2, "", "loss less that of stream, no mask\n(nats per token, "
                                "95 %); left: better", columns=max(2, len(models)), sharey=True)
    for axes, model in zip(panels, models, strict=False):
        for row in table[table["model"] == model].itertuples():
            y, color = kinds.index(row.windows) + (0.15 if row.mask else -0.15), GREEN if row.mask else DARK_GRAY
            axes.plot([row.less_stream_low, row.less_stream_high], [y, y], color=color, linewidth=1.6)
            axes.plot(row.less_stream, y, "s" if row.mask else "o", color=color, markersize=6)
        axes.axvline(0, color=DARK_GRAY, linewidth=1)
        axes.set_title(KINDS[model].label, loc="left", fontsize=11)
    for axes in panels[len(models):]:
        axes.set_axis_off()
    panels[0].set_yticks(range(len(kinds)), kinds)
    panels[0].set_ylim(len(kinds) - 0.5, -0.5)
    for is_masked, color in ((False, DARK_GRAY), (True, GREEN)):
        panels[0].plot([], [], "s" if is_masked else "o", color=color, label="mask_stories" if is_masked else "no mask")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return save_figure(figure, path)


def batch_times(table: pd.DataFrame, path: Path) -> Path:
    """Draw the time of a step, and samples per second, against the batch size.

    Args:
        table: of `benchmarks/batch_size.py`: model, source, batch_size, step_ms, samples_per_s.
        path: PNG to write.
    """
    figure, panels = new_figure(9.6, 3.8, "Speed against batch size", "rows per step", columns=2)
    for axes, column, label in zip(panels, ("step_ms", "samples_per_s"), ("ms per step", "rows per second"),
                                   strict=True):
        for (model, source), rows in table.groupby(["model", "source"], sort=False):
            axes.plot(rows["batch_size"], rows[column], color=KINDS[model].colors[0], marker="o", markersize=4,
                      linestyle="-" if source == "memory" else "--", label=f"{KINDS[model].label}, {source}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(set(table["batch_size"])), [f"{n:,}" for n in sorted(set(table["batch_size"]))])
        axes.set_ylabel(label)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    panels[1].set_ylim(bottom=0)
    panels[1].legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def batch_losses(table: pd.DataFrame, path: Path) -> Path:
    """Draw the loss against the batch size, after equal samples and after equal time, for each rule of learning rates.

    Args:
        table: of `benchmarks/batch_size.py`: budget ("samples" or "time"), rule, batch_size, loss, model.
        path: PNG to write.
    """
    budgets, base = ("samples", "time"), table[table["rule"] == "base"]  # one run, in both panels
    figure, panels = new_figure(9.6, 3.8, "", "rows per step", "loss (nats per token)", columns=2, sharex=True,
                                sharey=True)
    colors = {"none": DARK_GRAY, "square root": GREEN, "linear": PURPLE}
    for axes, budget in zip(panels, budgets, strict=True):
        own = pd.concat([table[(table["budget"] == budget) & (table["rule"] != "base")], base])
        for (rule, color), marker in zip(colors.items(), MARKERS, strict=False):
            rows = own[own["rule"] == rule]
            if len(rows):
                rows = pd.concat([rows, base]).sort_values("batch_size")
                axes.plot(rows["batch_size"], rows["loss"], color=color, marker=marker, markersize=5,
                          label=f"learning rate scaled: {rule}")
        axes.plot(base["batch_size"], base["loss"], "k*", markersize=10, label="where the rate was chosen")
        axes.set_xscale("log", base=2)
        sizes = sorted(set(table["batch_size"]))
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axes.set_title(f"after equal {budget}", loc="left", fontsize=11)
    panels[0].legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


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


def option_losses(table: pd.DataFrame, path: Path) -> Path:
    """Draw the loss of each arm less that of BDH, with its 95 % interval.

    Args:
        table: of `benchmarks/grid_losses.py`, with an arm `bdh`.
        path: PNG to write.
    """
    rows = table[table["less_bdh"].notna()].sort_values("less_bdh", ascending=False, ignore_index=True)
    figure, axes = new_figure(8.4, 1.2 + 0.26 * len(rows), "Test loss less that of BDH",
                              "nats per token, 95 % interval")
    for y, row in rows.iterrows():
        color = GREEN if row["arm"].startswith("modern") else BLUE
        axes.plot([row["less_bdh_low"], row["less_bdh_high"]], [y, y], color=color, linewidth=1.6)
        axes.plot(row["less_bdh"], y, "s" if "-time" in row["arm"] else "o", color=color, markersize=6)
    for marker, color, label in (("o", BLUE, "BDH, same tokens"), ("s", BLUE, "BDH, same time"),
                                 ("o", GREEN, "transformer, same tokens"), ("s", GREEN, "transformer, same time")):
        axes.plot([], [], marker, color=color, label=label)
    axes.axvline(0, color=DARK_GRAY, linewidth=1)
    axes.set_yticks(range(len(rows)), rows["arm"])
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save_figure(figure, path)


PLUS_ARMS = {  # arms of the figure: label and colour
    "bdh": ("BDH", KINDS["bdh"].colors[0]), "bdh_plus": ("BDH plus", KINDS["bdh_plus"].colors[0]),
    "llama-time": ("Llama", KINDS["llama"].colors[0]),
    "modern-decay-muon": ("Modern transformer, decay and Muon", KINDS["modern"].colors[0]),
    "llama-decay-muon": ("Llama, decay and Muon", KINDS["llama"].colors[1])}


def plus_curves(table: pd.DataFrame, path: Path) -> Path:
    """Draw the validation loss of arms during training, against tokens and against time.

    Args:
        table: `curves` of `benchmarks/grid_losses.py` for the grid bdh_plus.csv.
        path: PNG to write.
    """
    figure, panels = new_figure(9.6, 3.9, "Validation loss during training, the same time for all", "",
                                "loss (nats per token)", columns=2)
    for axes, column, unit, label in ((panels[0], "tokens_seen", 1e-6, "training tokens (million)"),
                                      (panels[1], "of_steps", 1.0, "training time (1: 2,200 steps of BDH)")):
        for arm, (name, color) in PLUS_ARMS.items():
            rows = table[table["arm"] == arm]
            axes.plot(unit * rows[column], rows["val_loss"], color=color, label=name, linewidth=1.8)
        axes.set_xlabel(label)
        axes.set_ylim(table["val_loss"].min() - 0.05, 3.6)
    panels[1].legend(frameon=False, fontsize=9)
    return save_figure(figure, path)


def budget_losses(points: dict[str, list[tuple[float, float]]], seconds: dict[str, float], bdh_tokens: float,
                  path: Path) -> Path:
    """Draw the loss of kinds of model against training tokens and against training time.

    Args:
        points: for each kind, (training tokens, test loss in nats per token) of each of its trainings.
        seconds: time of a step of each kind, BDH's is 1.
        bdh_tokens: of the training of BDH whose time is 1.
        path: of the PNG.
    """
    figure, panels = new_figure(9.6, 3.9, "Loss on held-out stories; each point is a whole training", "",
                                "loss (nats per token)", columns=2)
    of_time = f"training time (1: BDH with {bdh_tokens / 1e6:.2f} million tokens; logarithmic)"
    for axes, label, unit_of in ((panels[0], "training tokens (million, logarithmic)", lambda kind: 1e-6),
                                 (panels[1], of_time, lambda kind: seconds[kind] / bdh_tokens)):
        for kind, kind_points in points.items():
            tokens, losses = zip(*kind_points, strict=True)
            axes.plot([n * unit_of(kind) for n in tokens], losses, color=KINDS[kind].colors[0], marker="o",
                      linewidth=2.4 if kind in ("llama", "bdh") else 1.2, label=KINDS[kind].label)
        axes.set_xscale("log")
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(label)
    panels[1].legend(frameon=False, fontsize=9)
    return save_figure(figure, path)
