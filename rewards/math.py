"""Is a completion's final answer correct? `rewards/equality.py` compares it with the reference.

That runs in a process of its own, with math-verify's parser and sympy (`rewards/math_process.py`).
Plain integers and equal strings never get there.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

from rewards.math_process import MathProcess

# Seconds for one comparison, where the caller gives no limit.
TIMEOUT = 5.0
# Characters. A longer answer is wrong unless the strings are equal.
LONGEST = 1000
# Characters at the end of a completion without a box, among which an answer is looked for.
TAIL = 400

BOX = r"\\f?box(?:ed)?\s*\{"
_BOX = re.compile(BOX)
# An escaped brace is not a brace.
_BRACES = re.compile(BOX + r"|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"[+-]?\d{1,50}")
# What names the content of the box that follows: `x=`.
_NAME = r"(?P<name>(?:\\[a-z]+|[A-Za-z])(?:_(?:\w|\{\w+\}))?)\s*=\s*"
_NAME_BEFORE = re.compile(rf"(?<![A-Za-z\\]){_NAME}[\s$]*\Z")
_CONNECTIVE = r"[,;]|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\(?:lor|vee)\b"
_SPACE = r"[\s$~]|\\[()\[\],;: ]|\\q?quad\b"
# Between two boxes that belong together.
_BETWEEN = re.compile(rf"(?:{_SPACE})*(?:(?:{_CONNECTIVE})(?:{_SPACE})*)+(?:{_NAME}[\s$]*)?")
_MARK = re.compile(r"(?<!#)####(?!#)\s*(\S[^\n]*)")
# A number and then a sentence, or what was counted; not `2 or 3` and not `2 pi`.
_NUMBER_THEN_WORDS = re.compile(
    r"([-+$\s]*\d[\d,]*(?:\.\d+)?(?:/\d+)?\\?%?)[,;:]?\s+"
    r"(?!(?:and|or|to|by|plus|minus|times|over)\s+[-+\d$\\])"
    r"(?!pi\b|sqrt|times\b|over\b|e[+-]?\d|sin|cos|tan|log|ln\b|exp)\(?[A-Za-z]{2,}(?![A-Za-z(]).*"
)
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)[\s:*]*(\S.*?)(?:\.?\s*\Z|\.\s|\n)", re.I)
# How a formula begins, and an English sentence does not.
_FORMULA = re.compile(r"[-+($\s]*(?:\d|\\|[A-Z]\)|[A-Za-z]\s*(?:[-+*/^=_(!]|\Z))")


def grade(completion: str, answer: str, seconds: float | None = None) -> float:
    """1.0 if the completion's final answer equals `answer`, else 0.0.

    0.5 is 1/2, `1,000` is 1000, `x=5` is 5, `46\\text{ shells}` is 46: `rewards/equality.py` has
    the rules. No text makes it raise.

    Args:
        completion: a text.
        answer: the reference.
        seconds: the limit of a comparison. None: `TIMEOUT`, and what takes longer is unequal.

    Raises:
        TimeoutError: it takes longer than `seconds`.
        OnstreamError: math-verify is not installed.
    """
    if seconds is None:
        try:
            return grade(completion, answer, TIMEOUT)
        except TimeoutError:
            return 0.0
    prediction = extract_answer(completion, seconds)
    return float(prediction is not None and _equal(_plain(prediction), _plain(answer), seconds))


def extract_answer(completion: str, seconds: float = TIMEOUT) -> str | None:
    """The completion's final answer as text.

    It is `extract_boxed`'s. A box that was opened but never closed is a completion cut short: None,
    as where nothing was found. Where there is no box at all, the answer stands after the last
    `####`, else in the last 400 characters: after the words "answer is", or where math-verify
    finds one.

    Raises:
        TimeoutError: that takes longer than `seconds`.
        OnstreamError: math-verify is not installed.
    """
    boxed = extract_boxed(completion)
    if boxed is not None or _BOX.search(completion):
        return boxed or None
    if marked := extract_marked(completion):
        worked, answer = marked
        is_last_line = "\n" not in completion[len(worked) :].strip()
        # Else it is a heading.
        if is_last_line or (re.search(r"\d|\\", answer) and not re.match(r"\d+\. ", answer)):
            return answer
    tail = completion[-TAIL:]
    if len(completion) > TAIL:
        # The first word may be the end of a longer number.
        tail = tail.partition(" ")[2]
    for phrase in reversed(_PHRASE.findall(tail)):
        if _FORMULA.match(phrase):
            return _without_words(phrase.strip("* "))
    if not re.search(r"[\d$\\]", tail):
        return None
    found = _ask(seconds, "find", tail)
    return None if found is None or _is_part_of_a_formula(found, tail) else found


def extract_boxed(text: str) -> str | None:
    """The stripped content of the last closed box, None without one.

    A box is `\\boxed{…}`, `\\fbox{…}` or `\\box{…}`. Boxes before the last one belong to the
    answer where only a comma, a semicolon, `and` or `or` is between. So
    `$x=\\boxed{2}$ or $x=\\boxed{-2}$` is `2, -2`. Different names stay: `a = 2, b = 3`.
    """
    boxes = _closed_boxes(text)
    if not boxes:
        return None
    start = len(boxes) - 1
    while start and _BETWEEN.fullmatch(text[boxes[start - 1].end : boxes[start].start]):
        start -= 1
    together = boxes[start:]
    contents = [box.content for box in together]
    if len(contents) > 1:
        names = [_NAME_BEFORE.search(text[max(0, box.start - 40) : box.start]) for box in together]
        if all(names) and len({name["name"] for name in names if name}) == len(names):
            contents = [
                f"{name['name']} = {content}" for name, content in zip(names, contents) if name
            ]
    return ", ".join(dict.fromkeys(contents))


class _Box(NamedTuple):
    start: int
    end: int
    content: str


def _closed_boxes(text: str) -> list[_Box]:
    """The closed boxes that are in no other. A box of boxes has the content of the last one."""
    # Of each open brace that opens a box: where the box and its content start; None for another.
    open_braces: list[tuple[int, int] | None] = []
    spans = []
    for token in _BRACES.finditer(text):
        if token[0] == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None:
                spans.append((*opened, token.start()))
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(None if token[0] == "{" else (token.start(), token.end()))
    boxes: list[_Box] = []
    end = -1
    for start, content_start, content_end in sorted(spans):
        if start >= end:
            end = content_end + 1
            boxes.append(_Box(start, end, ""))
        boxes[-1] = boxes[-1]._replace(content=text[content_start:content_end].strip())
    return boxes


def extract_marked(text: str) -> tuple[str, str] | None:
    """The worked text before the last `####`, and the answer in the line after it; else None.

    A sentence behind a number is no part of the answer.
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    return text[: marks[-1].start()].strip("* \n"), _without_words(marks[-1][1].strip("* \r"))


