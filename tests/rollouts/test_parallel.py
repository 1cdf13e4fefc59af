"""Line-aligned text, SQuAD's questions, a target column, and what is read and written unit by
unit."""

import gzip
import json

import pytest
from sentencex import segment
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recipes.compose import compose
from recipes.errors import ConfigError, DataError, ModelError
from recipes.languages import characters
from rollouts.data.examples import Example
from rollouts.data.load import load_examples
from rollouts.simultaneous.prompts import target_cut, target_words, unit_prompts

COLUMNS = {"prompt_column": "en", "target_column": "de"}


def write(folder, **files):
    """NAME__LANG=lines; a list is written to NAME.LANG, a tuple to NAME.LANG.gz."""
    for name, lines in files.items():
        data = "".join(f"{line}\n" for line in lines).encode()
        path = folder / name.replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(lines, list):
            path.write_bytes(data)
        else:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))


def sources(path, **keys):
    return [e.messages[-1]["content"] for e in load_examples(str(path), **COLUMNS | keys)]


def message_of(path, kind=DataError, **keys):
    with pytest.raises(kind) as error:
        load_examples(str(path), **COLUMNS | keys)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_line_aligned_text(tmp_path):
    write(tmp_path, train__en=("A dog.", "Two dogs."), train__de=("Ein Hund.", "Zwei Hunde."))
    first, second = load_examples(str(tmp_path), **COLUMNS)
    assert (first.index, first.messages) == (0, [{"role": "user", "content": "A dog."}])
    assert (
        second.answer == second.solution == "Zwei Hunde."
        and second.context is second.references is None
    )
    assert sources(tmp_path, prompt_column="de", target_column="en") == ["Ein Hund.", "Zwei Hunde."]
    assert load_examples(str(tmp_path), **COLUMNS, limit=1) == [first]


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev"])
def test_splits_of_a_folder(tmp_path, word):
    write(
        tmp_path,
        train__en=["t"],
        train__de=["T"],
        test_2016__en=("a",),
        test_2016__de=("A",),
        test_2017__en=["b"],
        test_2017__de=["B"],
        **{f"more/{word}_1__en": ["v"], f"more/{word}_1__de": ("V",)},
    )
    assert sources(tmp_path) == ["t"] and sources(tmp_path, split="test") == ["a", "b"]
    for asked in ("val", "valid", "validation", "dev"):
        assert sources(tmp_path, split=asked) == ["v"]
    assert "no file of split 'heldout'; choose one of: dev, test, train, val" in message_of(
        tmp_path, split="heldout"
    )
    assert sources(tmp_path / "test_2017") == ["b"]  # named by itself: whole, whatever its name
    assert f"{tmp_path}/test: no such file" in message_of(tmp_path / "test")


def test_what_is_line_aligned_text_and_what_is_not(tmp_path):
    write(
        tmp_path,
        **{
            name: ["x", "y"]
            for name in (
                "README__md",
                "README__txt",
                "get__sh",
                "get__py",
                ".hidden__en",
                ".hidden__de",
                "alone__en",
            )
        },
    )
    assert "no line-aligned NAME.LANG files" in message_of(tmp_path)
    write(tmp_path, **{"a.lc__en": ["x"], "a.lc__zh-Hans": ["X"], "a.lc__deu": ["D"]})
    write(tmp_path, **{"a.lc__en": ("not read, since the other comes first",)})
    (example,) = load_examples(str(tmp_path), prompt_column="zh-Hans", target_column="en")
    assert (example.messages[0]["content"], example.solution) == ("X", "x")
    (tmp_path / "table.jsonl").write_text('{"en": "e", "de": "d"}\n')
    assert sources(tmp_path) == ["e"]


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "x.en").write_bytes("\ufeffa\u2028b\r\nc\rd\x85\ne".encode())
    write(tmp_path, x__de=["1", " 2 ", "3"])
    assert sources(tmp_path) == ["a\u2028b", "c\rd\x85", "e"]
    assert [e.solution for e in load_examples(str(tmp_path / "x"), **COLUMNS)] == ["1", " 2 ", "3"]


