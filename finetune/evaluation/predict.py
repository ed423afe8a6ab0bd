"""What a published model makes of a text: texts come in, a mapping for each goes out, as JSON has it.

The head decides. Without a task's head a decoder continues the text, an encoder-decoder answers it, and an
encoder fills in each mask; one that was fine-tuned gets the prompt that it was fine-tuned with. A label head
gives entities with their spans and types, or picks the sentences of a summary. Questions are
"question<TAB>context"; a span head gives the answer, where it begins, and its score.

A text that is longer than the positions that a model has learned is tagged in windows; a mask in it is an
error that gives both numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from trifold.finetune.evaluation.evaluate import LoadedModel
from trifold.finetune.examples.conll import iob2
from trifold.finetune.examples.squad import Question
from trifold.finetune.examples.words import split_words
from trifold.finetune.tasks.qa import Pointer
from trifold.finetune.tasks.scores import entities
from trifold.finetune.tasks.summarization import pick_sentences, sentence_positions
from trifold.finetune.tasks.tagging import TaggingWindow, tagging_windows, tags_of_words
from trifold.modeling.batch import Batch
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.corpus import check_unicode

BATCH_SIZE = 16  # texts that are answered at a time
MAX_QUESTION_TOKENS = 512  # of a window over a question and its context

Predictor = Callable[[LoadedModel, list[str], Generation], Iterator[dict[str, Any]]]


def predict(model: LoadedModel, texts: Iterable[str], generation: Generation) -> Iterator[dict[str, Any]]:
    """An output for each text, in order."""
    predictor = _predictor(model)
    remaining = (check_unicode(text, f"text {number}", "it") for number, text in enumerate(texts, 1))
    while batch := list(islice(remaining, BATCH_SIZE)):
        yield from predictor(model, batch, generation)


def as_text(output: dict[str, Any]) -> str:
    """An output as a line of text."""
    if "entities" in output:
        shown = []
        for entity in output["entities"]:
            shown.append(f"{entity['text']} [{entity['type']} {entity['start']}-{entity['end']}]")
        return "  ".join(shown) or "(no entities)"
    if "answer" in output:
        score = "no score" if output["score"] is None else f"{output['score']:.2f}"
        return f"{output['answer']}  ({output['start']}, {score})"
    return str(output["text"])


def _predictor(model: LoadedModel) -> Predictor:
    if model.config.labels:
        return _entities if model.task.get("picks") is None else _picked
    if model.config.spans:
        return _answers
    return _filled if model.config.family == "encoder" else _written


def _written(model: LoadedModel, texts: list[str], generation: Generation) -> Iterator[dict[str, Any]]:
    """What is written to each text; a decoder that was fine-tuned on no task continues it, and its text comes
    first.
    """
    tokenizer = model.tokenizer
    before, after = tokenizer.special_prefix_suffix(model.config.family)
    prompt = model.task.get("prompt") or "{source}"
    sources = texts
    if model.task.get("kind") == "qa":
        sources = [text.replace("\t", "\n", 1) for text in texts]
    encoded = tokenizer.encode_batch([prompt.replace("{source}", source) for source in sources])
    prompts = [[*before, *ids.tolist(), *after] for ids in encoded]
    outputs = model.generate(prompts, generation, bos=tokenizer.start, eos=tokenizer.eos, pad=tokenizer.pad)
    continues = model.config.family == "decoder" and not model.task
    for text, ids in zip(texts, outputs, strict=True):
        written = tokenizer.text(ids)
        yield {"text": text + written if continues else written}


def _filled(model: LoadedModel, texts: list[str], generation: Generation) -> Iterator[dict[str, Any]]:
    """The likeliest token in place of each mask."""
    tokenizer = model.tokenizer
    for text in texts:
        ids = tokenizer.encode_batch([text])[0].tolist()
        tokens = [*tokenizer.before, *ids, *tokenizer.after]
        if len(tokens) > model.config.max_positions:
            raise UserError(
                f"a text has {len(tokens)} tokens, and this model has learned {model.config.max_positions}"
                f" positions: shorten the text that begins with {text[:40]!r}."
            )
        batch = torch.tensor([tokens])
        best = model.logits(Batch(batch, None, batch))[0].argmax(-1).tolist()[len(tokenizer.before) :]
        filled = [best[i] if token == tokenizer.mask else token for i, token in enumerate(ids)]
        yield {"text": tokenizer.decode(filled)}


def _entities(model: LoadedModel, texts: list[str], generation: Generation) -> Iterator[dict[str, Any]]:
    """Entities as spans of whole words: a word's first token gives its tag, as in training."""
    for text in texts:
        spans = split_words(text)
        windows = tagging_windows(
            model.tokenizer, model.config.family, text, spans, model.config.max_positions
        )
        labels = [_labels(model, window) for window in windows]
        tags = tags_of_words(windows, labels, len(spans))
        tagged = [(span, tag) for span, tag in zip(spans, tags, strict=True) if tag is not None]
        in_iob2 = list(iob2([tag for _, tag in tagged]))
        output = []
        for kind, first, last in sorted(entities(in_iob2), key=lambda entity: entity[1]):
            start, end = tagged[first][0][0], tagged[last][0][1]
            output.append({"text": text[start:end], "type": kind, "start": start, "end": end})
        yield {"entities": output}


def _labels(model: LoadedModel, window: TaggingWindow) -> list[str]:
    """The likeliest label of each token. The labelled positions are those of training, which a CRF needs."""
    space = model.tokenizer.encode_batch([" "])[0][-1:].tolist()
    targets = window.targets([0] * (max(window.words, default=0) + 1), 0, space, set())
    batch = Batch(torch.from_numpy(window.tokens)[None], None, torch.from_numpy(targets)[None])
    best = model.logits(batch)[0].argmax(-1).tolist()
    return [model.config.labels[i] for i in best]


def _picked(model: LoadedModel, texts: list[str], generation: Generation) -> Iterator[dict[str, Any]]:
    """As many sentences of a text as summaries had on average; of a text that is too long those at its
    beginning.
    """
    for text in texts:
        tokens, positions = sentence_positions(model.tokenizer, model.config.family, text)
        tokens = tokens[: model.config.max_positions]
        batch = torch.from_numpy(tokens)[None]
        logits = model.logits(Batch(batch, None, batch))[0].numpy()
        inside = {sentence: position for sentence, position in positions.items() if position < len(tokens)}
        yield {"text": pick_sentences(text, logits, inside, model.task["picks"])}


def _answers(model: LoadedModel, texts: list[str], generation: Generation) -> Iterator[dict[str, Any]]:
    """The likeliest span; no text where its score is below the threshold that dev chose."""
    threshold = model.task.get("threshold")
    for text in texts:
        question, tab, context = text.partition("\t")
        if not tab:
            raise UserError(f"this folder answers questions: give `question<TAB>context`, not {text[:60]!r}.")
        length = min(model.config.max_positions, MAX_QUESTION_TOKENS)
        pointer = Pointer(model.tokenizer, model.config.family, length, stride=length // 6)
        asked = Question("the question", "", question, context, ())
        [answer] = pointer.answers(model, [asked], tokens=4 * length)
        refused = threshold is not None and answer.score < threshold
        yield {
            "answer": "" if refused else answer.text,
            "start": answer.start,
            "score": answer.finite_score,
        }
