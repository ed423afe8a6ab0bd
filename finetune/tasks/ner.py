"""Named entities: words with tags in, a tag for each word out, scored by entity F1 as seqeval finds entities.
Trivial: a word's usual tag.

A label head tags words. A decoder or an encoder-decoder can write the entities instead (`written`).

Words are joined by spaces and encoded as one text, so that a stock pipeline sees what training saw. A word's
first piece, found by character offsets, carries its label; the other pieces carry none, but for a piece that
is only the space before a word: it is outside, or inside as the word is, so that a stock pipeline, which
takes it for a word, sees no entity in it.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from trifold.finetune import config
from trifold.finetune.examples.conll import Sentence, iob2, read_tagged_sentences, starts
from trifold.finetune.examples.pairs import Pair
from trifold.finetune.tasks.scores import entities, entity_scores, entity_statistics
from trifold.finetune.tasks.task import Model, Task, TextToText, align_to_tokens, label_logits
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer


def open_ner(dials: config.NerConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> Task:
    return (WrittenNer if dials.written else Ner)(dials, tokenizer, family, row_length)


class _Entities:
    """What both ways of tagging share: the examples, the scores and the trivial system."""

    best = "f1"

    def __init__(self, dials: config.NerConfig) -> None:
        self.train, self.dev = (
            [sentence for place in places for sentence in read_tagged_sentences(place)]
            for places in (dials.train, dials.dev)
        )
        kinds = sorted({tag[2:] for sentence in self.train for tag in sentence.tags if tag != "O"})
        if not kinds:
            raise UserError(
                f"{', '.join(dials.train)}: no word has a tag other than O; the last column must be the tag."
            )
        self.kinds = kinds
        for sentence in self.dev:
            for kind in {tag[2:] for tag in sentence.tags if tag != "O"} - set(kinds):
                raise UserError(
                    f"{sentence.where}: the type {kind} was never seen in the training files, which have"
                    f" {', '.join(kinds)}."
                )

    def statistics(self, predictions: Sequence[Sequence[str]], examples: Sequence[Sentence]) -> np.ndarray:
        return entity_statistics(predictions, [sentence.tags for sentence in examples], self.kinds)

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return entity_scores(total, self.kinds)

    def signatures(self) -> dict[str, str]:
        return {"f1": f"seqeval {version('seqeval')}, exact spans and types, micro-averaged"}

    def baseline(self) -> tuple[str, list[tuple[str, ...]]]:
        seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for sentence in self.train:
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                seen[word][tag] += 1
        usual = {word: tags.most_common(1)[0][0] for word, tags in seen.items()}
        return "usual tag", [
            tuple(iob2([usual.get(word, "O") for word in sentence.words])) for sentence in self.dev
        ]

    def record(self, example: Sentence, prediction: Sequence[str]) -> dict[str, Any]:
        return {
            "where": example.where,
            "words": example.words,
            "prediction": list(prediction),
            "references": list(example.tags),
        }


class Ner(_Entities):
    """A label for each word."""

    def __init__(
        self, dials: config.NerConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        super().__init__(dials)
        self.tokenizer, self.family, self.row_length = tokenizer, family, row_length
        self.crf = dials.crf
        self.space = tokenizer.encode_batch([" "])[0][
            -1:
        ].tolist()  # none where the tokenizer drops spaces (WordPiece)
        self.labels = ("O", *(f"{prefix}-{kind}" for kind in self.kinds for prefix in "BI"))

    def with_head(self, config: ModelConfig) -> ModelConfig:
        """Of an encoder-decoder the encoder alone: labels need nothing written."""
        if self.crf and config.cell == "attention":
            raise UserError(
                "task.crf is for recurrent models: no stock class of the others has a CRF. Leave it out."
            )
        family = "decoder" if config.family == "decoder" else "encoder"
        head = {"labels": self.labels, "crf": self.crf, "spans": False}
        return config.model_copy(update={"family": family, "alignment": "none", **head})

    def segments(self, examples: Sequence[Sentence]) -> list[Segment]:
        made = []
        for sentence in examples:
            tokens, places = align_to_tokens(
                self.tokenizer, self.family, sentence.text, list(starts(sentence.words))
            )
            if len(tokens) > self.row_length:
                raise UserError(
                    f"{sentence.where}: the sentence has {len(tokens)} tokens, and row_length is"
                    f" {self.row_length}: raise it."
                )
            targets = np.full(len(tokens), IGNORE)
            for place, tag in zip(
                places, sentence.tags, strict=True
            ):  # an empty word stands at the next one's piece, which then wins
                targets[place] = self.labels.index(tag)
                if place and tokens[place - 1] in self.space:
                    targets[place - 1] = self.labels.index(tag if tag[0] == "I" else "O")
            made.append(Segment(tokens, targets))
        return made

    def predict(
        self, model: Model, examples: Sequence[Sentence], how: Generation, tokens: int
    ) -> list[tuple[str, ...]]:
        logits = label_logits(model, self.segments(examples), self.row_length, self.tokenizer.pad, tokens)
        tags = []
        for sentence, scores in zip(examples, logits, strict=True):
            _, places = align_to_tokens(
                self.tokenizer, self.family, sentence.text, list(starts(sentence.words))
            )
            best = [self.labels[i] for i in scores.argmax(-1)]
            tags.append(
                tuple(
                    iob2(
                        [
                            best[place] if word.strip() else "O"
                            for place, word in zip(places, sentence.words, strict=True)
                        ]
                    )
                )
            )
        return tags


class WrittenNer(_Entities, TextToText):  # type: ignore[misc]  # sentences in place of pairs
    """The entities as text, each with its type, "none" where there are none: `Ada (PER) | Oslo (LOC)`."""

    decoder_prompt = "{source}\nEntities:\n"

    def __init__(
        self, dials: config.NerConfig, tokenizer: Tokenizer, family: Family, row_length: int
    ) -> None:
        TextToText.__init__(self, tokenizer, family, row_length, dials.prompt, truncate=False)
        _Entities.__init__(self, dials)

    def segments(self, examples: Sequence[Sentence]) -> list[Segment]:  # type: ignore[override]
        return super().segments([_pair(sentence) for sentence in examples])

    def predict(  # type: ignore[override]
        self, model: Model, examples: Sequence[Sentence], how: Generation, tokens: int
    ) -> list[tuple[str, ...]]:
        said = super().predict(model, [_pair(sentence) for sentence in examples], how, tokens)
        return [read_back(text, sentence.words) for text, sentence in zip(said, examples, strict=True)]


def _pair(sentence: Sentence) -> Pair:
    found = sorted(entities(sentence.tags), key=lambda entity: entity[1])
    said = [f"{' '.join(sentence.words[first : last + 1])} ({kind})" for kind, first, last in found]
    return Pair(sentence.where, sentence.text, (" | ".join(said) or "none",))


def read_back(text: str, words: Sequence[str]) -> tuple[str, ...]:
    """The tags that written entities mean. Each is looked for after the one before, then from the start; what
    is not there is left out.
    """
    tags, after = ["O"] * len(words), 0
    for name, kind in re.findall(r"(.+?) \((\S+?)\)(?: \| |$)", text):
        for first in (*range(after, len(words)), *range(after)):
            last = first + name.count(" ")
            if " ".join(words[first : last + 1]) == name and set(tags[first : last + 1]) == {"O"}:
                tags[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
                after = last + 1
                break
    return tuple(tags)
