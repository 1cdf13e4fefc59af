"""Cuts English text into sentences."""

from __future__ import annotations

import re

SENTENCE_ENDS, QUESTION_ENDS, CLOSING = (*".!?…。！？؟।",), (*"?？؟",), "\"'”’»)]*"
LIST_NUMBER = re.compile(r"\(?\d{1,3}[.)]")


def split_sentences(text: str) -> list[str]:
    """The sentences of an English text, in order, without the white space around them."""
    from sentencex import segment

    found: list[str] = []
    for sentence in filter(None, map(str.strip, segment("en", text))):
        if found and LIST_NUMBER.fullmatch(found[-1]):  # as in "1. Add the salt."
            sentence = f"{found.pop()} {sentence}"
        found.append(sentence)
    return found
