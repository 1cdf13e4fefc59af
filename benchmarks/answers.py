"""How well answers are graded, beside math-verify's own defaults: rates, misgraded pairs, time.

    python -m benchmarks.answers [data=PATH …]

The graded pairs are those of tests/rewards/graded_answers.json. A false positive is a pair that is
not equal and was graded 1. math-verify parses the completion, and the reference between dollar
signs, with its defaults, then verifies. `data=` takes Parquet or JSON-lines files: how many of
their reference answers equal themselves in a box, and how many in another style."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rewards.math import grade

PAIRS = Path(__file__).resolve().parents[1] / "tests" / "rewards" / "graded_answers.json"
# The same answer in another style, so that equal strings do not decide.
STYLES = (("\\frac", "\\dfrac"), ("\\left", ""), ("\\right", ""), ("(", "\\left("))
STYLES += ((")", "\\right)"), ("=", " = "), ("+", " + "))

Grader = Callable[[str, str], bool]


def ours(completion: str, answer: str) -> bool:
    return grade(completion, answer) == 1.0


def math_verify(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    # It reads LaTeX between dollar signs only.
    reference = answer if "$" in answer else f"${answer}$"
    return bool(verify(parse(reference), parse(completion)))


def measure(name: str, grader: Grader, pairs: Sequence[dict]) -> None:
    """Prints the rates, the misgraded pairs and the times of one grader."""
    grader(r"\boxed{1/2}", "0.5")  # imports, and starts a process
    wrong, seconds = [], []
    for pair in pairs:
        started = time.perf_counter()
        equal = grader(pair["completion"], pair["gold"])
        seconds.append(time.perf_counter() - started)
        if equal != pair["equal"]:
            wrong.append(pair)
    for equal, rate in ((False, "false positives"), (True, "false negatives")):
        of = sum(pair["equal"] == equal for pair in pairs)
        misgraded = [pair for pair in wrong if pair["equal"] == equal]
        print(f"{name}: {len(misgraded)} {rate} of {of} pairs ({len(misgraded) / of:.1%})")
        for pair in misgraded:
            print(f"    {pair['kind']}: {_short(pair['completion'])} | {_short(pair['gold'])}")
    usual = [s for s, pair in zip(seconds, pairs) if pair["kind"] != "hostile"]
    print(
        f"{name}: {1000 * sum(usual) / len(usual):.1f} ms a pair, at most {max(usual):.2f} s; "
        f"hostile pairs at most {max(seconds):.2f} s"
    )


def _short(text: str) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) < 90 else text[:87] + "…"


def measure_file(path: str) -> None:
    """Prints how many reference answers of a data file equal themselves."""
    from rollouts.data.load import load_examples

    answers = [example.answer for example in load_examples(path) if example.answer]
    boxed = sum(ours(f"\\boxed{{{answer}}}", answer) for answer in answers)
    styled = sum(ours(f"\\boxed{{{_restyled(answer)}}}", answer) for answer in answers)
    print(
        f"{Path(path).name}: of {len(answers)} answers {boxed} equal themselves in a box, "
        f"{styled} in another style"
    )


def _restyled(answer: str) -> str:
    for written, other in STYLES:
        answer = answer.replace(written, other)
    return answer


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", nargs="*", metavar="data=PATH")
    arguments = parser.parse_args().data
    if unknown := [word for word in arguments if not word.startswith("data=")]:
        parser.error(f"{unknown[0]}: give files as data=PATH")
    logging.disable(logging.CRITICAL)
    pairs = json.loads(PAIRS.read_text("utf-8"))
    measure("ours", ours, pairs)
    measure("math-verify", math_verify, pairs)
    for word in arguments:
        measure_file(word.removeprefix("data="))
    return 0


if __name__ == "__main__":
    sys.exit(main())
