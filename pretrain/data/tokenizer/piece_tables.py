"""Properties of single pieces of a vocabulary: tokenizer.json comes in, two tables over ids go out.

`word_starts` is for masking whole words, `sentence_ends` for permuting sentences. Four spellings of pieces
are known: SentencePiece's ("▁" for a space), byte fallback ("<0x41>"), byte-level BPE (GPT-2: each byte a
printable character) and WordPiece ("##" before a piece that continues a word).
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BYTE = re.compile("<0x([0-9A-F]{2})>")
_ENDS = (".", "!", "?", "。", "！", "？")
# GPT-2's alphabet: printable bytes are themselves, other bytes are the characters from 256 on, in order
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(b): b for b in _PRINTABLE}
_BYTES |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}


def word_starts(spec: Mapping[str, Any], pieces: Mapping[int, str]) -> np.ndarray:
    """(V,) bool: the piece begins a word.

    Judged by its first character: spaces, line ends, punctuation and symbols begin one (a newline belongs to
    the word after it, as a space does), so do wide characters (Chinese, Japanese, Korean: each piece is a
    word) and special tokens; letters, digits and combining marks continue one. A byte is judged alike: an
    ASCII byte as its character, a UTF-8 lead byte begins a word, the bytes after it do not. In WordPiece
    every piece without the prefix begins a word.
    """
    special = {token["content"] for token in spec["added_tokens"]}
    if prefix := spec["model"].get("continuing_subword_prefix"):
        return _table(pieces, lambda piece: not piece.startswith(prefix))
    to_bytes = _from_byte_level if _is_byte_level(spec) else _from_text
    return _table(pieces, lambda piece: piece in special or _begins_word(to_bytes(piece)))


def sentence_ends(spec: Mapping[str, Any], pieces: Mapping[int, str]) -> np.ndarray:
    """(V,) bool: the piece ends with a full stop, an exclamation or a question mark."""
    to_bytes = _from_byte_level if _is_byte_level(spec) else _from_text
    return _table(pieces, lambda piece: to_bytes(piece).decode(errors="ignore").endswith(_ENDS))


def _table(pieces: Mapping[int, str], predicate: Callable[[str], bool]) -> np.ndarray:
    return np.array([predicate(pieces.get(i, "")) for i in range(max(pieces) + 1)])


def _begins_word(piece: bytes) -> bool:
    if not piece:
        return True
    first = piece.decode(errors="replace")[0]
    if first == "\ufffd":  # not a full character
        return piece[0] >= 0xC0
    return unicodedata.category(first)[0] not in "LNM" or unicodedata.east_asian_width(first) in "WF"


def _from_text(piece: str) -> bytes:
    byte = BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.encode()


def _from_byte_level(piece: str) -> bytes:
    """The bytes of a byte-level piece; a special token stands for itself."""
    return bytes(_BYTES[c] for c in piece) if _BYTES.keys() >= set(piece) else piece.encode()


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    return "'ByteLevel'" in str([spec["pre_tokenizer"], spec["decoder"]])