def test_errors_of_line_aligned_text(tmp_path):
    write(tmp_path, x__en=["a", "b", "c"], x__de=("A", "B"))
    said = message_of(tmp_path, limit=1)
    assert f"{tmp_path}/x.en has 3 lines" in said and f"{tmp_path}/x.de.gz has 2 lines" in said
    write(tmp_path, y__en=["a", " "], y__de=["A", "B"])
    assert f"{tmp_path}/y line 2: 'en' is empty" in message_of(tmp_path / "y")
    assert "no column 'fr' (data.target_column); its columns: de, en" in message_of(
        tmp_path / "y", target_column="fr"
    )
    (tmp_path / "y.de").write_bytes("Ä\n".encode("latin-1"))
    assert "y.de: not UTF-8" in message_of(tmp_path / "y")
    write(tmp_path, z__en=["a"] * 999, z__de=(*map(str, range(999)),))
    whole = (tmp_path / "z.de.gz").read_bytes()
    for broken in (b"not gzip", whole[: len(whole) // 2], whole[:99] + b"\xff" * 99 + whole[198:]):
        (tmp_path / "z.de.gz").write_bytes(broken)
        assert f"{tmp_path}/z.de.gz: cannot be read: " in message_of(tmp_path / "z")


def test_a_target_is_taken_as_it_is(tmp_path):
    rows = [
        {"question": "q", "text": " So \\boxed{3}.\n#### 4 ", "answer": "5", "solution": "s"},
        {"question": "r", "text": "", "answer": "5"},
        {"question": "r", "text": None, "answer": "5"},
        {"question": "n", "text": 7},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(tmp_path / "x.jsonl"), target_column="text")
    assert [e.solution for e in examples] == [" So \\boxed{3}.\n#### 4 ", "", None, "7"]
    assert all(e.answer == e.solution for e in examples)
    assert load_examples(str(tmp_path / "x.jsonl"))[0].answer == "5"


PARAGRAPHS = [
    {
        "context": "Normandy is in France. It is old.",
        "qas": [
            {
                "id": "1",
                "question": " Where is Normandy?",
                "answers": [
                    {"text": "France", "answer_start": 15},
                    {"text": "in France", "answer_start": 12},
                    {"text": "France", "answer_start": 15},
                ],
            },
            {
                "id": "2",
                "question": "Who?",
                "is_impossible": True,
                "answers": [],
                "plausible_answers": [{"text": "It", "answer_start": 0}],
            },
            {"id": "3", "question": "When?", "is_impossible": False},
        ],
    },
    {
        "context": "Snow is white.",
        "qas": [{"id": "4", "question": "What?", "answers": [{"text": "Snow"}]}],
    },
]


@pytest.mark.parametrize("indent", [None, 1])
def test_squad(tmp_path, indent):
    content = {
        "version": "2",
        "data": [
            {"title": "a", "paragraphs": PARAGRAPHS[:1]},
            {"title": "b", "paragraphs": PARAGRAPHS[1:]},
        ],
    }
    (tmp_path / "dev.json").write_text(json.dumps(content, indent=indent))
    examples = load_examples(str(tmp_path / "dev.json"))
    assert [e.messages[0]["content"] for e in examples] == [
        "Normandy is in France. It is old. Where is Normandy?",
        "Normandy is in France. It is old. Who?",
        "Normandy is in France. It is old. When?",
        "Snow is white. What?",
    ]
    assert [e.context for e in examples] == [PARAGRAPHS[0]["context"]] * 3 + ["Snow is white."]
    assert [e.question for e in examples] == ["Where is Normandy?", "Who?", "When?", "What?"]
    assert [e.references for e in examples] == [
        ("France", "in France"),
        ("unanswerable",),
        None,
        ("Snow",),
    ]
    assert (
        [e.answer for e in examples]
        == [e.solution for e in examples]
        == ["France", "unanswerable", None, "Snow"]
    )
    assert load_examples(str(tmp_path / "dev.json"), limit=2) == examples[:2]
    *_, named = load_examples(str(tmp_path / "dev.json"), prompt_column="context")
    assert named.messages[0]["content"] == "Snow is white."


def test_squad_rows_of_the_hub(tmp_path):
    rows = [
        {
            "id": "1",
            "title": "t",
            "context": "Snow is white.",
            "question": "What?",
            "answers": answers,
        }
        for answers in (
            {"text": ["Snow", "Snow"], "answer_start": [0, 0]},
            {"text": [], "answer_start": []},
        )
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [e.references for e in load_examples(str(tmp_path / "x.jsonl"))] == [
        ("Snow",),
        ("unanswerable",),
    ]
    rows[1]["answers"] = "Snow"
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "x.jsonl line 2: its answers are not as SQuAD has them" in message_of(
        tmp_path / "x.jsonl", prompt_column=None, target_column=None
    )


@pytest.mark.parametrize(
    "paragraph, said",
    [
        (
            {"context": "c", "qas": [{"answers": []}]},
            "article 1: not as SQuAD has it (KeyError: 'question')",
        ),
        (
            {"context": "c", "qas": [{"question": "q", "answers": ["a"]}]},
            "article 1: not as SQuAD has it (TypeError",
        ),
        ({"context": "c"}, "article 1: not as SQuAD has it (KeyError: 'qas')"),
        ({"context": " ", "qas": [{"question": "q"}]}, "question 1 has no text 'context'"),
        ({"context": "c", "qas": [{"question": 3}]}, "question 1 has no text 'question'"),
    ],
)
def test_errors_of_squad(tmp_path, paragraph, said):
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    assert f"{tmp_path}/x.json {said}" in message_of(
        tmp_path / "x.json", prompt_column=None, target_column=None
    )


# Units


@pytest.fixture
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models["student"])  # its end token: <|endoftext|>


def config(*overrides):
    return compose(["recipe=proactivellm", "data.template=auto", *overrides])


def example(text, solution=None, **parts):
    return Example(4, [{"role": "user", "content": text}], solution, solution, **parts)


def texts(tokenizer, parts):
    return [tokenizer.decode(part) for part in parts]


def one(example, tokenizer, *overrides):
    (prompt,), dropped = unit_prompts([example], tokenizer, config(*overrides), "d")
    assert dropped == 0 and prompt.example is example and prompt.index == 4
    assert prompt.token_ids == sum(prompt.segments, ()) and len(prompt.opening) == 1
    assert prompt.text == tokenizer.decode(prompt.token_ids)
    return texts(tokenizer, prompt.segments), tokenizer.decode(prompt.opening[0])


def test_words_of_a_plain_text(tokenizer):
    units, opening = one(example("  Tom has\n5 pens, not 12. "), tokenizer, "data.template=plain")
    assert units == ["<|endoftext|>", "Tom", " has", " 5", " pens,", " not", " 12.<|endoftext|>"]
    assert opening == "<|endoftext|>"
    assert one(example("Hi"), tokenizer, "data.template=plain")[0] == [
        "<|endoftext|>",
        "Hi<|endoftext|>",
    ]
    tokenizer.chat_template = None
    assert one(example("Hi"), tokenizer)[0] == ["<|endoftext|>", "Hi<|endoftext|>"]
    tokenizer.bos_token = "<|im_start|>"
    assert one(example("Hi"), tokenizer)[0] == ["<|im_start|>", "Hi<|endoftext|>"]


def test_a_tokenizer_that_begins_texts_by_itself(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A",
        special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))],
    )
    for template, frame in (("plain", "<|im_start|>Go: "), ("chat", "<|im_start|>user\nGo: ")):
        (prompt,), _ = unit_prompts(
            [example("a b")],
            tokenizer,
            config(f"data.template={template}", "streaming.instruction='Go: '"),
            "d",
        )
        assert texts(tokenizer, prompt.segments) == [frame, "a", " b<|endoftext|>"]
    assert texts(tokenizer, target_words("a b", tokenizer)) == ["a", " b", "<|endoftext|>"]


