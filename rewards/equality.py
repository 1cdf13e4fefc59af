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

import random
import re
from collections.abc import Iterator
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

# What a decimal may be away from a value that no decimal equals, as a part of that value.
TOLERANCE = sympy.Rational(1, 10**6)
# Significant digits that two decimals need to be compared with it.
LONG = 6
# Bits. A number that would have more is not computed.
LARGEST = 1 << 22
# Decimal digits to which a difference is computed before it counts as zero.
DIGITS = 400
# Points at which two formulas are compared.
POINTS = 12
# Symbols that stand for natural numbers.
NATURAL = {"n", "k", "m"}

CONVERSION = ConversionConfig(lowercase_symbols=False)
NORMALIZATION = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
SWAPPED = {sympy.StrictLessThan: sympy.StrictGreaterThan, sympy.LessThan: sympy.GreaterThan}
UNDEFINED = (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)


class TooLargeError(Exception):
    """A number would have more than `LARGEST` bits."""


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
        return _same_relations(a.equation, b.equation)
    named, other = (a, b) if isinstance(a, Named) else (b, a)
    assert isinstance(named, Named)
    if isinstance(other, Single) and isinstance(other.value, Relational):
        return _same_relations(named.equation, other.value)
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
    left, right = _as_set(single.value), _several_as_set(several)
    return left is not None and right is not None and _same_sets(left, right)


def _several_as_set(several: Several) -> Any:
    values = [getattr(item, "value", None) for item in several.items]
    if not values:
        return sympy.EmptySet
    if several.brackets in ("()", "[]", "(]", "[)") and len(values) == 2 and None not in values:
        ends = [_exact(value) for value in values]
        return sympy.Interval(*ends, several.brackets[0] == "(", several.brackets[1] == ")")
    if several.brackets == "" and all(_is_relation(value) for value in values):
        return sympy.Union(*map(_as_set, values))
    return None


def _same_singles(a: Single, b: Single) -> bool:
    if a.value is None or b.value is None:
        return a.words == b.words != ""
    left, right = _quantity(a.unit), _quantity(b.unit)
    if a.unit and b.unit and left and right:
        scale, dimension = left
        other_scale, other_dimension = right
        return dimension == other_dimension and _same_values(
            _scaled(a.value, scale), _scaled(b.value, other_scale)
        )
    if _same_values(a.value, b.value):
        return True
    # 50% is 1/2, and 90° is π/2.
    if a.unit in ("percent", "degree") and not b.unit and left:
        return _same_values(_scaled(a.value, left[0]), b.value)
    if b.unit in ("percent", "degree") and not a.unit and right:
        return _same_values(a.value, _scaled(b.value, right[0]))
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


def _same_values(a: Any, b: Any) -> bool:
    if isinstance(a, sympy.MatrixExpr) or isinstance(b, sympy.MatrixExpr):
        return _same_values(*(_exact(m).as_explicit() for m in (a, b)))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(_same_values, a.flat(), b.flat()))
    if _is_relation(a) and _is_relation(b):
        return _same_relations(a, b)
    left, right = _as_set(a), _as_set(b)
    if left is not None and right is not None:
        return _same_sets(left, right)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _same_expressions(a, b)
    return False


# Sets and relations


def _is_relation(value: Any) -> bool:
    return isinstance(value, (Relational, sympy.And))


def _as_set(value: Any) -> Any:
    """The set that a set or a relation of one variable is, else None."""
    if isinstance(value, sympy.Set):
        return _exact(value)
    if not _is_relation(value) or len(value.free_symbols) != 1:
        return None
    real = {symbol: sympy.Symbol("x", real=True) for symbol in value.free_symbols}
    parts = [_exact(part).xreplace(real) for part in _conjuncts(value)]
    try:
        return sympy.Intersection(*(part.as_set() for part in parts))
    except NotImplementedError:
        # So sympy says of relations with periodic solutions, as sin(x) = 0.
        return None


def _same_sets(a: Any, b: Any) -> bool:
    return a == b or sympy.SymmetricDifference(a, b).is_empty is True


def _conjuncts(relation: Any) -> list[Any]:
    return list(relation.args) if isinstance(relation, sympy.And) else [relation]


def _same_relations(a: Any, b: Any) -> bool:
    if not (_is_relation(a) and _is_relation(b)):
        return False
    left, right = _conjuncts(a), _conjuncts(b)
    if len(left) == len(right) and all(
        any(_same_relation(one, other) for other in others)
        for ones, others in ((left, right), (right, left))
        for one in ones
    ):
        return True
    if a.free_symbols != b.free_symbols or a.has(sympy.Eq) or b.has(sympy.Eq):
        return False
    sets = _as_set(a), _as_set(b)
    return None not in sets and _same_sets(*sets)


def _same_relation(a: Any, b: Any) -> bool:
    """Of one kind, and the differences of their sides are proportional."""
    kinds = [SWAPPED.get(type(relation), type(relation)) for relation in (a, b)]
    if kinds[0] is not kinds[1] or not all(
        isinstance(side, sympy.Expr) for side in (*a.args, *b.args)
    ):
        return False
    differences = [
        _exact(sympy.Add(r.lhs, sympy.Mul(-1, r.rhs))) * (-1 if type(r) in SWAPPED else 1)
        for r in (a, b)
    ]
    values = list(_values_at_points(*differences))
    base = next(((x, y) for x, y in values if not (_is_zero(x) or _is_zero(y))), None)
    if base is None or len(values) < 3:
        return False
    if kinds[0] not in (sympy.Eq, sympy.Ne) and not (base[0] * base[1]).is_positive:
        return False
    return all(_is_zero(base[0] * y - base[1] * x) for x, y in values)


