"""The text of an answer: one way of writing it, and where its parts are.

This prepares a text for math-verify's parser, which reads the formulas. The parser takes Chinese
punctuation for nothing, `2√3` and `1 1/2` for something else, and `1, 1,000` for three numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Characters whose LaTeX Unicode's tables do not tell.
SIGNS = {
    "−": "-",
    "–": "-",
    "、": ",",
    "。": ".",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": "/",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "°": r"^\circ ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∜": r"\sqrt[4] ",
}
_GROUP = r"\{[^{}]*\}"
# In this order. Each is (what, with what).
REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\displaystyle(?![a-zA-Z])|(?<!\\)\\!|(?:US ?)?\\\$|[£€¥₹]|\\pounds(?![a-zA-Z])", ""),
        (r"(?<!\\)\\(?:[,;: ]|q?quad(?![a-zA-Z]))|~|\$", " "),
        (r"\\%", "%"),
        (r"\{,\}", ","),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:(?:text|math)(?:bf|rm|it|sf|tt|normal)|mbox|hbox)(?=\s*\{)", r"\\text"),
        (
            r"\^\s*\{?\s*\\circ\s*\}?\s*(?:\\text\s*\{\s*([CF])\s*\}|([CF])\b)",
            r"\\text{ degrees \1\2}",
        ),
        (r"([A-Za-z])('+)", lambda m: f"{m[1]}_{{{'prime' * len(m[2])}}}"),
        (r"\\text\s*\{\s*([ei])\s*\}", r"\1"),
        (r"\\text\s*\{\s*\}", " "),
        (r"\\([gl])eq(?:slant)?(?![a-zA-Z])", r"\\\1e "),
        (r"\\neq(?![a-zA-Z])", r"\\ne "),
        (r"\\varnothing", r"\\emptyset "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"(?i)\\text\{\s*infinity\s*\}|(?<![a-z\\])infinity(?![a-z])", r"\\infty "),
        (r"(?<![\w)}\]!.])\s*\+\s*\\infty", r" \\infty"),
        (r"\s+", " "),
        # 1 000 and 10 000 000
        (r"(?<![\d.,] )(?<![\d.,])\d{1,3}(?: \d{3})+(?! ?[\d/])", lambda m: m[0].replace(" ", "")),
        # 1 1/2
        (r"(?<![\d./^_{])(\d+) (\d+)/(\d+)(?![\d/^])", r"\1\\frac{\2}{\3}"),
        # 6.7e-5
        (r"(?<![A-Za-z\\])([\d.]+)[eE]([+-]?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),
        # 0.1\overline{6}
        (r"(?<![\d.])(\d*)\.(\d*)\\overline\{(\d+)\}", lambda m: _repeating(*m.groups())),
        (r"(?<![\\A-Za-z])sqrt(?![a-z])", r"\\sqrt"),
        (r"\\log_ ?(\w) ", r"\\log_{\1} "),
        (r"(\\sqrt(?:\[\w+\])?) (\d+)", r"\1{\2}"),
    )
]
THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,]*\d)")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "eight": 8, "ten": 10, "sixteen": 16}
BASE = re.compile(
    rf"\(?(?P<digits>\d[0-9A-Z]*)\)?_(?:\{{(?:\\text\{{)?|)\s*(?P<base>\d\d?|{'|'.join(BASES)})\s*\}}*"
)

TEXT = r"\\text\s*\{[^{}]*\}"
BRACKETS = re.compile(r"\\[{}]|\\(?:begin|end)(?![a-zA-Z])|\\.|[{}()\[\]]")
OPENING = ("(", "[", "{", r"\{", r"\begin")
CLOSING = (")", "]", "}", r"\}", r"\end")
SEPARATOR = re.compile(
    r"[,;]|\\text\s*\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
EQUALS = re.compile(r"(?<![<>!:])=|\\in(?![a-zA-Z])")
OTHER_RELATIONS = re.compile(r"[<>]|\\(?:le|ge|ne|lt|gt|approx|equiv|sim)(?![a-zA-Z])")

SUBSCRIPT = rf"(?:_(?:\w|{_GROUP}))?"
NAME = re.compile(
    rf"(?:[A-Za-z]|\\(?!pi(?![a-z]))[a-z]+){SUBSCRIPT}'*"
    rf"(?:(?:\^\{{?-1\}}?)?\([^()]*\))?"
    rf"|(?:\\overline|\\angle|\\triangle|\\vec|\\text)?\s*\{{?[A-Za-z ]+\}}?"
)
NAMES = re.compile(rf"\(\s*[A-Za-z]{SUBSCRIPT}(?:\s*,\s*[A-Za-z]{SUBSCRIPT})+\s*\)")
CHOICE = re.compile(r"(?:\\text\s*\{\s*\(([A-Z])\)\s*\}\s*|\(([A-Z])\) +)[^\s+*/^(=_!-].*")

PERCENT = re.compile(r"(.+?)\s*(?:%|\\text\s*\{\s*(?:percent|%)\s*\}|\bpercent)")
DEGREE = re.compile(r"((?:[^A-Za-z\\]|\\frac|\\pi|\\sqrt)+?)\s*\^\s*\{?\s*\\circ\s*\}?")
TEXT_UNIT = re.compile(
    rf"(.*?[^\s/_^+*=-])[\s/]*((?:(?:[\s/]|\\cdot(?![a-z]))*{TEXT}(?:\^\{{?-?\d\}}?)?)+)"
)
BARE_UNIT = re.compile(r"(.*[\d})])\s*((?:[A-Za-z]+[\s/]*)+(?:\^\{?\d\}?)?)")
# Words of a unit that a product of variables would not be taken for.
SHORT_UNITS = {"cm", "mm", "km", "kg", "ft", "mi", "yd", "ml", "mph", "min", "sec", "hr", "hrs"}
SHORT_UNITS |= {"lb", "lbs", "oz", "in", "per", "of", "sq", "st", "nd", "rd", "th"}
COMPOUND_UNIT = re.compile(r"(.*\d) ?((?:k|c)?m ?/ ?(?:s|h)(?:\^\{?2\}?)?)")
# What makes a text behind a value more than its unit.
CONDITION = re.compile(r"\b(?:if|for|when|where|mod|unless|otherwise|is|are|not|only|base)\b", re.I)
WORDS = re.compile(rf"(?:{TEXT}|[\s.,;:!?()])+")
BARE_WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z][A-Za-z0-9 .,'?!-]*")


def normalize(text: str) -> str:
    """The answer in LaTeX that the functions below and math-verify's parser understand."""
    text = "".join(map(_latex_of, text))
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    text = _braced_arguments(text).strip().rstrip(".,; ")
    if whole := re.fullmatch(r"\\text\s*\{([^{}]*)\}", text):
        parts = split_list(whole[1].strip())
        if re.search(r"\d", whole[1]):
            text = whole[1].strip()
        elif len(parts) > 1:
            text = ", ".join(f"\\text{{{part}}}" for part in parts)
    if not (text.startswith(("(", "[", r"\{")) and ", " not in text):
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    return _from_base(text)


