"""How well a model does a task: in, a model that answers and a task; out, scores, their intervals, and what a
trivial system scores.

Inside training the model is the engine, all ranks side by side; `Opened` is a published folder in one
process.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trifold.finetune.tasks.scores import bootstrap_intervals
from trifold.finetune.tasks.task import Task
from trifold.modeling.batch import Batch
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.transformer import Transformer
from trifold.pretrain.publish import published_folder


class LoadedModel:
    """A published folder, answering alone on the CPU. Raises UserError where it is not whole."""

    rank, world = 0, 1

    def __init__(self, folder: Path) -> None:
        self.config, state = published_folder.load_model(folder)
        self.tokenizer = published_folder.open_tokenizer(folder)
        self.task: dict[str, Any] = (
            published_folder.read_record(folder).get("task") or {}
        )  # its kind, and the prompt it was taught with
        self.model = Transformer(self.config).eval()
        self.model.load_state_dict(state)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        return self.model.logits(batch)

    def generate(
        self, prompts: list[list[int]], how: Generation, *, bos: int, eos: int, pad: int
    ) -> list[list[int]]:
        return generate(self.model, prompts, how, bos=bos, eos=eos, pad=pad)

    def gather(self, mine: list[Any]) -> list[list[Any]]:
        return [mine]


def evenly_spaced(examples: Sequence[Any], number: int) -> list[Any]:
    """`number` of the examples, evenly spread; the same ones each time."""
    return [examples[i] for i in np.linspace(0, len(examples) - 1, min(number, len(examples))).astype(int)]


def score_predictions(task: Task, predictions: Sequence[Any], examples: Sequence[Any]) -> dict[str, float]:
    return task.scores(task.statistics(predictions, examples).sum(axis=0))


def report(task: Task, predictions: Sequence[Any]) -> dict[str, Any]:
    """Scores of predictions for all of `dev`, with intervals, beside the trivial system's."""
    statistics = task.statistics(predictions, task.dev)
    name, guesses = task.baseline()
    return {
        "examples": len(task.dev),
        "scores": task.scores(statistics.sum(axis=0)),
        "intervals": bootstrap_intervals(statistics, task.scores),
        "signatures": task.signatures(),
        "trivial": {"system": name, "scores": score_predictions(task, guesses, task.dev)},
    }
