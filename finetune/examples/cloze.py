"""Questions made of contexts alone (cloze questions: Dhingra et al. 2018, Lewis et al. 2019): in, asked
questions; out, more to learn from.

A span of a sentence is hidden, and the rest of the sentence, some of its words dropped, asks for it. So a
model learns to find the one text in the other, which asked questions are too few to teach. What is hidden
looks like an asked answer, and what is asked begins and ends like that answer's question: nothing here knows
a language.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.examples.squad import Question

_WORD = re.compile(
    r"\d+(?:[.,]\d+)*|[\u3041-\u3096]+|[\u30a1-\u30fc]+|[\u3400-\u9fff々]+|[^\W\d_\u3041-\u30fc\u3400-\u9fff々]+"
)
_COMMON = 0.02  # words in more of the contexts than this neither begin nor end an answer
_ANSWER, _FRAME, _ASIDE = (
    4,
    3,
    12,
)  # words at most: of an answer, of a question's beginning or end, of the sentence on either side
_AROUND = 2  # sentences at most that stay on either side of the answer's own
_DROPPED = (0.1, 0.3, 0.5)  # the share of the words that a question drops is one of these


@dataclass(frozen=True)
class _Sentence:
    context: int
    number: int  # among the context's sentences
    words: list[tuple[int, int]]  # characters of the context


def cloze(asked: Sequence[Question], number: int) -> list[Question]:
    """`number` questions about the contexts of the asked ones, the same for the same ones."""
    random = Random(0)
    contexts = list(dict.fromkeys(question.context for question in asked))
    bounds = [split_sentences(context) for context in contexts]
    frames = [frame for question in asked if (frame := _frame(question)) is not None]
    hidden = _hidable(contexts, bounds, {shape for shape, _, _ in frames}, random)
    frames = [frame for frame in frames if frame[0] in hidden]
    made = []
    for i in range(number if frames else 0):
        shape, opening, ending = random.choice(frames)
        sentence, first, last = random.choice(hidden[shape])
        text, span = contexts[sentence.context], bounds[sentence.context]
        begin = span[max(sentence.number - random.randint(0, _AROUND), 0)][0]
        end = span[min(sentence.number + random.randint(0, _AROUND), len(span) - 1)][1]
        start, stop = sentence.words[first][0], sentence.words[last][1]
        question = opening + _rest(text, sentence.words, first, last, random) + ending
        made.append(
            Question(
                "a made question",
                f"cloze-{i}",
                question,
                text[begin:end],
                ((start - begin, text[start:stop]),),
            )
        )
    return made


def _frame(question: Question) -> tuple[str, str, str] | None:
    """What an answer looks like, and how its question begins and ends before and behind the words that stand
    in the context.
    """
    words = [match.span() for match in _WORD.finditer(question.question)]
    if not words or not question.answers or not (shape := _shape(_WORD.findall(question.texts[0]))):
        return None
    known = {word.lower() for word in _WORD.findall(question.context)}
    asked = question.question
    shared = [i for i, (begin, end) in enumerate(words) if asked[begin:end].lower() in known] or [
        min(1, len(words) - 1),
        len(words) - 1,
    ]
    opens, ends = words[min(shared[0], _FRAME)][0], words[max(shared[-1], len(words) - 1 - _FRAME)][1]
    return shape, asked[:opens], asked[ends:]


def _hidable(
    contexts: Sequence[str], bounds: Sequence[list[tuple[int, int]]], shapes: set[str], random: Random
) -> dict[str, list[tuple[_Sentence, int, int]]]:
    """By shape, the spans of words that could be an answer: a sentence, and the first and last word; one of
    each shape in a sentence.
    """
    spoken = [
        [[match.span() for match in _WORD.finditer(text, *span)] for span in spans]
        for text, spans in zip(contexts, bounds, strict=True)
    ]
    times = Counter(word for text in contexts for word in {word.lower() for word in _WORD.findall(text)})
    found = defaultdict(list)
    for at, (text, of_context) in enumerate(zip(contexts, spoken, strict=True)):
        for number, words in enumerate(of_context):
            said = [text[begin:end] for begin, end in words]
            edge = [times[word.lower()] <= max(_COMMON * len(contexts), 1) for word in said]
            spans = [
                (i, j)
                for i in range(len(words))
                for j in range(i, min(i + _ANSWER, len(words)))
                if edge[i] and edge[j]
            ]
            random.shuffle(spans)
            one = {shape: span for span in spans if (shape := _shape(said[span[0] : span[1] + 1])) in shapes}
            for shape, (i, j) in one.items():
                found[shape].append((_Sentence(at, number, words), i, j))
    return found


def _shape(words: Sequence[str]) -> str:
    """What the words of an answer begin with, such as "AA" for Denver Broncos; empty: they are too many."""
    return "".join(_script(word[0]) for word in words) if len(words) <= _ANSWER else ""


def _script(letter: str) -> str:
    if letter.isdigit():
        return "0"
    if letter >= "\u3041":
        return "あ" if letter < "\u3097" else "ア" if letter < "\u3100" else "漢"
    return "A" if letter.isupper() else "a"


def _rest(text: str, words: list[tuple[int, int]], first: int, last: int, random: Random) -> str:
    """The sentence around the answer, each word with what stands behind it, some dropped; half the time what
    follows comes first.
    """
    ends = [*(begin for begin, _ in words[1:]), words[-1][1]]
    share = random.choice(_DROPPED)
    left, right = (
        "".join(text[words[i][0] : ends[i]] for i in part if random.random() >= share)
        for part in (
            range(max(first - _ASIDE, 0), first),
            range(last + 1, min(last + 1 + _ASIDE, len(words))),
        )
    )
    return (right + " " + left if random.random() < 0.5 else left + right).strip()