def _latex_of(character: str) -> str:
    if character.isascii():
        return character
    if sign := SIGNS.get(character):
        return sign
    tag, *codes = unicodedata.decomposition(character).split() or [""]
    plain = "".join(chr(int(code, 16)) for code in codes) if tag.startswith("<") else character
    if tag == "<fraction>" and "⁄" in plain:
        numerator, denominator = plain.split("⁄")
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    forms = {"<wide>": plain, "<super>": f"^{{{plain}}}", "<sub>": f"_{{{plain}}}"}
    forms |= {"<noBreak>": " ", "<compat>": plain}
    if unicodedata.name(character, "").startswith("GREEK SMALL LETTER "):
        return f"\\{unicodedata.name(character).split()[-1].lower()} "
    return forms.get(tag, character)


def _repeating(whole: str, fixed: str, repeated: str) -> str:
    """0.1666… as a fraction."""
    nines = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    numerator = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{nines}}}"


def _braced_arguments(text: str) -> str:
    r"""`\sqrt(x+1)` is `\sqrt{x+1}`, and `2^(n+1)` is `2^{n+1}`."""
    found = 0
    while match := re.compile(r"(?:\\sqrt(?:\[\w+\])?|\^)\s*(?=\()").search(text, found):
        found = match.end()
        end = _closing(text, found)
        if end is not None and text[end - 1] == ")":
            text = f"{text[:found]}{{{text[found + 1 : end - 1]}}}{text[end:]}"
    return text


