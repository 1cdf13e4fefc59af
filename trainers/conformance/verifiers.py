"""Verifiers: what a completion is worth, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from recipes.components import VERIFIERS
from recipes.compose import compose
from rewards.calls import made
from rewards.verification import verdicts
from trainers.conformance.report import Case, require

TEXTS = (
    "",
    "7",
    "8",
    "\\boxed{7}",
    "\\boxed{8}",
    "So 3 + 4 = 7. \\boxed{7}",
    "\\boxed{",
    "\x00é你",
)
# (completion, answer, score) of those that come with the project.
ROWS = {
    "math": (
        ("\\boxed{7}", "7", 1),
        ("3 + 4 = \\boxed{7.0}", "7", 1),
        ("\\boxed{8}", "7", 0),
        ("", "7", 0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1),
    ),
    "code": (
        ("def f(x): return x + 1", "assert f(1) == 2", 1),
        ("def f(x): return x", "assert f(1) == 2", 0),
        ("", "assert True", 0),
    ),
    "exact": (("7", "7", 1), ("The 7", "7", 1), ("8", "7", 0), ("", "7", 0)),
}


def resolved(name: str) -> Callable[[str, str], float]:
    """The verifier of one completion, whatever its form."""
    rewards = compose(["recipe=grpo", "reward.code.enabled=true"]).reward
    verifier = made(VERIFIERS.resolve(name), rewards)
    return lambda text, answer: verdicts(verifier, [(text, (answer,))], 60.0)[0].score


def bounds(name: str) -> None:
    verifier = resolved(name)
    for text in TEXTS:
        score = verifier(text, "7")
        require(0 <= score <= 1, f"a score of {score} for {text!r}")


def repeats(name: str) -> None:
    verifier = resolved(name)
    for text in TEXTS:
        scores = {float(verifier(text, "7")) for _ in range(3)}
        require(len(scores) == 1, f"{text!r} has the scores {sorted(scores)}")


def depends(name: str) -> None:
    verifier = resolved(name)
    scores = {float(verifier(text, "7")) for text in TEXTS}
    require(len(scores) > 1, f"every completion has the score {scores.pop():g}")


def values(name: str) -> None:
    verifier = resolved(name)
    for text, answer, score in ROWS[name]:
        found = float(verifier(text, answer))
        require(found == score, f"{text!r} for {answer!r}: {found:g}, not {score}")


def of_verifier(name: str) -> Iterator[Case]:
    """The checks of one verifier, registered or from outside."""
    checks = {"bounds": bounds, "same score again": repeats, "depends on the action": depends}
    if name in ROWS:
        checks["values"] = values
    for label, check in checks.items():

        def run(check=check) -> None:
            check(name)

        yield Case(f"reward.verifier={name}", label, "", run)


def cases() -> Iterator[Case]:
    for name in ROWS:
        yield from of_verifier(name)
