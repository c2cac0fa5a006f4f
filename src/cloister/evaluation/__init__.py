"""Scoring held-out examples, the statistics of scores, and paired comparisons."""
