"""Generation: sample one token after the other, from the state of one model or from a blend of several models.

A blend of models with a common vocabulary, at shares w that have the sum 1:

    linear        p = sum of w_i * p_i            a mixture: at every token, the model i decides with probability w_i
    logarithmic   log p = sum of w_i * log p_i    less a constant: a product of experts, which all must agree
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plotarmour.cli import UserError, warn
from plotarmour.machine import Machine

GREEDY = 1e-6  # below this temperature the most probable token has all of the probability, in float32 too
PIECE = 4096  # tokens of a prompt per forward pass: memory does not grow with the prompt
BLENDS = ("linear", "logarithmic")


@dataclass(frozen=True)
class NewToken:
    """A token of a continuation."""

    id: int
    probabilities: tuple[float, ...]  # that each model gives it, before temperature, top_k, top_p and penalty


def blend_logits(logits: Sequence[Tensor], shares: Sequence[float], kind: str = "linear") -> Tensor:
    """Return the logits of a blend.

    Args:
        logits: of each model, float (..., V).
        shares: of each model, at least 0, with sum 1.
        kind: "linear" or "logarithmic".

    Returns:
        Float (..., V). Where one share is 1, that model's own logits.

    Example:
        Two models give a token the probabilities 0.9 and 0.1. At equal shares, the linear blend gives it 0.5.

    Source: linear blends as in Jelinek and Mercer (1980), products of experts as in Hinton (2002).
    """
    used = [(own, share) for own, share in zip(logits, shares, strict=True) if share]
    if len(used) == 1:
        return used[0][0]
    weighted = [own.log_softmax(-1) + math.log(share) if kind == "linear" else own.log_softmax(-1) * share
                for own, share in used]
    return torch.stack(weighted).logsumexp(0) if kind == "linear" else sum(weighted)


def next_token_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Compute the distribution to sample from.

    Args:
        logits: float (V,).
        temperature: above 0; a value below 1 sharpens the distribution.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens with a total probability of at least top_p; 1 keeps all.

    Returns:
        float32 (V,), with sum 1; 0 for tokens that are not kept.
    """
    p = torch.softmax(logits.float() / temperature, dim=-1)
    if not top_k and top_p == 1:
        return p
    # Sorting a whole vocabulary can take as long as a small model. Tokens that cannot be kept are not sorted: all
    # tokens below (1 - top_p) / V have a total probability below 1 - top_p.
    threshold = p.topk(min(top_k, len(p))).values[-1] if top_k else 0.0
    candidates = (p >= max(threshold, (1 - top_p) / len(p))).nonzero().squeeze(1)
    order = torch.sort(p[candidates], descending=True, stable=True)
    keep = torch.ones_like(order.values, dtype=torch.bool)
    if top_k:
        keep[top_k:] = False
    if top_p < 1:
        keep &= (order.values.cumsum(0) - order.values) < top_p  # always keeps the first token
    p = torch.zeros_like(p).scatter(0, candidates[order.indices], order.values * keep)
    return p / p.sum()


def generate(model: nn.Module, prompt: list[int], end_of_text_id: int, machine: Machine, max_new_tokens: int = 200,
             **options) -> list[int]:
    """Continue a prompt with one model; see `stream` for the arguments.

    Returns:
        The new ids, without prompt and end-of-text id.
    """
    with machine.autocast:  # one context for all tokens, so that autocast casts the weights once
        tokens = stream([model], [1.0], prompt, end_of_text_id, machine, max_new_tokens, **options)
        return [token.id for token in tokens]


