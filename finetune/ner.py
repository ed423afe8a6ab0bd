"""Named entities: words with tags in, a tag for each word out, scored by entity F1 as seqeval finds entities. Trivial: a word's usual tag.

Words are joined by spaces and encoded as one text, so that a stock pipeline sees what training saw. A word's first piece, found by
character offsets, carries its label; the other pieces carry none, but for a piece that is only the space before a word: it is outside,
or inside as the word is, so that a stock pipeline, which takes it for a word, sees no entity in it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from finetune import config
from finetune.records import existing, text_lines
from finetune.scores import entity_scores, entity_statistics
from finetune.task import Model, labelled, placed
from modeling.batch import IGNORE
from modeling.config import Family, Generation, ModelConfig, Refused
from pretrain.objectives import Segment
from pretrain.tokenizer import Tokenizer

_INSIDE, _BEGINS = "IEML", "BSU"  # prefixes of IOB1, IOB2, BIOES and BILOU


@dataclass(frozen=True)
class Sentence:
    """Words and their tags in IOB2."""

    where: str
    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


class Ner:
    best = "f1"

    def __init__(self, dials: config.Ner, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        self.tokenizer, self.family, self.row_length = tokenizer, family, row_length
        self.space = int(tokenizer.encode_batch([" "])[0][-1])
        self.train, self.dev = ([sentence for place in places for sentence in read_conll(place)] for places in (dials.train, dials.dev))
        kinds = sorted({tag[2:] for sentence in self.train for tag in sentence.tags if tag != "O"})
        if not kinds:
            raise Refused(f"{', '.join(dials.train)}: no word has a tag other than O; the last column must be the tag.")
        self.kinds, self.labels = kinds, ("O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI"))
        for sentence in self.dev:
            for kind in {tag[2:] for tag in sentence.tags if tag != "O"} - set(kinds):
                raise Refused(f"{sentence.where}: the type {kind} was never seen in the training files, which have {', '.join(kinds)}.")

    def shaped(self, config: ModelConfig) -> ModelConfig:
        """Of an encoder-decoder the encoder alone: labels need nothing written."""
        family = "decoder" if config.family == "decoder" else "encoder"
        return config.model_copy(update={"family": family, "labels": self.labels, "spans": False})

    def segments(self, examples: Sequence[Sentence]) -> list[Segment]:
        made = []
        for sentence in examples:
            tokens, places = placed(self.tokenizer, self.family, sentence.text, list(starts(sentence.words)))
            if len(tokens) > self.row_length:
                raise Refused(f"{sentence.where}: the sentence has {len(tokens)} tokens, and row_length is {self.row_length}: raise it.")
            targets = np.full(len(tokens), IGNORE)
            for place, tag in zip(places, sentence.tags, strict=True):  # an empty word stands at the next one's piece, which then wins
                targets[place] = self.labels.index(tag)
                if tokens[place - 1] == self.space:
                    targets[place - 1] = self.labels.index(tag if tag[0] == "I" else "O")
            made.append(Segment(tokens, targets))
        return made

    def predict(self, model: Model, examples: Sequence[Sentence], how: Generation, tokens: int) -> list[tuple[str, ...]]:
        logits = labelled(model, self.segments(examples), self.row_length, self.tokenizer.pad, tokens)
        tags = []
        for sentence, scores in zip(examples, logits, strict=True):
            _, places = placed(self.tokenizer, self.family, sentence.text, list(starts(sentence.words)))
            best = [self.labels[i] for i in scores.argmax(-1)]
            tags.append(tuple(iob2([best[place] if word.strip() else "O" for place, word in zip(places, sentence.words, strict=True)])))
        return tags

    def statistics(self, predictions: Sequence[Sequence[str]], examples: Sequence[Sentence]) -> np.ndarray:
        return entity_statistics(predictions, [sentence.tags for sentence in examples], self.kinds)

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return entity_scores(total, self.kinds)

    def trivial(self) -> tuple[str, list[tuple[str, ...]]]:
        seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for sentence in self.train:
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                seen[word][tag] += 1
        usual = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
        return "usual tag", [tuple(iob2([usual.get(word, "O") for word in sentence.words])) for sentence in self.dev]

    def record(self, example: Sentence, prediction: Sequence[str]) -> dict[str, Any]:
        return {"where": example.where, "words": example.words, "prediction": list(prediction), "references": list(example.tags)}


def starts(words: Sequence[str]) -> Iterator[int]:
    """Where each word begins in the text that spaces join."""
    at = 0
    for word in words:
        yield at
        at += len(word) + 1


def read_conll(place: str) -> Iterator[Sentence]:
    """The sentences of a CoNLL file: a word a line, its tag in the last column, an empty line after each sentence; -DOCSTART- is no word.

    Columns stand apart by tabs where the file has any, else by spaces. A word may be empty or hold a space. Raises Refused for a line
    without a tag, and for a tag that no scheme (IOB1, IOB2, BIOES, BILOU) allows.
    """
    path = existing(place)
    lines = list(text_lines(path))
    tabs = any("\t" in line for _, line in lines)
    for blank, group in groupby(lines, key=lambda item: not item[1].strip()):
        rows = [] if blank else list(group)
        words, tags = [], []
        for where, line in rows:
            columns = line.split("\t") if tabs else line.split(" ")
            if columns[0] == "-DOCSTART-":
                continue
            tag = columns[-1].strip()
            prefix, dash, kind = tag.partition("-")
            if len(columns) < 2:
                raise Refused(f"{where}, has 1 column, {line!r}: a word and its tag are needed, apart by a {'tab' if tabs else 'space'}.")
            if tag != "O" and not (len(prefix) == 1 and prefix in _INSIDE + _BEGINS and dash and kind):
                raise Refused(f"{where}, has the tag {tag!r}, which no scheme allows: O, or B- I- E- S- L- U- M- and a type.")
            words.append(columns[0])
            tags.append(tag)
        if words:
            yield Sentence(rows[0][0], tuple(words), tuple(iob2(tags)))


def iob2(tags: Sequence[str]) -> Iterator[str]:
    """The same entities in IOB2, whatever scheme they came in: an entity begins with B, or where nothing of its type goes on."""
    before = "O"
    for tag in tags:
        goes_on = tag[:1] in _INSIDE and tag != "O" and before[2:] == tag[2:]
        yield tag if tag == "O" else f"{'I' if goes_on else 'B'}-{tag[2:]}"
        before = tag
