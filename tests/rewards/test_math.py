import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from recipes.components import VERIFIERS
from recipes.errors import OnstreamError
from rewards import math as rewards_math
from rewards import math_process, verification
from rewards.math import extract_answer, extract_boxed, extract_marked, grade
from rewards.math_process import MathProcess
from rewards.verification import verdicts

# Completion, reference answer. References are as in the files of GSM8K, MATH-500, AIME and
# OlympiadBench.
RIGHT = [
    (r"34 + 12 = 46. The answer is \boxed{46}.", "46"),
    (r"\boxed{046}", "46"),
    (r"\boxed{46.}", "46"),
    (r"First \boxed{5}, no: \boxed{46}", "46"),
    (r"The answer is \boxed{46}. I hope that 99 people agree.", "46"),
    (r"\boxed{46} and then \boxed{4", "46"),
    (r"\boxed{\boxed{46}}", "46"),
    (r"\fbox{46}", "46"),
    (r"\boxed{70,000}", "70000"),
    (r"\boxed{70000}", "70,000"),
    (r"\boxed{10,\!000}", "10000"),
    (r"\boxed{\$18.00}", "18"),
    (r"\boxed{46\text{ shells}}", "46"),
    (r"\boxed{5 \text{ cm}}", "5"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{90}", r"90^\circ"),
    (r"\boxed{\frac{270}{7}}", r"\frac{270}7\text{ degrees}"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{62.5}", "62.5%"),
    (r"\boxed{8}", r"$8 \%$"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{\dfrac12}", r"\frac{1}{2}"),
    (r"\boxed{1/2}", r"\frac{1}{2}"),
    (r"\boxed{6.72 \times 10^{-5}}", ".0000672"),
    (r"\boxed{2\sqrt{2}+9\sqrt 2}", r"11\sqrt2"),
    (r"\boxed{7i - 2}", "-2 + 7i"),
    (r"\boxed{ab+2a+5b+10}", "(a+5)(b+2)"),
    (r"\boxed{5}", "x=5"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{\left(3, \pi/2\right)}", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\boxed{\left(3,4\right]}", "(3,4]"),
    (r"\boxed{-2, 1}", "1,-2"),
    (r"\boxed{\{-2, 1\}}", "1,-2"),
    (r"\boxed{84, 69}", "$69$,$84$"),
    (r"\boxed{(3,2),(1,1)}", "$(1,1), (3,2)$"),
    (r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}", r"1 \pm \sqrt{19}"),
    (
        r"\boxed{\begin{pmatrix} -\frac13 \\ \frac{2}{3} \end{pmatrix}}",
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
    ),
    (r"\boxed{\text{Evelyn}}", "Evelyn"),
    (r"\boxed{(C)}", "C"),
    (r"\boxed{\frac{1}{2n+2}}", r"$\frac{1}{2 n+2}$"),
    (r"\boxed{k \ge 2}", r"$k \geqslant 2$"),
    ("The final answer is 46.", "46"),
    ("so each of them gets $5,000", "5000"),
    (r"Hence $x = \frac{3}{4}$.", "0.75"),
]
WRONG = [
    (r"\boxed{47}", "46"),
    (r"\boxed{-46}", "46"),
    (r"\boxed{46} Wait. \boxed{47}", "46"),
    (r"34 + 12 = 46. The answer is \boxed{4", "46"),  # cut short: neither 4 nor 46
    (r"34 + 12 = 46. The answer is \boxed{46", "46"),
    (r"\boxed{}", "46"),
    (r"\boxed{}", ""),
    ("", "46"),
    ("", ""),
    ("I do not know.", "46"),
    (r"\boxed{0.33}", r"\frac13"),
    (r"\boxed{[3,4]}", "(3,4]"),
    (r"\boxed{(1,-2)}", "(-2,1)"),
    (r"\boxed{69}", "$69$,$84$"),
    (r"\boxed{46 or 47}", "46"),
    (r"\boxed{y=5}", "x=5"),
    (r"\boxed{\text{Brad}}", r"\text{Evelyn}"),
    ("34 + 12 = 46. 46 - 1 = 45.", "46"),
]


GRADED = json.loads((Path(__file__).parent / "graded_answers.json").read_text("utf-8"))
HOSTILE = [pair for pair in GRADED if pair["kind"] == "hostile"]
USUAL = [pair for pair in GRADED if pair["kind"] != "hostile"]
# Equal pairs that may be graded as wrong: docs/results/answers.md lists them.
FALSE_NEGATIVES = 8


@pytest.fixture(scope="module")
def impatient():
    """A short time limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards_math, "TIMEOUT", 1)
        yield


@pytest.mark.parametrize("completion, answer", RIGHT)
def test_right(completion, answer):
    assert grade(completion, answer) == 1.0


@pytest.mark.parametrize("completion, answer", WRONG)
def test_wrong(completion, answer):
    assert grade(completion, answer) == 0.0


@pytest.mark.parametrize(
    "completion, content",
    [
        (r"\boxed{\frac{a}{b}}", r"\frac{a}{b}"),
        (r"{ \boxed{ 1 } }}", "1"),
        (r"\boxed {3}", "3"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{1", None),
        ("none", None),
        (r"\mbox{4}", None),
        (r"So $x=\boxed{2}$ or $x=\boxed{-2}$.", "2, -2"),
        (r"$\boxed{1}$, $\boxed{2}$, and $$\boxed{3}$$", "1, 2, 3"),
        (r"\[\boxed{1} \text{ or } \boxed{2}\]", "1, 2"),
        (r"\boxed{1}; \boxed{2}", "1, 2"),
        (r"$a=\boxed{2}$ and $b=\boxed{3}$", "a = 2, b = 3"),
        (r"\boxed{4}, \boxed{4}", "4"),
        (r"\boxed{1}. \boxed{2}", "2"),
        (r"First \boxed{5}, so $x = \boxed{6}$", "6"),
        (r"$a=\boxed{3}$, so $a+b=\boxed{7}$", "7"),
    ],
)
def test_extract_boxed(completion, content):
    assert extract_boxed(completion) == content


@pytest.mark.parametrize(
    "text, marked",
    [
        ("2+40=42\n#### 42", ("2+40=42", "42")),
        ("2+40=42\n#### 42\nand the reasoning above", ("2+40=42", "42")),
        ("2+40=42\n#### 42 and the reasoning above", ("2+40=42", "42")),
        ("a\n#### 1\nb\n**#### 2**\nc", ("a\n#### 1\nb", "2")),
        ("#### $1,042.50\n\nLet me know", ("", "$1,042.50")),
        ("#### 2 or 3", ("", "2 or 3")),
        ("#### x + 5\n", ("", "x + 5")),
        ("#### City of Paris", ("", "City of Paris")),
        ("##### a heading of five", None),
        ("####", None),
        ("none", None),
    ],
)
def test_extract_marked(text, marked):
    assert extract_marked(text) == marked


def test_a_heading_is_no_answer():
    assert extract_answer("#### Conclusion\nThe answer is 42.") == "42"
    assert extract_answer("#### 1. Sum\nThe answer is 42.") == "42"


def test_extract_answer_without_a_box_reads_the_end():
    assert extract_answer("12 apples. " + "word " * 200 + "So the answer is 46.") == "46"
    assert extract_answer("12 apples. " + "word " * 200) is None
    # Where the tail begins inside a number, that number is not taken for a shorter one.
    assert extract_answer("123456" + " word" * 79) is None


def test_the_graded_pairs_are_many_and_balanced():
    assert len(GRADED) >= 200
    assert sum(not pair["equal"] for pair in GRADED) >= 0.4 * len(GRADED)
    assert len({pair["kind"] for pair in GRADED}) >= 20


def misgraded(pairs, equal):
    return [
        (pair["completion"][:100], pair["gold"][:100])
        for pair in pairs
        if pair["equal"] == equal and grade(pair["completion"], pair["gold"]) != equal
    ]


def test_no_graded_pair_is_a_false_positive():
    assert misgraded(USUAL, equal=False) == []


def test_the_graded_pairs_have_few_false_negatives():
    wrong = misgraded(USUAL, equal=True)
    assert len(wrong) <= FALSE_NEGATIVES, wrong


def test_hostile_pairs_end_in_time_without_a_false_positive(impatient):
    grade(r"\boxed{1/3}", "2/6")  # the process is up
    slowest = 0.0
    for pair in HOSTILE:
        started = time.perf_counter()
        graded = grade(pair["completion"], pair["gold"])
        slowest = max(slowest, time.perf_counter() - started)
        assert graded <= pair["equal"], pair["completion"][:100]
    assert slowest < 2  # the limit is one second


@pytest.mark.parametrize(
    "one, other",
    [(r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"), ("x + 5", "5"), ("1 m", "1 km"), ("50%", "5%")],
)
def test_unequal_is_symmetric(one, other):
    assert grade(rf"\boxed{{{one}}}", other) == grade(rf"\boxed{{{other}}}", one) == 0.0


def test_registered_by_name():
    assert VERIFIERS.resolve("math") is grade


@pytest.mark.parametrize(
    "garbage",
    [
        "\\boxed{" * 5000,
        "{" * 5000,
        "}" * 5000,
        "(" * 500,
        r"\frac{" * 100,
        "1" * 5000,
        "1e999999999",
        "\x00\ud800\n\n",
        r"\frac{1}{0}",
        r"2^{100000000}",
        "9" * 60 + "!",
        "$" * 99,
        "\\",
        r"\left(",
        "٣",
    ],
)
def test_garbage_is_wrong_and_nothing_is_raised(impatient, garbage):
    assert grade(garbage, "46") == grade(f"\\boxed{{{garbage}}}", "46") == 0.0
    assert grade(r"\boxed{46}", garbage) == 0.0


def test_an_endless_comparison_ends_and_leaves_the_next_one_unharmed(impatient):
    grade(r"\boxed{1/3}", "2/6")  # the process is up, so the time below is the comparison's
    started = time.perf_counter()
    assert grade(r"\boxed{9^{9^{9^{9}}}}", "46") == 0.0
    assert time.perf_counter() - started < 2
    assert grade(r"\boxed{2/8}", "0.25") == 1.0


# Each differs from the others, so that none is answered from the cache.
ENDLESS = (
    r"\sum_{{n=1}}^{{10^{{12}}}} \frac{{{i}}}{{n}}",
    r"\prod_{{n={i}}}^{{10^8}} n",
    r"\sum_{{n=1}}^{{10^{{9}}}} \sin(n^{i})",
)


def test_a_batch_of_endless_answers_ends_in_time_and_the_others_are_graded(monkeypatch):
    """Each took five seconds, one after another: four minutes for 48."""
    questions = [(rf"\boxed{{{ENDLESS[i % 3].format(i=i + 2)}}}", ["28"]) for i in range(48)]
    questions += [(text, [answer]) for text, answer in (*RIGHT[:20], *WRONG[:10])]
    random.Random(0).shuffle(questions)
    monkeypatch.setattr(verification, "QUICK", 0.03)
    grade(r"\boxed{1/3}", "2/6")  # the process is up
    rewards_math._question.cache_clear()
    started = time.perf_counter()
    found = verdicts(grade, questions, seconds=4)
    assert time.perf_counter() - started < 4 + 48 * 0.03 + 6
    by_text = {text: verdict for (text, _), verdict in zip(questions, found)}
    assert [by_text[text] for text, _ in RIGHT[:20]] == [(1.0, False)] * 20
    assert [by_text[text] for text, _ in WRONG[:10]] == [(0.0, False)] * 10
    assert sum(verdict.timed_out for verdict in found) == 48


def test_a_slow_answer_is_right_where_there_is_time(impatient):
    """It needs several rounds. Of several right answers, one that ended is enough."""
    slow = r"\boxed{\lim_{n\to\infty} \left(1+\frac1n\right)^n}"
    rewards_math._question.cache_clear()
    assert verdicts(grade, [(slow, ["e"])], seconds=20) == [(1.0, False)]
    endless = r"\sum_{n=1}^{10^{12}} \frac{77}{n}"
    assert verdicts(grade, [(r"\boxed{28}", [endless, "28"])], seconds=0.1) == [(1.0, False)]
    assert verdicts(grade, [(r"\boxed{28}", [endless, "29"])], seconds=0.1) == [(0.0, True)]


def test_a_verifier_without_a_limit_is_called_as_it_is():
    questions = [("a", ["b", "a"]), ("c", ["d"])]
    same = verdicts(lambda text, answer: float(text == answer), questions, seconds=1)
    assert same == [(1.0, False), (0.0, False)]
    assert verdicts(max, [("1", ["2"])], seconds=1) == [("2", False)]


def test_works_in_threads_and_leaves_the_alarm_alone():
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the alarm went off early"))
    was = signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        wrong = []

        def work(k):
            for i in range(1, 30):
                if grade(rf"\boxed{{\frac{{{i}}}{{{k}}}}}", f"{2 * i}/{2 * k}") != 1.0:
                    wrong.append((i, k))

        threads = [threading.Thread(target=work, args=(k,)) for k in (31, 37, 41)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not wrong
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 400
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *was)


def test_a_forked_child_does_not_share_the_process():
    assert grade(r"\boxed{2/6}", "1/3") == 1.0
    process = rewards_math._process.running
    child = os.fork()
    if child == 0:
        right = grade(r"\boxed{2/14}", "1/7") == 1.0
        os._exit(0 if right and rewards_math._process.running.pid != process.pid else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert grade(r"\boxed{2/22}", "1/11") == 1.0


def test_a_process_that_died_between_questions_is_replaced():
    assert grade(r"\boxed{3/6}", "1/2") == 1.0
    process = rewards_math._process.running
    process.kill()
    process.wait()
    assert grade(r"\boxed{3/9}", "1/3") == 1.0


def test_repeated_and_integer_answers_need_no_parsing(monkeypatch):
    assert grade(r"\boxed{0.2}", "1/5") == 1.0
    monkeypatch.setattr(rewards_math._process, "ask", lambda *_: pytest.fail("asked math-verify"))
    assert grade(r"again \boxed{0.2}", "1/5") == 1.0
    assert [grade(rf"\boxed{{{i}}}", "7") for i in range(6, 9)] == [0.0, 1.0, 0.0]
    assert grade(r"\boxed{p - q}", "p - q") == 1.0
    started = time.perf_counter()
    for i in range(5000):
        grade(rf"34 + 12 = 46. The answer is \boxed{{{i % 100}}}.", "46")
    assert time.perf_counter() - started < 2.5  # 2,000 a second; far more on an idle machine


def test_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr(math_process.sys, "executable", "/bin/false")
    with pytest.raises(
        OnstreamError, match="reward.verifier=math cannot start math-verify"
    ) as error:
        MathProcess().ask(1.0, "equal", "1/2", "0.5")
    assert "\n" not in str(error.value)