# Expressions


def _same_expressions(a: Any, b: Any) -> bool:
    if a == b:
        return not a.has(sympy.nan, sympy.zoo)
    decimals = [value.has(sympy.Float) for value in (a, b)]
    a, b = _exact(a), _exact(b)
    if a.has(*UNDEFINED) or b.has(*UNDEFINED):
        return a == b and not a.has(sympy.nan, sympy.zoo)
    if a == b:
        return True
    if not (a.free_symbols or b.free_symbols):
        return _is_zero(a - b) or (any(decimals) and _close(a, b, all(decimals)))
    values = list(_values_at_points(a, b))
    if len(values) < 3:
        return sympy.simplify(a - b) == 0
    return all(_is_zero(x - y) for x, y in values)


def _exact(value: Any) -> Any:
    """The value evaluated, with fractions in place of decimals.

    Raises:
        TooLargeError: that would take too long.
    """
    with sympy.evaluate(False):
        value = value.xreplace({x: sympy.Rational(str(x)) for x in value.atoms(sympy.Float)})
    _bits(value)
    value = value.doit()
    if value.has(sympy.I):
        return value
    # The real one of the odd roots of a negative number.
    return value.replace(
        lambda e: e.is_Pow and e.base == -1 and e.exp.is_Rational and e.exp.q % 2 == 1,
        lambda e: (-1) ** e.exp.p,
    )


def _bits(value: Any) -> float:
    """A bound for the bits of a number's numerator and denominator.

    Raises:
        TooLargeError: more than `LARGEST`.
    """
    if value.is_Rational:
        return max(value.p.bit_length(), value.q.bit_length(), 1)
    parts = [_bits(part) for part in value.args if isinstance(part, sympy.Basic)]
    bits = max(parts, default=8)
    if isinstance(value, (sympy.Pow, sympy.exp)):
        bits = (parts[0] if len(parts) == 2 else 2) * 2 ** min(parts[-1], 64)
    elif isinstance(value, (sympy.factorial, sympy.gamma)):
        bits = parts[0] * 2 ** min(parts[0], 64)
    elif isinstance(value, sympy.binomial):
        bits = parts[0] * 2 ** min(parts[1], 64)
    elif isinstance(value, (sympy.Add, sympy.Mul)):
        bits = sum(parts)
    if bits > LARGEST:
        raise TooLargeError
    return bits


def _is_zero(number: Any) -> bool:
    if number.is_Rational:
        return bool(number == 0)
    value = number.evalf(5, maxn=DIGITS)
    parts = value.as_real_imag()
    if not all(part.is_Rational or part.is_Float for part in parts):
        return bool(sympy.simplify(number) == 0)
    # One bit of precision: nothing is left at DIGITS digits.
    return all(part == 0 or getattr(part, "_prec", 0) == 1 for part in parts)


def _close(a: Any, b: Any, decimals: bool) -> bool:
    """Whether two numbers, of which one was a decimal, differ by rounding only.

    Args:
        decimals: both were decimals.
    """
    if a.is_real is False or b.is_real is False:
        return False
    digits = [_decimal_digits(number) for number in (a, b)]
    if None not in digits and not (decimals and min(digits) >= LONG):
        return False
    return bool(abs(a - b) <= TOLERANCE * sympy.Max(abs(a), abs(b)))


def _decimal_digits(number: Any) -> Any:
    """The significant digits of a finite decimal, None for another number."""
    if not number.is_Rational:
        return None
    rest = number.q
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return None
    shifted = number.p * 10 ** number.q.bit_length() // number.q
    return len(str(abs(shifted)).rstrip("0"))


def _values_at_points(*formulas: Any) -> Iterator[tuple[Any, ...]]:
    """The formulas' values at points where all of them are defined, and real if they are."""
    symbols = sorted(set().union(*(f.free_symbols for f in formulas)), key=str)
    natural = all(str(symbol) in NATURAL for symbol in symbols)
    is_complex = any(formula.has(sympy.I) for formula in formulas)
    even_roots = [
        power.base
        for formula in formulas
        for power in formula.atoms(sympy.Pow)
        if power.exp.is_Rational and power.exp.q % 2 == 0
    ]
    draw = random.Random(0)
    for index in range(POINTS):
        signs = (1,) if index < POINTS // 2 else (1, -1)
        point = {
            symbol: sympy.Integer(draw.randint(2, 40))
            if natural
            else sympy.Rational(draw.choice(signs) * draw.randint(1, 99), draw.randint(11, 40))
            for symbol in symbols
        }
        if not is_complex and any(root.xreplace(point).is_negative for root in even_roots):
            continue
        values = tuple(formula.xreplace(point).doit() for formula in formulas)
        if all(_is_defined(value, is_complex) for value in values):
            yield values


def _is_defined(value: Any, is_complex: bool) -> bool:
    if value.free_symbols or value.has(*UNDEFINED):
        return False
    if is_complex:
        return True
    roots = (p for p in value.atoms(sympy.Pow) if not p.exp.is_integer)
    return not value.has(sympy.I) and not any(root.base.is_negative for root in roots)
