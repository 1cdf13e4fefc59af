"""Are two answers the same mathematics? math-verify's parser reads them, sympy compares.

math-verify's own `verify` is not used. It takes values that differ by less than 1e-15 for equal,
rounds decimals to six places whatever their size, and takes any equation for its right side. Its
`parse` goes on with the first number where it cannot read a formula. Here:

- A text is read as a whole, or compared as text.
- Exact values are equal if their difference is zero.
- A decimal equals a value without a finite decimal expansion up to one part in a million.
- A tuple is ordered. A set and a bare list are not.
- A name stands for its value: `x = 5` is 5, but not `y = 5`.
- A unit may be missing. Two that are given must agree: 5 cm is not 5 km.

`rewards/math.py` runs this in a process of its own, since sympy may never come back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.physics import units
from sympy.physics.units.systems.si import dimsys_SI

from rewards.answer_text import (
    as_words,
    brackets,
    choice_label,
    equation_sides,
    is_name,
    is_words,
    normalize,
    split_list,
    split_unit,
)
from rewards.values import as_set, exact, is_relation, same_relations, same_sets, same_values

CONVERSION = ConversionConfig(lowercase_symbols=False)
NORMALIZATION = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")


@dataclass(frozen=True)
class Single:
    """An expression, a relation, a set, a matrix, or words.

    Attributes:
        words: the text, for a comparison as text.
        value: of sympy; None for what cannot be read.
        unit: that stands behind the value.
    """

    words: str
    value: Any = None
    unit: str | None = None


@dataclass(frozen=True)
class Named:
    """`name = value`; `equation` is the whole of it, None where it cannot be read."""

    name: str
    value: Answer
    equation: Any


@dataclass(frozen=True)
class Several:
    """Several answers, in an opening and a closing bracket; without, they are a bare list."""

    brackets: str
    items: tuple[Answer, ...]


Answer = Single | Named | Several


def equal(prediction: str, answer: str) -> bool:
    """Whether two answers are equal. Raises what sympy raises on garbage."""
    return _same(_read(normalize(prediction)), _read(normalize(answer)))


# Reading


def _read(text: str) -> Answer:
    parts = split_list(text)
    if len(parts) > 1:
        return Several("", tuple(map(_read, parts)))
    if text.count(r"\pm") == 1:
        both = text.replace(r"\mp", "-").replace(r"\pm", "+"), text.replace(r"\mp", "+")
        return Several("", tuple(_read(side.replace(r"\pm", "-").strip()) for side in both))
    if bracketed := brackets(text):
        return _read_brackets(*bracketed)
    if label := choice_label(text):
        return Single(label)
    sides = equation_sides(text)
    if sides and is_name(sides[0]):
        value = next((side for side in reversed(sides[1:]) if not is_name(side)), sides[-1])
        return Named(_squeezed(sides[0]), _read(value), _parsed(text))
    if sides and len(sides) == 2 and is_name(sides[1]):
        return Named(_squeezed(sides[1]), _read(sides[0]), _parsed(text))
    if sides and re.fullmatch(r"[\d\s+*/.^{}()-]+", sides[0]) and _all_equal(sides):
        return _read(sides[-1])
    return _read_single(text)


def _read_brackets(opening: str, inside: str, closing: str) -> Answer:
    parts = split_list(inside)
    if opening == "{":
        if condition := re.fullmatch(r"[A-Za-z][^|:]*?(?:\||\\mid(?![a-z])|:)(.*)", inside):
            return _read(condition[1].strip())
    elif len(parts) == 1:
        return _read(inside)
    return Several(opening + closing, tuple(map(_read, parts)))


def _all_equal(sides: list[str]) -> bool:
    return all(_same(_read(side), _read(sides[-1])) for side in sides[:-1])


def _read_single(text: str) -> Answer:
    if is_words(text):
        return Single(as_words(text))
    text, unit = split_unit(text)
    value = _parsed(text)
    if isinstance(value, sympy.FiniteSet) and value.args:
        items = tuple(Single(str(item), item, unit) for item in value.args)
        return items[0] if len(items) == 1 else Several("", items)
    return Single(as_words(text), value, unit)


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """sympy's object, nothing in it evaluated; None where the text cannot be read as a whole."""
    # The parser adds 2 and 3 in `2 3`, and drops what it does not know in the others.
    if re.search(r"\d\s+[\d.]|\.\d+\.|\d_|!!", text):
        return None
    try:
        parsed = latex2sympy(
            normalize_latex(text, NORMALIZATION),
            is_real=True,
            convert_degrees=True,
            normalization_config=None,
            conversion_config=CONVERSION,
        )
    except Exception:  # the parser's own are bare
        return None
    return _plain(parsed) if isinstance(parsed, (sympy.Basic, sympy.MatrixBase)) else None


