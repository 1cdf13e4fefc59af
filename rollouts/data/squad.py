"""Reads question answering as SQuAD has it: its JSON, and the Hub's rows of it.

A row has `context`, `question` and the `answers`. The answer of a question that cannot be answered
(SQuAD 2) is `unanswerable`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from recipes.errors import DataError

UNANSWERABLE = "unanswerable"


def squad_rows(text: str, file: str) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """Place and row of each question of a SQuAD file, in the form of the Hub's rows; None where the
    JSON is another.

    Raises:
        DataError: an article is not as SQuAD has it.
    """
    try:
        content = json.loads(text)
    except ValueError:  # perhaps one object per line
        return None
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list) or not all(
        isinstance(a, dict) and "paragraphs" in a for a in articles[:1]
    ):
        return None
    return _squad_rows(articles, file)


def _squad_rows(articles: list, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for place, article in enumerate(articles, 1):
        try:
            asked = [
                (
                    paragraph["context"],
                    qa["question"],
                    qa.get("is_impossible"),
                    [answer["text"] for answer in qa.get("answers") or ()],
                )
                for paragraph in article["paragraphs"]
                for qa in paragraph["qas"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} article {place}: not as SQuAD has it ({type(error).__name__}: {error}); each "
                "paragraph needs a context and qas, and each of these a question"
            ) from error
        for context, question, impossible, texts in asked:
            number += 1
            known = {"text": [] if impossible else texts} if texts or impossible else None
            yield f"question {number}", {"context": context, "question": question, "answers": known}


def is_squad(row: dict[str, Any]) -> bool:
    """Whether a row has a text, a question on it and a list of answers to that, perhaps empty or
    unknown."""
    answers = row.get("answers", "")
    return {"context", "question"} <= set(row) and (
        answers is None or isinstance(answers, dict) and isinstance(answers.get("text"), list)
    )


def squad(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of an `Example` of one row, all but its index.

    Args:
        where: file and row, for errors.

    Raises:
        DataError: its context or question is no text, or is empty, or its answers have another
            form.
    """
    if not is_squad(row):
        raise DataError(
            f"{where}: its answers are not as SQuAD has them; give an object with a list 'text', or null"
        )
    for name in ("context", "question"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise DataError(f"{where} has no text '{name}'; give it, or drop the row")
    context, question = row["context"], row["question"].strip()
    texts = (
        None
        if row["answers"] is None
        else tuple(dict.fromkeys(row["answers"]["text"])) or (UNANSWERABLE,)
    )
    first = texts and texts[0]
    return {
        "messages": [{"role": "user", "content": f"{context} {question}"}],
        "answer": first,
        "solution": first,
        "question": question,
        "context": context,
        "references": texts,
    }
