"""Papermill runs and notebook pairing: the only room that knows all the others."""