def test_joined_units_have_the_ids_of_the_text(tokenizer):
    text = "Mia's 34 shells -- (not 7!) and Ünï 中文 🙂."
    (prompt,), _ = unit_prompts([example(text)], tokenizer, config("data.template=plain"), "d")
    assert sum(prompt.segments[1:], ())[:-1] == tuple(tokenizer(text).input_ids)


def test_sentences(tokenizer):
    units, _ = one(
        example("Tom has 3.5 pens.  He lost 2.\nHow many?"),
        tokenizer,
        "streaming.unit=sentence",
        "data.template=plain",
    )
    assert units == ["<|endoftext|>", "Tom has 3.5 pens.", " He lost 2.", " How many?<|endoftext|>"]


def test_the_frame_and_the_opening_of_a_chat(tokenizer):
    units, opening = one(
        example("Tom has"),
        tokenizer,
        "streaming.instruction='To German: '",
        "data.suffix=' Go.'",
        "data.system=Hush.",
    )
    assert units == [
        "<|im_start|>system\nHush.<|im_end|>\n<|im_start|>user\nTo German:  Go.",
        "Tom",
        " has<|endoftext|>",
    ]
    assert opening == "<|im_end|>\n<|im_start|>assistant\n"
    turns = Example(
        4,
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c d"},
        ],
    )
    assert one(turns, tokenizer, "data.template=plain")[0] == ["a\n\nb\n\n", "c", " d<|endoftext|>"]


