"""The writing desk: two runs continue a prompt, alone and blended, and one of them checks a draft against its story.

What the desk shows is a pure function of its state: `texts_html` and `draft_html`. `writing_desk` puts core widgets of
ipywidgets around them; without a browser, `desk_strip` shows the same at five positions of the slider.

The names on the slider, logic and creativity, are labels: notebook 04 measures whether the runs deserve them.
"""

import html
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from plotarmour.cli import UserError
from plotarmour.data.token_file import TokenFile
from plotarmour.data.tokenizer import Tokenizer
from plotarmour.evaluation.generation import NewToken
from plotarmour.evaluation.surprise import Memory, Word, causes, threshold_of
from plotarmour.report.figures import arm_label
from plotarmour.run import Run, check_one_tokenizer
from plotarmour.suite.steps import find_prepared

MOST_CHARACTERS = 200_000  # of a prompt, a story or a draft: half a minute of reading
REDRAW_S = 0.1  # a browser gets a new text at most ten times a second
STYLE = """<style>
.desk { font: 16px/1.6 system-ui, sans-serif; overflow-wrap: anywhere; }
.desk .sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: 1rem; }
.desk .side { border-top: 4px solid #8888; padding: .3rem .2rem; white-space: pre-wrap; }
.desk h4 { margin: 0 0 .3rem; font-size: .95rem; } .desk .prompt { opacity: .65; }
.desk .note { font-size: .9rem; opacity: .8; margin: .4rem 0; } .desk mark { background: #E69F0066; color: inherit;
 border-bottom: 2px solid #D55E00; } .desk .error { border-left: 4px solid #D55E00; padding-left: .6rem; }
</style>"""
LEGEND = "Blue tokens: {logic} gave them more probability than {creativity} did; orange tokens: less."


@dataclass(frozen=True)
class Piece:
    """Text that one or more new tokens add to a story."""

    text: str
    probabilities: tuple[float, ...]  # of the last of these tokens, under each model


@dataclass(frozen=True)
class Pair:
    """Two runs of one tokenizer: `logic` is the slider's end at 100 %, `creativity` the one at 0 %.

    Raises:
        UserError: different tokenizers.
    """

    logic: Run
    creativity: Run

    def __post_init__(self):
        check_one_tokenizer(self.logic, self.creativity)

    @property
    def labels(self) -> tuple[str, str]:
        return tuple(arm_label(run.name, run.config.model) for run in (self.logic, self.creativity))

    def stream(self, prompt: str, percent: float, **options) -> Iterator[Piece]:
        """Continue a prompt by a blend with `percent` of logic; `options` are those of `generation.stream`.

        Raises:
            UserError: an empty or very long prompt, or settings out of range.
        """
        if not 0 <= percent <= 100:
            raise UserError(f"logic is {percent:g} %; expected 0 to 100 %.")
        ids = self.logic.tokenizer.encode(checked(prompt, "prompt"))
        return pieces_of(self.logic.tokenizer, ids, self.logic.stream(ids, self.creativity, percent / 100, **options))


def checked(text: str, name: str) -> str:
    """Return a text that somebody has typed; raise `UserError` where it is empty, too long or not UTF-8."""
    if not text.strip():
        raise UserError(f"The {name} is empty; write a few words.")
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"The {name} has {len(text):,} characters; the desk takes at most {MOST_CHARACTERS:,}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The {name} has a lone surrogate at character {error.start:,}; remove it.") from None
    return text


def pieces_of(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[NewToken]) -> Iterator[Piece]:
    """Yield the text that each new token adds; a character of several tokens comes with the last of them."""
    ids, text = list(prompt), tokenizer.decode(prompt)
    shown = len(text)
    for token in tokens:
        ids.append(token.id)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield Piece(text[shown:], token.probabilities)
            shown = len(text)
    if text[shown:]:
        yield Piece(text[shown:], token.probabilities)


def texts_html(prompt: str, texts: Sequence[tuple[str, list[Piece]]], labels: tuple[str, str], message: str = ""
               ) -> str:
    """Return the split view as HTML: a column per text, the prompt and the text's pieces in the tints of `tint_of`.

    Args:
        prompt: that all texts continue.
        texts: title and pieces of each.
        labels: of logic and creativity, for the legend.
        message: a sentence for the user, such as what is wrong with the prompt.
    """
    columns = []
    for title, pieces in texts:
        spans = "".join(f'<span style="background:{tint_of(piece.probabilities)}" title="{_title(piece, labels)}">'
                        f"{html.escape(piece.text)}</span>" for piece in pieces)
        columns.append(f'<div class="side"><h4>{html.escape(title)}</h4><span class="prompt">'
                       f"{html.escape(prompt)}</span>{spans}</div>")
    legend = html.escape(LEGEND.format(logic=labels[0], creativity=labels[1]))
    return (f'{STYLE}<div class="desk">{_message(message)}<div class="sides">{"".join(columns)}</div>'
            f'<div class="note">{legend}</div></div>')


