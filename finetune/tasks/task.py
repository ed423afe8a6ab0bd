"""What a task is: examples come in, segments to train on go out; a model comes in, predictions and their
scores go out.

`Task` is what every task has. `TextToText` is the half that tasks from text to text share. `Model` is what
predicts: the engine during training, on all ranks side by side, or a published folder in one process.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from trifold.finetune.examples.pairs import Pair
from trifold.finetune.rows import TaskRows, row_capacity
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.objectives import Segment
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")


class Model(Protocol):
    """What predicts. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This process among `world`."""
        ...

    @property
    def world(self) -> int: ...

    def logits(self, batch: Batch) -> Tensor:
        """(B, T, outputs) of the model's head."""
        ...

    def generate(
        self, prompts: list[list[int]], generation: Generation, /, *, bos: int, eos: int, pad: int
    ) -> list[list[int]]:
        """The tokens written after each prompt."""
        ...

    def gather(self, values: list[Any], /) -> list[list[Any]]:
        """The values of every rank, on every rank."""
        ...


class Task(Protocol):
    """One task with its examples read and checked. Scores are percentages."""

    @property
    def best(self) -> str:
        """The name of the score that chooses the checkpoint: the highest wins."""
        ...

    @property
    def train(self) -> Sequence[Any]:
        """The examples to learn from."""
        ...

    @property
    def dev(self) -> Sequence[Any]:
        """The examples that choose the checkpoint."""
        ...

    @property
    def test(self) -> Sequence[Any]:
        """The examples that are scored once, with the chosen checkpoint; may be empty."""
        ...

    @property
    def notes(self) -> list[str]:
        """Sentences about the examples that the user should read, such as how many were left out."""
        ...

    def with_head(self, config: ModelConfig) -> ModelConfig:
        """The model with this task's head. Raises UserError for a family that cannot do the task."""
        ...

    def segments(self, examples: Sequence[Any]) -> list[Segment]:
        """What is packed into rows: one or several segments of each example."""
        ...

    def predict(
        self, model: Model, examples: Sequence[Any], generation: Generation, tokens: int
    ) -> list[Any]:
        """A prediction for each example, on every rank; `tokens` positions at a time."""
        ...

    def calibrate(self, predictions: Sequence[Any], examples: Sequence[Any]) -> None:
        """Choose by these dev examples what turns predictions into answers, such as a threshold; most tasks
        have nothing of that kind.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """What a published folder must record so that it predicts as it was scored: prompt, number of
        sentences, threshold.
        """
        ...

    def restore(self, settings: dict[str, Any]) -> None:
        """Predict by the settings that a published folder has recorded."""
        ...

    def statistics(self, predictions: Sequence[Any], examples: Sequence[Any]) -> np.ndarray:
        """(examples, K): numbers that add up over examples, from which the scores follow."""
        ...

    def scores(self, total: np.ndarray) -> dict[str, float]:
        """The scores of summed statistics (K,), each by name."""
        ...

    def signatures(self) -> dict[str, str]:
        """By what tool and rules each score is computed, so that others can compute the same; after
        `statistics`.
        """
        ...

    def baseline(self, examples: Sequence[Any]) -> tuple[str, list[Any]]:
        """The name of a system that knows nothing of language, and its predictions for examples."""
        ...

    def record(self, example: Any, prediction: Any) -> dict[str, Any]:
        """A line of predictions.jsonl: values that JSON has, no infinity."""
        ...


class TaskDefaults:
    """What a task has that has nothing to choose and nothing to record."""

    notes: list[str]

    def calibrate(self, predictions: Sequence[Any], examples: Sequence[Any]) -> None:
        """Nothing to choose."""

    def settings(self) -> dict[str, Any]:
        return {}

    def restore(self, settings: dict[str, Any]) -> None:
        """Nothing to restore."""


class TextToText(TaskDefaults):
    """Source in, target out: an encoder-decoder reads the source; a decoder continues the prompt, and only
    the target has a loss.
    """

    decoder_prompt = "{source}\n"

    def __init__(
        self, tokenizer: Tokenizer, family: Family, row_length: int, prompt: str | None, truncate: bool
    ) -> None:
        self.tokenizer, self.family, self.row_length = tokenizer, family, row_length
        self.truncate = truncate
        self.prompt = prompt or (self.decoder_prompt if family == "decoder" else "{source}")

    def with_head(self, config: ModelConfig) -> ModelConfig:
        if config.family == "encoder":
            raise UserError(
                "this task writes text, and an encoder cannot: give a decoder or an encoder-decoder as"
                " model.from."
            )
        return config.model_copy(update={"labels": (), "crf": False, "spans": False})

    def settings(self) -> dict[str, Any]:
        return {"prompt": self.prompt}

    def segments(self, examples: Sequence[Pair]) -> list[Segment]:
        targets = self.tokenizer.encode_batch([pair.targets[0] for pair in examples])
        prompts = self.prompts(examples)
        segments = []
        for pair, prompt, target in zip(examples, prompts, targets, strict=True):
            if self.family == "decoder":
                segment = self._continuation(prompt, target)
            else:
                segment = self._answer(prompt, target)
            segments.append(self._fit(segment, pair, len(prompt)))
        return segments

    def prompts(self, examples: Sequence[Pair]) -> list[list[int]]:
        """What the model reads before it writes."""
        texts = [self.prompt.replace("{source}", pair.source) for pair in examples]
        before, after = self.tokenizer.special_prefix_suffix(self.family)
        capacity = self.row_length - len(before) - len(after) if self.truncate else None
        encoded = self.tokenizer.encode_batch(texts)
        return [[*before, *ids[:capacity].tolist(), *after] for ids in encoded]

    def predict(
        self, model: Model, examples: Sequence[Pair], generation: Generation, tokens: int
    ) -> list[str]:
        tokenizer = self.tokenizer
        prompts = self.prompts(examples)
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        batches = batched(longest_first, [len(prompts[i]) for i in longest_first], tokens)

        def write(batch: list[int]) -> list[list[int]]:
            of_batch = [prompts[i] for i in batch]
            return model.generate(
                of_batch, generation, bos=tokenizer.start, eos=tokenizer.eos, pad=tokenizer.pad
            )

        outputs: dict[int, list[int]] = {}
        for batch, rows in run_batches(model, batches, write):
            outputs |= zip(batch, rows, strict=True)
        return [tokenizer.text(outputs[i]).strip() for i in range(len(prompts))]

    def record(self, example: Pair, prediction: str) -> dict[str, Any]:
        return {
            "where": example.where,
            "source": example.source,
            "prediction": prediction,
            "references": list(example.targets),
        }

    def _continuation(self, prompt: list[int], target: np.ndarray) -> Segment:
        """A decoder's: the prompt and the target in one row, where the prompt has no loss."""
        tokens = np.array([*prompt, *target, self.tokenizer.eos], np.int64)
        targets = tokens[1:].copy()
        targets[: len(prompt) - 1] = IGNORE
        return Segment(tokens[:-1], targets)

    def _answer(self, prompt: list[int], target: np.ndarray) -> Segment:
        """An encoder-decoder's: the prompt as its source."""
        targets = np.array(self.tokenizer.decoder_target(target.tolist()), np.int64)
        tokens = np.array([self.tokenizer.start, *targets[:-1]], np.int64)
        return Segment(tokens, targets, source=np.array(prompt, np.int64))

    def _fit(self, segment: Segment, pair: Pair, prompt_length: int) -> Segment:
        """A segment that a row can hold; what is cut off is cut off at the end."""
        size = len(segment.tokens)
        if segment.source is not None:
            size = max(len(segment.source), size)
        if size <= self.row_length:
            return segment
        source_too_long = segment.source is None and prompt_length > self.row_length
        if not self.truncate or source_too_long:
            raise UserError(
                f"{pair.where}: source and target need {size} tokens, and row_length is {self.row_length}:"
                " raise it, set task.truncate, or"
                " remove the example."
            )
        return Segment(segment.tokens[: self.row_length], segment.targets[: self.row_length], segment.source)


