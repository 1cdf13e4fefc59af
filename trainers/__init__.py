"""The training loop, the three loss primitives, and one file per method.

`core/` has what the loop is made of, `modes/` how a run reads its sources.
"""
