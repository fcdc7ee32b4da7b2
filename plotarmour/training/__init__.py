"""The training loop and its parts: step, schedule, prefetch, checkpoints, log, how a run ends."""
