"""Where the words and graphemes of a text begin and end, in every script: a text comes in, spans go out.

Words follow Unicode (UAX 29, by the `regex` package). What taggers' training files have as one word stays
one: words joined by a hyphen, @name and #tag, an address, a run of one punctuation mark. Scripts that are
written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) are cut into graphemes: a base character
with its combining marks. No span begins or ends inside a grapheme. Cost: 1 MB of text in 0.5 s.
"""

import regex

# Scripts without spaces between words
UNSPACED = (
    r"\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\u30fc\u3005"
    r"\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}"
)
_MARK = r"\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=ZWJ}"  # never cut off what stands before it
_LETTER = rf"(?![{UNSPACED}{_MARK}])[\p{{L}}\p{{N}}_]"
_WORD = regex.compile(
    rf"""
    https?://[^\s\p{{Ps}}\p{{Pe}}\p{{Pi}}\p{{Pf}}"<>]*[\p{{L}}\p{{N}}/](?![{_MARK}])   # an address
    | [a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+/[\w/.?=&%-]*[\w/](?![{_MARK}])   # an address without its scheme
    | (?=[{UNSPACED}])(?![{_MARK}])\X                        # a grapheme
    | [@#$]?{_LETTER}
      (?:{_LETTER}|[{_MARK}]                                 # letters, digits and their marks
        |\u00ad(?=\p{{L}})                                   # a soft hyphen
        |(?<=\p{{Lu}})&(?=\p{{Lu}})                          # AT&T
        |(?<=\p{{L}}\p{{M}}*)['’·](?=\p{{L}})                # it's
        |(?<=\p{{L}}\p{{M}}*)\.(?=\p{{L}})                   # U.S, t.co
        |(?<=\p{{N}})[.,](?=\p{{N}})                         # 3,000.5
        |(?<=[\p{{L}}\p{{N}}]\p{{M}}*)[-‐‑](?=[\p{{L}}\p{{N}}])  # New-York
      )*
    | ([\p{{P}}=+<>|~$])\1+(?![{_MARK}])                     # ... and --
    | (?![\s\p{{Cc}}\p{{Cf}}{_MARK}])\X                      # any other mark, an emoji
    """,
    regex.VERBOSE | regex.V1,
)
_SCORED = regex.compile(
    rf"(?=[{UNSPACED}])\X|(?:(?![{UNSPACED}])[\p{{L}}\p{{N}}\p{{M}}\u200c\u200d])+", regex.V1
)
_GRAPHEME = regex.compile(r"\X")


def split_words(text: str) -> list[tuple[int, int]]:
    """The span of each word of a text, in characters; invisible characters between words belong to none."""
    boundaries = {match.start() for match in _GRAPHEME.finditer(text)}
    spans = []
    for match in _WORD.finditer(text):
        begin, end = match.span()
        while begin and begin not in boundaries:  # a mark without a letter before it
            begin -= 1
        spans.append((begin, end))
    return spans


def extend_to_graphemes(text: str, begin: int, end: int) -> tuple[int, int]:
    """The smallest span of whole graphemes that holds text[begin:end]: no mark is cut off its letter."""
    if begin >= end:
        return begin, end
    # A grapheme begins behind each line end, and with each space
    first = max(text.rfind("\n", 0, begin) + 1, text.rfind(" ", 0, begin))
    for match in _GRAPHEME.finditer(text, first):
        if match.start() <= begin < match.end():
            begin = match.start()
        if match.end() >= end:
            return begin, match.end()
    return begin, end


def unspaced_as_words(text: str) -> list[str]:
    """Words of letters, digits and marks, with each grapheme of an unspaced script as a word of its own: what
    scores compare in every script.
    """
    return _SCORED.findall(text)
