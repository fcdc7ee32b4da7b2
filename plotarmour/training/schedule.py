"""The learning rate as a function of the step, or of the time a run has taken."""

import math

from plotarmour.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig, elapsed_s: float = 0.0) -> float:
    """Return the learning rate of the update that `step` (from 0) makes.

    Linear warm-up over `warmup_steps`, then either a cosine to `final_learning_rate_fraction`, or ("linear_tail")
    constant until the last `decay_fraction`, which falls linearly to the same end. With `schedule_minutes` the schedule
    follows the clock where that is ahead of the steps, so that it ends inside the time instead of being cut.

    Args:
        step: from 0.
        config: of the run.
        elapsed_s: seconds since the run began, all sessions together; matters with `schedule_minutes` only.

    Example (max_steps = 10, warmup_steps = 2, learning_rate = 1, fraction 0):
        steps 0, 1, 2 of a cosine: 0.5, 1.0, 1.0; step 6 is half-way between 2 and 10: 0.5. With schedule_minutes = 10,
        step 2 after 5 minutes is half-way, too.
    """
    warm = config.learning_rate * (step + 1) / max(1, config.warmup_steps)
    if step < config.warmup_steps and not config.schedule_minutes:
        return warm
    by_clock = elapsed_s / (60 * config.schedule_minutes) if config.schedule_minutes else 0.0
    if config.schedule == "cosine":
        after, total = step - config.warmup_steps, config.max_steps - config.warmup_steps
        high = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(after / total, by_clock))))
    else:
        left = (config.max_steps - step) / max(1.0, config.decay_fraction * config.max_steps)
        left_by_clock = (1.0 - by_clock) / max(1e-9, config.decay_fraction)
        high = min(1.0, max(0.0, min(left, left_by_clock)))
    low = config.final_learning_rate_fraction
    rate = config.learning_rate * (low + (1.0 - low) * high)
    return min(warm, rate) if step < config.warmup_steps else rate  # time that ends during warm-up
