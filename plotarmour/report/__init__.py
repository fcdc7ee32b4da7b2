"""Comparison of runs: tables, figures and a report page from scored stories."""
