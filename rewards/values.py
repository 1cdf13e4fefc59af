"""Are two of sympy's values the same: numbers, formulas, sets, relations, matrices?

Exact values are equal if their difference is zero. Formulas are compared at points, with exact
numbers. No number of more than `LARGEST` bits is computed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import sympy
from sympy.core.relational import Relational

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
SWAPPED = {sympy.StrictLessThan: sympy.StrictGreaterThan, sympy.LessThan: sympy.GreaterThan}
UNDEFINED = (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)


class TooLargeError(Exception):
    """A number would have more than `LARGEST` bits."""


def same_values(a: Any, b: Any) -> bool:
    """Whether two values are equal. Raises TooLargeError, and what sympy raises on garbage."""
    if isinstance(a, sympy.MatrixExpr) or isinstance(b, sympy.MatrixExpr):
        return same_values(*(exact(m).as_explicit() for m in (a, b)))
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(same_values, a.flat(), b.flat()))
    if is_relation(a) and is_relation(b):
        return same_relations(a, b)
    left, right = as_set(a), as_set(b)
    if left is not None and right is not None:
        return same_sets(left, right)
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return _same_expressions(a, b)
    return False


# Sets and relations


def is_relation(value: Any) -> bool:
    return isinstance(value, (Relational, sympy.And))


def as_set(value: Any) -> Any:
    """The set that a set or a relation of one variable is, else None."""
    if isinstance(value, sympy.Set):
        return exact(value)
    if not is_relation(value) or len(value.free_symbols) != 1:
        return None
    real = {symbol: sympy.Symbol("x", real=True) for symbol in value.free_symbols}
    parts = [exact(part).xreplace(real) for part in _conjuncts(value)]
    try:
        return sympy.Intersection(*(part.as_set() for part in parts))
    except NotImplementedError:
        # So sympy says of relations with periodic solutions, as sin(x) = 0.
        return None


def same_sets(a: Any, b: Any) -> bool:
    return a == b or sympy.SymmetricDifference(a, b).is_empty is True


def _conjuncts(relation: Any) -> list[Any]:
    return list(relation.args) if isinstance(relation, sympy.And) else [relation]


def same_relations(a: Any, b: Any) -> bool:
    if not (is_relation(a) and is_relation(b)):
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
    sets = as_set(a), as_set(b)
    return None not in sets and same_sets(*sets)


def _same_relation(a: Any, b: Any) -> bool:
    """Of one kind, and the differences of their sides are proportional."""
    kinds = [SWAPPED.get(type(relation), type(relation)) for relation in (a, b)]
    if kinds[0] is not kinds[1] or not all(
        isinstance(side, sympy.Expr) for side in (*a.args, *b.args)
    ):
        return False
    differences = [
        exact(sympy.Add(r.lhs, sympy.Mul(-1, r.rhs))) * (-1 if type(r) in SWAPPED else 1)
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
    a, b = exact(a), exact(b)
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


def exact(value: Any) -> Any:
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