def test_the_question_comes_before_its_context(tokenizer):
    asked = example("Snow is. What?", "Snow", question="What?", context="Snow is.")
    frame, *units = one(asked, tokenizer, "streaming.instruction='Answer: '")[0]
    assert frame == "<|im_start|>user\nAnswer: What?\n" and units == ["Snow", " is.<|endoftext|>"]
    frame, *units = one(
        example("Snow is. What?", question="What?"), tokenizer, "data.template=plain"
    )[0]
    assert frame == "<|endoftext|>" and units == ["Snow", " is.", " What?<|endoftext|>"]


def test_each_example_gets_its_own_units(tokenizer):
    examples = [
        Example(i, [{"role": "user", "content": text}], question=question, context=text)
        for i, (text, question) in enumerate([("a b", "p?"), ("b", "q?"), ("b a b", "p?")])
    ]
    prompts, _ = unit_prompts(examples, tokenizer, config("data.template=plain"), "d")
    assert [texts(tokenizer, p.segments) for p in prompts] == [
        ["p?\n", "a", " b<|endoftext|>"],
        ["q?\n", "b<|endoftext|>"],
        ["p?\n", "b", " a", " b<|endoftext|>"],
    ]
    assert [p.index for p in prompts] == [0, 1, 2] and unit_prompts(
        [], tokenizer, config(), "d"
    ) == ([], 0)


def test_long_sources_are_dropped_and_counted(tokenizer):
    short, long = example("a b"), example("a b c")
    lengths = [
        len(unit_prompts([e], tokenizer, config("data.template=plain"), "d")[0][0].token_ids)
        for e in (short, long)
    ]
    limit = ("data.template=plain", f"data.max_prompt_tokens={lengths[0]}")
    kept, dropped = unit_prompts([long, short, long], tokenizer, config(*limit), "d")
    assert lengths[0] < lengths[1] and [p.example for p in kept] == [short] and dropped == 2
    with pytest.raises(
        DataError,
        match=f"^d: all 1 sources are longer than {lengths[0]} tokens, the shortest has "
        f"{lengths[1]}; raise data.max_prompt_tokens",
    ):
        unit_prompts([long], tokenizer, config(*limit), "d")


