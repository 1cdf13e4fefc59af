"""The bytes of tokens, and the spans that two tokenizers share: properties on texts of any kind, of
tokenizers that are learned here and of real ones."""

from __future__ import annotations

import itertools
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from trainers.core.alignment import (
    REPLACEMENT,
    Codec,
    Piece,
    Span,
    letter_pieces,
    spans,
    text_pieces,
)

TEXTS = st.text(
    st.one_of(st.sampled_from("aAe 1é\u0301ﬁ½ß漢🙂👍🏽▁Ġ\n\t<>0x"), st.characters(codec="utf-8")),
    max_size=40,
)
CUTS = st.lists(st.integers(0, 12), max_size=12)


def parts(data: bytes, cuts) -> list[bytes]:
    """The data in parts that end at these places, and at its end."""
    places = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def ends(tokens):
    return set(itertools.accumulate(map(len, tokens)))


@given(st.binary(min_size=1, max_size=12), CUTS, CUTS)
@example(b"abc", [0, 0, 3], [3])
def test_spans_are_the_shortest_that_both_sides_share(data, ours, theirs):
    student, teacher = parts(data, ours), parts(data, theirs)
    found = spans(student, teacher)
    for side, tokens in ((0, student), (2, teacher)):
        bounds = [(span[side], span[side + 1]) for span in found]
        assert [start for start, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
        assert bounds[-1][1] == len(tokens)
    for span in found:
        joined = b"".join(student[span.start : span.end])
        assert span.same
        assert joined == b"".join(teacher[span.teacher_start : span.teacher_end])
    # No boundary that both have is inside one.
    shared = ends(student) & ends(teacher)
    assert ends([b"".join(student[span.start : span.end]) for span in found]) == shared


def test_pieces_that_differ_are_in_spans_of_their_own():
    # A letter that was written in two signs is one for the teacher, and a space is dropped.
    student, teacher = [b"a", b"e", b"\xcc\x81", b"b ", b" c"], [b"a", b"\xc3\xa9b", b" c"]
    pieces = [Piece(1, 1, True), Piece(3, 2, False), Piece(2, 2, True)]
    pieces += [Piece(1, 0, False), Piece(1, 1, True)]
    assert spans(student, teacher, pieces) == [
        Span(0, 1, 0, 1, True),
        Span(1, 5, 1, 3, False),
    ]
    with pytest.raises(ValueError, match="other numbers of bytes"):
        spans([b"ab"], [b"a"])


@given(
    st.lists(st.sampled_from([b"a", "é".encode(), "🙂".encode(), b"\xf0\x9f", b"\xff"]), max_size=8)
)
def test_bytes_that_are_no_utf8_are_replaced_and_nothing_else(symbols):
    data = b"".join(symbols)
    text, pieces = data.decode(errors="replace"), letter_pieces(data)
    assert len(pieces) == len(text)
    assert sum(piece.student for piece in pieces) == len(data)
    for letter, piece in zip(text, pieces):
        assert piece.teacher == len(letter.encode())
        assert piece.same == (letter != REPLACEMENT) and (not piece.same or piece[0] == piece[1])


def loaded(folder) -> Codec:
    return Codec(AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def codecs(tiny_models, byte_tokenizer, space_tokenizer):
    """Of learned tokenizers, by name. `new_space` marks the first word as transformers 5 does."""
    newer = Tokenizer.from_str(space_tokenizer.backend_tokenizer.to_str())
    newer.normalizer = None
    newer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return {
        "tiny": loaded(tiny_models["student"]),
        "byte": Codec(byte_tokenizer),
        "space": Codec(space_tokenizer),
        "new_space": Codec(PreTrainedTokenizerFast(tokenizer_object=newer)),
    }


@pytest.fixture(scope="module")
def real(smollm2, tmp_path_factory):
    """SmolLM2's (byte-level) and Mistral's first (SentencePiece)."""
    package = find_spec("mistral_common")
    if package is None:
        pytest.skip("needs the package mistral_common, which vLLM brings")
    folder = tmp_path_factory.mktemp("mistral")
    data = Path(package.origin).parent / "data"
    shutil.copy(data / "tokenizer.model.v1", folder / "tokenizer.model")
    return {
        "smollm2": loaded(smollm2),
        "mistral": Codec(LlamaTokenizer.from_pretrained(folder)),
    }


def check(first: Codec, second: Codec, text: str, cut: int) -> bool:
    """Spans that are the same have the same bytes, and all tokens are in spans.

    Returns:
        whether all spans are the same.
    """
    ids, _ = first.encode(text)
    student = first.bytes_of(ids[: len(ids) - cut])
    data = b"".join(student)
    ids, offsets = second.encode(data.decode(errors="replace"))
    teacher = second.bytes_of(ids)
    whole = b"".join(teacher) == data
    found = spans(student, teacher, None if whole else text_pieces(data, teacher, offsets))
    assert sum(span.end - span.start for span in found) == len(student)
    assert sum(span.teacher_end - span.teacher_start for span in found) == len(teacher)
    for span in found:
        joined = b"".join(student[span.start : span.end])
        assert not span.same or joined == b"".join(teacher[span.teacher_start : span.teacher_end])
    assert whole == all(span.same for span in found)
    return whole and data == text.encode()


ORDINARY = "Tom has 12 pens.  He finds é🙂<|im_end|></s><0x0A>\n\n  def f(x):\n\treturn x² 漢字"
PAIRS = [("tiny", "byte"), ("tiny", "space"), ("new_space", "byte"), ("space", "new_space")]


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
@given(text=TEXTS, cut=st.integers(0, 2))
def test_learned_tokenizers_share_spans(codecs, names, text, cut):
    first, second = (codecs[name] for name in names)
    check(first, second, text, cut)
    assert check(first, second, text.replace("▁", ""), 0) and check(first, second, ORDINARY, 0)


@given(text=TEXTS, cut=st.integers(0, 2))
def test_real_tokenizers_share_spans(real, text, cut):
    for first, second in (("smollm2", "mistral"), ("mistral", "smollm2")):
        check(real[first], real[second], text, cut)
        assert check(real[first], real[second], ORDINARY, 0)


@pytest.mark.parametrize(
    ("name", "puts"), [("tiny", 0), ("byte", 1), ("space", 1), ("new_space", 1)]
)
def test_the_space_before_a_text_is_no_part_of_it(codecs, name, puts):
    codec = codecs[name]
    assert codec.puts_space == puts
    spaced, bare = (codec.encode("Tom has 12", spaced)[0] for spaced in (True, False))
    assert (spaced != bare) == puts
    assert b"".join(codec.bytes_of(bare)) == b"".join(codec.bytes_of(spaced, True)) == b"Tom has 12"
    line, word = codec.encode("a\n")[0], codec.encode("a")[0]
    assert codec.spaced(word) and not codec.spaced(line)


def test_a_space_is_not_invented_and_special_tokens_are_not_read(codecs):
    for codec in codecs.values():
        ids, _ = codec.encode("a</s><stop><|im_end|>")
        assert b"".join(codec.bytes_of(ids)) == b"a</s><stop><|im_end|>"
        assert len(ids) > 10
    # The sign that stands for a space is not itself.
    assert codecs["space"].gives_back("a▁b") == "a b"


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.NFC(), "cafe\u0301 au lait"),
        (normalizers.NFKC(), "½ of ﬁve"),
        (normalizers.Lowercase(), "a B c"),
        (normalizers.Replace("  ", " "), "two  spaces"),
        (normalizers.Strip(), " both ends "),
    ],
)
def test_what_the_teachers_tokenizer_changes_is_left_out(byte_tokenizer, normalizer, text):
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizer
    codec = Codec(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids, offsets = codec.encode(text)
    tokens = codec.bytes_of(ids)
    assert b"".join(tokens) != text.encode()
    letters = [letter.encode() for letter in text]
    found = spans(letters, tokens, text_pieces(text.encode(), tokens, offsets))
    assert sum(span.end - span.start for span in found) == len(letters)
    kept = [span for span in found if span.same]
    assert 0 < len(kept) < len(found)
    for span in kept:
        joined = b"".join(letters[span.start : span.end])
        assert joined == b"".join(tokens[span.teacher_start : span.teacher_end])


def test_tokens_that_are_no_pieces_of_text_are_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="neither byte-level nor SentencePiece's"):
        Codec(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match="no tokenizer of the library tokenizers"):
        Codec(object())
