"""Rewards of tokens and of whole completions; `metrics/` holds what only evaluations use."""
