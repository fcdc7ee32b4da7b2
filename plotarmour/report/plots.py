"""CSVs to figures (PNG). Colours are Okabe and Ito's, safe for the colour-blind; no global matplotlib state."""

import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
MODEL_COLORS = {"bdh": BLUE, "gpt2": ORANGE}
TINTS = ("#CFE3F1", "#FBE3C8", "#CFEDE3", "#F0D9E8")  # of tokens: light, so that black text stays readable
DASHES = ("-", "--", ":", "-.")  # tell runs of one model apart
MODEL_NAMES = {"bdh": "BDH", "gpt2": "GPT-2"}


def training_curves(runs: dict[str, tuple[str, pd.DataFrame]], path: Path, baseline: float | None = None) -> Path:
    """Draw validation loss (and, faintly, training loss) against tokens and against time.

    Args:
        runs: by name, the kind of model and the rows of log.csv.
        path: of the PNG.
        baseline: loss of the bigram baseline, drawn as a line.
    """
    figure, (left, right) = new_figure(10, 4.2, columns=2, sharey=True)
    most_tokens, longest_s = (max(log[c].max() for _, log in runs.values()) for c in ("tokens_seen", "elapsed_s"))
    tokens, tokens_unit = (1e6, "million") if most_tokens >= 1e6 else (1e3, "thousand")
    seconds, time_unit = (60, "minutes") if longest_s >= 180 else (1, "seconds")
    kinds = [kind for kind, _ in runs.values()]
    for i, (name, (kind, log)) in enumerate(runs.items()):
        color, dash = MODEL_COLORS.get(kind, GRAY), DASHES[kinds[:i].count(kind) % len(DASHES)]
        for axes, x in ((left, log["tokens_seen"] / tokens), (right, log["elapsed_s"] / seconds)):
            axes.plot(x, log["train_loss"], color=color, alpha=0.25, linewidth=1)
            measured = log["val_loss"].notna()
            axes.plot(x[measured], log["val_loss"][measured], dash, color=color, linewidth=2, marker="o", markersize=3,
                      label=f"{arm_label(name, kind)}: last {log['val_loss'][measured].iloc[-1]:.2f}")
    for axes, label in ((left, f"training tokens ({tokens_unit})"), (right, f"time ({time_unit})")):
        if baseline:
            axes.axhline(baseline, color=GRAY, linewidth=1, linestyle="--")
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
    if baseline:
        left.annotate("bigram baseline (test stories)", (0.99, baseline), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", color="#555555", fontsize=9)
    measured = [log["val_loss"].dropna() for _, log in runs.values()]
    # The untrained start, near ln(vocabulary), would flatten all the rest: the axis begins below it, if it can.
    shown = [v for values in measured for v in values.iloc[int(len(values) > 3):]] + ([baseline] if baseline else [])
    shown += [log["train_loss"].min() for _, log in runs.values() if log["train_loss"].notna().any()]
    margin = 0.1 * (max(shown) - min(shown)) + 0.01
    left.set_ylim(min(shown) - margin, max(shown) + margin)
    left.set_ylabel("loss (nats per token)")
    left.set_title("Validation loss (faint: training) against tokens", loc="left", fontsize=11)
    right.set_title("... and against time", loc="left", fontsize=11)
    right.legend(frameon=False, loc="upper right")
    return save_figure(figure, path)


def story_lengths(tokens_per_story: Sequence[int], path: Path, context_length: int | None = None) -> Path:
    """Draw a histogram of story lengths in tokens, with the context length as a line."""
    figure, axes = new_figure(8, 3.2)
    axes.hist(tokens_per_story, bins=min(60, max(10, len(tokens_per_story) // 50)), color=BLUE)
    if context_length:
        axes.axvline(context_length, color=ORANGE, linewidth=2)
        axes.annotate(f" context {context_length}", (context_length, 0.95), xycoords=("data", "axes fraction"),
                      color=ORANGE, va="top")
    axes.set_xlabel("tokens per story")
    axes.set_ylabel("stories")
    axes.set_title("How long the stories are", loc="left", fontsize=11)
    return save_figure(figure, path)


def coloured_tokens(pieces: Sequence[str]) -> str:
    """Return HTML that shows a text's tokens: neighbours in different tints, line breaks as ⏎.

    Args:
        pieces: the text of each token, in order. A character that is spelled by several tokens shows as �.
    """
    spans = []
    for i, piece in enumerate(pieces):
        shown = html.escape(piece).replace("\n", "⏎<br>").replace(" ", "&nbsp;")
        spans.append(f'<span style="background:{TINTS[i % len(TINTS)]};color:#000;border-radius:3px;'
                     f'border-right:1px solid #fff">{shown}</span><wbr>')
    return f'<div style="font-family:monospace;line-height:1.7;max-width:60em">{"".join(spans)}</div>'


def arm_label(name: str, kind: str) -> str:
    """Return a run's or an arm's name as people know it: BDH, GPT-2, or its own with the model behind it."""
    shown = MODEL_NAMES.get(kind, kind)
    return shown if name in (kind, shown) else f"{name} ({shown})"


def new_figure(width: float, height: float, columns: int = 1, **options):
    """Return a figure of so many inches, and its axes: one, or an array of `columns`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, **options)
    for each in axes if columns > 1 else [axes]:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="both" if columns > 1 else "x", color="#E5E5E5", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
