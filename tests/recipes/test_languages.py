"""Languages without spaces: what a character is, and what is known of a language by its code."""

import random

import pytest

from recipes.languages import (
    begun,
    bleu_tokenizer,
    characters,
    is_spaceless,
    named_by,
    runs_on,
    words,
)

# Letters of many scripts, marks, spaces and signs.
LETTERS = "我爱北京。，がカー゙กำลังไปမြန်မာབོདខ្មែរab3é€! \n\u3000😀한"


def test_joined_characters_are_the_text():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(LETTERS, k=rng.randint(0, 30)))
        pieces = characters(text)
        assert "".join(pieces) == text.strip() and all(pieces)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("我爱北京。", ["我", "爱", "北", "京", "。"]),
        ("用 Python 3写", ["用", " Python", " 3", "写"]),
        ("日本語のテスト", list("日本語のテスト")),
        ("ที่นี่", ["ที่", "นี่"]),  # marks stay with their letter
        ("か\u3099", ["か\u3099"]),
        ("  ", []),
    ],
)
def test_characters(text, pieces):
    assert characters(text) == pieces


def test_words_are_those_between_spaces_where_there_are_spaces():
    text = "The  dog's U.S. naïve\tmañana — 한국어 문장"
    assert words(text) == text.split()
    assert words("他说：「你好，Bob」") == ["他", "说", "你", "好", "Bob"]


def test_what_a_part_of_a_text_begins():
    assert [begun(part) for part in ("我们", " Bob", "bob", "。", "我Bob", "")] == [
        2,
        1,
        0,
        1,
        2,
        0,
    ]


def test_languages_by_their_codes():
    spaceless = ("zh", "zh-TW", "zho_Hans", "ja", "th", "my_Mymr")
    assert all(map(is_spaceless, spaceless))
    assert not any(map(is_spaceless, ("de", "ko", "vi", None)))
    found = [bleu_tokenizer(language) for language in ("zh_CN", "ja", "ko", "th", "de", None)]
    assert found == ["zh", "ja-mecab", "ko-mecab", "char", "13a", "13a"]


@pytest.mark.parametrize(
    "column, language",
    [
        ("zh", "zh"),
        ("translation.ja", "ja"),
        ("zh-TW", "zh-TW"),
        ("cmn", "cmn"),
        ("src", None),
        ("text", None),
        ("answer", None),
        (None, None),
    ],
)
def test_a_column_may_be_named_after_a_language(column, language):
    assert named_by(column) == language


def test_a_text_that_runs_on_is_told_from_one_that_quotes_a_word():
    assert runs_on("今天天气很好，我们去公园吧。") and not runs_on("The city of 北京 is large.")
