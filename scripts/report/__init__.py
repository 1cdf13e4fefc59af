"""A run directory as `report.html`: one file that opens without a network.

    python -m scripts.report RUN_DIR [OTHER_DIR …]

With other directories, the report in RUN_DIR compares the runs.

`directory.py` reads a run. `cards.py` and `policies.py` choose the charts and hold their numbers.
`summary.py` has the figures above the charts, `completions.py` the samples below them. `page.py`
renders `page.html.j2`, in which `charts.js` draws the charts from JSON.
"""

from scripts.report.page import write_report

__all__ = ["write_report"]
