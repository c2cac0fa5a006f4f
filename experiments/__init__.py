"""The study behind docs/results.md: does protection cost accuracy? `python -m experiments --help`."""
