"""Cuts English text into sentences.

`sentencex` would rather leave two sentences together than break one."""

from __future__ import annotations

import re

SENTENCE_ENDS = tuple(".!?…。！？؟।")
QUESTION_ENDS = tuple("?？؟")
# What may follow the end of a sentence: quotation marks and brackets.
CLOSING = "\"'”’»)]*"
LIST_NUMBER = re.compile(r"\(?\d{1,3}[.)]")


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text, in order, without the white space around them."""
    from sentencex import segment

    sentences: list[str] = []
    for sentence in filter(None, map(str.strip, segment("en", text))):
        # The number of a list belongs to what follows it, as in "1. Add the salt."
        if sentences and LIST_NUMBER.fullmatch(sentences[-1]):
            sentence = f"{sentences.pop()} {sentence}"
        sentences.append(sentence)
    return sentences