def draft_html(draft: str, words: Sequence[Word], threshold: float, reasons: dict[int, str], message: str = "") -> str:
    """Return a draft as HTML in which the words above the threshold are marked.

    Args:
        draft: text.
        words: of the draft.
        threshold: least misfit of a marked word.
        reasons: by index of a marked word, the sentence of the story that it contradicts.
        message: a sentence for the user.
    """
    parts, place, items = [], 0, []
    for i, word in enumerate(words):
        parts.append(html.escape(draft[place:word.begin]))
        text, place = html.escape(draft[word.begin:word.end]), word.end
        if word.misfit > threshold:
            parts.append(f'<mark title="misfit {word.misfit:.1f}, marked above {threshold:.1f}">{text}</mark>')
            because = f": “{html.escape(reasons[i])}”" if i in reasons else ""
            items.append(f"<li><b>{html.escape(word.of(draft))}</b>{because}</li>")
        else:
            parts.append(text)
    marked = f'<ul class="note">{"".join(items)}</ul>' if items else ""
    return (f'{STYLE}<div class="desk">{_message(message)}<div class="side">{"".join(parts)}'
            f"{html.escape(draft[place:])}</div>{marked}</div>")


def tint_of(probabilities: Sequence[float]) -> str:
    """Return the colour of a token: blue where the first model gave it more probability, orange where less.

    Example:
        Equal probabilities have no colour; 100 times as much, or more, has the full one.
    """
    first, second = (max(p, 1e-9) for p in probabilities)
    strength = max(-1.0, min(1.0, math.log(first / second) / math.log(100)))
    red, green, blue = (0, 114, 178) if strength > 0 else (230, 159, 0)
    return f"rgba({red},{green},{blue},{0.5 * abs(strength):.2f})"


def check_draft(memory: Memory, draft: str, threshold: float, explained: int = 3
                ) -> Iterator[tuple[list[Word], dict[int, str]]]:
    """Find the words of a draft, and for those with the largest misfit the sentence that they contradict.

    Args:
        memory: of the story before the draft.
        draft: text.
        threshold: see `surprise.threshold_of`.
        explained: marked words to explain, at most.

    Yields:
        The words, and by index of a word the sentence: none at first, then the best of those looked at so far.
    """
    words, reasons = memory.words(checked(draft, "draft")), {}
    yield words, reasons
    marked = sorted((i for i, word in enumerate(words) if word.misfit > threshold), key=lambda i: -words[i].misfit)
    largest = dict.fromkeys(marked[:explained], 0.0)
    for sentence, fall in causes(memory.run, memory.story, draft) if largest else ():
        for i in largest:
            if fall[i] > largest[i]:
                largest[i], reasons[i] = fall[i], sentence
        yield words, reasons


def calibrated(run: Run, tokens: Path | None = None, false_alarms: float = 0.01) -> float:
    """Return the misfit above which the desk marks a word.

    Args:
        run: the run that checks drafts.
        tokens: folder with the token files of `suite.steps.prepare`; None: the folder of the run's folder.
        false_alarms: share of the words of validation stories that are above it.
    """
    paths = find_prepared(tokens or run.folder.resolve().parent)
    return threshold_of(run, TokenFile.open(paths["val"]), false_alarms=false_alarms)


def desk_strip(pair: Pair, prompt: str, percents: Sequence[int] = (0, 25, 50, 75, 100), **options) -> str:
    """Return the blend at several positions of the slider as HTML, for notebooks without a browser."""
    texts = [(f"{percent} % logic", list(pair.stream(prompt, percent, **options))) for percent in percents]
    return texts_html(prompt, texts, pair.labels)


