"""Simultaneous generation: a model reads unit by unit, and a decision head says when to write."""
