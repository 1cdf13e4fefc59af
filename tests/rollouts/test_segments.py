"""Streaming prompts: sentences from raw text, segments tokenized one by one, the chat around them,
and targets."""

import pytest
from transformers import AutoTokenizer

from recipes.compose import compose
from recipes.errors import ConfigError, DataError
from rollouts.data.examples import Example
from rollouts.data.sentences import split_sentences
from rollouts.streaming.prompts import question_and_sentences, streaming_prompts, target_segments
from rollouts.streaming.tokens import Protocol


@pytest.mark.parametrize(
    "sentences",
    [
        ["Mia runs 3.5 km.", "Then she rests."],
        ["It costs $1,000.50 (approx. 5% off).", "Is it cheap?"],
        ["Mr. Smith and Dr. Lee met at St. Mary's.", "They talked."],
        ["She moved to the U.S. in 2010.", "It was cold."],
        ["She lives in the U.S.", "It is big."],
        ["Bring fruit, e.g. apples, i.e. the red ones.", "Thanks!"],
        ["Apples cost $3 each vs. $2 for pears.", "Which is cheaper?"],
        ['"Go!" she said.', "Then he went."],
        ['He asked, "Are you there?"', "Nobody answered."],
        ["She said, “Stop! Now.”", "He stopped."],
        ["The train leaves at 9 a.m. and arrives at 5 p.m. on Monday.", "It is late."],
        ["The train leaves at 9 a.m.", "It is late."],
        ["Wait... what was that?", "Nothing."],
        ["Really?!", "Yes."],
        ["J. K. Rowling wrote it.", "I read it."],
        ["Fig. 3 shows No. 5.", "It is red."],
        ["He weighs 70 kg.", "A pizza is 12 in. wide."],
        ["Visit www.example.com.", "It is free."],
        ["Tom has 5.", "Ann has 6."],
        ["1. Add the salt.", "2. Stir the pot."],
        ["If x = 2, then f(x) = 4.", "Find f(3)."],
        ["no end here"],
        [],
    ],
)
def test_the_sentence_splitter(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


def test_line_breaks():
    assert split_sentences("Tom has 5 pens.\n\nHe buys 3\nmore.\n How many has he? \n") == [
        "Tom has 5 pens.",
        "He buys 3\nmore.",
        "How many has he?",
    ]
    assert split_sentences("There are two:\n- apples cost $2.50\n- pears cost $3") == [
        "There are two:",
        "- apples cost $2.50",
        "- pears cost $3",
    ]


def example(text="", **parts):
    return Example(4, [{"role": "user", "content": text}], **parts)


@pytest.mark.parametrize(
    "text, question",
    [
        ("Ann has 3. How many? She is 9.", "How many?"),
        ("Why? Ann has 3. Find out how many.", "Why?"),
        ("Is it? Ann has 3. How many?", "How many?"),
        ("Ann has 3. She buys 4. Count them.", "Count them."),
        ('Ann has 3. She asks, "how many?"', 'She asks, "how many?"'),
    ],
)
def test_the_question_of_a_text(text, question):
    found, sentences = question_and_sentences(example(text), "data")
    assert found == question and sentences == [s for s in split_sentences(text) if s != question]


def test_one_sentence_alone_is_question_and_source():
    assert question_and_sentences(example("How many are 3 and 4?"), "data") == (
        "How many are 3 and 4?",
        ["How many are 3 and 4?"],
    )


@pytest.fixture(scope="module")
def tokenizer(streaming_model):
    return AutoTokenizer.from_pretrained(streaming_model)


def config(*overrides):
    return compose(["recipe=streaming_sft", *overrides])


STORY = dict(
    sentences=("Mia has 34 shells.", "She finds 3 more."),
    question="How many shells does Mia have now?",
    thoughts=("<skip>", "34 + 3 = 37."),
    final="The answer is \\boxed{37}.",
    deep="So 37.",
)


def test_each_segment_is_tokenized_by_itself_and_ends_in_its_token(tokenizer):
    protocol = Protocol.of(tokenizer)
    (prompt,), dropped = streaming_prompts(
        [example(**STORY)], tokenizer, config("streaming.instruction='Think.'"), "d"
    )
    assert dropped == 0 and prompt.index == 4
    texts = ["<|im_start|>user\nThink.", STORY["question"], *STORY["sentences"]]
    ends = [protocol.sep, protocol.eoq, protocol.eos, protocol.eos]
    assert prompt.segments == tuple(
        (*tokenizer(text).input_ids, end) for text, end in zip(texts, ends)
    )
    assert prompt.token_ids == sum(prompt.segments, ())
    assert prompt.text == tokenizer.decode(prompt.token_ids)
    assert prompt.opening == (
        (*tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids, protocol.sep),
        (protocol.eoq,),
    )


def test_the_question_can_be_restated(tokenizer):
    (prompt,), _ = streaming_prompts(
        [example(**STORY)], tokenizer, config("streaming.restate_question=true"), "d"
    )
    assert prompt.opening[1] == prompt.segments[1]


def test_plain_text_and_the_system_turn(tokenizer):
    text = example("Tom has 5 pens. He buys 3. How many?")
    (prompt,), _ = streaming_prompts(
        [text], tokenizer, config("data.template=plain", "data.suffix=' Box it.'"), "d"
    )
    assert prompt.text == " Box it.<SEP>How many?<EOQ>Tom has 5 pens.<EOS>He buys 3.<EOS>"
    assert prompt.opening == ((Protocol.of(tokenizer).sep,), (Protocol.of(tokenizer).eoq,))
    (prompt,), _ = streaming_prompts([text], tokenizer, config("data.system=Hush."), "d")
    assert prompt.text.startswith(
        "<|im_start|>system\nHush.<|im_end|>\n<|im_start|>user\n<SEP>How many?"
    )


def test_long_sources_are_dropped_and_counted(tokenizer):
    short, long = example(**STORY), example("Ann has 3. " * 40 + "How many?")
    kept, dropped = streaming_prompts(
        [long, short], tokenizer, config("data.max_prompt_tokens=60"), "d"
    )
    assert [p.example for p in kept] == [short] and dropped == 1
    with pytest.raises(
        DataError, match=r"^d: all 1 sources are longer than 5 tokens, the shortest has \d+; raise"
    ):
        streaming_prompts([short], tokenizer, config("data.max_prompt_tokens=5"), "d")


@pytest.mark.parametrize(
    "bad, said",
    [
        (example("  "), "d: row 4: no sentence end was found in its text"),
        (example("no sentence ends in here"), "d: row 4: no sentence end was found in its text"),
        (example(**STORY | {"sentences": ("One.", " ")}), "d: row 4: sentence 2 is empty"),
        (example(**STORY | {"sentences": ()}), "d: row 4 has no sentences"),
        (example(**STORY | {"question": ""}), "d: row 4 has no question"),
        (
            example("Ann has <EOT> 3. How many?"),
            "d: row 4: its text holds the protocol token <EOT>",
        ),
    ],
)
def test_what_cannot_be_streamed_is_one_line(tokenizer, bad, said):
    with pytest.raises(DataError) as caught:
        streaming_prompts([bad], tokenizer, config(), "d")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template, said",
    [
        (
            "{{ raise_exception('only one turn') }}",
            "the chat template refuses a chat of user: only one turn",
        ),
        (
            "{% for m in messages %}{{ m['content'] | length }}{% endfor %}",
            "does not keep the user's text as it is",
        ),
    ],
)
def test_a_chat_template_that_does_not_serve(streaming_model, template, said):
    tokenizer = AutoTokenizer.from_pretrained(streaming_model)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said):
        streaming_prompts([example(**STORY)], tokenizer, config(), "d")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template; use data\.template=plain"):
        streaming_prompts([example(**STORY)], tokenizer, config("data.template=chat"), "d")


def test_targets(tokenizer):
    protocol = Protocol.of(tokenizer)
    skip, thought, deep = target_segments(example(**STORY), tokenizer)
    assert skip == (protocol.skip,) and thought == (
        *tokenizer("34 + 3 = 37.").input_ids,
        protocol.eot,
    )
    assert deep == (
        *tokenizer("So 37.").input_ids,
        protocol.eor,
        *tokenizer(STORY["final"]).input_ids,
        protocol.eoa,
    )
    assert target_segments(example(**STORY | {"deep": None}), tokenizer)[-1][0] == protocol.eor
