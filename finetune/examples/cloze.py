"""Questions made of contexts alone (cloze questions: Dhingra et al. 2018, Lewis et al. 2019): asked questions
come in, more questions to learn from go out.

A span of a sentence is hidden, and the rest of the sentence, with some of its words dropped, asks for it. So
a model learns to find one text in the other, which asked questions are too few to teach. A hidden span looks
like an asked answer, and its question begins and ends like that answer's question: no rule depends on a
language.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import regex

from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.examples.squad import Question

_CJK = r"\u3041-\u30fc\u3400-\u9fff々"
_WORD = regex.compile(
    r"\d+(?:[.,]\d+)*|[\u3041-\u3096]+|[\u30a1-\u30fc]+|[\u3400-\u9fff々]+"
    rf"|(?:(?![\d{_CJK}])[\p{{L}}\p{{N}}\p{{M}}])+"
)
_COMMON = 0.02  # words in more of the contexts than this neither begin nor end an answer
_MAX_ANSWER_WORDS = 4
_MAX_FRAME_WORDS = 3  # at the beginning of a question, and at its end
_MAX_SIDE_WORDS = 12  # of the sentence on either side of the answer
_MAX_SIDE_SENTENCES = 2  # of the context on either side of the answer's sentence
_DROP_RATES = (0.1, 0.3, 0.5)  # the share of the words that a question drops is one of these


@dataclass(frozen=True)
class _Sentence:
    context: int  # index of its context
    index: int  # among the context's sentences
    words: list[tuple[int, int]]  # characters of the context


def cloze(questions: Sequence[Question], number: int) -> list[Question]:
    """`number` questions about the contexts of these questions; the same for the same ones."""
    random = Random(0)
    contexts = list(dict.fromkeys(question.context for question in questions))
    bounds = [split_sentences(context) for context in contexts]
    frames = [frame for question in questions if (frame := _frame(question)) is not None]
    candidates = _candidate_answers(contexts, bounds, {shape for shape, _, _ in frames}, random)
    frames = [frame for frame in frames if frame[0] in candidates]

    generated = []
    for i in range(number if frames else 0):
        shape, opening, ending = random.choice(frames)
        sentence, first, last = random.choice(candidates[shape])
        text, sentences = contexts[sentence.context], bounds[sentence.context]
        begin = sentences[max(sentence.index - random.randint(0, _MAX_SIDE_SENTENCES), 0)][0]
        final = min(sentence.index + random.randint(0, _MAX_SIDE_SENTENCES), len(sentences) - 1)
        end = sentences[final][1]
        start, stop = sentence.words[first][0], sentence.words[last][1]
        question = opening + _rest(text, sentence.words, first, last, random) + ending
        answer = (start - begin, text[start:stop])
        generated.append(Question("a cloze question", f"cloze-{i}", question, text[begin:end], (answer,)))
    return generated


def _frame(question: Question) -> tuple[str, str, str] | None:
    """(shape of the answer, beginning, end): the text of a question before the first and behind the last word
    that also stands in the context.
    """
    text = question.question
    words = [match.span() for match in _WORD.finditer(text)]
    if not words or not question.answers:
        return None
    shape = _shape(_WORD.findall(question.texts[0]))
    if not shape:
        return None
    in_context = {word.lower() for word in _WORD.findall(question.context)}
    shared = [i for i, (begin, end) in enumerate(words) if text[begin:end].lower() in in_context]
    if not shared:
        shared = [min(1, len(words) - 1), len(words) - 1]
    opening_end = words[min(shared[0], _MAX_FRAME_WORDS)][0]
    ending_begin = words[max(shared[-1], len(words) - 1 - _MAX_FRAME_WORDS)][1]
    return shape, text[:opening_end], text[ending_begin:]


def _candidate_answers(
    contexts: Sequence[str], bounds: Sequence[list[tuple[int, int]]], shapes: set[str], random: Random
) -> dict[str, list[tuple[_Sentence, int, int]]]:
    """By shape, the spans of words that could be an answer: a sentence, and the first and last word. A
    sentence gives one of each shape.
    """
    frequency: Counter[str] = Counter()
    for text in contexts:
        frequency.update({word.lower() for word in _WORD.findall(text)})
    most = max(_COMMON * len(contexts), 1)

    candidates = defaultdict(list)
    for number, text in enumerate(contexts):
        for index, bound in enumerate(bounds[number]):
            words = [match.span() for match in _WORD.finditer(text, *bound)]
            texts = [text[begin:end] for begin, end in words]
            rare = [frequency[word.lower()] <= most for word in texts]
            spans = []
            for first in range(len(words)):
                lasts = range(first, min(first + _MAX_ANSWER_WORDS, len(words)))
                spans += [(first, last) for last in lasts if rare[first] and rare[last]]
            random.shuffle(spans)
            by_shape = {_shape(texts[first : last + 1]): (first, last) for first, last in spans}
            for shape, (first, last) in by_shape.items():
                if shape in shapes:
                    candidates[shape].append((_Sentence(number, index, words), first, last))
    return candidates


def _shape(words: Sequence[str]) -> str:
    """The scripts of an answer's words, such as "AA" for Denver Broncos; empty where there are too many."""
    return "".join(_script(word[0]) for word in words) if len(words) <= _MAX_ANSWER_WORDS else ""


def _script(letter: str) -> str:
    if letter.isdigit():
        return "0"
    if letter >= "\u3041":
        return "あ" if letter < "\u3097" else "ア" if letter < "\u3100" else "漢"
    return "A" if letter.isupper() else "a"


def _rest(text: str, words: list[tuple[int, int]], first: int, last: int, random: Random) -> str:
    """The sentence around the answer, each word with the text up to the next one, some words dropped; in half
    of the questions what follows the answer comes first.
    """
    ends = [*(begin for begin, _ in words[1:]), words[-1][1]]
    drop_rate = random.choice(_DROP_RATES)

    def kept(indices: range) -> str:
        return "".join(text[words[i][0] : ends[i]] for i in indices if random.random() >= drop_rate)

    left = kept(range(max(first - _MAX_SIDE_WORDS, 0), first))
    right = kept(range(last + 1, min(last + 1 + _MAX_SIDE_WORDS, len(words))))
    return (right + " " + left if random.random() < 0.5 else left + right).strip()
