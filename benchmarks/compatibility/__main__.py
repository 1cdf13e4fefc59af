"""Which families of models work with what: the compatibility matrix.

    python -m benchmarks.compatibility                run everything, a family after the other
    python -m benchmarks.compatibility FAMILY …       these families; the others' results stay
    python -m benchmarks.compatibility --page         write the page again from the results

Each family is a tiny random model. Its checks share a process, which starts vLLM once for them.
The results go to docs/results/compatibility.json, and docs/compatibility.md is made of
them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.compatibility.families import END, FAMILIES
from benchmarks.compatibility.page import PAGE, RESULTS, facts, page, results

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run the families, and write results and page; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compatibility",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--page", action="store_true", help="write the page again")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.families) - set(FAMILIES):
        parser.error(f"there is no family {min(unknown)}; choose from {', '.join(FAMILIES)}")
    if args.child:
        check(args.families[0], args.child)
        return 0
    for name in [] if args.page else args.families or FAMILIES:
        print(f"== {name}", flush=True)
        store(name, in_process(name))
    PAGE.write_text(page(results()))
    return 0


def in_process(name: str) -> dict:
    """Check a family in a process of its own; returns what held and what did not."""
    with tempfile.TemporaryDirectory(prefix="onstream-") as work:
        found = Path(work) / "found.json"
        command = [sys.executable, "-m", "benchmarks.compatibility", name, "--child", found]
        status = subprocess.run(command, cwd=ROOT).returncode
        if not found.exists():
            return {"loads": {"holds": False, "what": f"exit status {status}", "seconds": 0}}
        return json.loads(found.read_text())


def check(name: str, found: Path) -> None:
    """Try every feature with a family, and write what held after each."""
    from benchmarks.compatibility.features import FEATURES, Subject
    from recipes.errors import first_line
    from scripts.cli import quiet_libraries
    from scripts.tiny_models import make_tokenizer

    quiet_libraries()
    subject = Subject(name, found.parent, make_tokenizer(END))
    outcomes: dict[str, dict] = {}
    for key, feature in FEATURES.items():
        if feature.families and name not in feature.families:
            continue
        started = time.perf_counter()
        try:
            outcome = {"holds": True, "what": feature.check(subject)}
        except Exception as error:
            outcome = {"holds": False, "what": first_line(error) or type(error).__name__}
        outcome["seconds"] = round(time.perf_counter() - started, 2)
        outcomes[key] = outcome
        print(f"   {key:14} {'yes' if outcome['holds'] else 'NO '} {outcome['what']}", flush=True)
        found.write_text(json.dumps(outcomes))


def store(name: str, outcomes: dict) -> None:
    """Put a family's outcomes into the results, in the order of the families."""
    families = results()["families"] if RESULTS.exists() else {}
    families[name] = {**facts(), "features": outcomes}
    ordered = {key: families[key] for key in FAMILIES if key in families}
    RESULTS.write_text(json.dumps({"families": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
