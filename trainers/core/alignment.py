"""One text in the tokens of two tokenizers: the bytes of each token, and the spans that both share.

A span is the shortest run of a student's tokens that has the bytes of a run of the teacher's. Where
both tokenizers cut a text at the same places, each token is a span.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Stands for bytes that are no UTF-8, in the text that a teacher reads.
REPLACEMENT = "\ufffd"
# What SentencePiece writes for a space.
SPACE = "▁"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# What a changed piece is long, so that each side has a place in it that the other has not.
CHANGED = 3


class Span(NamedTuple):
    """Tokens `start` to `end` of the student and `teacher_start` to `teacher_end` of the teacher.

    `same`: their bytes are the same. They may differ where a student's bytes are no UTF-8, or where
    the teacher's tokenizer changes the text.
    """

    start: int
    end: int
    teacher_start: int
    teacher_end: int
    same: bool


class Piece(NamedTuple):
    """A part of a text: its number of bytes on each side, and whether these are the same bytes."""

    student: int
    teacher: int
    same: bool


def spans(
    student: Sequence[bytes], teacher: Sequence[bytes], pieces: Sequence[Piece] | None = None
) -> list[Span]:
    """The shortest spans between the byte boundaries that both sides have.

    They partition the tokens of both sides. A token without bytes belongs to the span before it.

    Args:
        student, teacher: the bytes of each token.
        pieces: how the bytes of both sides correspond. None: they are the same.

    Raises:
        ValueError: the pieces are of other numbers of bytes.
    """
    if pieces is None:
        pieces = [Piece(len(b"".join(student)), len(b"".join(teacher)), True)]
    if any(piece.same and piece.student != piece.teacher for piece in pieces):
        raise ValueError("a piece that is the same has other numbers of bytes")
    # An axis that both sides share: equal bytes are one long.
    marks = [0, *itertools.accumulate(p.student if p.same else CHANGED for p in pieces)]
    changed = [mark for mark, piece in zip(marks, pieces) if not piece.same]
    ours, theirs = (_ends(side, one, pieces, marks) for side, one in enumerate((student, teacher)))
    found, i, j, last = [], 0, 0, 0
    for place in sorted(set(ours) & set(theirs)):
        next_i, next_j = bisect_right(ours, place), bisect_right(theirs, place)
        before = bisect_left(changed, place)
        same = not before or changed[before - 1] + CHANGED <= last
        found.append(Span(i, next_i, j, next_j, same))
        i, j, last = next_i, next_j, place
    if i < len(ours) or j < len(theirs):
        found.append(Span(i, len(ours), j, len(theirs), False))
    return found


def _ends(
    side: int, tokens: Sequence[bytes], pieces: Sequence[Piece], marks: Sequence[int]
) -> list[int]:
    """Where the tokens of a side end, on the axis on which the pieces begin at `marks`."""
    edges = [0, *itertools.accumulate(piece[side] for piece in pieces)]
    counts = list(itertools.accumulate(map(len, tokens)))
    if edges[-1] != (counts[-1] if counts else 0):
        raise ValueError("the pieces are of other numbers of bytes than the tokens")
    ends = []
    for count in counts:
        # Past pieces that have no bytes on this side.
        index = bisect_right(edges, count) - 1
        inside = count - edges[index]
        if inside and not pieces[index].same:
            # A place that the other side has not.
            inside = 1 + side
        ends.append(marks[index] + inside)
    return ends


def letter_pieces(data: bytes) -> list[Piece]:
    """A piece for each letter of a student's bytes, decoded with `REPLACEMENT`.

    That stands for each run of bytes that is no UTF-8, as where a completion was cut in a letter.
    """
    pieces = []
    while data:
        good, bad = len(data), 0
        try:
            part = data.decode()
        except UnicodeDecodeError as error:
            good, bad = error.start, error.end - error.start
            part = data[:good].decode()
        sizes = [len(letter.encode()) for letter in part]
        pieces += [Piece(size, size, True) for size in sizes]
        if bad:
            pieces.append(Piece(bad, len(REPLACEMENT.encode()), False))
        data = data[good + bad :]
    return pieces


def text_pieces(
    data: bytes, tokens: Sequence[bytes], offsets: Sequence[tuple[int, int]]
) -> list[Piece]:
    """How a student's bytes correspond to those of the teacher's tokens.

    Args:
        data: the student's.
        tokens: the bytes of the teacher's tokens of `data`, decoded with `REPLACEMENT`.
        offsets: of each token, the letters of that text which it is made of.
    """
    pieces, text = letter_pieces(data), data.decode(errors="replace")
    if b"".join(tokens) == text.encode():
        return pieces
    # The tokenizer changes the text, as a normalisation does.
    found, done = [], 0
    for group in _groups(offsets):
        start, end = offsets[group[0]][0], max(offsets[index][1] for index in group)
        joined = b"".join(tokens[index] for index in group)
        if start > done:
            found.append(Piece(sum(p.student for p in pieces[done:start]), 0, False))
        own = pieces[start:end]
        same = all(p.same for p in own) and joined == text[start:end].encode()
        found.append(Piece(sum(p.student for p in own), len(joined), same))
        done = max(done, end)
    found.append(Piece(sum(p.student for p in pieces[done:]), 0, False))
    return [piece for piece in found if piece.student or piece.teacher]


def _groups(offsets: Sequence[tuple[int, int]]) -> Iterator[list[int]]:
    """Runs of tokens that are made of the same letters."""
    group: list[int] = []
    end = 0
    for index, (first, last) in enumerate(offsets):
        if group and first >= end:
            yield group
            group = []
        group.append(index)
        end = max(end, last)
    if group:
        yield group


class Codec:
    """The bytes of a tokenizer's tokens, and its tokens of a text.

    No special token is written or recognised. Some tokenizers put a space before a text, as Llama
    2's. It is no part of the text.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Raises:
        ValueError: its tokens have no bytes of their own; the message says why.
    """

    def __init__(self, tokenizer):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ValueError("it is no tokenizer of the library tokenizers (tokenizer.json)")
        state = json.loads(backend.to_str())
        self.bytes = token_bytes(state, backend)
        bare = {part: _without_prefix(state[part]) for part in ("normalizer", "pre_tokenizer")}
        # By whether a space may be put before the text.
        self.backends = {True: _backend(state), False: _backend(state | bare)}

    def spaced(self, prompt: Sequence[int]) -> bool:
        """Whether a text after this prompt begins as one by itself does.

        It does not where the prompt ends on a space or a line break.
        """
        last = self.bytes[prompt[-1]]
        return not last[-1:].isspace()

    def bytes_of(self, ids: Sequence[int], spaced: bool = False) -> list[bytes]:
        """The bytes of each token.

        Args:
            spaced: without the space before the text, where the tokenizer puts one.
        """
        tokens = [self.bytes[id] for id in ids]
        if spaced and self.puts_space and tokens:
            tokens[0] = tokens[0].removeprefix(b" ")
        return tokens

    @functools.cached_property
    def puts_space(self) -> bool:
        """Whether the tokenizer puts a space before a text by itself."""
        return self.bytes[self.encode("a", True)[0][0]].startswith(b" ")

    def encode(self, text: str, spaced: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and the letters of the text that each token is made of.

        Args:
            spaced: put the space before it that the tokenizer puts before a text by itself.
        """
        encoding = self.backends[spaced].encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def gives_back(self, text: str) -> str:
        """What the tokens of a text say, with `REPLACEMENT` for what is no UTF-8."""
        return b"".join(self.bytes_of(self.encode(text)[0])).decode(errors="replace")