def _without_words(text: str) -> str:
    number = _NUMBER_THEN_WORDS.fullmatch(text)
    return number[1].strip() if number else text


def _is_part_of_a_formula(found: str, tail: str) -> bool:
    """Whether a number that was found stands in a text such as `x + 5` or `5x`."""
    before, number, after = tail.rpartition(found)
    if not number or not re.fullmatch(r"[-\d.,]+", found):
        return False
    return bool(
        re.search(r"(?<![A-Za-z])[A-Za-z)]\s*[-+*/^]\s*\Z", before)
        or re.match(r"\s*[-+*/^]\s*[A-Za-z(\\]|[abcnpqrtuvwxyz](?![A-Za-z])", after)
    )


def _plain(text: str) -> str:
    """The text without dollar signs and without a full stop at its end."""
    return text.replace("\\$", "").replace("$", " ").strip().removesuffix(".").strip()


def _equal(prediction: str, answer: str, seconds: float) -> bool:
    if prediction == answer:
        return answer != ""
    if _INTEGER.fullmatch(prediction) and _INTEGER.fullmatch(answer):
        return int(prediction) == int(answer)
    if not prediction or not answer or max(len(prediction), len(answer)) > LONGEST:
        return False
    return bool(_ask(seconds, "equal", prediction, answer))


class _Question:
    """What is known of a question to the process."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        # The longest limit that was too short, seconds.
        self.tried = 0.0


@lru_cache(maxsize=1 << 16)
def _question(*question: str) -> _Question:
    return _Question()


def _ask(seconds: float, *question: str) -> Any:
    """The process's answer, which is asked for once.

    Raises:
        TimeoutError: it takes longer than `seconds`, now or earlier.
    """
    known = _question(*question)
    if not known.answers:
        if seconds <= known.tried:
            raise TimeoutError
        try:
            known.answers.append(_process.ask(seconds, *question))
        except TimeoutError:
            known.tried = seconds
            raise
    return known.answers[0]


_process = MathProcess()