def _plain(parsed: Any) -> Any:
    """`e` and `i` are the constants, the latter unless it is an index. f(x) is a symbol."""
    constants = {"e": sympy.E, "i": sympy.I}
    if parsed.has(sympy.Sum, sympy.Product):
        del constants["i"]
    names: dict[Any, Any] = {
        symbol: constants.get(symbol.name, sympy.Symbol(symbol.name))
        for symbol in parsed.atoms(sympy.Symbol)
    }
    names |= {call: sympy.Symbol(str(call)) for call in parsed.atoms(AppliedUndef)}
    with sympy.evaluate(False):
        return parsed.xreplace(names)


def _squeezed(text: str) -> str:
    return re.sub(r"[\s{}\\]|text", "", text)


# Comparing


def _same(a: Answer, b: Answer) -> bool:
    if isinstance(a, Named) or isinstance(b, Named):
        return _same_named(a, b)
    if isinstance(a, Several) and isinstance(b, Several):
        return _same_several(a, b)
    if isinstance(a, Single) and isinstance(b, Single):
        return _same_singles(a, b)
    single, several = (a, b) if isinstance(a, Single) else (b, a)
    return _single_is_several(single, several)


def _same_named(a: Answer, b: Answer) -> bool:
    if isinstance(a, Named) and isinstance(b, Named):
        if a.name == b.name and _same(a.value, b.value):
            return True
        return same_relations(a.equation, b.equation)
    named, other = (a, b) if isinstance(a, Named) else (b, a)
    assert isinstance(named, Named)
    if isinstance(other, Single) and isinstance(other.value, Relational):
        return same_relations(named.equation, other.value)
    return _same(named.value, other)


def _same_several(a: Several, b: Several) -> bool:
    """A bare list equals a set in any order, and a tuple in the tuple's."""
    kinds = {a.brackets, b.brackets}
    for one, other in ((a, b), (b, a)):
        if one.brackets == "{}" and len(one.items) == 1 and other.brackets == "()":
            return _same(one.items[0], other)
    if kinds <= {"", "{}"}:
        # As sets: each item of either has an equal one in the other.
        return all(
            any(_same(item, other) for other in right.items)
            for left, right in ((a, b), (b, a))
            for item in left.items
        )
    in_order = len(kinds) == 1 or kinds == {"", "()"}
    return in_order and len(a.items) == len(b.items) and all(map(_same, a.items, b.items))


def _single_is_several(single: Any, several: Any) -> bool:
    is_set = isinstance(single.value, sympy.Set)
    if several.brackets in ("", "{}") and several.items and not is_set:
        # 1/2 or 0.5
        return all(_same(single, item) for item in several.items)
    left, right = as_set(single.value), _several_as_set(several)
    return left is not None and right is not None and same_sets(left, right)


def _several_as_set(several: Several) -> Any:
    values = [getattr(item, "value", None) for item in several.items]
    if not values:
        return sympy.EmptySet
    if several.brackets in ("()", "[]", "(]", "[)") and len(values) == 2 and None not in values:
        ends = [exact(value) for value in values]
        return sympy.Interval(*ends, several.brackets[0] == "(", several.brackets[1] == ")")
    if several.brackets == "" and all(is_relation(value) for value in values):
        return sympy.Union(*map(as_set, values))
    return None


def _same_singles(a: Single, b: Single) -> bool:
    if a.value is None or b.value is None:
        return a.words == b.words != ""
    left, right = _quantity(a.unit), _quantity(b.unit)
    if a.unit and b.unit and left and right:
        scale, dimension = left
        other_scale, other_dimension = right
        return dimension == other_dimension and same_values(
            _scaled(a.value, scale), _scaled(b.value, other_scale)
        )
    if same_values(a.value, b.value):
        return True
    # 50% is 1/2, and 90° is π/2.
    if a.unit in ("percent", "degree") and not b.unit and left:
        return same_values(_scaled(a.value, left[0]), b.value)
    if b.unit in ("percent", "degree") and not a.unit and right:
        return same_values(a.value, _scaled(b.value, right[0]))
    return False


def _scaled(value: Any, scale: Any) -> Any:
    if scale == 1 or not isinstance(value, sympy.Expr):
        return value
    return sympy.Mul(value, scale, evaluate=False)


@lru_cache(maxsize=256)
def _quantity(unit: str | None) -> Any:
    """Scale and dimension of a unit that sympy knows, else None."""
    text = re.sub(r"\\text|[{}]|\\", " ", unit or "").replace(" per ", "/")
    text = re.sub(r"\b(?:square|sq)\.?\s+(\w+)", r"\1^2", text)
    text = re.sub(r"\bcubic\s+(\w+)", r"\1^3", text)
    text = re.sub(r"\s*\^\s*", "^", text)
    scale, dimension = sympy.Integer(1), sympy.Integer(1)
    words = re.findall(r"(/?)\s*([A-Za-z]+)(?:\^(-?\d))?", text)
    for slash, word, power in words:
        found = getattr(units, word, None) or getattr(units, word.lower(), None)
        if not isinstance(found, units.Quantity):
            return None
        exponent = int(power or 1) * (-1 if slash else 1)
        scale *= found.scale_factor**exponent
        dimension *= found.dimension.name**exponent
    if not words:
        return None
    return scale, dimsys_SI.get_dimensional_dependencies(units.Dimension(dimension))
