"""Completions as a report shows them: cut to a bounded length, coloured by token reward."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from rollouts.data.marks import TOKENS
from scripts.report.directory import Run
from scripts.report.numbers import finite, numbers, short

if TYPE_CHECKING:
    from markupsafe import Markup

MAX_TOKENS = 800
MAX_CHARACTERS = 6000
MAX_FACT = 200  # characters of an answer and the like
LEVELS = 5  # of colour, for either sign
MARKS = re.compile("|".join(map(re.escape, TOKENS)))
FACTS = {"reward": "reward", "length": "length", "finish": "finish_reason", "answer": "answer"}


def reward_scale(runs: list[Run]) -> float:
    """The size of a large token reward; 0 where there is none.

    A percentile, because one outlier would leave every other token pale.
    """
    sizes: list[float] = []
    for run in runs:
        for _, rows in run.samples:
            for row in rows:
                sizes.extend(np.abs(finite(numbers(row.get("token_rewards")))))
    return float(np.percentile(sizes, 98)) if sizes else 0.0


def facts(row: dict) -> dict[str, str]:
    """What is written above a completion."""
    found = {}
    for name, key in FACTS.items():
        value = row.get(key)
        if value is None or value == "":
            continue
        found[name] = short(value) if isinstance(value, float) else str(value)[:MAX_FACT]
    return found


def spans(row: dict, scale: float) -> tuple[list[tuple[str, str, float]], int]:
    """A completion as (text, colour, reward), and how much of it was cut off.

    A reward of ±`scale` has the full colour. Without a reward it is NaN.
    """
    tokens = row.get("tokens")
    rewards = numbers(row.get("token_rewards"))
    if not tokens or not isinstance(tokens, list) or len(tokens) != len(rewards):
        text = str(row.get("completion") or "")
        shown = text[:MAX_CHARACTERS]
        return [(shown, "", math.nan)], len(text) - len(shown)
    found = [
        (str(token), _color(reward, scale), reward)
        for token, reward in zip(tokens[:MAX_TOKENS], rewards)
    ]
    return found, len(tokens) - len(found)


def _color(reward: float, scale: float) -> str:
    """p1 … p5 or n1 … n5, the stronger the higher; none for zero or no reward."""
    if math.isnan(reward) or reward == 0:
        return ""
    level = min(LEVELS, math.ceil(LEVELS * abs(reward) / (scale or 1.0)))
    return f"{'p' if reward > 0 else 'n'}{level}"


def marked(text: str) -> Markup:
    """HTML in which the tokens of the streaming protocol stand out, each at the end of its line."""
    from markupsafe import Markup, escape

    html, end = Markup(), 0
    for match in MARKS.finditer(text):
        html += escape(text[end : match.start()])
        html += Markup('<b class="mark">{}</b>\n').format(match[0])
        end = match.end()
    return html + escape(text[end:])
