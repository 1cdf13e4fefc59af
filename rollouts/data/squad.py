"""Reads question answering as SQuAD has it: its JSON files, and the Hub's rows.

A row has `context`, `question` and `answers`. The answer of a question that cannot be answered
(SQuAD 2) is `unanswerable`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from recipes.errors import DataError

UNANSWERABLE = "unanswerable"


def squad_rows(text: str, file: str) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """The questions of a SQuAD file, in the form of the Hub's rows.

    Args:
        text: what the file holds.
        file: its name, for errors.

    Returns:
        Place and row of each question; None where the JSON is another.

    Raises:
        DataError: an article is not as SQuAD has it.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        # Perhaps it has one object per line, which another reader takes.
        return None
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list):
        return None
    if articles and not (isinstance(articles[0], dict) and "paragraphs" in articles[0]):
        return None
    return _rows_of_articles(articles, file)


def _rows_of_articles(articles: list, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for place, article in enumerate(articles, 1):
        try:
            rows = _article_rows(article)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} article {place}: not as SQuAD has it ({type(error).__name__}: {error}); "
                "each paragraph needs a context and qas, and each of these a question"
            ) from error
        for row in rows:
            number += 1
            yield f"question {number}", row


def _article_rows(article: dict) -> list[dict[str, Any]]:
    return [
        {
            "context": paragraph["context"],
            "question": question["question"],
            "answers": _hub_answers(question),
        }
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


def _hub_answers(question: dict) -> dict[str, list] | None:
    """The answers in the form of the Hub's rows; None where they are not known."""
    texts = [answer["text"] for answer in question.get("answers") or ()]
    if question.get("is_impossible"):
        return {"text": []}
    return {"text": texts} if texts else None


def is_squad(row: dict[str, Any]) -> bool:
    """Whether a row has a context, a question on it, and answers in the form of SQuAD.

    The list of answers may be empty, and answers that are not known are null.
    """
    if not {"context", "question"} <= set(row):
        return False
    answers = row.get("answers", "")
    if answers is None:
        return True
    texts = answers.get("text") if isinstance(answers, dict) else None
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def squad(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of an `Example` of one row, all but its index.

    Args:
        row: of the Hub's form.
        where: file and row, for errors.

    Raises:
        DataError: the context or the question is no text, or is empty, or the answers have another
            form.
    """
    for name in ("context", "question"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"{where} has no text '{name}'; give it, or drop the row")
    if not is_squad(row):
        raise DataError(
            f"{where}: its answers are not as SQuAD has them; give an object with a list 'text', "
            "or null"
        )
    context = row["context"]
    question = row["question"].strip()
    references = _references(row["answers"])
    answer = references and references[0]
    return {
        "messages": [{"role": "user", "content": f"{context} {question}"}],
        "answer": answer,
        "solution": answer,
        "question": question,
        "context": context,
        "references": references,
    }


def _references(answers: dict | None) -> tuple[str, ...] | None:
    """The distinct answers; None where they are not known."""
    if answers is None:
        return None
    return tuple(dict.fromkeys(answers["text"])) or (UNANSWERABLE,)
