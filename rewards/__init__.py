"""Rewards: per token (teacher against student) and per completion (verifiers), and the scores made
of them."""
