import ast
import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recipes.errors import ConfigError, DataError
from rollouts.data import chat
from rollouts.data.chat import text_ids, tokenize_prompts
from rollouts.data.examples import PromptSampler
from rollouts.data.load import load_examples
from rollouts.data.stories import story


def write(path, rows):
    """Rows in the format that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return str(path)


def user(text):
    return [{"role": "user", "content": text}]


def message_of(*arguments, **keys):
    with pytest.raises(DataError) as error:
        list(load_examples(*map(str, arguments), **keys))
    assert "\n" not in str(error.value)
    return str(error.value)


# A row as such files have it, and the messages, answer and solution it must give.
ROWS = {
    "verl": (
        {"prompt": user("2+2?"), "reward_model": {"ground_truth": "4", "style": "rule"}, "id": "0"},
        user("2+2?"),
        "4",
        None,
    ),
    "olympiadbench": (
        {
            "prompt": user("n?"),
            "solution": ["As $n=2$.", "Otherwise."],
            "context": None,
            "reward_model": {"ground_truth": "$2$", "style": "rule"},
        },
        user("n?"),
        "$2$",
        "As $n=2$.",
    ),
    "olympiadbench list": (
        {"question": "n?", "final_answer": ["$2$", "$3$"], "solution": ["So."]},
        user("n?"),
        "$2$, $3$",
        "So.",
    ),
    "gsm8k": (
        {"question": "Price?", "answer": "It is <<700*2=1400>>1,400.\n#### 1,400"},
        user("Price?"),
        "1400",
        "It is <<700*2=1400>>1,400.",
    ),
    "math": (
        {"problem": "x?", "solution": r"As $x=\frac12$, it is $\boxed{\frac{1}{2}}$."},
        user("x?"),
        r"\frac{1}{2}",
        r"As $x=\frac12$, it is $\boxed{\frac{1}{2}}$.",
    ),
    "math with answer": (
        {"problem": "x?", "solution": r"Thus \boxed{3}.", "answer": "3.0"},
        user("x?"),
        "3.0",
        r"Thus \boxed{3}.",
    ),
    "only a box": ({"question": "x?", "answer": r"\boxed{285}"}, user("x?"), "285", None),
    "prose solution": ({"problem": "Why?", "solution": "Because."}, user("Why?"), None, "Because."),
    "messages": (
        {"messages": [*user("2+2?"), {"role": "assistant", "content": r"\boxed{4}, I think."}]},
        user("2+2?"),
        "4",
        r"\boxed{4}, I think.",
    ),
    "conversation": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *user("a"),
                {"role": "assistant", "content": "b"},
                *user("c"),
            ]
        },
        [
            {"role": "system", "content": "Be brief."},
            *user("a"),
            {"role": "assistant", "content": "b"},
            *user("c"),
        ],
        None,
        None,
    ),
    "alpaca": ({"instruction": "Say hi.", "output": "Hi."}, user("Say hi."), None, "Hi."),
    "number": ({"input": "2+2?", "answer": 4}, user("2+2?"), "4", None),
    "precedence": (
        {
            "input": "no",
            "problem": "no",
            "question": "no",
            "prompt": "yes",
            "solution": "no",
            "ground_truth": "no",
            "final_answer": "no",
            "answer": "yes",
        },
        user("yes"),
        "yes",
        "no",
    ),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("row, messages, answer, solution", ROWS.values(), ids=ROWS)
def test_columns(tmp_path, suffix, row, messages, answer, solution):
    (example,) = load_examples(write(tmp_path / f"data{suffix}", [row]))
    assert (example.messages, example.answer, example.solution) == (messages, answer, solution)
    assert example.index == 0 and example.sentences is None and example.thoughts is None


def test_csv(tmp_path):
    path = write(
        tmp_path / "data.csv",
        [{"question": "2+2?", "answer": 4}, {"question": '"a, b\nc"', "answer": ""}],
    )
    first, second = load_examples(path)
    assert (first.messages, first.answer) == (user("2+2?"), "4")
    assert (second.messages, second.answer) == (user("a, b\nc"), None)


def test_a_gap_does_not_turn_integers_into_floats(tmp_path):
    table = pyarrow.table({"question": ["a", "b", "c"], "answer": pyarrow.array([18.0, None, 2.5])})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert [e.answer for e in load_examples(str(tmp_path / "x.parquet"))] == ["18", None, "2.5"]


def test_named_columns_win(tmp_path):
    row = {"prompt": "no", "answer": "no", "task": {"text": "yes"}, "solution": "prose"}
    path = write(tmp_path / "x.jsonl", [row])
    (example,) = load_examples(path, prompt_column="task.text", answer_column="solution")
    assert example.messages == user("yes") and example.answer == "prose"


def test_folder_and_limit(tmp_path):
    write(tmp_path / "set/b.parquet", [{"question": f"b{i}", "answer": str(i)} for i in range(3)])
    write(tmp_path / "set/a.jsonl", [{"prompt": user(f"a{i}")} for i in range(2)])
    (tmp_path / "set/README.md").write_text("not data")
    write(tmp_path / "set/.cache/c.jsonl", [{"prompt": "hidden"}])
    examples = load_examples(str(tmp_path / "set"))
    assert [e.messages[0]["content"] for e in examples] == ["a0", "a1", "b0", "b1", "b2"]
    assert [e.index for e in examples] == [0, 1, 2, 3, 4]
    assert load_examples(str(tmp_path / "set"), limit=3) == examples[:3]


def test_a_limit_stops_reading(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n{broken\n')
    assert len(load_examples(str(tmp_path / "x.jsonl"), limit=2)) == 2


def test_a_folder_with_splits(tmp_path):
    for name in ("train-00000-of-00001", "test-00000-of-00001", "data/validation/0"):
        write(tmp_path / f"{name}.jsonl", [{"prompt": name}])

    def found(split):
        return [e.messages[0]["content"] for e in load_examples(str(tmp_path), split=split)]

    assert found("train") == ["train-00000-of-00001"] and found("validation") == [
        "data/validation/0"
    ]
    said = message_of(tmp_path, split="heldout")
    assert str(tmp_path) in said and "'heldout'" in said and "test, train, validation" in said
    # A file by itself is whole, whatever its name.
    assert len(load_examples(str(tmp_path / "test-00000-of-00001.jsonl"), split="train")) == 1


def test_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **keys):
        asked.append((arguments, keys))
        return datasets.Dataset.from_list([{"question": "2+2?", "answer": "#### 4"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = load_examples("openai/gsm8k:main", split="test")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert (example.messages, example.answer) == (user("2+2?"), "4")


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = message_of("my-data", split="validation")
    assert all(
        part in said for part in ("my-data: no such file", "split 'validation'", "no route to host")
    )


@pytest.mark.parametrize(
    "path",
    [
        "./data",
        "../data",
        "/nowhere/data",
        "~/nowhere",
        "data.jsonl",
        "data.parquet",
        "org/name.json",
        "name.csv",
        "a/b/c",
    ],
)
def test_a_missing_path_does_not_ask_the_hub(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert message_of(path) == f"{path}: no such file or folder; check data.path"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("x.txt", "a", ["x.txt", "'.txt'", ".jsonl, .json, .csv, .tsv, .parquet, .arrow"]),
        ("x.jsonl", "", ["x.jsonl", "no rows"]),
        ("x.json", "[]", ["x.json", "no rows"]),
        ("x.csv", "question,answer\n", ["x.csv", "no rows"]),
        ("x.jsonl", '{"prompt": "a"}\n\n{"prompt": }\n', ["x.jsonl line 3", "malformed JSON"]),
        ("x.jsonl", '{"prompt": "a"}\n["b"]\n', ["x.jsonl line 2", "not a JSON object"]),
        ("x.json", '[{"prompt": "a"},\n{"prompt" "b"}]', ["x.json line 2", "malformed JSON"]),
        ("x.json", '[{"prompt": "a"}, 3]', ["x.json row 2", "not a JSON object"]),
        (
            "x.json",
            '{\n "prompt": "a"\n}',
            ["x.json line 1", "malformed JSON", "one object per line"],
        ),
        ("x.jsonl", '{"prompt": "a"}\n{"other": "b"}\n', ["x.jsonl line 2", "no 'prompt'"]),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', ["x.jsonl line 2", "no 'prompt'"]),
        (
            "x.jsonl",
            '{"prompt": "a"}\n{"prompt": " \\n"}\n',
            ["x.jsonl line 2", "'prompt' is empty"],
        ),
        ("x.jsonl", '{"prompt": []}\n', ["x.jsonl line 1", "'prompt' is empty"]),
        (
            "x.jsonl",
            '{"prompt": [{"role": "user"}]}\n',
            ["x.jsonl line 1", "'prompt'", "role", "content"],
        ),
        ("x.jsonl", '{"prompt": 3}\n', ["x.jsonl line 1", "'prompt' is neither"]),
        (
            "x.jsonl",
            '{"messages": [{"role": "assistant", "content": "b"}]}\n',
            ["line 1", "'messages' is empty"],
        ),
        ("x.csv", "question,answer\na,1\nb,2,3\n", ["x.csv row 2", "cells"]),
        ("x.csv", 'question,answer\na,"1\n', ["x.csv", "cannot be read as .csv"]),
        (
            "x.jsonl",
            '{"text": "a", "label": 1}\n',
            ["x.jsonl", "text, label", "data.prompt_column"],
        ),
        ("x.parquet", "not parquet", ["x.parquet", "cannot be read as .parquet"]),
    ],
)
def test_errors_say_what_and_where(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    message = message_of(tmp_path / name)
    assert message.startswith(str(tmp_path)) and all(part in message for part in said), message


def test_errors_of_parquet_rows_and_encodings(tmp_path):
    path = write(tmp_path / "x.parquet", [{"question": "a"}] * 1500 + [{"question": None}])
    assert f"{path} row 1501: no 'question'" in message_of(path)
    (tmp_path / "x.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    assert "x.jsonl: not UTF-8" in message_of(tmp_path / "x.jsonl")


@pytest.mark.parametrize("key", ["prompt_column", "answer_column"])
def test_a_named_column_that_is_missing(tmp_path, key):
    path = write(tmp_path / "x.parquet", [{"question": "a", "answer": "b"}])
    message = message_of(path, **{key: "label"})
    assert all(part in message for part in (path, "'label'", f"data.{key}", "question, answer")), (
        message
    )


def test_an_empty_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("a")
    assert f"{tmp_path}: no .jsonl" in message_of(tmp_path)


def test_stories():
    train = load_examples("stories", size=50, seed=1, difficulty=2)
    made = story(1, 49, "train", 2)
    last = train[-1]
    assert len(train) == 50 and last == train[49] and [e.index for e in train[48:]] == [48, 49]
    assert last.messages == user(made.prompt) and (last.answer, last.solution) == (
        made.answer,
        made.solution,
    )
    assert (last.sentences, last.thoughts, last.question, last.final) == (
        made.sentences,
        made.thoughts,
        made.question,
        made.final,
    )
    with pytest.raises(IndexError):
        train[50]
    heldout = load_examples("stories", split="heldout", size=300, limit=200)
    assert len(heldout) == 200 and len({e.thoughts for e in heldout}) == 200
    assert not {e.thoughts for e in heldout} & {
        e.thoughts for e in load_examples("stories", size=3000)
    }
    assert len(load_examples("stories")) == 20000
    assert "Check: " in " ".join(
        e.solution for e in load_examples("stories", size=20, verbose=True)
    )
    assert "split 'test'" in message_of("stories", split="test")
    assert "data.difficulty" in message_of("stories", difficulty=0)


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant>"
    "{% if enable_thinking %} <think>{% endif %}"
)


def make_tokenizer(template=None, frame="[BOS] $A"):
    words = ["[UNK]", "[BOS]", *"abcdefgh", "<user>", "<system>", "<assistant>", "<think>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        frame, special_tokens=[("[BOS]", 1), ("[UNK]", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="[BOS]")
    fast.chat_template = template
    return fast


@pytest.fixture
def examples(tmp_path):
    return load_examples(
        write(
            tmp_path / "x.jsonl",
            [
                {"prompt": "a b"},
                {"prompt": "a b c d e f"},
                {"prompt": [{"role": "system", "content": "h"}, *user("c")]},
            ],
        )
    )


def words(tokenizer, prompts):
    return [" ".join(tokenizer.convert_ids_to_tokens(prompt.token_ids)) for prompt in prompts]


def test_plain_prompts(examples):
    tokenizer = make_tokenizer()
    prompts, dropped = tokenize_prompts(examples, tokenizer, max_prompt_tokens=5, suffix=" g")
    assert words(tokenizer, prompts) == ["[BOS] a b g", "[BOS] h c g"] and dropped == 1
    assert [p.index for p in prompts] == [0, 2] and prompts[1].example is examples[2]
    assert [p.text for p in prompts] == ["a b g", "h\n\nc g"]
    assert examples[0].messages == user("a b")  # the suffix stays out of the example


@pytest.mark.parametrize("frame, before", [("[BOS] $A [UNK]", "[BOS] "), ("$A [BOS] [UNK]", "")])
def test_no_special_token_stands_between_prompt_and_completion(examples, frame, before):
    tokenizer = make_tokenizer(frame=frame)
    assert tokenizer("a b").input_ids[-1] == 0
    prompts, _ = tokenize_prompts(examples, tokenizer, max_prompt_tokens=5)
    assert words(tokenizer, prompts) == [f"{before}a b", f"{before}h c"]
    # A text that itself ends in such a token keeps it.
    (ids,) = text_ids(tokenizer, ["a [UNK]"], add_special_tokens=True).values()
    assert tokenizer.convert_ids_to_tokens(ids) == [*before.split(), "a", "[UNK]"]
    assert text_ids(tokenizer, ["a"]) == {"a": (2,)}


def test_texts_are_tokenized_in_parts(examples, monkeypatch):
    tokenizer = make_tokenizer()
    whole = tokenize_prompts(examples, tokenizer, max_prompt_tokens=99)
    sizes = []

    def tokenize(texts, **options):
        sizes.append(len(texts))
        return tokenizer(texts, **options)

    tokenize.chat_template = None
    monkeypatch.setattr(chat, "CHUNK", 2)
    assert tokenize_prompts(examples, tokenize, max_prompt_tokens=99) == whole
    ids = text_ids(tokenize, ["a b", "c", "a b", "d e", "f"])
    assert ids == {"a b": (2, 3), "c": (4,), "d e": (5, 6), "f": (7,)}
    assert max(sizes) == 2


def test_chat_prompts(examples):
    tokenizer = make_tokenizer(TEMPLATE)
    prompts, dropped = tokenize_prompts(
        examples, tokenizer, max_prompt_tokens=99, suffix=" g", system="f"
    )
    assert (
        words(tokenizer, prompts)
        == [  # no [BOS]: the template has the word on special tokens
            "<system> f <user> a b g <assistant>",
            "<system> f <user> a b c d e f g <assistant>",
            "<system> f <user> c g <assistant>",
        ]
        and dropped == 0
    )
    prompts, _ = tokenize_prompts(examples, tokenizer, max_prompt_tokens=99, enable_thinking=True)
    assert words(tokenizer, prompts)[2] == "<system> h <user> c <assistant> <think>"
    prompts, _ = tokenize_prompts(examples, tokenizer, max_prompt_tokens=99, template="plain")
    assert words(tokenizer, prompts)[0] == "[BOS] a b"


def test_the_longest_prompt_that_is_kept(examples):
    tokenizer = make_tokenizer()
    assert tokenize_prompts(examples, tokenizer, max_prompt_tokens=7)[1] == 0
    assert tokenize_prompts(examples, tokenizer, max_prompt_tokens=6)[1] == 1
    with pytest.raises(
        DataError, match=r"all 3 .* longer than 2 tokens, .* has 3; raise data\.max_prompt_tok"
    ):
        tokenize_prompts(examples, tokenizer, max_prompt_tokens=2)
    with pytest.raises(DataError, match=r"^data\.path=x\.jsonl: all 3 prompts are longer than 2 "):
        tokenize_prompts(examples, tokenizer, max_prompt_tokens=2, where="data.path=x.jsonl")


def test_template_errors(examples):
    with pytest.raises(ConfigError, match=r"data\.template=chat.* no chat template"):
        tokenize_prompts(examples, make_tokenizer(), max_prompt_tokens=9, template="chat")
    refusing = make_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}a"
    )
    with pytest.raises(DataError, match="^x: example 2: the chat template refuses it: no system"):
        tokenize_prompts(examples, refusing, max_prompt_tokens=9, where="x")


@pytest.mark.parametrize("count, per_step", [(10, 4), (10, 5), (7, 7), (3, 8), (1, 3)])
def test_sampler_visits_every_prompt_once_per_epoch(count, per_step):
    sampler = PromptSampler(count, per_step, seed=5)
    steps = [sampler.indices(step) for step in range(3 * count)]
    assert all(len(step) == per_step for step in steps)
    taken = [i for step in steps for i in step]
    epochs = [taken[i : i + count] for i in range(0, len(taken), count)]
    assert len(epochs) == 3 * per_step and all(
        sorted(epoch) == list(range(count)) for epoch in epochs
    )
    if count == 10:
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_sampler_needs_no_state():
    ordered = PromptSampler(10, 4, seed=5)
    expected = [ordered.indices(step) for step in range(20)]
    jumping = PromptSampler(10, 4, seed=5)
    for step in (19, 0, 7, 7, 3):
        assert jumping.indices(step) == expected[step]
    other = PromptSampler(10, 4, seed=6)
    assert [other.indices(step) for step in range(20)] != expected
    # A resumed run must get the same prompts in another process and another Python: pinned.
    assert PromptSampler(5, 5, seed=0).indices(0) == [0, 1, 4, 3, 2]


def test_sampler_shuffles_evenly():
    first = Counter(PromptSampler(4, 1, seed).indices(0)[0] for seed in range(2000))
    assert all(400 < first[i] < 600 for i in range(4))


@pytest.mark.parametrize("count, per_step, step", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_sampler_errors(count, per_step, step):
    with pytest.raises(ValueError):
        PromptSampler(count, per_step, 0).indices(step)


def test_data_is_below_the_reading_modes():
    folder = Path(__file__).parents[2] / "rollouts" / "data"
    files = list(folder.glob("*.py"))
    assert len(files) > 10
    for file in files:
        nodes = ast.walk(ast.parse(file.read_text()))
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        ours = [module for module in modules if module.startswith("rollouts.")]
        assert all(module.startswith("rollouts.data.") for module in ours), file.name
