"""What a task is: examples in, segments to train on; a model in, predictions and their scores out.

`Task` is what every task answers. `TextToText` is the half that tasks from text to text share. A model is
whoever answers alike (`Model`): the engine in the middle of training, all ranks side by side, or a published
folder in one process.
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
    """What answers. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def logits(self, batch: Batch) -> Tensor: ...
    def generate(
        self, prompts: list[list[int]], how: Generation, *, bos: int, eos: int, pad: int
    ) -> list[list[int]]: ...
    def gather(self, mine: list[Any]) -> list[list[Any]]: ...


class Task(Protocol):
    """One task with its examples read and checked. Scores are percentages."""

    @property
    def best(self) -> str:
        """The score by which models are chosen: the highest."""
        ...

    @property
    def train(self) -> Sequence[Any]: ...
    @property
    def dev(self) -> Sequence[Any]: ...

    def with_head(self, config: ModelConfig) -> ModelConfig:
        """The model with this task's head. Raises UserError for a family that cannot do the task."""
        ...

    def segments(self, examples: Sequence[Any]) -> list[Segment]:
        """What is packed into rows."""
        ...

    def predict(self, model: Model, examples: Sequence[Any], how: Generation, tokens: int) -> list[Any]:
        """A prediction for each example, on every rank; `tokens` positions at a time."""
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

    def baseline(self) -> tuple[str, list[Any]]:
        """The name of a system that knows nothing of language, and its predictions for `dev`."""
        ...

    def record(self, example: Any, prediction: Any) -> dict[str, Any]:
        """A line of predictions.jsonl."""
        ...


class TextToText:
    """Source in, target out: an encoder-decoder reads the source; a decoder continues the prompt, and only
    the target is its loss.
    """

    decoder_prompt = "{source}\n"

    def __init__(
        self, tokenizer: Tokenizer, family: Family, row_length: int, prompt: str | None, truncate: bool
    ) -> None:
        self.tokenizer, self.family, self.row_length, self.truncate = tokenizer, family, row_length, truncate
        self.prompt = prompt or (self.decoder_prompt if family == "decoder" else "{source}")

    def with_head(self, config: ModelConfig) -> ModelConfig:
        if config.family == "encoder":
            raise UserError(
                "this task writes text, and an encoder cannot: give a decoder or an encoder-decoder as"
                " model.from."
            )
        return config.model_copy(update={"labels": (), "crf": False, "spans": False})

    def segments(self, examples: Sequence[Pair]) -> list[Segment]:
        marks = self.tokenizer
        targets = self.tokenizer.encode_batch([pair.targets[0] for pair in examples])
        made: list[Segment] = []
        for pair, prompt, target in zip(examples, self.prompts(examples), targets, strict=True):
            if self.family == "decoder":
                whole = np.array([*prompt, *target, marks.eos], np.int64)
                wanted = whole[1:].copy()
                wanted[: len(prompt) - 1] = IGNORE
                segment = Segment(whole[:-1], wanted)
            else:
                wanted = np.array(marks.decoder_target(target.tolist()), np.int64)
                segment = Segment(
                    np.array([marks.start, *wanted[:-1]], np.int64), wanted, source=np.array(prompt, np.int64)
                )
            made.append(self._fitted(segment, pair, len(prompt)))
        return made

    def prompts(self, examples: Sequence[Pair]) -> list[list[int]]:
        """What the model reads before it writes."""
        ids = self.tokenizer.encode_batch([self.prompt.replace("{source}", pair.source) for pair in examples])
        before, after = self.tokenizer.special_prefix_suffix(self.family)
        longest = self.row_length - len(before) - len(after)
        return [[*before, *map(int, i[:longest] if self.truncate else i), *after] for i in ids]

    def predict(self, model: Model, examples: Sequence[Pair], how: Generation, tokens: int) -> list[str]:
        marks = self.tokenizer
        prompts = self.prompts(examples)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

        def work(batch: list[int]) -> list[list[int]]:
            return model.generate(
                [prompts[i] for i in batch], how, bos=marks.start, eos=marks.eos, pad=marks.pad
            )

        written: dict[int, list[int]] = {}
        for batch, rows in run_batches(model, batched(order, [len(prompts[i]) for i in order], tokens), work):
            written |= zip(batch, rows, strict=True)
        return [marks.text(written[i]).strip() for i in range(len(prompts))]

    def record(self, example: Pair, prediction: str) -> dict[str, Any]:
        return {
            "where": example.where,
            "source": example.source,
            "prediction": prediction,
            "references": list(example.targets),
        }

    def _fitted(self, segment: Segment, pair: Pair, prompt: int) -> Segment:
        """A segment that a row can hold; what is cut off is cut off at the end."""
        size = (
            len(segment.tokens) if segment.source is None else max(len(segment.source), len(segment.tokens))
        )
        if size <= self.row_length:
            return segment
        if not self.truncate or (segment.source is None and prompt > self.row_length):
            raise UserError(
                f"{pair.where}: source and target need {size} tokens, and row_length is {self.row_length}:"
                " raise it, set task.truncate, or"
                " remove the example."
            )
        return Segment(segment.tokens[: self.row_length], segment.targets[: self.row_length], segment.source)


def run_batches(
    model: Model, batches: Sequence[list[T]], work: Callable[[list[T]], R]
) -> list[tuple[list[T], R]]:
    """`work` done on every batch, dealt out round by round; all ranks make as many calls and get all results,
    in the batches' order.
    """
    rounds = -(-len(batches) // model.world)
    mine = [work(batches[min(i * model.world + model.rank, len(batches) - 1)]) for i in range(rounds)]
    everyone = model.gather(mine)
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
    at_once = max(1, tokens // row_length)
    batches = [list(range(i, min(i + at_once, rows.num_rows))) for i in range(0, rows.num_rows, at_once)]

    def work(batch: list[int]) -> list[tuple[int, np.ndarray]]:
        packed = rows.rows(batch)
        logits = model.logits(stack(packed)).float().cpu().numpy()
        return [
            (member, logits[at][row.segments == number])
            for at, (i, row) in enumerate(zip(batch, packed, strict=True))
            for number, member in enumerate(rows.members(i), 1)
        ]

    found = {member: logits for _, parts in run_batches(model, batches, work) for member, logits in parts}
    return [found[i] for i in range(len(segments))]


def align_to_tokens(
    tokenizer: Tokenizer, family: Family, text: str, begins: Sequence[int]
) -> tuple[np.ndarray, list[int]]:
    """A text's tokens with their marks, and for each of these characters the place of the piece that it
    stands in.
    """
    ids, spans = tokenizer.offsets(text)
    ends = np.array([end for _, end in spans], np.int64)
    before, after = tokenizer.special_prefix_suffix(family)
    tokens = np.array([*before, *ids, *after], np.int64)
    places = np.minimum(
        np.searchsorted(ends, np.array(begins, np.int64), side="right"), max(len(ids) - 1, 0)
    ) + len(before)
    return tokens, np.minimum(places, len(tokens) - 1).tolist()  # of a text without a piece: its mark
