"""Reads rows that are cut into sentences: StreamingThinker's StreamingCoT, and plain columns.

StreamingCoT (arXiv 2510.17238) has these columns:

- `Instruct_Context`, with `context`, sentences that end in <EOS>, and `instruct`, the question;
- `streaming_reasoning`: thoughts that end in <EOT>, after a restated question that ends in <EOQ>;
- `deep_reasoning`, which holds <EOR> before the answer and <EOA> after it;
- `answer`.

Plain columns are `sentences` or `sentence` (a list) and `question`. For supervised training there
are also `thoughts` (a list), `deep` and `final`. A part may end in its mark, as a thought in <EOT>.

The restated question is left out: it is the question, and `streaming.restate_question` forces it.
Segments are tokenized by themselves, so white space around them goes. \\box{…} becomes \\boxed{…}.
An empty thought becomes <skip>, and so does <Skip>, whatever the case of its letters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from recipes.errors import DataError
from rewards.math import BOX, extract_boxed
from rollouts.data.cells import cell_text
from rollouts.data.marks import SKIP, TOKENS

# A lone <skip>, which the data writes with or without its closing mark.
SKIPPED_THOUGHT = re.compile(rf"{SKIP}\s*(?:<EOT>)?", re.IGNORECASE)


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


def is_segmented(row: dict[str, Any]) -> bool:
    """Whether a row is cut into sentences."""
    has_sentences = "sentences" in row or isinstance(row.get("sentence"), list)
    return "Instruct_Context" in row or (has_sentences and "question" in row)


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
    answer = cell_text(row.get("answer"), where, "answer")
    prompt = " ".join((*parts.sentences, parts.question))
    solution = " ".join(filter(None, parts.target_texts()))
    return vars(parts) | {
        "messages": [{"role": "user", "content": prompt}],
        "answer": extract_boxed(answer or parts.final or "") or answer,
        "solution": solution or None,
    }


def _thought(text: str) -> str:
    return SKIP if text.lower() in ("", SKIP) else text


def _check_thoughts(parts: _Parts, where: str) -> None:
    if parts.thoughts is not None and len(parts.thoughts) != len(parts.sentences):
        raise DataError(
            f"{where} has {len(parts.thoughts)} thoughts for {len(parts.sentences)} sentences; "
            f"give one per sentence, {SKIP} where there is nothing to think"
        )


def _check_marks(parts: _Parts, where: str) -> None:
    for text in (parts.question, *parts.sentences, *parts.target_texts()):
        for token in TOKENS:
            if token in text or (token == SKIP and SKIP in text.lower()):
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
    final = _unmarked(final, "<EOA>").strip()
    parts.thoughts = tuple(map(_thought, thoughts))
    parts.deep = deep.strip()
    parts.final = re.sub(BOX, r"\\boxed{", final)
    return parts


def _column_parts(row: dict, where: str) -> _Parts:
    # The target's columns come first: an error in them is the one that is reported.
    thoughts = None
    if row.get("thoughts") is not None:
        thoughts = tuple(map(_thought, _texts(row, "thoughts", where, "<EOT>")))
    deep = None if row.get("deep") is None else _text(row, "deep", where, "<EOR>")
    final = None if row.get("final") is None else _text(row, "final", where, "<EOA>")
    name = "sentence" if "sentences" not in row and "sentence" in row else "sentences"
    sentences = _texts(row, name, where, "<EOS>")
    return _Parts(sentences, _text(row, "question", where, "<EOQ>"), thoughts, deep, final)


def _texts(row: dict, name: str, where: str, mark: str) -> tuple[str, ...]:
    """A list of texts, each without the mark that it may end in."""
    texts = row.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: '{name}' is not a list of texts; give one, or drop the row")
    return tuple(_unmarked(text, mark) for text in texts)


def _text(row: dict, name: str, where: str, mark: str = "") -> str:
    """A text without the mark that it may end in."""
    if not isinstance(row.get(name), str):
        raise DataError(f"{where} has no text '{name}'; give it, or drop the row")
    return _unmarked(row[name], mark)


def _unmarked(text: str, mark: str) -> str:
    return text.strip().removesuffix(mark).rstrip()


def _marked_parts(text: str, mark: str) -> tuple[str, ...]:
    """The parts that end in a mark. What follows the last mark is a part, if it is not blank."""
    *parts, rest = [part.strip() for part in text.split(mark)]
    return (*parts, rest) if rest else tuple(parts)
