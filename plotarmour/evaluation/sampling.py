"""Generation: one token after the other, from a model's state, with temperature, top-k, top-p and a seed."""

import torch
from torch import Tensor, nn

from plotarmour.errors import UserError
from plotarmour.machine import Machine


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
    order = torch.sort(p, descending=True, stable=True)
    kept = torch.ones_like(p, dtype=torch.bool)
    if top_k:
        kept[top_k:] = False
    kept &= (order.values.cumsum(0) - order.values) < top_p  # the first always stays
    p = torch.zeros_like(p).scatter(0, order.indices, order.values * kept)
    return p / p.sum()


@torch.no_grad()
def generate(model: nn.Module, prompt: list[int], end_of_text_id: int, machine: Machine, max_new_tokens: int = 200,
             temperature: float = 0.8, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> list[int]:
    """Continue a prompt.

    Args:
        model: with `features`, `unembedding`, `initial_state`; in evaluation mode on the machine's device.
        prompt: ids; the end-of-text id is put before it, as in training.
        end_of_text_id: ends the story.
        machine: device and dtype.
        max_new_tokens: at most so many.
        temperature: 0 takes the most probable token.
        top_k, top_p: see `next_token_probabilities`.
        seed: same seed, same story (on one machine).

    Returns:
        The new ids, without prompt and end-of-text. Beyond a model's positions the older half of what it
        has read is dropped and the rest read again.

    Raises:
        UserError: settings out of range.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise UserError(f"temperature {temperature} and top_k {top_k} must not be negative, top_p {top_p} must be in "
                        f"(0, 1], max_new_tokens {max_new_tokens} at least 1.")
    random = torch.Generator().manual_seed(seed)
    seen, new = [end_of_text_id, *prompt], []
    waiting, state, held = seen, None, 0  # ids not read yet; what was read, and how many that were
    limit = model.context_length or float("inf")
    while len(new) < max_new_tokens:
        if state is None or held + len(waiting) > limit:
            state, held = model.initial_state(1), 0
            waiting = seen if len(seen) <= limit else seen[-max(1, limit // 2):]
        with machine.autocast:
            features, state = model.features(torch.tensor([waiting], device=machine.device), state)
            logits = (features[0, -1] @ model.unembedding.to(features.dtype).T).float().cpu()
        held += len(waiting)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p = next_token_probabilities(logits, temperature, top_k, top_p)
            token = int(torch.multinomial(p, 1, generator=random))
        if token == end_of_text_id:
            break
        new.append(token)
        seen.append(token)
        waiting = [token]
    return new
