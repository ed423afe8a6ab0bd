"""TODO"""

import re
from itertools import pairwise

_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Where sentences begin and end: at full stops and line ends."""
    cuts = [0, *(at for match in _END.finditer(text) for at in match.span()), len(text)]
    return [(begin, end) for begin, end in list(pairwise(cuts))[::2] if text[begin:end].strip()]
