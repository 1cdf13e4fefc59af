"""Reads rows that are cut into sentences: StreamingThinker's StreamingCoT, and plain columns of
segments.

- StreamingCoT (arXiv 2510.17238): `Instruct_Context` with `context`, sentences that end in <EOS>,
  and `instruct`, the question; `streaming_reasoning`, thoughts that end in <EOT> after a restated
  question that ends in <EOQ>; `deep_reasoning`, which holds <EOR> before the answer and <EOA> after
  it; `answer`.
- Columns: `sentences` (a list) and `question`; for supervised training also `thoughts` (a list),
`deep` and `final`.

The restated question is left out: it is the question (`streaming.restate_question` forces it).
White space around segments goes, since segments are tokenized by themselves; \\box{…} becomes
\\boxed{…}, and an empty thought <skip>."""

from __future__ import annotations

import re
from typing import Any, Iterable

from recipes.errors import DataError
from rewards.math import BOX, extract_boxed
from rollouts.data.marks import SKIP, TOKENS


def is_segmented(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are cut into sentences."""
    return "Instruct_Context" in columns or {"sentences", "question"} <= set(columns)


def segmented(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of an `Example` of one row, all but its index.

    Args:
        where: file and row, for errors.

    Raises:
        DataError: a part is missing or of another type, a protocol token stands where it should
            not, or there is not one thought per sentence.
    """
    parts = _streaming_cot(row, where) if "Instruct_Context" in row else _columns(row, where)
    thoughts, sentences = parts["thoughts"], parts["sentences"]
    if thoughts is not None and len(thoughts) != len(sentences):
        raise DataError(
            f"{where} has {len(thoughts)} thoughts for {len(sentences)} sentences; give one per sentence, "
            f"{SKIP} where there is nothing to think"
        )
    written = [
        *(thought for thought in thoughts or () if thought != SKIP),
        parts["deep"] or "",
        parts["final"] or "",
    ]
    for text in (parts["question"], *sentences, *written):
        if odd := next((token for token in TOKENS if token in text), None):
            raise DataError(
                f"{where}: {odd} stands inside {text[:60]!r}; a segment holds no protocol token, and "
                f"{SKIP} stands alone"
            )
    answer = None if row.get("answer") is None else str(row["answer"]).strip()
    prompt = " ".join((*sentences, parts["question"]))
    return parts | {
        "messages": [{"role": "user", "content": prompt}],
        "answer": extract_boxed(answer or parts["final"] or "") or answer,
        "solution": " ".join(filter(None, written)) or None,
    }


def _streaming_cot(row: dict, where: str) -> dict:
    source = row["Instruct_Context"] if isinstance(row["Instruct_Context"], dict) else {}
    context, question = (
        _text(source, name, f"{where}: Instruct_Context") for name in ("context", "instruct")
    )
    parts = {
        "sentences": _ended(context, "<EOS>"),
        "question": question,
        "thoughts": None,
        "deep": None,
        "final": None,
    }
    if row.get("streaming_reasoning") is None:
        return parts
    written = _text(row, "streaming_reasoning", where).rpartition("<EOQ>")[2]
    written = re.sub(rf"{SKIP}\s*(?:<EOT>)?", f"{SKIP}<EOT>", written)
    deep, mark, final = _text(row, "deep_reasoning", where).partition("<EOR>")
    if not mark:
        raise DataError(
            f"{where}: its deep_reasoning has no <EOR>, so the answer cannot be told from it; add it"
        )
    return parts | {
        "thoughts": tuple(thought or SKIP for thought in _ended(written, "<EOT>")),
        "deep": deep.strip(),
        "final": re.sub(BOX, r"\\boxed{", final.strip().removesuffix("<EOA>").strip()),
    }


def _columns(row: dict, where: str) -> dict:
    def texts(name: str) -> tuple[str, ...]:
        if not isinstance(row.get(name), list) or not all(
            isinstance(text, str) for text in row[name]
        ):
            raise DataError(f"{where}: '{name}' is not a list of texts; give one, or drop the row")
        return tuple(text.strip() for text in row[name])

    thoughts = (
        None if row.get("thoughts") is None else tuple(text or SKIP for text in texts("thoughts"))
    )
    deep, final = (
        None if row.get(name) is None else _text(row, name, where) for name in ("deep", "final")
    )
    return {
        "sentences": texts("sentences"),
        "question": _text(row, "question", where),
        "thoughts": thoughts,
        "deep": deep,
        "final": final,
    }


def _text(row: dict, name: str, where: str) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f"{where} has no text '{name}'; give it, or drop the row")
    return row[name].strip()


def _ended(text: str, mark: str) -> tuple[str, ...]:
    """The parts that end in a mark; what follows the last one is a part if it is not blank."""
    *parts, rest = [part.strip() for part in text.split(mark)]
    return (*parts, rest) if rest else tuple(parts)