def _from_base(text: str) -> str:
    """A number with its base as subscript, in base ten."""
    number = BASE.fullmatch(text)
    if not number:
        return text
    base = BASES.get(number["base"]) or int(number["base"])
    try:
        return str(int(number["digits"], base))
    except ValueError:
        return text


# Parts


def _brackets(text: str, start: int = 0) -> Iterator[tuple[int, str, int]]:
    """Of each bracket: the depth outside of it, the bracket, and where it ends."""
    depth = 0
    for token in BRACKETS.finditer(text, start):
        if token[0] in OPENING:
            yield depth, token[0], token.end()
            depth += 1
        elif token[0] in CLOSING:
            depth -= 1
            yield depth, token[0], token.end()


def _closing(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` is closed."""
    ends = (end for depth, token, end in _brackets(text, start) if depth == 0 and token in CLOSING)
    return next(ends, None)


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The stripped parts between the separators that stand outside of all brackets."""
    spans, start = [], 0
    # Spans within brackets.
    for depth, token, end in _brackets(text):
        if depth == 0 and token in OPENING:
            start = end
        elif depth == 0:
            spans.append((start, end))
    parts, start = [], 0
    for match in separator.finditer(text):
        if not any(opened <= match.start() < closed for opened, closed in spans):
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


def split_list(text: str) -> list[str]:
    """The items of a list: between commas, semicolons, `and` and `or`."""
    return [part for part in _split(text, SEPARATOR) if part]


def brackets(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, inside and closing bracket of a text that is in brackets as a whole."""
    opening = re.match(r"\(|\[|\\\{", text)
    if not opening or _closing(text, 0) != len(text):
        return None
    closing = re.search(r"(?:\)|\]|\\\})$", text)
    if not closing or (opening[0] == r"\{") != (closing[0] == r"\}"):
        return None
    return opening[0][-1], text[opening.end() : closing.start()].strip(), closing[0][-1]


def choice_label(text: str) -> str | None:
    """`B` of `(B) 12`."""
    choice = CHOICE.fullmatch(text)
    return (choice[1] or choice[2]) if choice else None


def equation_sides(text: str) -> list[str] | None:
    """The sides of an equation or a chain of them, or of `x \\in S`."""
    sides = _split(text, EQUALS)
    if len(sides) < 2 or not all(sides) or len(_split(text, OTHER_RELATIONS)) > 1:
        return None
    return sides


def is_name(text: str) -> bool:
    """Whether a side of an equation only names the other: `x`, `f(x)`, `(x, y)`, `AB`, `Area`."""
    if re.fullmatch(r"[a-z]{2,3}", text):
        return False  # a product
    return bool(NAME.fullmatch(text) or NAMES.fullmatch(text))


def split_unit(text: str) -> tuple[str, str | None]:
    """The text before a unit, and the unit."""
    for unit, pattern in (("percent", PERCENT), ("degree", DEGREE)):
        if match := pattern.fullmatch(text):
            return match[1], unit
    match = TEXT_UNIT.fullmatch(text)
    if match and not CONDITION.search(match[2]):
        return match[1], match[2].strip()
    if match := COMPOUND_UNIT.fullmatch(text):
        return match[1], match[2]
    match = BARE_UNIT.fullmatch(text)
    words = re.findall("[A-Za-z]+", match[2]) if match else []
    if match and all(len(word) > 3 or word in SHORT_UNITS for word in words):
        return match[1], match[2]
    return text, None


def is_words(text: str) -> bool:
    """Whether a text is words and no formula."""
    return bool(WORDS.fullmatch(text) or BARE_WORDS.fullmatch(text))


def as_words(text: str) -> str:
    """The text without the commands and marks around it; case does not matter in a word."""
    if not is_words(text) and not re.fullmatch(r"\(?[A-Za-z]+[).]*", text):
        return re.sub(r"\s+", " ", text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=[A-Za-z])[.,](?= |$)", "", re.sub(r"\s+", " ", text))
    text = text.strip(" .,;:!?()'\"")
    return text.casefold() if len(text) > 1 else text
