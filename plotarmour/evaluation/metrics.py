"""Metrics, by one rule: add nats, count tokens, divide once, exponentiate once.

Loss is nats per token, perplexity is exp(loss), and bits per byte are nats / ln 2 / bytes of the text. The tokens of a
story are its ids and the end-of-text token that closes it. A mean of losses or perplexities is none of these metrics.
"""

import math

MAX_LOSS = 700.0  # nats per token; exp of a larger loss overflows a float64


def totals(nats: float, n_tokens: int, n_bytes: int) -> dict[str, float | None]:
    """Compute loss, perplexity and bits per byte from summed nats.

    Args:
        nats: sum over all tokens.
        n_tokens: number of tokens, at least 1.
        n_bytes: number of UTF-8 bytes of the text; 0 gives None for bits_per_byte.

    Returns:
        loss (nats per token), perplexity, bits_per_byte.

    Example:
        >>> totals(16 * math.log(4), 16, 32)
        {'loss': 1.3862943611198906, 'perplexity': 4.0, 'bits_per_byte': 1.0}
    """
    loss = nats / n_tokens
    return {"loss": loss, "perplexity": perplexity(loss),
            "bits_per_byte": nats / math.log(2) / n_bytes if n_bytes else None}


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats per token; losses above `MAX_LOSS` give exp(MAX_LOSS)."""
    return math.exp(min(loss, MAX_LOSS))
