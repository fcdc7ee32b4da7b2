"""The learning rate as a function of the step, or of the time that a run has taken."""

import math

from plotarmour.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig, elapsed_s: float = 0.0) -> float:
    """Return the learning rate of one update.

    After a linear warm-up over `warmup_steps`, it follows a cosine down to `final_learning_rate_fraction`, or
    ("linear_tail") it is constant and falls linearly to the same end over the last `decay_fraction`. With
    `schedule_minutes`, the schedule follows the clock where the clock is ahead of the steps, so that it is complete
    when the time is over.

    Args:
        step: index of the update, from 0.
        config: the training part of a recipe.
        elapsed_s: seconds of training, over all sessions; used only with `schedule_minutes`.

    Example (max_steps = 10, warmup_steps = 2, learning_rate = 1, fraction 0):
        steps 0, 1, 2 of a cosine: 0.5, 1.0, 1.0; step 6 is half-way between 2 and 10: 0.5. With schedule_minutes = 10,
        step 2 after 5 minutes is half-way as well.
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
    return min(warm, rate) if step < config.warmup_steps else rate  # the time may be over during warm-up
