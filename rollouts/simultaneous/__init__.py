"""Simultaneous generation: a source is read unit by unit, and a decision head says when to write."""
