"""Faults, injected from outside into real runs of every recipe: `python -m scripts.faults`.

`faults.py` is the list of faults. `inject.py` brings one into a run. `processes.py` starts a run as
a process and says how it ended. `cells.py` holds a recipe's run against a fault and judges it.
`campaign.py` deals the recipes out to the cores. `page.py` writes docs/results/faults.md.
"""
