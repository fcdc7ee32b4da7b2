"""Generation: one token after the other, from a model's state, with temperature, top-k, top-p and a seed."""

import math
import warnings

import torch
from torch import Tensor, nn

from plotarmour.cli import UserError
from plotarmour.machine import Machine

PIECE = 4096  # tokens of a prompt that are read at once: memory does not grow with the prompt


def next_token_probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Turn logits into the distribution to draw from.

    Args:
        logits: (V,), float.
        temperature: above 0; below 1 sharpens.
        top_k: keep the k most probable; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p; 1 keeps all.

    Returns:
        float32 (V,), sums to 1; what is not kept is 0.
    """
    p = torch.softmax(logits.float() / temperature, dim=-1)
    if not top_k and top_p == 1:
        return p
    # Sorting a vocabulary can take as long as a small model. What is too improbable to be kept is not sorted: all
    # tokens below (1 - top_p) / V together are less than 1 - top_p.
    least = p.topk(min(top_k, len(p))).values[-1] if top_k else 0.0
    likely = (p >= max(least, (1 - top_p) / len(p))).nonzero().squeeze(1)
    order = torch.sort(p[likely], descending=True, stable=True)
    kept = torch.ones_like(order.values, dtype=torch.bool)
    if top_k:
        kept[top_k:] = False
    if top_p < 1:
        kept &= (order.values.cumsum(0) - order.values) < top_p  # the first always stays
    p = torch.zeros_like(p).scatter(0, likely[order.indices], order.values * kept)
    return p / p.sum()


@torch.no_grad()
def generate(model: nn.Module, prompt: list[int], end_of_text_id: int, machine: Machine, max_new_tokens: int = 200,
             temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             slide_to: int | None = None) -> list[int]:
    """Continue a prompt.

    A model without a `context_length` (BDH) sees everything it has read. One with positions (GPT-2) sees all until
    they are used up; then it forgets what it has read, reads the last `slide_to` tokens again, from its first position
    on, and continues until they are used up once more. That, or the stop of `slide_to` 0, is said once, by a warning.

    Args:
        model: with `features`, `unembedding`, `initial_state`; in evaluation mode on the machine's device.
        prompt: ids, of any number; the end-of-text id is put before it, as in training.
        end_of_text_id: ends the story.
        machine: device and dtype.
        max_new_tokens: at most so many.
        temperature: 0 takes the most probable token.
        top_k, top_p: see `next_token_probabilities`.
        seed: same seed, same story (on one machine).
        slide_to: in tokens, 0 up to below `context_length`: how many of the last are kept and read again when the
            positions are used up, by the prompt or later. None: half the context. 0: generation stops there, at the
            model's last position. Ignored, with a warning, by a model that never slides.

    Returns:
        The new ids, without prompt and end-of-text.

    Raises:
        UserError: settings out of range, or, with `slide_to` 0, a prompt of more tokens than positions.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UserError(f"temperature {temperature} and top_k {top_k} must not be negative, top_p {top_p} must be in "
                        f"(0, 1], max_new_tokens {max_new_tokens} at least 1.")
    keep, positions = _window(model.context_length, slide_to), model.context_length or math.inf
    random = torch.Generator().manual_seed(seed)
    seen, new, held, slid = [end_of_text_id, *prompt], [], 0, False
    if keep == 0 and len(seen) > positions:
        raise UserError(f"the prompt has {len(prompt)} tokens; expected at most {positions - 1} with slide_to 0: the "
                        f"model has {positions} positions, and the first takes the end-of-text token. Shorten it, or "
                        "set slide_to above 0.")
    # Logits in float32, as in scoring: a half-precision logit of 16 is off by up to 0.06.
    head = model.unembedding.to(torch.promote_types(model.unembedding.dtype, torch.float32))
    state, waiting = model.initial_state(1), seen  # what was read, and what was not yet
    with machine.autocast:  # around all tokens: it converts weights once and keeps them
        while len(new) < max_new_tokens:
            if held + len(waiting) > positions:
                if not slid:
                    _say_window(positions, keep, len(seen), len(new), max_new_tokens)
                if keep == 0:
                    break
                state, waiting, held, slid = model.initial_state(1), seen[-keep:], 0, True
            for start in range(0, len(waiting), PIECE):
                piece = torch.tensor([waiting[start:start + PIECE]], device=machine.device)
                features, state = model.features(piece, state)
            held += len(waiting)
            with torch.autocast(machine.device.type, enabled=False):
                logits = features[0, -1].to(head.dtype) @ head.T  # (V,)
                token = _choose(logits, temperature, top_k, top_p, random)
            if token == end_of_text_id:
                break
            new.append(token)
            seen.append(token)
            waiting = [token]
    return new


def _choose(logits: Tensor, temperature: float, top_k: int, top_p: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    p = next_token_probabilities(logits.cpu(), temperature, top_k, top_p)  # one generator for every device
    return int(torch.multinomial(p, 1, generator=random))


def _window(context_length: int | None, slide_to: int | None) -> int:
    """How many tokens are read again when positions are used up."""
    if slide_to is not None and (slide_to < 0 or slide_to >= (context_length or math.inf)):
        below = f" and below the model's {context_length} positions" if context_length else ""
        raise UserError(f"slide_to {slide_to} must be at least 0{below}.")
    if context_length is None:
        if slide_to is not None:
            warnings.warn(f"slide_to {slide_to} is ignored: this model has no positions that could be used up.",
                          stacklevel=4)
        return 0
    return context_length // 2 if slide_to is None else slide_to


def _say_window(positions: int, keep: int, seen: int, new: int, wanted: int) -> None:
    """Warn for the reader of the story; `seen` counts the end-of-text token before it."""
    used = f"The model's {positions} positions are used up"
    if keep == 0:
        message = (f"{used}: the story stops at its token {seen - 1}, with {new} of {wanted} new tokens. A slide_to "
                   "above 0 goes on.")
    else:
        message = (f"{used}: from token {seen} on the story is read through a window, which sees its last {keep} to "
                   f"{positions} tokens.")
    warnings.warn(message, stacklevel=4)
