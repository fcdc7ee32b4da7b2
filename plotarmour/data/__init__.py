"""Corpus to tokens to batches. Knows nothing of models."""