def run_batches(
    model: Model, batches: Sequence[list[T]], work: Callable[[list[T]], R]
) -> list[tuple[list[T], R]]:
    """`work` done on every batch, distributed over ranks round by round. All ranks make as many calls and get
    all results, in the batches' order.
    """
    rounds = -(-len(batches) // model.world)
    indices = [min(i * model.world + model.rank, len(batches) - 1) for i in range(rounds)]
    everyone = model.gather([work(batches[index]) for index in indices])
    return [(batch, everyone[i % model.world][i // model.world]) for i, batch in enumerate(batches)]


def batched(items: Sequence[T], sizes: Sequence[int], tokens: int) -> list[list[T]]:
    """Items that come longest first, in batches of at most `tokens` positions with their padding (an item at
    least).
    """
    batches: list[list[T]] = []
    longest = 0
    for item, size in zip(items, sizes, strict=True):
        if batches and (len(batches[-1]) + 1) * longest <= tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
            longest = max(size, 1)
    return batches


def label_logits(
    model: Model, segments: Sequence[Segment], row_length: int, pad: int, tokens: int
) -> list[np.ndarray]:
    """The logits (T, outputs) of each segment under a task's head, read in packed rows."""
    rows = TaskRows([segments], row_capacity([segments], row_length), pad, [1.0], seed=None)
    batch_rows = max(1, tokens // row_length)
    batches = [
        list(range(i, min(i + batch_rows, rows.num_rows))) for i in range(0, rows.num_rows, batch_rows)
    ]

    def read(batch: list[int]) -> list[tuple[int, np.ndarray]]:
        packed = rows.rows(batch)
        logits = model.logits(stack(packed)).float().cpu().numpy()
        results = []
        for i, row, row_logits in zip(batch, packed, logits, strict=True):
            for number, member in enumerate(rows.members(i), 1):
                results.append((member, row_logits[row.segments == number]))
        return results

    by_segment: dict[int, np.ndarray] = {}
    for _, results in run_batches(model, batches, read):
        by_segment |= dict(results)
    return [by_segment[i] for i in range(len(segments))]
