"""Words and graphemes of every script."""

import random
from itertools import pairwise

import pytest
import regex

from trifold.finetune.examples.words import extend_to_graphemes, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Paris,London", "Paris|,|London"),
        ("Rome/Milan", "Rome|/|Milan"),
        ("(Microsoft)Google", "(|Microsoft|)|Google"),
        ("said:“Obama”", "said|:|“|Obama|”"),
        ("Bogota\u0301 lives", "Bogota\u0301|lives"),
        ("दिल्ली में", "दिल्ली|में"),
        ("ที่นี่", "ที่|นี่"),
        ("東京カ", "東|京|カ"),
        ("\ufeffAda \ufeff x\ufeff", "Ada|x"),
        ("it's t.co/x @ada Lima.", "it's|t.co/x|@ada|Lima|."),
        ("New-York, AT&T ... 3,000.5", "New-York|,|AT&T|...|3,000.5"),
        ("שָׁלוֹם مُحَمَّد", "שָׁלוֹם|مُحَمَّد"),
        ("👨\u200d👩\u200d👧 ❤\ufe0f", "👨\u200d👩\u200d👧|❤\ufe0f"),
    ],
)
def test_words_are_those_of_training_files_in_every_script(text: str, words: str) -> None:
    assert [text[begin:end] for begin, end in split_words(text)] == words.split("|")


def test_no_word_and_no_extended_span_cuts_a_grapheme() -> None:
    draw = random.Random(0)
    alphabet = "aB1 .,-'@/\u0301\u200d\ufe0f\ufeffदिल्लीमेंที่นี่東カ👨👩ُّ\n\u00ad"
    for _ in range(3000):
        text = "".join(draw.choices(alphabet, k=draw.randint(1, 12)))
        bounds = {match.start() for match in regex.finditer(r"\X", text)} | {len(text)}
        spans = split_words(text)
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), repr(text)
        begin = draw.randrange(len(text))
        end = draw.randint(begin + 1, len(text))
        first, last = extend_to_graphemes(text, begin, end)
        assert {first, last} <= bounds and first <= begin and last >= end, (text, begin, end)
        assert all({start, stop} <= bounds for start, stop in spans), repr(text)
