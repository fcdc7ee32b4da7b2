"""Scoring held-out stories, floors, comparison, sampling."""
