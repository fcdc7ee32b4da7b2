"""Generation: sample one token after the other from a model's state."""

import math

import torch
from torch import Tensor, nn

from plotarmour.cli import UserError, warn
from plotarmour.machine import Machine

GREEDY = 1e-6  # below this temperature the most probable token has all of the probability, in float32 too
PIECE = 4096  # tokens of a prompt per forward pass: memory does not grow with the prompt


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


@torch.no_grad()
def generate(model: nn.Module, prompt: list[int], end_of_text_id: int, machine: Machine, max_new_tokens: int = 200,
             temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             slide_to: int | None = None) -> list[int]:
    """Continue a prompt.

    A model without a `context_length` (BDH) uses all tokens before. A model with a limited context (GPT-2) uses all
    tokens until its positions are used up. Then it reads the last `slide_to` tokens again, from its first position on,
    and continues until its positions are used up again. A warning says so once.

    Args:
        model: a `plotarmour.models.LanguageModel` in evaluation mode, on the machine's device.
        prompt: token ids; the end-of-text id is put before them, as in training.
        end_of_text_id: id that ends the story.
        machine: device and dtype.
        max_new_tokens: maximum number of new tokens, at least 1.
        temperature: at least 0; 0, or less than 1e-6, takes the most probable token.
        top_k, top_p: see `next_token_probabilities`.
        seed: seed of the sampling, in [0, 2**32); the same seed gives the same story on the same machine.
        slide_to: tokens to read again when the positions are used up, at least 0 and below `context_length`. 0 stops
            there instead. None: half of `context_length`. A model without a `context_length` ignores it with a warning.

    Returns:
        The new ids, without prompt and end-of-text id.

    Raises:
        UserError: settings out of range, or a prompt longer than the context with `slide_to` 0.
    """
    positions = model.context_length or math.inf
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UserError(f"temperature {temperature} and top_k {top_k} must not be negative or infinite, top_p {top_p} "
                        f"must be in (0, 1], max_new_tokens {max_new_tokens} at least 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} must be in [0, 2**32).")
    if slide_to is None:
        slide_to = (model.context_length or 0) // 2
    elif not 0 <= slide_to < positions:
        raise UserError(f"slide_to {slide_to} must be at least 0 and below the model's {positions} positions.")
    elif model.context_length is None:
        warn(f"slide_to {slide_to} is ignored: the context of this model is not limited.")
    tokens, n_read, unread = [end_of_text_id, *prompt], 0, [end_of_text_id, *prompt]
    if slide_to == 0 and len(tokens) > positions:
        raise UserError(f"the prompt has {len(prompt)} tokens; expected at most {positions - 1} with slide_to 0: the "
                        f"model has {positions} positions, and the first takes the end-of-text token. Shorten it, or "
                        "set slide_to above 0.")
    random, new, slid = torch.Generator().manual_seed(seed), [], False
    # Logits in float32, as in scoring: the error of a half-precision logit of 16 is up to 0.06.
    head = model.unembedding.to(torch.promote_types(model.unembedding.dtype, torch.float32))
    state = model.initial_state(1)
    with machine.autocast:  # one context for all tokens, so that autocast casts the weights once
        while len(new) < max_new_tokens:
            if n_read + len(unread) > positions:
                if not slid:
                    effect = (f"from here on the context is the last {slide_to} to {positions} tokens" if slide_to else
                              f"generation stops after {len(new)} of {max_new_tokens} new tokens; set slide_to above 0 "
                              "to continue")
                    warn(f"Token {len(tokens)} needs more than the model's {positions} positions: {effect}.")
                if slide_to == 0:
                    break
                state, unread, n_read, slid = model.initial_state(1), tokens[-slide_to:], 0, True
            for start in range(0, len(unread), PIECE):
                piece = torch.tensor([unread[start:start + PIECE]], device=machine.device)
                features, state = model.features(piece, state)
            n_read += len(unread)
            with torch.autocast(machine.device.type, enabled=False):
                logits = features[0, -1].to(head.dtype) @ head.T  # (V,)
                if temperature < GREEDY:
                    token = int(logits.argmax())
                else:  # on the CPU: the same generator for every device
                    p = next_token_probabilities(logits.cpu(), temperature, top_k, top_p)
                    token = int(torch.multinomial(p, 1, generator=random))
            if token == end_of_text_id:
                break
            new.append(token)
            tokens.append(token)
            unread = [token]
    return new