def writing_desk(pair: Pair, threshold: float, prompt: str = "Once upon a time", story: str = "", draft: str = ""
                 ) -> Any:
    """Return the desk as a tree of core widgets: slider, prompt, split view, and the check of a draft.

    Texts are written in a thread, and a button stops it. Nothing that is typed is evaluated or read as a path.

    Args:
        pair: the runs; the first one checks drafts.
        threshold: misfit above which a word of a draft is marked.
        prompt, story, draft: what the fields hold first.
    """
    import ipywidgets as widgets

    wide = widgets.Layout(width="98%")
    percent = widgets.IntSlider(50, 0, 100, description="logic %", layout=wide)
    field_of = {name: widgets.Textarea(text, description=name, rows=2 if name == "prompt" else 4, layout=wide)
                for name, text in (("prompt", prompt), ("story", story), ("draft", draft))}
    seed = widgets.BoundedIntText(1, 0, 2**31, description="seed", layout=widgets.Layout(width="12rem"))
    length = widgets.BoundedIntText(120, 1, 2000, description="tokens", layout=widgets.Layout(width="12rem"))
    write, stop, check = (widgets.Button(description=name) for name in ("Write", "Stop", "Check"))
    stop.disabled = True
    split, marked = widgets.HTML(layout=wide), widgets.HTML(layout=wide)
    no_draft = partial(draft_html, "", [], threshold, {})
    stopped, memories = threading.Event(), {}

    def write_texts() -> None:
        start, blended = field_of["prompt"].value, percent.value
        titles = {blended: f"blend, {blended} % logic", 100: pair.labels[0], 0: pair.labels[1]}
        shares = sorted(titles, reverse=True)
        texts = [(titles[share], []) for share in shares]
        streams = {i: pair.stream(start, share, max_new_tokens=length.value, top_p=0.95, seed=seed.value)
                   for i, share in enumerate(shares)}
        drawn_at = 0.0
        while streams and not stopped.is_set():
            for i, new in list(streams.items()):  # a piece of each in turn: all texts grow together
                if (piece := next(new, None)) is None:
                    del streams[i]
                else:
                    texts[i][1].append(piece)
            if time.monotonic() - drawn_at >= REDRAW_S:
                split.value, drawn_at = texts_html(start, texts, pair.labels), time.monotonic()
        split.value = texts_html(start, texts, pair.labels, "Stopped." if stopped.is_set() else "")

    def check_text() -> None:
        text = checked(field_of["story"].value, "story")
        if text not in memories:
            marked.value = no_draft("Reading the story ...")
            memories.clear()
            memories[text] = Memory.of(pair.logic, text)
        draft, message = field_of["draft"].value, ""
        for words, reasons in check_draft(memories[text], draft, threshold):
            if not message:
                n = sum(word.misfit > threshold for word in words)
                message = f"{n} of {len(words)} words do not fit the story." if n else "Every word fits the story."
                marked.value = draft_html(draft, words, threshold, {}, f"{message} Looking for the reasons ...")
            if stopped.is_set():
                break
        marked.value = draft_html(draft, words, threshold, reasons, message)

    def run_in_thread(work: Callable[[], None], field: Any, page_of: Callable[[str], str]) -> Callable[[Any], None]:
        def started() -> None:
            try:
                work()
            except UserError as error:
                field.value = page_of(str(error))
            except Exception as error:  # of any kind: the page shows a sentence, never a stack trace
                field.value = page_of(f"This went wrong ({type(error).__name__}: {error}). The desk still works; try "
                                      "another text.")
            finally:
                write.disabled, check.disabled, stop.disabled = False, False, True

        def click(_: Any) -> None:
            write.disabled, check.disabled, stop.disabled = True, True, False
            stopped.clear()
            threading.Thread(target=started, daemon=True).start()
        return click

    write.on_click(run_in_thread(write_texts, split, partial(texts_html, "", [], pair.labels)))
    check.on_click(run_in_thread(check_text, marked, no_draft))
    stop.on_click(lambda _: stopped.set())
    ends = widgets.HTML(f"<small>0 %: creativity, {html.escape(pair.labels[1])} · 100 %: logic, "
                        f"{html.escape(pair.labels[0])}</small>")
    flow = widgets.Layout(flex_flow="row wrap")
    return widgets.VBox([percent, ends, field_of["prompt"], widgets.HBox([write, stop, seed, length], layout=flow),
                         split, field_of["story"], field_of["draft"], check, marked])


def _title(piece: Piece, labels: tuple[str, str]) -> str:
    return html.escape(", ".join(f"{label} {p:.1%}" for label, p in zip(labels, piece.probabilities, strict=True)))


def _message(message: str) -> str:
    return f'<div class="note error" role="status">{html.escape(message)}</div>' if message else ""
