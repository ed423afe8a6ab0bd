"""Where the sentences of a text begin and end: a text comes in, spans of characters go out.

A sentence ends at a full stop, an exclamation or a question mark before a space, at a Chinese or Japanese one
anywhere, and at a line end.
"""

import re
from itertools import pairwise

_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


def split_sentences(text: str) -> list[tuple[int, int]]:
    """The span of each sentence."""
    inner = [offset for match in _END.finditer(text) for offset in match.span()]
    bounds = list(pairwise([0, *inner, len(text)]))
    return [(begin, end) for begin, end in bounds[::2] if text[begin:end].strip()]
