"""Rows cut into sentences: the StreamingCoT format with its oddities, columns of segments, and what
is refused."""

import json

import pytest

from recipes.errors import DataError
from rollouts.data.load import load_examples

COT = {
    "Instruct_Context": {
        "context": "Ann has 3 pens.<EOS> The sun shines.<EOS> She buys 4.5 more.<EOS>",
        "instruct": "How many pens has Ann?",
    },
    "streaming_reasoning": "Okay. The question is asking How many pens has Ann?<EOQ>  \n"
    "Ann has 3.<EOT>  \n<skip>  \n3 + 4.5 = 7.5.<EOT>",
    "deep_reasoning": "Altogether 7.5.  \n<EOR> Therefore, the answer is \\box{7.5}.<EOA>\n",
    "answer": "\\boxed{7.5}",
}
COLUMNS = {
    "sentences": ["Ann has 3 pens. ", "She buys 4."],
    "question": "How many?",
    "thoughts": ["3.", ""],
    "deep": "3 + 4 = 7.",
    "final": "\\boxed{7}",
}


def load(path, *rows):
    path.write_text(json.dumps(list(rows)))
    return load_examples(str(path))


def test_streaming_cot(tmp_path):
    example, bare = load(tmp_path / "cot.json", COT, {"Instruct_Context": COT["Instruct_Context"]})
    assert example.sentences == ("Ann has 3 pens.", "The sun shines.", "She buys 4.5 more.")
    assert example.question == "How many pens has Ann?"
    assert example.thoughts == ("Ann has 3.", "<skip>", "3 + 4.5 = 7.5.")
    assert (
        example.deep == "Altogether 7.5."
        and example.final == "Therefore, the answer is \\boxed{7.5}."
    )
    assert example.answer == "7.5"
    assert example.messages == [
        {"role": "user", "content": " ".join((*example.sentences, example.question))}
    ]
    assert example.solution == " ".join(
        (example.thoughts[0], example.thoughts[2], example.deep, example.final)
    )
    assert bare.sentences == example.sentences
    assert bare.thoughts is None and bare.solution is None and bare.answer is None


def test_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(COLUMNS) + "\n")
    (example,) = load_examples(str(tmp_path / "rows.jsonl"))
    assert example.sentences == ("Ann has 3 pens.", "She buys 4.") and example.thoughts == (
        "3.",
        "<skip>",
    )
    assert (example.deep, example.final, example.answer) == ("3 + 4 = 7.", "\\boxed{7}", "7")


def test_another_mark_before_the_skip_or_a_last_sentence_without_one(tmp_path):
    row = COT | {
        "Instruct_Context": {"context": "One.<EOS>Two.", "instruct": "Q?"},
        "streaming_reasoning": "<skip><EOT>\nTwo.<EOT>",
        "answer": 7,
    }
    (example,) = load(tmp_path / "rows.json", row)
    assert (
        example.sentences == ("One.", "Two.")
        and example.thoughts == ("<skip>", "Two.")
        and example.answer == "7"
    )


@pytest.mark.parametrize(
    "row, said",
    [
        (
            COT | {"streaming_reasoning": "a<EOT>b<EOT>c<EOT>d<EOT>"},
            "row 1 has 4 thoughts for 3 sentences; give one per",
        ),
        (COT | {"streaming_reasoning": "a<EOT>"}, "row 1 has 1 thoughts for 3 sentences"),
        (COT | {"streaming_reasoning": "a<EOT>b <skip>c<EOT>"}, "<skip> stands inside 'b <skip>'"),
        (COLUMNS | {"thoughts": ["3. <Skip>", ""]}, "<skip> stands inside '3. <Skip>'"),
        (COT | {"deep_reasoning": "so \\box{7}<EOA>"}, "row 1: its deep_reasoning has no <EOR>"),
        (COT | {"deep_reasoning": "a <EOR> b <EOR> c"}, "<EOR> stands inside"),
        (COT | {"deep_reasoning": None}, "row 1 has no text 'deep_reasoning'"),
        (
            COT | {"Instruct_Context": {"context": "One.<EOS>"}},
            "Instruct_Context has no text 'instruct'",
        ),
        (COT | {"Instruct_Context": None}, "Instruct_Context has no text 'context'"),
        (COLUMNS | {"sentences": "One. Two."}, "row 1: 'sentences' is not a list of texts"),
        (COLUMNS | {"question": None}, "row 1 has no text 'question'"),
        (COLUMNS | {"thoughts": ["a", "b", "c"]}, "row 1 has 3 thoughts for 2 sentences"),
        (COLUMNS | {"question": "What <EOQ>?"}, "<EOQ> stands inside 'What <EOQ>?'"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, row, said):
    with pytest.raises(DataError) as caught:
        load(tmp_path / "rows.json", row)
    assert (
        said in str(caught.value)
        and "rows.json" in str(caught.value)
        and "\n" not in str(caught.value)
    )
