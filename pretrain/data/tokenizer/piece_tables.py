"""What single pieces of a vocabulary say of the text around them: in, tokenizer.json; out, two tables over
ids.

`word_starts` is for masking whole words, `sentence_ends` for putting sentences in another order. Four ways of
writing pieces are known: SentencePiece's ("▁" for a space), byte fallback ("<0x41>"), byte-level BPE (GPT-2:
each byte a printable character) and WordPiece ("##" before a piece that goes on with a word).
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BYTE = re.compile("<0x([0-9A-F]{2})>")
_ENDS = (".", "!", "?", "。", "！", "？")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {
    chr(b): b for b in _PRINTABLE
}  # GPT-2's alphabet: other bytes are the characters from 256 on, in order
_BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


def word_starts(spec: Mapping[str, Any], pieces: Mapping[int, str]) -> np.ndarray:
    """(V,) bool: the piece begins a word.

    Judged by its first character: spaces, line ends, punctuation and symbols begin one (a newline belongs to
    the word after it, as a space does), so do wide characters (Chinese, Japanese, Korean: each piece is a
    word) and special tokens; letters, digits and marks go on with one. A byte is judged alike: an ASCII byte
    as its character, a UTF-8 lead byte begins a word, the bytes after it do not. Of WordPiece every piece
    begins a word that does not say it goes on with one.
    """
    special = {token["content"] for token in spec["added_tokens"]}
    if continuing := spec["model"].get("continuing_subword_prefix"):
        return _table(pieces, lambda piece: not piece.startswith(continuing))
    read = _of_bytes if _byte_level(spec) else _of_text
    return _table(pieces, lambda piece: piece in special or _begins(read(piece)))


def sentence_ends(spec: Mapping[str, Any], pieces: Mapping[int, str]) -> np.ndarray:
    """(V,) bool: the piece ends with a full stop, an exclamation or a question mark."""
    read = _of_bytes if _byte_level(spec) else _of_text
    return _table(pieces, lambda piece: read(piece).decode(errors="ignore").endswith(_ENDS))


def _table(pieces: Mapping[int, str], judge: Callable[[str], bool]) -> np.ndarray:
    return np.array([judge(pieces.get(i, "")) for i in range(max(pieces) + 1)])


def _begins(piece: bytes) -> bool:
    if not piece:
        return True
    first = piece.decode(errors="replace")[0]
    if first == "\ufffd":  # part of a character
        return piece[0] >= 0xC0
    return unicodedata.category(first)[0] not in "LNM" or unicodedata.east_asian_width(first) in "WF"


def _of_text(piece: str) -> bytes:
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.encode()


def _of_bytes(piece: str) -> bytes:
    """What a byte-level piece stands for; a special token stands for itself."""
    return bytes(_BYTES[c] for c in piece) if _BYTES.keys() >= set(piece) else piece.encode()


def _byte_level(spec: Mapping[str, Any]) -> bool:
    return "'ByteLevel'" in str([spec["pre_tokenizer"], spec["decoder"]])