@torch.no_grad()
def stream(models: Sequence[nn.Module], shares: Sequence[float], prompt: list[int], end_of_text_id: int,
           machine: Machine, max_new_tokens: int = 200, temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0,
           repetition_penalty: float = 1.0, seed: int = 0, slide_to: int | None = None,
           blend: str = "linear") -> Iterator[NewToken]:
    """Continue a prompt by a blend of models, one token after the other; each model keeps its own state.

    A model without a `context_length` (BDH) uses all tokens before. A model with a limited context (GPT-2) uses all
    tokens until its positions are used up. Then it reads the last `slide_to` tokens again, from its first position on,
    and continues until its positions are used up again. A warning says so once.

    Args:
        models: each a `plotarmour.models.LanguageModel` in evaluation mode, on the machine's device, of one tokenizer.
        shares: of each model in the blend, see `blend_logits`. With a share of 1 a model's text is the same as alone.
        prompt: token ids; the end-of-text id is put before them, as in training.
        end_of_text_id: id that ends the story.
        machine: device and dtype.
        max_new_tokens: maximum number of new tokens, at least 1.
        temperature: at least 0; 0, or less than 1e-6, takes the most probable token.
        top_k, top_p: see `next_token_probabilities`; they apply to the blend.
        repetition_penalty: at least 1: factor on the log-probability of each token that the continuation has already.
            As in CTRL (Keskar et al. 2019, arXiv 1909.05858), but on log-probabilities, which are never above 0.
        seed: seed of the sampling, in [0, 2**32); the same seed gives the same story on the same machine.
        slide_to: tokens to read again when the positions are used up, at least 0 and below `context_length`. 0 stops
            there instead. None: half of `context_length`. A model without a `context_length` ignores it with a warning.
        blend: "linear" or "logarithmic".

    Yields:
        The new tokens, without end-of-text.

    Raises:
        UserError: settings out of range, or a prompt longer than the context with `slide_to` 0.
    """
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UserError(f"temperature {temperature} and top_k {top_k} must not be negative or infinite, top_p {top_p} "
                        f"must be in (0, 1], max_new_tokens {max_new_tokens} at least 1.")
    if not 1 <= repetition_penalty < math.inf:
        raise UserError(f"repetition_penalty {repetition_penalty} must be at least 1, and finite; 1 changes nothing.")
    if min(shares) < 0 or not math.isclose(sum(shares), 1) or blend not in BLENDS:
        raise UserError(f"shares {list(shares)} must be at least 0 with the sum 1, and blend {blend!r} must be one of "
                        f"{', '.join(BLENDS)}.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must be in [0, 2**32).")
    tokens, new, random = [end_of_text_id, *prompt], [], torch.Generator().manual_seed(seed)
    readers = [_Reader(model, tokens, machine, slide_to) for model in models]
    while len(new) < max_new_tokens:
        with machine.autocast:  # not around `yield`: streams may take turns, and the caller has work of its own
            logits = [reader.read(len(new), max_new_tokens) for reader in readers]
        if any(own is None for own in logits):
            return
        scores = blend_logits(logits, shares, blend)
        if repetition_penalty > 1 and new:
            seen = torch.tensor(sorted(set(new)))
            scores = scores.log_softmax(-1)
            scores[seen] *= repetition_penalty
        if temperature < GREEDY:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(next_token_probabilities(scores, temperature, top_k, top_p), 1,
                                          generator=random))
        if token == end_of_text_id:
            return
        new.append(token)
        tokens.append(token)
        yield NewToken(token, tuple(float((own[token] - own.logsumexp(-1)).exp()) for own in logits))


class _Reader:
    """One model that reads a growing list of tokens."""

    def __init__(self, model: nn.Module, tokens: list[int], machine: Machine, slide_to: int | None):
        self.model, self.tokens, self.machine = model, tokens, machine
        self.positions = model.context_length or math.inf
        self.slide_to = (model.context_length or 0) // 2 if slide_to is None else slide_to
        if not 0 <= self.slide_to < self.positions:
            raise UserError(f"slide_to {slide_to} must be at least 0 and below the model's {self.positions} positions.")
        if slide_to is not None and model.context_length is None:
            warn(f"slide_to {slide_to} is ignored: the context of this model is not limited.")
        if slide_to == 0 and len(tokens) > self.positions:
            raise UserError(f"the prompt has {len(tokens) - 1} tokens; expected at most {self.positions - 1} with "
                            f"slide_to 0: the model has {self.positions} positions, and the first takes the "
                            "end-of-text token. Shorten it, or set slide_to above 0.")
        self.state, self.begin, self.end, self.slid = model.initial_state(1), 0, 0, False  # it has read [begin, end)
        # Logits in float32, as in scoring: the error of a half-precision logit of 16 is up to 0.06.
        self.head = model.unembedding.to(torch.promote_types(model.unembedding.dtype, torch.float32))

    def read(self, n_new: int, max_new_tokens: int) -> Tensor | None:
        """Read what is new, and return the logits of the next token on the CPU, float (V,); None to stop."""
        if len(self.tokens) - self.begin > self.positions:
            if not self.slid:
                effect = (f"from here on the context is the last {self.slide_to} to {self.positions} tokens"
                          if self.slide_to else f"generation stops after {n_new} of {max_new_tokens} new tokens; set "
                          "slide_to above 0 to continue")
                warn(f"Token {len(self.tokens)} needs more than the model's {self.positions} positions: {effect}.")
            if self.slide_to == 0:
                return None
            self.begin = self.end = len(self.tokens) - self.slide_to
            self.state, self.slid = self.model.initial_state(1), True
        for start in range(self.end, len(self.tokens), PIECE):
            piece = torch.tensor([self.tokens[start:start + PIECE]], device=self.machine.device)
            features, self.state = self.model.features(piece, self.state)
        self.end = len(self.tokens)
        with torch.autocast(self.machine.device.type, enabled=False):
            return (features[0, -1].to(self.head.dtype) @ self.head.T).cpu()  # the same generator for every device
