"""Scoring held-out stories, metrics, n-gram baselines, comparison, generation."""
