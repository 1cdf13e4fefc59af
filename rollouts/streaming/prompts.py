"""Streaming prompts: a text cut into what is read step by step, and what is to be written after
each step.

The question comes first, then one sentence after the other. Each segment is tokenized by itself and
ends in its own protocol token; sequences are made by joining ids, so a mask over segments cannot
come apart from the tokens. Data that is cut already (`Example.sentences`) is taken as it is; other
text is cut by `sentencex`, which would rather leave two sentences together than break one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain

from recipes.errors import ConfigError, DataError
from rollouts.data.chat import chat_frame
from rollouts.data.examples import Example, Ids, Prompt
from rollouts.data.marks import SKIP, TOKENS
from rollouts.data.sentences import CLOSING, QUESTION_ENDS, SENTENCE_ENDS, split_sentences
from rollouts.streaming.tokens import Protocol


def question_and_sentences(example: Example, where: str) -> tuple[str, list[str]]:
    """What an example asks, and the sentences that tell it.

    In a text, the last sentence that ends in a question mark is the question, else the last
    sentence is. One sentence alone is both what is asked and what is read.

    Args:
        where: the data's name, for errors.

    Raises:
        DataError: a text has no sentence end, a part is missing or empty, or holds a protocol
            token.
    """
    row = f"{where}: row {example.index}"
    if example.sentences is not None:
        question, sentences = example.question or "", list(example.sentences)
        if not question.strip() or not sentences:
            raise DataError(
                f"{row} has no {'sentences' if question.strip() else 'question'}; give it, or drop the row"
            )
    else:
        sentences = split_sentences(example.messages[-1]["content"])
        ends = [sentence.rstrip(CLOSING)[-1:] for sentence in sentences]
        if not sentences or (len(sentences) == 1 and ends[0] not in SENTENCE_ENDS):
            raise DataError(
                f"{row}: no sentence end was found in its text, so it cannot be read step by step; end its "
                "sentences with . ! or ?, or give columns `sentences` and `question`"
            )
        asked = max((place for place, end in enumerate(ends) if end in QUESTION_ENDS), default=-1)
        question = sentences.pop(asked) if len(sentences) > 1 else sentences[0]
    for place, sentence in enumerate(sentences, 1):
        if not sentence.strip():
            raise DataError(f"{row}: sentence {place} is empty; drop it and its thought")
    if odd := next(
        (token for token in TOKENS for text in (question, *sentences) if token in text), None
    ):
        raise DataError(f"{row}: its text holds the protocol token {odd}; take it out")
    return question, sentences


def streaming_prompts(
    examples: Sequence[Example], tokenizer, config, where: str
) -> tuple[list[Prompt], int]:
    """Prompts with `segments` and `opening`, for a model that thinks while it reads.

    Args:
        examples: those of a chat keep its earlier turns; the last one is the text.
        tokenizer: a Hugging Face tokenizer that has the protocol tokens.
        config: of the run; its sections `data` and `streaming` are read.
        where: the data's name, for errors.

    Returns:
        The prompts whose source fits in `data.max_prompt_tokens`, in order, and the number of those
        dropped.

    Raises:
        DataError: an example cannot be streamed, or not one prompt fits.
        ModelError: the tokenizer lacks a protocol token.
    """
    protocol, data = Protocol.of(tokenizer), config.data
    instruction = config.streaming.instruction + (data.suffix or "")
    if data.template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            f"data.template=chat: the tokenizer of {tokenizer.name_or_path} has no chat template; use "
            "data.template=plain"
        )
    chat = data.template != "plain" and bool(tokenizer.chat_template)

    @cache
    def frame(turns: tuple[tuple[str, str], ...]) -> tuple[str, Ids, Ids]:
        """The text and ids before the question, and the ids that open the answer."""
        before, after = (
            chat_frame(tokenizer, data, turns)
            if chat
            else ("\n\n".join([t for _, t in turns] + [""]), "")
        )
        first, last = (
            tuple(tokenizer(text, add_special_tokens=special).input_ids)
            for text, special in ((before + instruction, not chat), (after, False))
        )
        return before + instruction, (*first, protocol.sep), (*last, protocol.sep)

    examples = list(examples)
    cut = [question_and_sentences(example, where) for example in examples]
    texts = [text for question, sentences in cut for text in (question, *sentences)]
    coded = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else [])
    prompts = []
    for example, (question, sentences) in zip(examples, cut):
        turns = [(turn["role"], turn["content"]) for turn in example.messages[:-1]]
        if data.system is not None:
            turns = [("system", data.system)] + [turn for turn in turns if turn[0] != "system"]
        head, first, prefix = frame(tuple(turns))
        asked = (*next(coded), protocol.eoq)
        segments = (first, asked, *((*next(coded), protocol.eos) for _ in sentences))
        text = "".join(
            (head, "<SEP>", question, "<EOQ>", *(sentence + "<EOS>" for sentence in sentences))
        )
        opening = (prefix, asked if config.streaming.restate_question else asked[-1:])
        prompts.append(
            Prompt(example.index, tuple(chain(*segments)), text, example, segments, opening)
        )
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= data.max_prompt_tokens]
    if prompts and not kept:
        raise DataError(
            f"{where}: all {len(prompts)} sources are longer than {data.max_prompt_tokens} tokens, the "
            f"shortest has {min(len(p.token_ids) for p in prompts)}; raise data.max_prompt_tokens"
        )
    return kept, len(prompts) - len(kept)


def target_segments(example: Example, tokenizer) -> list[Ids]:
    """The supervised target, `thoughts` and `final`, after the opening: a segment per thought, then
    the deep reasoning with the answer."""
    protocol = Protocol.of(tokenizer)
    *thoughts, deep, final = (
        tuple(ids)
        for ids in tokenizer(
            [*example.thoughts, example.deep or "", example.final], add_special_tokens=False
        ).input_ids
    )
    return [
        (protocol.skip,) if text == SKIP else (*ids, protocol.eot)
        for text, ids in zip(example.thoughts, thoughts)
    ] + [(*deep, protocol.eor, *final, protocol.eoa)]
