"""What differs between written languages: whether words have spaces, how BLEU cuts a text.

A language is its code, as in `de`, `zh`, `zh-TW` or `jpn_Jpan`.
"""

from __future__ import annotations

import re
import unicodedata

# Languages that are written without spaces between words, each with the tokenizer of sacrebleu that
# fits it.
SPACELESS = {
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue", "wuu", "lzh"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("th", "tha", "lo", "lao", "km", "khm"), "char"),
    **dict.fromkeys(("my", "mya", "bur", "bo", "bod", "tib", "dz", "dzo"), "char"),
}
# Of the other languages, those that need another tokenizer than the default.
BLEU_TOKENIZERS = SPACELESS | dict.fromkeys(("ko", "kor"), "ko-mecab")
DEFAULT_BLEU_TOKENIZER = "13a"
# Thai, Lao, Tibetan, Myanmar, Khmer, CJK punctuation and kana, ideographs, full-width forms.
SPACELESS_LETTERS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u312f\u31f0-\u9fff"
    "\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff"
)
_SPACELESS_LETTER = re.compile(f"[{SPACELESS_LETTERS}]")
# So many in a row are no word that a text with spaces quotes.
_LONG_RUN = re.compile(f"[{SPACELESS_LETTERS}]{{12}}")
_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z]{2,4})?")


def base(language: str | None) -> str | None:
    """A language's code without its region or script."""
    return None if language is None else re.split("[-_]", language)[0].lower()


def is_spaceless(language: str | None) -> bool:
    """Whether the language is written without spaces between words."""
    return base(language) in SPACELESS


def bleu_tokenizer(language: str | None) -> str:
    """The tokenizer of sacrebleu's BLEU for texts of a language."""
    return BLEU_TOKENIZERS.get(base(language) or "", DEFAULT_BLEU_TOKENIZER)


def named_by(column: str | None) -> str | None:
    """The language that a column has as its name, as `zh` or `translation.zh`; None: it has none.

    A name of three letters counts where it is that of a language known here, as others, such as
    `src`, are none.
    """
    last = "" if column is None else column.rpartition(".")[2]
    known = _CODE.fullmatch(last) and (len(base(last) or "") == 2 or base(last) in BLEU_TOKENIZERS)
    return last if known else None


def runs_on(text: str) -> bool:
    """Whether a text is written without spaces, as far as its letters say."""
    return bool(_LONG_RUN.search(text))


def characters(text: str) -> list[str]:
    """The characters of a text in a language without spaces; joined, they are the text.

    A mark belongs to the letter before it, and white space to the character after it. A word or a
    number of another script, in which words have spaces, is one piece. White space at the ends is
    left out.
    """
    pieces: list[str] = []
    for letter in text.strip():
        if pieces and _goes_on(pieces[-1], letter):
            pieces[-1] += letter
        else:
            pieces.append(letter)
    return pieces


def begun(text: str) -> int:
    """How many pieces of `characters` a part of a text begins, whatever came before it.

    A word of another script that the part begins with may have begun before, so it counts only
    after white space. White space alone counts as the beginning of what follows it.
    """
    pieces = characters(text)
    if not pieces:
        return 1 if text else 0
    first = text[0]
    goes_on = _in_word(first) or unicodedata.category(first)[0] == "M"
    return len(pieces) - goes_on


def _goes_on(piece: str, letter: str) -> bool:
    """Whether a letter belongs to the piece before it."""
    if letter.isspace() or piece.isspace():
        return piece.isspace()
    if unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf"):
        return True
    return _in_word(piece[-1]) and _in_word(letter)


def _in_word(letter: str) -> bool:
    is_mark = unicodedata.category(letter)[0] == "M"
    return (letter.isalnum() or is_mark) and not _SPACELESS_LETTER.match(letter)


def words(text: str) -> list[str]:
    """What is between the white space of a text; of words without spaces, their characters.

    Punctuation beside such characters is left out.
    """
    found: list[str] = []
    for word in text.split():
        if not _SPACELESS_LETTER.search(word):
            found.append(word)
            continue
        pieces = characters(word)
        found += [piece for piece in pieces if unicodedata.category(piece[0])[0] not in "PS"]
    return found
