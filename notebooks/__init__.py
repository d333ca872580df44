"""Worked examples that run as scripts: `python -m notebooks.<name>`."""
