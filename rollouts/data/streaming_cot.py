"""Reads rows that are cut into sentences: StreamingThinker's StreamingCoT, and plain columns.

StreamingCoT (arXiv 2510.17238) has these columns:

- `Instruct_Context`, with `context`, sentences that end in <EOS>, and `instruct`, the question;
- `streaming_reasoning`: thoughts that end in <EOT>, after a restated question that ends in <EOQ>;
- `deep_reasoning`, which holds <EOR> before the answer and <EOA> after it;
- `answer`.

Plain columns are `sentences` (a list) and `question`. For supervised training there are also
`thoughts` (a list), `deep` and `final`.

The restated question is left out: it is the question, and `streaming.restate_question` forces it.
Segments are tokenized by themselves, so white space around them goes. \\box{…} becomes \\boxed{…},
and an empty thought becomes <skip>."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from recipes.errors import DataError
from rewards.math import BOX, extract_boxed
from rollouts.data.marks import SKIP, TOKENS

# A lone <skip>, which the data writes with or without its closing mark.
SKIPPED_THOUGHT = re.compile(rf"{SKIP}\s*(?:<EOT>)?")


@dataclass
class _Parts:
    """The parts of a row. The target's parts are None where the row has none."""

    sentences: tuple[str, ...]
    question: str
    thoughts: tuple[str, ...] | None = None
    deep: str | None = None
    final: str | None = None

    def target_texts(self) -> list[str]:
        """What is to be written, in order, without skipped thoughts; "" for a part that is None."""
        thoughts = [thought for thought in self.thoughts or () if thought != SKIP]
        return [*thoughts, self.deep or "", self.final or ""]


def is_segmented(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are cut into sentences."""
    return "Instruct_Context" in columns or {"sentences", "question"} <= set(columns)


def segmented(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of an `Example` of one row, all but its index.

    Args:
        row: of StreamingCoT, or with plain columns.
        where: file and row, for errors.

    Raises:
        DataError: a part is missing or of another type, a protocol token stands where it should
            not, or there is not one thought per sentence.
    """
    if "Instruct_Context" in row:
        parts = _streaming_cot_parts(row, where)
    else:
        parts = _column_parts(row, where)
    _check_thoughts(parts, where)
    _check_marks(parts, where)
    answer = None if row.get("answer") is None else str(row["answer"]).strip()
    prompt = " ".join((*parts.sentences, parts.question))
    solution = " ".join(filter(None, parts.target_texts()))
    return vars(parts) | {
        "messages": [{"role": "user", "content": prompt}],
        "answer": extract_boxed(answer or parts.final or "") or answer,
        "solution": solution or None,
    }


def _check_thoughts(parts: _Parts, where: str) -> None:
    if parts.thoughts is not None and len(parts.thoughts) != len(parts.sentences):
        raise DataError(
            f"{where} has {len(parts.thoughts)} thoughts for {len(parts.sentences)} sentences; "
            f"give one per sentence, {SKIP} where there is nothing to think"
        )


def _check_marks(parts: _Parts, where: str) -> None:
    for text in (parts.question, *parts.sentences, *parts.target_texts()):
        for token in TOKENS:
            if token in text:
                raise DataError(
                    f"{where}: {token} stands inside {text[:60]!r}; a segment holds no protocol "
                    f"token, and {SKIP} stands alone"
                )


def _streaming_cot_parts(row: dict, where: str) -> _Parts:
    source = row["Instruct_Context"] if isinstance(row["Instruct_Context"], dict) else {}
    context = _text(source, "context", f"{where}: Instruct_Context")
    question = _text(source, "instruct", f"{where}: Instruct_Context")
    parts = _Parts(_marked_parts(context, "<EOS>"), question)
    if row.get("streaming_reasoning") is None:
        return parts
    _, _, reasoning = _text(row, "streaming_reasoning", where).rpartition("<EOQ>")
    thoughts = _marked_parts(SKIPPED_THOUGHT.sub(f"{SKIP}<EOT>", reasoning), "<EOT>")
    deep, mark, final = _text(row, "deep_reasoning", where).partition("<EOR>")
    if not mark:
        raise DataError(
            f"{where}: its deep_reasoning has no <EOR>, so the answer cannot be told from it; "
            "add it"
        )
    final = final.strip().removesuffix("<EOA>").strip()
    parts.thoughts = tuple(thought or SKIP for thought in thoughts)
    parts.deep = deep.strip()
    parts.final = re.sub(BOX, r"\\boxed{", final)
    return parts


def _column_parts(row: dict, where: str) -> _Parts:
    # The target's columns come first: an error in them is the one that is reported.
    thoughts = None
    if row.get("thoughts") is not None:
        thoughts = tuple(text or SKIP for text in _texts(row, "thoughts", where))
    deep = None if row.get("deep") is None else _text(row, "deep", where)
    final = None if row.get("final") is None else _text(row, "final", where)
    sentences = _texts(row, "sentences", where)
    return _Parts(sentences, _text(row, "question", where), thoughts, deep, final)


def _texts(row: dict, name: str, where: str) -> tuple[str, ...]:
    texts = row.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: '{name}' is not a list of texts; give one, or drop the row")
    return tuple(text.strip() for text in texts)


def _text(row: dict, name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f"{where} has no text '{name}'; give it, or drop the row")
    return row[name].strip()


def _marked_parts(text: str, mark: str) -> tuple[str, ...]:
    """The parts that end in a mark. What follows the last mark is a part, if it is not blank."""
    *parts, rest = [part.strip() for part in text.split(mark)]
    return (*parts, rest) if rest else tuple(parts)