def _backend(state: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer of a tokenizer.json that adds and reads no special tokens."""
    plain = {"post_processor": None, "truncation": None, "padding": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps({**state, **plain}))
    backend.encode_special_tokens = True
    return backend


def token_bytes(state: Mapping[str, Any], backend) -> dict[int, bytes]:
    """The bytes of each token, by its id.

    Args:
        state: tokenizer.json of `backend`, a `tokenizers.Tokenizer`.

    Raises:
        ValueError: the tokens are no pieces of text, as those of WordPiece.
    """
    added = backend.get_added_tokens_decoder()
    decoders = list(_nested(state["decoder"]))
    kinds = {decoder["type"] for decoder in decoders}
    vocab = {id: token for token, id in backend.get_vocab(True).items()}
    if "ByteLevel" in kinds:
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        return {
            id: token.encode()
            if id in added or not letters.keys() >= set(token)
            else bytes(letters[letter] for letter in token)
            for id, token in vocab.items()
        }
    spaces = any(SPACE in json.dumps(one, ensure_ascii=False) for one in decoders)
    if not spaces:
        raise ValueError("its tokens are neither byte-level nor SentencePiece's")
    fallback = "ByteFallback" in kinds or state["model"].get("byte_fallback")
    found = {}
    for id, token in vocab.items():
        byte = BYTE.fullmatch(token) if fallback else None
        if byte:
            found[id] = bytes.fromhex(byte[1])
        else:
            literal = id in added and added[id].special
            found[id] = (token if literal else token.replace(SPACE, " ")).encode()
    return found


def _nested(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A part of tokenizer.json, or the parts of a sequence."""
    if part is None:
        return
    for name in ("decoders", "normalizers", "pretokenizers"):
        for one in part.get(name, ()):
            yield from _nested(one)
    yield part


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return {key: value for key, value in part.items() if key != "add_prefix_space"} | {
            "prepend_scheme": "never"
        }
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            kept = [one for one in map(_without_prefix, part[name]) if one is not None]
            return part | {name: kept}
    return part