@pytest.mark.parametrize(
    "bad, said",
    [
        (example(" \n"), "d: row 4 has an empty source; "),
        (example("a", " "), "d: row 4 has an empty target; "),
        (example("a", context=""), "d: row 4 has an empty source; "),
    ],
)
def test_empty_texts(tokenizer, bad, said):
    with pytest.raises(DataError) as error:
        unit_prompts([example("a", "b"), bad], tokenizer, config(), "d")
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_tokenizers_that_do_not_serve(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template; use data\.template=plain"):
        unit_prompts([example("a")], tokenizer, config("data.template=chat"), "d")
    tokenizer.eos_token = None
    for call in (
        lambda: unit_prompts([example("a")], tokenizer, config(), "d"),
        lambda: target_words("a", tokenizer),
    ):
        with pytest.raises(ModelError, match="has no end token"):
            call()
    vocabulary = ["<unk>", "</s>", "\u2581", "\u2581a", "\u2581b"]
    pieces = Tokenizer(
        models.Unigram([(piece, -float(place)) for place, piece in enumerate(vocabulary)], unk_id=0)
    )
    pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    always_spaced = PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="</s>", unk_token="<unk>"
    )
    with pytest.raises(
        ModelError, match="joins 'a' and ' b' to 'a  b', so a text cannot be cut into words"
    ):
        unit_prompts([example("a b")], always_spaced, config(), "d")


def test_target_words(tokenizer):
    *words, end = target_words("Er hat\n 12 Stifte. ", tokenizer)
    assert texts(tokenizer, words) == ["Er", " hat", " 12", " Stifte."] and end == (
        tokenizer.eos_token_id,
    )
    assert sum(words, ()) == tuple(tokenizer("Er hat 12 Stifte.").input_ids)
    assert target_words(" ", tokenizer) == [end]


SPACELESS_TEXTS = [
    "我爱北京。用 Python 3写的，好吗？ 好的！",
    "กำลังไป ที่นั่น",
    "日本語の\u3000テスト。か\u3099",
]


@pytest.mark.parametrize("unit", ["word", "sentence"])
@pytest.mark.parametrize("text", SPACELESS_TEXTS)
def test_joined_units_of_a_text_without_spaces_are_the_text(tokenizer, text, unit):
    plain = ("data.template=plain", f"streaming.unit={unit}", "streaming.source_language=ja")
    (frame, *units), _ = one(example(text, text), tokenizer, *plain, "data.target_column=zh")
    count = len(characters(text)) if unit == "word" else len(list(segment("ja", text)))
    assert frame == "<|endoftext|>" and len(units) == count
    assert "".join(units) == f"{text}<|endoftext|>"
    cut = target_cut(config("data.target_column=translation.zh"))
    *words, _ = target_words(text, tokenizer, cut)
    assert texts(tokenizer, words) == characters(text)


def test_the_language_comes_from_the_column_unless_a_key_names_it(tokenizer):
    plain = "data.template=plain"
    for overrides, count in (
        (["data.prompt_column=zh"], 5),
        (["streaming.source_language=zh", "data.prompt_column=en"], 5),
        (["data.prompt_column=zh", "streaming.source_language=en"], 1),
        ([], 1),
    ):
        units, _ = one(example("我爱北京。"), tokenizer, plain, *overrides)
        assert len(units) == 1 + count


def test_a_text_without_spaces_in_no_known_language_is_refused(tokenizer):
    long = "今天天气很好，我们去公园吧。"
    for made, key in ((example(long), "source"), (example("a", long), "target")):
        with pytest.raises(ConfigError) as error:
            unit_prompts([made], tokenizer, config(), "d")
        said = str(error.value)
        assert said.startswith("d: row 4 has text without spaces between words; name its language")
        assert f"streaming.{key}_language=zh" in said and "\n" not in said
        assert unit_prompts([made], tokenizer, config(f"streaming.{key}_language=en"), "d")
