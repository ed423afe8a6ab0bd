"""Named entities: words with tags come in, a tag for each word goes out, scored by entity F1 as seqeval finds
entities. Baseline: a word's usual tag.

A label head tags words. A decoder or an encoder-decoder can write the entities instead (`written`).

Words are joined by spaces and encoded as one text, so that a stock pipeline reads what training read. A
word's first token, found by character offsets, carries its label (finetune/tasks/tagging.py).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from trifold.finetune.config import NerConfig
from trifold.finetune.examples.conll import Sentence, iob2, read_tagged_sentences, word_spans
from trifold.finetune.examples.pairs import Pair
from trifold.finetune.tasks.scores import entities, entity_scores, entity_statistics
from trifold.finetune.tasks.tagging import TaggingWindow, tagging_windows, tags_in_iob2, tags_of_words
from trifold.finetune.tasks.task import Model, Task, TaskDefaults, TextToText, label_logits
from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer


def open_ner(config: NerConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> Task:
    if config.written:
        return WrittenNer(config, tokenizer, family, row_length)
    return Ner(config, tokenizer, family, row_length)


class _Entities(TaskDefaults):
    """What both ways of tagging share: the examples, the scores and the baseline."""

    best = "f1"

    def __init__(self, config: NerConfig) -> None:
        self.notes: list[str] = []
        self.train, self.dev, self.test = (
            read_sentences(config, files) for files in (config.train, config.dev, config.test)
        )
        self.kinds = sorted(_kinds(self.train))
        if not self.kinds:
            raise UserError(
                f"{', '.join(config.train)}: no word has a tag other than O; name the column of the tags by"
                " task.columns.tag."
            )
        self._check_kinds()

    def statistics(self, predictions: Sequence[Sequence[str]], examples: Sequence[Sentence]) -> np.ndarray:
        return entity_statistics(predictions, [sentence.tags for sentence in examples], self.kinds)

    def scores(self, total: np.ndarray) -> dict[str, float]:
        return entity_scores(total, self.kinds)

    def signatures(self) -> dict[str, str]:
        return {"f1": f"seqeval {version('seqeval')}, exact spans and types, micro-averaged"}

    def baseline(self, examples: Sequence[Sentence]) -> tuple[str, list[tuple[str, ...]]]:
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for sentence in self.train:
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                counts[word][tag] += 1
        usual = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
        predictions = [[usual.get(word, "O") for word in sentence.words] for sentence in examples]
        return "usual tag", [tuple(iob2(tags)) for tags in predictions]

    def record(self, example: Sentence, prediction: Sequence[str]) -> dict[str, Any]:
        return {
            "where": example.where,
            "words": example.words,
            "prediction": list(prediction),
            "references": list(example.tags),
        }

    def _check_kinds(self) -> None:
        for sentence in (*self.dev, *self.test):
            for kind in _kinds([sentence]) - set(self.kinds):
                raise UserError(
                    f"{sentence.where}: the type {kind} was never seen in the training files, which have"
                    f" {', '.join(self.kinds)}."
                )


class Ner(_Entities):
    """A label for each word."""

    def __init__(self, config: NerConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        super().__init__(config)
        self.tokenizer, self.family, self.row_length = tokenizer, family, row_length
        self.crf = config.crf
        # The token of a space alone: none where the tokenizer drops spaces (WordPiece)
        self.space = tokenizer.encode_batch([" "])[0][-1:].tolist()
        self.labels = ("O", *(f"{prefix}-{kind}" for kind in self.kinds for prefix in "BI"))
        self._index = {label: index for index, label in enumerate(self.labels)}
        self._inside = {index for label, index in self._index.items() if label[0] == "I"}

    def with_head(self, config: ModelConfig) -> ModelConfig:
        """Of an encoder-decoder the encoder alone: labels are not written."""
        if self.crf and config.cell == "attention":
            raise UserError(
                "task.crf is for recurrent models: no stock class of the others has a CRF. Leave it out."
            )
        family = "decoder" if config.family == "decoder" else "encoder"
        head = {"labels": self.labels, "crf": self.crf, "spans": False}
        return config.model_copy(update={"family": family, "alignment": "none", **head})

    def segments(self, examples: Sequence[Sentence]) -> list[Segment]:
        """The windows of each sentence: one, unless it is longer than a row."""
        segments = []
        for sentence in examples:
            labels = [self._index[tag] for tag in sentence.tags]
            for window in self._windows(sentence):
                targets = window.targets(labels, self._index["O"], self.space, self._inside)
                segments.append(Segment(window.tokens, targets))
        return segments

    def predict(
        self, model: Model, examples: Sequence[Sentence], generation: Generation, tokens: int
    ) -> list[tuple[str, ...]]:
        logits = iter(
            label_logits(model, self.segments(examples), self.row_length, self.tokenizer.pad, tokens)
        )
        predictions = []
        for sentence in examples:
            windows = self._windows(sentence)
            labels = [[self.labels[i] for i in next(logits).argmax(-1)] for _ in windows]
            tags = tags_of_words(windows, labels, len(sentence.words))
            visible = [tag if word.strip() else None for tag, word in zip(tags, sentence.words, strict=True)]
            predictions.append(tags_in_iob2(visible))
        return predictions

    def _windows(self, sentence: Sentence) -> list[TaggingWindow]:
        spans = list(word_spans(sentence.words))
        return tagging_windows(self.tokenizer, self.family, sentence.text, spans, self.row_length)


class WrittenNer(_Entities, TextToText):  # type: ignore[misc]  # sentences in place of pairs
    """The entities as text, each with its type, "none" where there are none: `Ada (PER) | Oslo (LOC)`."""

    decoder_prompt = "{source}\nEntities:\n"

    def __init__(self, config: NerConfig, tokenizer: Tokenizer, family: Family, row_length: int) -> None:
        TextToText.__init__(self, tokenizer, family, row_length, config.prompt, truncate=False)
        _Entities.__init__(self, config)

    def segments(self, examples: Sequence[Sentence]) -> list[Segment]:  # type: ignore[override]
        return super().segments([_pair(sentence) for sentence in examples])

    def predict(  # type: ignore[override]
        self, model: Model, examples: Sequence[Sentence], generation: Generation, tokens: int
    ) -> list[tuple[str, ...]]:
        outputs = super().predict(model, [_pair(sentence) for sentence in examples], generation, tokens)
        return [parse_entities(text, example.words) for text, example in zip(outputs, examples, strict=True)]


def parse_entities(text: str, words: Sequence[str]) -> tuple[str, ...]:
    """The tags that written entities mean. Each is looked for after the one before, then from the start; what
    is not among the words is left out.
    """
    tags, after = ["O"] * len(words), 0
    for name, kind in re.findall(r"(.+?) \((\S+?)\)(?: \| |$)", text):
        for first in (*range(after, len(words)), *range(after)):
            last = first + name.count(" ")
            free = set(tags[first : last + 1]) == {"O"}
            if free and " ".join(words[first : last + 1]) == name:
                tags[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
                after = last + 1
                break
    return tuple(tags)


def read_sentences(config: NerConfig, files: Sequence[str]) -> list[Sentence]:
    """The sentences of several files and hub sets."""
    columns = config.columns
    sentences: list[Sentence] = []
    for file in files:
        sentences += read_tagged_sentences(file, columns.word, columns.tag)
    return sentences


def _kinds(sentences: Sequence[Sentence]) -> set[str]:
    return {tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O"}


def _pair(sentence: Sentence) -> Pair:
    written = []
    for kind, first, last in sorted(entities(sentence.tags), key=lambda entity: entity[1]):
        written.append(f"{' '.join(sentence.words[first : last + 1])} ({kind})")
    return Pair(sentence.where, sentence.text, (" | ".join(written) or "none",))
