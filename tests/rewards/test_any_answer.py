"""Whatever an answer is: comparing it never raises, and gives the same from both sides."""

from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rewards import math as rewards_math
from rewards.math import grade

WHOLE = st.integers(-60, 60)
NUMBERS = st.one_of(
    WHOLE.map(str),
    st.decimals(-99, 99, places=2).map(str),
    st.tuples(WHOLE, st.integers(1, 30)).map(lambda pair: r"\frac{{{}}}{{{}}}".format(*pair)),
    st.integers(2, 30).map(lambda n: rf"\sqrt{{{n}}}"),
    st.sampled_from([r"\pi", "e", r"\frac{\pi}{3}", "50\\%", "90^\\circ", "1,234"]),
)
FORMULAS = st.recursive(
    st.one_of(NUMBERS, st.sampled_from(["x", "y", "n", "x^2", "x_1"])),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(" + ".join),
        st.tuples(inner, inner).map(lambda pair: "({})({})".format(*pair)),
        st.tuples(inner, st.integers(2, 3)).map(lambda pair: r"\left({}\right)^{}".format(*pair)),
        inner.map(lambda part: rf"\frac{{{part}}}{{7}}"),
    ),
    max_leaves=4,
)
ANSWERS = st.one_of(
    FORMULAS,
    st.tuples(FORMULAS, FORMULAS).map(", ".join),
    st.tuples(NUMBERS, NUMBERS).map(lambda pair: r"\left({}, {}\right]".format(*pair)),
    st.lists(NUMBERS, min_size=1, max_size=3).map(lambda items: rf"\{{{', '.join(items)}\}}"),
    FORMULAS.map("x = {}".format),
    NUMBERS.map("x > {}".format),
    st.tuples(WHOLE, st.sampled_from(["cm", r"\text{ km}", "apples"])).map(
        lambda pair: "{} {}".format(*pair)
    ),
    st.sampled_from([r"\text{Evelyn}", "(C)", "no solution", r"\emptyset", r"\infty"]),
)
# Pieces of which hostile texts are made.
MARKS = r"\boxed{ { } $ \( \) ^ _ \frac \left( \right] , = < 1e9 ! \sum_{n=1} \int \text{"
PIECES = st.sampled_from(
    [*MARKS.split(), "9" * 60, "\x00", "\ud800", "\n", "#### ", "answer is ", "x", "7", " "]
)


@pytest.fixture(autouse=True, scope="module")
def patience():
    """No comparison of these should take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards_math, "TIMEOUT", 2)
        yield


@settings(max_examples=settings.default.max_examples // 2)
@given(ANSWERS)
def test_an_answer_equals_itself_however_it_is_wrapped(answer):
    assert rewards_math._process.ask(2, "equal", answer, answer)
    wrapped = [answer, f" {answer} ", f"${answer}$", f"$ {answer} $", f"{answer}."]
    for text in wrapped:
        assert grade(rf"So it is $\boxed{{{text}}}$.", answer) == 1.0
        assert grade(rf"\boxed{{{answer}}}", text) == 1.0


@given(ANSWERS, ANSWERS)
@example("50\\%", "0.5")
def test_equality_is_symmetric(one, other):
    there, back = (
        rewards_math._process.ask(2, "equal", *pair) for pair in ((one, other), (other, one))
    )
    assert there == back


@given(st.fractions(-50, 50, max_denominator=40), st.integers(2, 9))
def test_a_number_equals_its_other_forms_and_no_other_number(number, factor):
    top, bottom = number.numerator, number.denominator
    forms = [
        rf"\frac{{{top}}}{{{bottom}}}",
        f"{top}/{bottom}",
        rf"\dfrac{{{factor * top}}}{{{factor * bottom}}}",
    ]
    whole, rest = divmod(abs(number), 1)
    if number > 0 and whole and rest:
        forms.append(rf"{whole} \frac{{{rest.numerator}}}{{{rest.denominator}}}")
    for form in forms:
        assert grade(rf"\boxed{{{form}}}", str(number)) == 1.0
        assert grade(rf"\boxed{{{form}}}", str(number + Fraction(1, factor))) == 0.0


@settings(max_examples=2 * settings.default.max_examples)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=12).map("".join)), ANSWERS)
def test_no_text_raises(text, answer):
    assume(len(text) < 400)
    for completion in (text, rf"\boxed{{{text}}}"):
        assert grade(completion, answer) in (0.0, 1.0)
    assert grade(rf"\boxed{{{answer}}}", text) in (0.0, 1.0)
