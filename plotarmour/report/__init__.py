"""From scored stories to tables, figures and one page."""
