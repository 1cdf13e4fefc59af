"""Streaming prompts: what is read step by step, and what is to be written after each step.

The question comes first, then one sentence after the other. Each segment is tokenized by itself and
ends in its own protocol token. Sequences are made by joining ids, so a mask over segments cannot
come apart from the tokens. Data that is cut already (`Example.sentences`) is taken as it is; other
text is cut by `rollouts.data.sentences`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from recipes.errors import DataError
from rollouts.data.chat import SourceFrame, drop_overlong, text_ids
from rollouts.data.examples import Example, Ids, Prompt
from rollouts.data.marks import SKIP, TOKENS
from rollouts.data.sentences import CLOSING, QUESTION_ENDS, SENTENCE_ENDS, split_sentences
from rollouts.streaming.tokens import Protocol


def question_and_sentences(example: Example, where: str) -> tuple[str, list[str]]:
    """What an example asks, and the sentences that tell it.

    In a text, the question is the last sentence that ends in a question mark, else the last
    sentence. One sentence alone is both what is asked and what is read.

    Args:
        where: the data's name, for errors.

    Raises:
        DataError: a text has no sentence end, a part is missing or empty, or holds a protocol
            token.
    """
    row = f"{where}: row {example.index}"
    if example.sentences is None:
        question, sentences = _cut_text(example.messages[-1]["content"], row)
    else:
        question, sentences = example.question or "", list(example.sentences)
        _check_parts(question, sentences, row)
    for place, sentence in enumerate(sentences, 1):
        if not sentence.strip():
            raise DataError(f"{row}: sentence {place} is empty; drop it and its thought")
    for token in TOKENS:
        if any(token in text for text in (question, *sentences)):
            raise DataError(f"{row}: its text holds the protocol token {token}; take it out")
    return question, sentences


def _check_parts(question: str, sentences: list[str], row: str) -> None:
    if question.strip() and sentences:
        return
    lacking = "sentences" if question.strip() else "question"
    raise DataError(f"{row} has no {lacking}; give it, or drop the row")


def _cut_text(text: str, row: str) -> tuple[str, list[str]]:
    """The question of a text, and its other sentences."""
    sentences = split_sentences(text)
    ends = [sentence.rstrip(CLOSING)[-1:] for sentence in sentences]
    if not sentences or (len(sentences) == 1 and ends[0] not in SENTENCE_ENDS):
        raise DataError(
            f"{row}: no sentence end was found in its text, so it cannot be read step by step; "
            "end its sentences with . ! or ?, or give columns `sentences` and `question`"
        )
    if len(sentences) == 1:
        return sentences[0], sentences
    questions = [place for place, end in enumerate(ends) if end in QUESTION_ENDS]
    question = sentences.pop(questions[-1] if questions else -1)
    return question, sentences


def streaming_prompts(
    examples: Sequence[Example], tokenizer, config, where: str
) -> tuple[list[Prompt], int]:
    """Prompts with `segments` and `opening`, for a model that thinks while it reads.

    The segments are (frame, question, sentence 1, …, sentence N). The opening is what the chat
    template writes before the answer, then the question, or its mark alone.

    Args:
        examples: those of a chat keep its earlier turns. The last turn is the text.
        tokenizer: a Hugging Face tokenizer that has the protocol tokens.
        config: of the run; its sections `data` and `streaming` are read.
        where: the data's name, for errors.

    Returns:
        The prompts whose source fits in `data.max_prompt_tokens`, in order, and the number of those
        dropped.

    Raises:
        ConfigError: `data.template=chat` without a chat template.
        DataError: an example cannot be streamed, or not one prompt fits.
        ModelError: the tokenizer lacks a protocol token.
    """
    protocol = Protocol.of(tokenizer)
    frame = SourceFrame(tokenizer, config.data, config.streaming.instruction)
    restate_question = config.streaming.restate_question
    examples = list(examples)
    sources = [question_and_sentences(example, where) for example in examples]
    frames = [frame.around(example) for example in examples]
    befores = text_ids(
        tokenizer, (before for before, _ in frames), add_special_tokens=not frame.chat
    )
    afters = text_ids(tokenizer, (after for _, after in frames))
    texts = (text for question, sentences in sources for text in (question, *sentences))
    ids = text_ids(tokenizer, texts)
    prompts = []
    for example, (before, after), (question, sentences) in zip(examples, frames, sources):
        question_ids = (*ids[question], protocol.eoq)
        segments = (
            (*befores[before], protocol.sep),
            question_ids,
            *((*ids[sentence], protocol.eos) for sentence in sentences),
        )
        opening = (
            (*afters[after], protocol.sep),
            question_ids if restate_question else (protocol.eoq,),
        )
        sentence_text = "".join(f"{sentence}<EOS>" for sentence in sentences)
        text = f"{before}<SEP>{question}<EOQ>{sentence_text}"
        token_ids = tuple(chain(*segments))
        prompts.append(Prompt(example.index, token_ids, text, example, segments, opening))
    return drop_overlong(prompts, config.data.max_prompt_tokens, "sources", where)


def target_segments(example: Example, tokenizer) -> list[Ids]:
    """The supervised target after the opening, in segments of token ids.

    There is a segment per thought, then one of the deep reasoning with the answer.

    Args:
        example: has `thoughts` and `final`.
        tokenizer: a Hugging Face tokenizer that has the protocol tokens.

    Raises:
        ModelError: the tokenizer lacks a protocol token.
    """
    protocol = Protocol.of(tokenizer)
    texts = [*example.thoughts, example.deep or "", example.final]
    *thoughts, deep, final = tokenizer(texts, add_special_tokens=False).input_ids
    segments = [
        (protocol.skip,) if text == SKIP else (*ids, protocol.eot)
        for text, ids in zip(example.thoughts, thoughts)
    ]
    return [*segments, (*deep, protocol.eor, *final, protocol.eoa)]
