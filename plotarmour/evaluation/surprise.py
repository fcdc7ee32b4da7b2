"""Surprise: how well each word of a draft fits the story so far.

A word that contradicts the story is one that a model which has read it does not expect, at a place where it expects
another one. The misfit of a word w of a draft is

    nats of w given the story and the draft before it - H

where H is the entropy, in nats, of the model's predictions of the word's tokens: the nats that it expects to pay. Where
many words can follow, none is a surprise. Words are what white space separates; their tokens' nats are added.

Source: surprisal marks contradictions at the word and is gone at the end of the story (arXiv 2512.07777), so words are
scored, never whole stories; errors stand where the entropy is high (arXiv 2603.05890), so it is taken off. To take off
what the model without the story pays instead was measured to find fewer contradictions (docs/desk.md).
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from plotarmour.cli import UserError
from plotarmour.data.token_file import TokenFile
from plotarmour.evaluation.scoring import windows_of
from plotarmour.files import complete_file

PIECE = 512  # tokens per forward pass; their logits are in memory at once
# A sentence ends at . ! or ? where no small letter follows, and at a line end.
SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"')\]]*(?=\s+[^a-z\s]|\s*$)|(?=\n)|$)", re.S)


@dataclass(frozen=True)
class Word:
    """A word of a draft."""

    begin: int  # [begin, end) in characters of the draft
    end: int
    nats: float  # given the story and the draft before it; sum over its tokens
    entropy: float  # of their predictions, nats; sum

    def of(self, draft: str) -> str:
        """Return the word in its draft, without punctuation at its ends."""
        word = draft[self.begin:self.end]
        return re.sub(r"^\W+|\W+$", "", word) or word

    @property
    def misfit(self) -> float:
        """Nats above what the model expects to pay here: about 0 on average for words that fit."""
        return self.nats - self.entropy


@dataclass(frozen=True)
class Memory:
    """A model that has read a story.

    A model without a `context_length` keeps its state, which for BDH has the same size after any story. A model with
    a limited context keeps the last tokens, and reads as many of them as the draft leaves positions for, at least half.
    """

    run: Any  # a `plotarmour.run.Run`
    story: str
    tokens: list[int]  # that the model reads before a draft; at least the last one
    state: Any  # `plotarmour.models.State` after the tokens before these; None: they are all that it reads

    @classmethod
    def of(cls, run, story: str) -> "Memory":
        """Read a story; "" is none."""
        model, machine = run.model, run.machine
        tokens = [run.tokenizer.end_of_text_id, *run.tokenizer.encode(story.rstrip())]
        if model.context_length is not None:
            return cls(run, story, tokens[-model.context_length:], None)
        state = model.initial_state(1)
        with torch.no_grad(), machine.autocast:
            for begin in range(0, len(tokens) - 1, PIECE):
                piece = torch.tensor([tokens[begin:min(begin + PIECE, len(tokens) - 1)]], device=machine.device)
                _, state = model.features(piece, state)
        return cls(run, story, tokens[-1:], state)

    def save(self, path: Path) -> None:
        """Save the story and what the model remembers of it, as safetensors."""
        tensors = {"tokens": torch.tensor(self.tokens), **(self.state.tensors() if self.state else {})}
        with complete_file(path, "wb") as file:
            file.write(save(tensors, {"story": self.story, "weights": _sha256_of(self.run.model)}))

    @classmethod
    def load(cls, run, path: Path) -> "Memory":
        """Return what `save` wrote.

        Raises:
            UserError: it is what other weights remember, or no such file.
        """
        path.open("rb").close()  # for the usual errors; those of safetensors do not name the file
        about, model = {}, run.model
        with suppress(SafetensorError), safe_open(path, "pt", str(run.machine.device)) as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        if about.get("weights") != _sha256_of(model):
            raise UserError(f"{path} is not what {run.name} remembers of a story: it is of other weights, or damaged. "
                            "Read the story again with these weights.")
        tokens = tensors.pop("tokens").tolist()
        return cls(run, about["story"], tokens, type(model.initial_state(1)).from_tensors(tensors) if tensors else None)

    def score(self, draft: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the nats of each token of a draft, and the entropy of its prediction; float32 (n,) each."""
        model, read = self.run.model, self.tokens
        if model.context_length is not None:
            read = read[-max(model.context_length // 2, model.context_length + 1 - len(draft)):]
        tokens = torch.tensor([[*read, *draft]], device=self.run.machine.device)
        n, head, nats, entropies = tokens.shape[1] - 1, model.unembedding.float(), [], []
        state = None if self.state is None else self.state.copy()  # other drafts continue from it, too
        windows = (windows_of(n, model.context_length, model.context_length // 2) if state is None else
                   [(begin, min(begin + PIECE, n), 0) for begin in range(0, n, PIECE)])
        with torch.no_grad():
            for begin, end, first in windows:
                with self.run.machine.autocast:
                    features, state = model.features(tokens[:, begin:end], state)
                log_p = (features[0, first:].float() @ head.T).log_softmax(-1)
                nats.append(-log_p.gather(1, tokens[0, begin + first + 1:end + 1, None])[:, 0])
                entropies.append(-(log_p.exp() * log_p).sum(-1))
        return tuple(torch.cat(parts)[n - len(draft):].cpu().numpy() for parts in (nats, entropies))

    def words(self, draft: str) -> list[Word]:
        """Return the words of a draft that follows the story, with their nats.

        Args:
            draft: text; a space is put before it, and the blank space at its ends does not count.

        Raises:
            UserError: an empty draft.
        """
        spans = [match.span() for match in re.finditer(r"\S+", draft)]
        if not spans:
            raise UserError("the draft is empty; expected at least one word.")
        ids, ends = self.run.tokenizer.encode_with_ends(f" {draft}".rstrip())
        # A token belongs to the word in which it ends; one of blank space only, to the word that follows.
        owner = np.searchsorted([end for _, end in spans], np.array(ends) - 1).clip(max=len(spans) - 1)
        sums = [np.bincount(owner, weights, len(spans)) for weights in self.score(ids)]
        return [Word(*span, *map(float, values)) for span, *values in zip(spans, *sums, strict=True)]


def threshold_of(run, data: TokenFile, stories: int = 200, false_alarms: float = 0.01) -> float:
    """Return the misfit above which a word is marked: of the words of held-out stories, a share is above it.

    The last sentence of each story is the draft, the sentences before it are the story.

    Args:
        run: the run whose misfits are meant.
        data: held-out stories, best the validation part.
        stories: how many of them to read, from the first on.
        false_alarms: share of words that are above the threshold and fit.

    Raises:
        UserError: no story with two sentences, or a share that is none.
    """
    if not 0 <= false_alarms <= 1:
        raise UserError(f"false alarms are {false_alarms:.0%} of the words that fit; expected 0 to 100 %.")
    misfits = []
    for i in range(min(stories, data.n_stories)):
        misfits += last_misfits(run, run.tokenizer.decode(data.story(i)))
    if not misfits:
        raise UserError(f"{data.path} has no story with two sentences; expected stories to calibrate on.")
    return float(np.quantile(misfits, 1 - false_alarms))


def last_misfits(run, text: str) -> list[float]:
    """Return the misfit of each word of a text's last sentence, after those before it; none of a single sentence."""
    spans = sentences(text)
    if len(spans) < 2:
        return []
    begin = spans[-1][0]
    return [word.misfit for word in Memory.of(run, text[:begin]).words(text[begin:])]


def sentences(text: str) -> list[tuple[int, int]]:
    """Return the [begin, end) of each sentence; a line end ends one, too.

    Example:
        'He ran. "Stop!" she said.' has two sentences: [0, 7) and [8, 25).
    """
    return [match.span() for match in SENTENCE.finditer(text)]


def causes(run, story: str, draft: str, most: int = 20) -> Iterator[tuple[str, np.ndarray]]:
    """Find by how much the misfit of each word of a draft falls without each of the story's last sentences.

    Args:
        run: the run that checks the draft.
        story, draft: texts.
        most: sentences to leave out, one at a time. Only they are read, once for each.

    Yields:
        A sentence of the story, and for each word the misfit less that without this sentence, (words,); in the
        story's order.
    """
    spans = sentences(story)[-most:]

    def misfits(text: str) -> np.ndarray:
        return np.array([word.misfit for word in Memory.of(run, text).words(draft)])

    first = spans[0][0] if spans else 0
    whole = misfits(story[first:])
    for begin, end in spans:
        yield story[begin:end], whole - misfits(story[first:begin] + story[end:])


def _sha256_of(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy())
    return digest.hexdigest()
