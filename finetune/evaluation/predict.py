"""What a published model says to a text: its task's natural output, found from its head. In: texts. Out: a
mapping for each, JSON as it is.

Without a task's head a decoder continues the text, an encoder-decoder answers it, an encoder fills in each
`<mask>`; one that was taught a task is asked as it was taught. A label head gives entities with their spans
and types, or picks the sentences of a summary. Questions are "question<TAB>context"; a span head gives the
answer, where it stands, and its score.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from trifold.finetune.evaluation.evaluate import LoadedModel
from trifold.finetune.examples.conll import iob2
from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.examples.squad import Question
from trifold.finetune.tasks.qa import Pointer
from trifold.finetune.tasks.scores import entities
from trifold.finetune.tasks.summarization import pick_sentences
from trifold.finetune.tasks.task import align_to_tokens
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.corpus import check_unicode

_WORD = re.compile(
    r"[@#$]?\w(?:\S*\w)?|[^\w\s]+"
)  # what CoNLL files have as words: it's, @ada, t.co/x whole, the stop after Lima apart
BATCH_TOKENS = 16  # texts that are answered at a time


def predict(opened: LoadedModel, texts: Iterable[str], how: Generation) -> Iterator[dict[str, Any]]:
    """An answer for each text, in order."""
    work = _predictor(opened)
    remaining = (check_unicode(text, f"text {number}", "it") for number, text in enumerate(texts, 1))
    while batch := list(islice(remaining, BATCH_TOKENS)):
        yield from work(opened, batch, how)


def _predictor(
    opened: LoadedModel,
) -> Callable[[LoadedModel, list[str], Generation], Iterator[dict[str, Any]]]:
    if opened.config.labels:
        return _entities if opened.task.get("picks") is None else _picked
    if opened.config.spans:
        return _spans
    return _filled if opened.config.family == "encoder" else _text


def as_text(said: dict[str, Any]) -> str:
    """An answer as a line of text."""
    if "entities" in said:
        found = (
            f"{entity['text']} [{entity['type']} {entity['start']}-{entity['end']}]"
            for entity in said["entities"]
        )
        return "  ".join(found) or "(no entities)"
    return (
        f"{said['answer']}  ({said['start']}, {said['score']:.2f})" if "answer" in said else str(said["text"])
    )


def _text(opened: LoadedModel, texts: list[str], how: Generation) -> Iterator[dict[str, Any]]:
    """What is written to each text; a decoder that was taught no task goes on with it, and its text comes
    first.
    """
    marks, alone = opened.tokenizer, opened.config.family == "decoder"
    (before, after), prompt = (
        marks.special_prefix_suffix(opened.config.family),
        opened.task.get("prompt") or "{source}",
    )
    asked = [text.replace("\t", "\n", 1) if opened.task.get("kind") == "qa" else text for text in texts]
    prompts = [
        [*before, *ids.tolist(), *after]
        for ids in marks.encode_batch([prompt.replace("{source}", text) for text in asked])
    ]
    for text, ids in zip(
        texts, opened.generate(prompts, how, bos=marks.start, eos=marks.eos, pad=marks.pad), strict=True
    ):
        made = marks.text(ids)
        yield {"text": text + made if alone and not opened.task else made}


def _filled(opened: LoadedModel, texts: list[str], how: Generation) -> Iterator[dict[str, Any]]:
    """The likeliest token in place of each mask."""
    marks = opened.tokenizer
    for text in texts:
        ids = marks.encode_batch([text])[0].tolist()
        tokens = torch.tensor([[*marks.before, *ids, *marks.after]])
        best = opened.logits(Batch(tokens, None, tokens))[0].argmax(-1).tolist()[len(marks.before) :]
        yield {
            "text": marks.decode(
                [best[place] if token == marks.mask else token for place, token in enumerate(ids)]
            )
        }


def _entities(opened: LoadedModel, texts: list[str], how: Generation) -> Iterator[dict[str, Any]]:
    """A word's first piece says its tag."""
    for text in texts:
        spans = [match.span() for match in _WORD.finditer(text)]
        tokens, places = align_to_tokens(
            opened.tokenizer, opened.config.family, text, [begin for begin, _ in spans]
        )
        batch, space = torch.from_numpy(tokens)[None], opened.tokenizer.encode_batch([" "])[0][-1:]
        labelled = [
            at for place in places for at in (place - 1, place) if at == place or tokens[at] in space
        ]  # as in training
        targets = torch.full_like(batch, IGNORE)
        targets[0, labelled] = 0
        best = opened.logits(Batch(batch, None, targets))[0].argmax(-1).numpy()
        found = entities(list(iob2([opened.config.labels[best[place]] for place in places])))
        yield {
            "entities": [
                {
                    "text": text[spans[first][0] : spans[last][1]],
                    "type": kind,
                    "start": spans[first][0],
                    "end": spans[last][1],
                }
                for kind, first, last in sorted(found, key=lambda entity: entity[1])
            ]
        }


def _picked(opened: LoadedModel, texts: list[str], how: Generation) -> Iterator[dict[str, Any]]:
    """As many sentences of a text as summaries had on average; of a text that is too long those at its
    beginning.
    """
    for text in texts:
        tokens, places = align_to_tokens(
            opened.tokenizer, opened.config.family, text, [begin for begin, _ in split_sentences(text)]
        )
        tokens = tokens[: opened.config.max_positions]
        batch = torch.from_numpy(tokens)[None]
        logits = opened.logits(Batch(batch, None, batch))[0].numpy()
        yield {
            "text": pick_sentences(
                text, logits[[place for place in places if place < len(tokens)]], opened.task["picks"]
            )
        }


def _spans(opened: LoadedModel, texts: list[str], how: Generation) -> Iterator[dict[str, Any]]:
    for text in texts:
        question, tab, context = text.partition("\t")
        if not tab:
            raise UserError(f"this folder answers questions: give `question<TAB>context`, not {text[:60]!r}.")
        length = min(opened.config.max_positions, 512)
        pointer = Pointer(opened.tokenizer, opened.config.family, length, stride=length // 6)
        [found] = pointer.answers(
            opened, [Question("the question", "", question, context, ())], tokens=4 * length
        )
        yield {"answer": found.text, "start": found.start, "score": found.score}
