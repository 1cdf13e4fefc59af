"""Each form of data that docs/data.md names is read as it says, and odd rows of any form are read
or refused in one line."""

import csv
import gzip
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from recipes.errors import DataError
from rollouts.data.examples import Example
from rollouts.data.load import load_examples

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def named_in_page(heading):
    """The first cells of the table under a heading."""
    section = PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", row)[1].strip(" `") for row in rows[1:]]


def turn(role, content):
    return {"role": role, "content": content}


def user(text):
    return [turn("user", text)]


ASKED, ANSWERED = user("2+2?"), [turn("assistant", "It is \\boxed{4}.")]
REPLY = ANSWERED[0]["content"]
COT = {
    "Instruct_Context": {"context": "Ann has 3.<EOS> She buys 4.<EOS>", "instruct": "How many?"},
    "streaming_reasoning": "The question is How many?<EOQ> 3.<EOT> <Skip><EOT>",
    "deep_reasoning": "3 + 4 = 7. <EOR> It is \\box{7}.<EOA>",
    "answer": "\\boxed{7}",
}

# By form: a row, options, and the messages, the target and the right answers that it must give.
ROWS = {
    "TRL prompt": ({"prompt": "2+2?"}, {}, ASKED, None, ()),
    "TRL prompt and completion": (
        {"prompt": ASKED, "completion": ANSWERED},
        {},
        ASKED,
        REPLY,
        ("4",),
    ),
    "TRL messages": ({"messages": ASKED + ANSWERED}, {}, ASKED, REPLY, ("4",)),
    "TRL preference": (
        {"chosen": ASKED + ANSWERED, "rejected": [*ASKED, turn("assistant", "5")]},
        {},
        ASKED,
        REPLY,
        ("4",),
    ),
    "Alpaca": (
        {"instruction": "Translate.", "input": "Hello", "output": "Bonjour"},
        {},
        user("Translate.\n\nHello"),
        "Bonjour",
        (),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": REPLY}]},
        {},
        ASKED,
        REPLY,
        ("4",),
    ),
    "OpenAI chat": (
        {"messages": [turn("user", [{"type": "text", "text": "2+2?"}]), *ANSWERED]},
        {},
        ASKED,
        REPLY,
        ("4",),
    ),
    "system column": (
        {"system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        {},
        [turn("system", "Be brief."), *ASKED],
        "4",
        (),
    ),
    "verl": (
        {
            "prompt": user("Capital of France?"),
            "reward_model": {"ground_truth": {"target": ["Paris", "City of Paris"]}},
        },
        {},
        user("Capital of France?"),
        None,
        ("Paris", "City of Paris"),
    ),
    "GSM8K": (
        {"question": "Price?", "answer": "It is 1,400.\n#### 1,400"},
        {},
        user("Price?"),
        "It is 1,400.",
        ("1400",),
    ),
    "MATH": ({"problem": "2+2?", "solution": REPLY}, {}, ASKED, REPLY, ("4",)),
    "DeepScaleR": (
        {"problem": "2+2?", "answer": "4", "solution": "Count."},
        {},
        ASKED,
        "Count.",
        ("4",),
    ),
    "question with context": (
        {"context": "Ann has 3.", "question": "How many?", "answer": 3},
        {},
        user("Ann has 3.\n\nHow many?"),
        None,
        ("3",),
    ),
    "SQuAD": (
        {"context": "It is 4 C.", "question": "How cold?", "answers": {"text": ["4 C", "4"]}},
        {},
        user("It is 4 C. How cold?"),
        "4 C",
        ("4 C", "4"),
    ),
    "line-aligned text": (
        {"en": "A dog.", "de": "Ein Hund."},
        {"prompt_column": "en", "target_column": "de"},
        user("A dog."),
        "Ein Hund.",
        ("Ein Hund.",),
    ),
    "StreamingCoT": (COT, {}, user("Ann has 3. She buys 4. How many?"), None, ("7",)),
    "sentences and question": (
        {
            "sentence": ["Ann has 3.", "She buys 4."],
            "question": "How many?",
            "thoughts": ["3.<EOT>", "<SKIP><EOT>"],
            "final": "\\boxed{7}",
        },
        {},
        user("Ann has 3. She buys 4. How many?"),
        "3. \\boxed{7}",
        ("7",),
    ),
    "frames": (
        {"audio": [[0.5, 1.0], [2.0, 3.0]], "text": "Hello."},
        {"prompt_column": "audio", "target_column": "text"},
        user("frames"),
        "Hello.",
        ("Hello.",),
    ),
}


def test_the_page_names_the_forms_that_are_tested():
    assert named_in_page("Rows") == list(ROWS)
    assert named_in_page("Files") == list(FILES)


@pytest.mark.parametrize("form", ROWS)
def test_a_row_of_each_form(tmp_path, form):
    row, options, messages, target, answers = ROWS[form]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (example,) = load_examples(str(tmp_path / "rows.jsonl"), **options)
    assert example.messages == messages and example.right_answers == answers
    if form == "StreamingCoT":
        assert example.thoughts == ("3.", "<skip>") and example.final == "It is \\boxed{7}."
    else:
        assert example.solution == target
    assert (example.frames is not None) == (form == "frames")


# Files

ROW = {"question": "2+2?", "answer": "4"}


def write_text(name):
    def write(folder):
        suffix = name.removesuffix(".gz")
        separator = "\t" if suffix.endswith(".tsv") else ","
        text = {
            ".jsonl": json.dumps(ROW),
            ".json": json.dumps([ROW], indent=1),
        }.get(suffix, f"question{separator}answer\n2+2?{separator}4\n")
        open_text = gzip.open if name.endswith(".gz") else open
        with open_text(folder / f"rows{name}", "wt") as file:
            file.write(text)
        return folder / f"rows{name}"

    return write


def write_parquet(folder):
    parquet.write_table(pyarrow.Table.from_pylist([ROW]), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_arrow(folder):
    table = pyarrow.Table.from_pylist([ROW])
    with ipc.new_stream(folder / "rows.arrow", table.schema) as stream:
        stream.write_table(table)
    return folder / "rows.arrow"


def write_folder(folder):
    write_text(".jsonl.gz")(folder)
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_saved(folder):
    rows = datasets.Dataset.from_list([ROW])
    other = datasets.Dataset.from_list([{"question": "3+3?", "answer": "6"}])
    datasets.DatasetDict({"train": rows, "rest": other}).save_to_disk(folder / "saved")
    return folder / "saved"


def write_aligned(folder):
    (folder / "train.qu").write_text("2+2?\n")
    (folder / "train.an").write_text("4\n")
    return folder / "train"


def write_nothing(name):
    return lambda folder: name


FILES = {
    ".jsonl": write_text(".jsonl"),
    ".json": write_text(".json"),
    ".csv": write_text(".csv"),
    ".tsv": write_text(".tsv"),
    ".gz": write_text(".csv.gz"),
    ".parquet": write_parquet,
    ".arrow": write_arrow,
    "folder": write_folder,
    "save_to_disk": write_saved,
    "line-aligned text": write_aligned,
    "Hugging Face hub": write_nothing("owner/name:config"),
    "generated": write_nothing("stories"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_row_of_each_kind_of_file(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([ROW])
    )
    path = str(FILES[kind](tmp_path))
    options = {"limit": 1}
    if kind == "line-aligned text":
        options |= {"prompt_column": "qu", "answer_column": "an"}
    (example,) = load_examples(path, **options)
    if kind != "generated":
        assert example.messages == ASKED and example.answer == "4"


@pytest.mark.parametrize("name", [".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz"])
def test_packed_texts(tmp_path, name):
    path = write_text(name)(tmp_path)
    assert [example.answer for example in load_examples(str(path))] == ["4"]
    path.write_bytes(path.read_bytes()[:-6])
    said = refusal(path)
    assert said.startswith(f"{path}: cannot be read as {name.removesuffix('.gz')}: ")


def test_arrow_files_streams_and_mixed_cells(tmp_path):
    feather.write_feather(pyarrow.Table.from_pylist([ROW] * 3000), tmp_path / "file.arrow")
    examples = load_examples(str(tmp_path / "file.arrow"))
    assert len(examples) == 3000 and examples[2999].answer == "4"
    (tmp_path / "broken.arrow").write_bytes(b"ARROW1 and no more")
    assert "broken.arrow: cannot be read as .arrow" in refusal(tmp_path / "broken.arrow")
    # `datasets` keeps cells of mixed types as JSON; a list of answers comes back as one.
    features = datasets.Features({"prompt": datasets.Value("string"), "ground_truth": json_type()})
    rows = [{"prompt": "a", "ground_truth": ["x", "y"]}, {"prompt": "b", "ground_truth": 2}]
    mixed = datasets.Dataset.from_list(rows, features=features)
    mixed.to_parquet(tmp_path / "mixed.parquet")
    mixed.save_to_disk(tmp_path / "mixed")
    for path in ("mixed.parquet", "mixed"):
        found = [e.right_answers for e in load_examples(str(tmp_path / path))]
        assert found == [("x", "y"), ("2",)]
    (arrow,) = (tmp_path / "mixed").glob("*.arrow")
    assert [e.right_answers for e in load_examples(str(arrow))] == [("x", "y"), ("2",)]


def json_type():
    return datasets.Json()


def test_splits_of_a_saved_dataset(tmp_path):
    folder = write_saved(tmp_path)
    assert [e.answer for e in load_examples(str(folder), split="rest")] == ["6"]
    said = refusal(folder, split="test")
    assert said == f"{folder}: no split 'test'; choose one of: train, rest"
    # One dataset by itself is taken whole, whatever the split.
    assert [e.answer for e in load_examples(str(folder / "rest"), split="train")] == ["6"]
    (folder / "train" / "state.json").write_text("{")
    assert "cannot be read as a folder of save_to_disk" in refusal(folder)


def refusal(path, **options):
    with pytest.raises(DataError) as caught:
        load_examples(str(path), **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# Odd values

BACKSLASH = chr(92)
LONE = BACKSLASH + "ud800"


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "a' + LONE + '"}', "half a surrogate pair"),
        ('{"prompt": "a", "answer": "' + LONE + '"}', "half a surrogate pair"),
        ('{"messages": [{"role": "' + LONE + '", "content": "a"}]}', "is of"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", "a number of more than 4300 digits"),
        ('{"prompt": ' + "[" * 100000 + "]" * 100000 + "}", "nested too deep"),
        ('{"prompt": "a", "answer": {"value": "b"}}', "'answer' holds a dict"),
        ('{"prompt": "a", "answer": [["b"], ["c"]]}', "'answer' holds a list"),
        ('{"prompt": "a", "reward_model": {"ground_truth": {"a": 1}}}', "holds a dict"),
        ('{"prompt": "a", "output": {"text": "b"}}', "'output' is neither"),
        ('{"prompt": [{"role": "system", "content": "a"}]}', "is of 'system'"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            "last turn of 'messages' before the reply is of 'system'",
        ),
        ('{"conversations": [{"from": ["x"], "value": "a"}]}', "is from list"),
        ('{"chosen": "Human: a", "rejected": "Human: b"}', "'chosen' is text"),
        ('{"instruction": "a", "history": [["b", "c"]]}', "'history'"),
        ('{"prompt": "<image>a", "images": ["x.png"]}', "it has 'images'"),
        ('{"question": "a", "context": {"title": "b"}}', "'context' is no text"),
        (
            '{"prompt": "a", "messages": [], "chosen": [{"role": "user", "content": "b"}]}',
            "'chosen' must be one turn",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
            '"content": "b", "reasoning_content": "c"}]}',
            "'reasoning_content'",
        ),
        (
            '{"system": "a", "prompt": [{"role": "system", "content": "b"}, '
            '{"role": "user", "content": "c"}]}',
            "differs from its column",
        ),
    ],
)
def test_a_row_that_would_be_read_wrongly_is_refused(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    message = refusal(path)
    assert message.startswith(f"{path} line 1: ") and said in message
    assert len(message) < 400


def test_what_python_cannot_read_in_a_list(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"prompt": "a"},\n{"prompt": "b", "answer": ' + "9" * 5000 + "}]")
    assert refusal(path).startswith(f"{path} line 2: a number of more than 4300 digits")
    path.write_text("[" * 100000)
    assert refusal(path).startswith(f"{path}: JSON is nested too deep")
    path.write_text('{"data": ' + "[" * 100000)
    assert refusal(path).startswith(f"{path} line 1: JSON is nested too deep")


def test_gaps_of_pandas_are_no_values(tmp_path):
    nan = float("nan")
    table = pyarrow.table(
        {
            "question": ["a", "b"],
            "context": pyarrow.array([nan, nan]),
            "answer": pyarrow.array([nan, 2.0]),
            "solution": ["c", None],
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    first, second = load_examples(str(tmp_path / "rows.parquet"))
    assert (first.messages, first.answer, first.solution) == (user("a"), None, "c")
    assert (second.messages, second.answer, second.solution) == (user("b"), "2", None)
    lines = '{"prompt": "a", "reward_model": {"ground_truth": NaN}}\n{"prompt": NaN}\n'
    (tmp_path / "rows.jsonl").write_text(lines)
    assert "rows.jsonl line 2: no 'prompt'" in refusal(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": NaN}\n')
    assert "no row has a value in 'prompt'" in refusal(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(
        COLUMN_OF_GAPS.replace("VALUE", "NaN") + COLUMN_OF_GAPS.replace("VALUE", "3")
    )
    found = load_examples(str(tmp_path / "rows.jsonl"))
    assert [example.answer for example in found] == [None, "3"]


COLUMN_OF_GAPS = '{"sentences": ["a"], "question": "b", "answer": VALUE}\n'


def test_right_answers_of_verl_and_of_maths(tmp_path):
    cells = [2, "42", ["a", None, "a", "\\boxed{b}"], {"target": "c"}, [], None]
    rows = [{"prompt": "q", "reward_model": {"ground_truth": cell}} for cell in cells]
    (tmp_path / "verl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [example.right_answers for example in load_examples(str(tmp_path / "verl.jsonl"))]
    assert found == [("2",), ("42",), ("a", "b"), ("c",), (), ()]
    (tmp_path / "maths.jsonl").write_text('{"problem": "q", "answer": ["2", "-2"]}\n')
    (example,) = load_examples(str(tmp_path / "maths.jsonl"))
    assert example.right_answers == ("2, -2",)


def test_a_target_keeps_its_white_space(tmp_path):
    rows = [
        {"prompt": "The sky is", "completion": " blue.\n", "answer": " blue "},
        {"prompt": "The sky is", "completion": [turn("assistant", " blue.")]},
        {"prompt": "The sky is", "completion": " \n"},
        {"prompt": "The sky is", "completion": " green.", "label": False},
        {"prompt": "1+1?", "completion": " It is \\boxed{2}."},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(tmp_path / "rows.jsonl"))
    targets = [" blue.\n", " blue.", None, None, " It is \\boxed{2}."]
    assert [example.solution for example in examples] == targets
    assert [example.answer for example in examples] == ["blue", None, None, None, "2"]


def test_preferences(tmp_path):
    chat = [turn("system", "Be brief."), *ASKED]
    rejected = [turn("assistant", "5")]
    rows = [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "chosen": ASKED + ANSWERED, "rejected": ASKED + rejected},
        {"prompt": chat, "chosen": ANSWERED, "rejected": rejected},
        {"prompt": chat, "chosen": chat + ANSWERED, "rejected": chat + rejected},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(tmp_path / "rows.jsonl"))
    assert [example.messages for example in examples] == [ASKED, ASKED, chat, chat]
    assert [example.solution for example in examples] == ["4", REPLY, REPLY, REPLY]
    other = {"prompt": "3+3?", "chosen": ASKED + ANSWERED}
    (tmp_path / "rows.jsonl").write_text(json.dumps(other) + "\n")
    assert "it is user, assistant" in refusal(tmp_path / "rows.jsonl")


def test_long_cells_turns_and_headers_of_csv(tmp_path):
    long = "word " * 40000
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages", "response"])
        writer.writerow([json.dumps(ASKED), long])
    (example,) = load_examples(str(tmp_path / "rows.csv"))
    assert example.messages == ASKED and example.solution == long
    (tmp_path / "rows.csv").write_text("messages,answer\n2+2?,4\n")
    assert "rows.csv row 1: 'messages' is a text" in refusal(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("prompt,prompt\na,b\n")
    assert "rows.csv: two columns" in refusal(tmp_path / "rows.csv")


def test_line_separators_are_text(tmp_path):
    text = "one\u2028two\u2029three\u0085four"
    row = {"prompt": text, "answer": "7", "solution": text}
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(row, ensure_ascii=False) + "\n"), "utf-8")
    (tmp_path / "rows.csv").write_text(f"prompt,solution\n{text},{text}\n{text},{text}\n", "utf-8")
    for name in ("rows.jsonl", "rows.csv"):
        first, second = load_examples(str(tmp_path / name))
        assert first.messages == second.messages == user(text) and second.solution == text


def test_a_column_that_one_row_lacks(tmp_path):
    lines = '{"prompt": "a", "answer": "1"}\n{"prompt": "b"}\n{"prompt": "c", "solution": "s"}\n'
    (tmp_path / "rows.jsonl").write_text(lines)
    first, second, third = load_examples(str(tmp_path / "rows.jsonl"))
    assert (first.answer, second.answer, third.answer) == ("1", None, None)
    assert (first.solution, second.solution, third.solution) == (None, None, "s")


# Any rows

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", "\n", "\ud800", "a\u2028b", "\\boxed{4}", "\\boxed{", "#### 4", "<skip>", "<EOS>"]
    ),
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "x\ny", "\udfff"])
TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"role": ROLES, "content": SCALARS}, optional={"tool_calls": SCALARS}
        ),
        st.fixed_dictionaries({"from": st.one_of(ROLES, SCALARS), "value": SCALARS}),
        SCALARS,
    ),
    max_size=4,
)
VALUES = st.one_of(
    SCALARS,
    TURNS,
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["target", "text", "context", "instruct", "ground_truth", "a\nb"]),
                inner,
                max_size=3,
            ),
        ),
        max_leaves=5,
    ),
)
EXTRA = ("rejected", "label", "history", "tools", "system", "reward_model", "sentences", "passage")
COLUMNS = sorted({name for row, *_ in ROWS.values() for name in row} | {*EXTRA, "odd\nname"})


@st.composite
def odd_rows(draw):
    """Rows of one form, of which some cells are odd, missing or more."""
    base = dict(ROWS[draw(st.sampled_from(sorted(ROWS)))][0])
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = dict(base)
        for name in draw(st.lists(st.sampled_from(COLUMNS), max_size=3)):
            if name in row and draw(st.booleans()):
                del row[name]
            else:
                row[name] = draw(VALUES)
        rows.append(row)
    return rows


@settings(max_examples=4 * settings.default.max_examples)
@given(rows=odd_rows(), name=st.sampled_from(["rows.jsonl", "rows.json"]), column=st.booleans())
def test_any_rows_are_read_whole_or_refused_in_one_line(tmp_path, rows, name, column):
    path = tmp_path / name
    is_list = name.endswith(".json")
    path.write_text(json.dumps(rows) if is_list else "\n".join(map(json.dumps, rows)))
    options = {"prompt_column": "audio", "target_column": "text"} if column else {}
    try:
        examples = load_examples(str(path), **options)
    except DataError as error:
        message = str(error)
        assert message.isprintable()
        place = "row" if is_list else "line"
        of_file = (
            ": no column 'audio'",
            ": no column 'text'",
            ": none of its columns",
            ": no row has",
        )
        assert re.match(rf"{re.escape(str(path))} {place} [1-3]\b", message) or message.startswith(
            tuple(f"{path}{said}" for said in of_file)
        )
        return
    assert len(examples) == len(rows)
    for index, example in enumerate(examples):
        assert example.index == index and is_sound(example)


def is_sound(example: Example) -> bool:
    """Whether an example has a prompt of the user, and texts that a tokenizer takes."""
    texts = [message[key] for message in example.messages for key in ("role", "content")]
    texts += [example.answer, example.solution, example.question, example.context]
    texts += [*example.right_answers, *(example.sentences or ()), *(example.thoughts or ())]
    given = [text for text in texts if text is not None]
    is_text = all(isinstance(text, str) and text.encode() is not None for text in given)
    has_frames = example.frames is None or example.frames.dtype == np.float32
    return is_text and has_frames and example.messages[-1]["role"] == "user"
