"""The learning rate as a function of the step."""

import math

from plotarmour.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Return the learning rate of the update that `step` (from 0) makes.

    Linear warm-up over `warmup_steps`, then either a cosine to `final_learning_rate_fraction`, or ("linear_tail")
    constant until the last `decay_fraction` of the steps, which fall linearly to the same end.

    Example (max_steps = 10, warmup_steps = 2, learning_rate = 1, fraction 0):
        steps 0, 1, 2 of a cosine: 0.5, 1.0, 1.0; step 6 is half-way between 2 and 10: 0.5.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    after, total = step - config.warmup_steps, config.max_steps - config.warmup_steps
    if config.schedule == "cosine":
        high = 0.5 * (1.0 + math.cos(math.pi * min(1.0, after / total)))
    else:
        tail = max(1.0, config.decay_fraction * config.max_steps)
        high = min(1.0, max(0.0, (config.max_steps - step) / tail))
    low = config.final_learning_rate_fraction
    return config.learning_rate * (low + (1.0 - low) * high)
