"""How well a model does a task: a model and a task come in; scores, their intervals, and those of a baseline
go out.

During training the model is the engine, on all ranks side by side; `LoadedModel` is a published folder in one
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
    """A published folder that predicts alone on the CPU. Raises UserError where it is not complete."""

    rank, world = 0, 1

    def __init__(self, folder: Path) -> None:
        self.config, state = published_folder.load_model(folder)
        self.tokenizer = published_folder.open_tokenizer(folder)
        # The task's kind, prompt, number of sentences and threshold
        self.task: dict[str, Any] = published_folder.read_record(folder).get("task") or {}
        self.model = Transformer(self.config).eval()
        self.model.load_state_dict(state)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        return self.model.logits(batch)

    def generate(
        self, prompts: list[list[int]], generation: Generation, *, bos: int, eos: int, pad: int
    ) -> list[list[int]]:
        return generate(self.model, prompts, generation, bos=bos, eos=eos, pad=pad)

    def gather(self, values: list[Any]) -> list[list[Any]]:
        return [values]


def evenly_spaced(examples: Sequence[Any], number: int) -> list[Any]:
    """`number` of the examples, evenly spread; the same ones each time."""
    return [examples[i] for i in np.linspace(0, len(examples) - 1, min(number, len(examples))).astype(int)]


def score_predictions(task: Task, predictions: Sequence[Any], examples: Sequence[Any]) -> dict[str, float]:
    """The scores of predictions for these examples."""
    return task.scores(task.statistics(predictions, examples).sum(axis=0))


def report(task: Task, predictions: Sequence[Any], examples: Sequence[Any]) -> dict[str, Any]:
    """Scores of predictions for all of `dev` or `test`, with intervals, beside the baseline's."""
    statistics = task.statistics(predictions, examples)
    name, guesses = task.baseline(examples)
    return {
        "examples": len(examples),
        "scores": task.scores(statistics.sum(axis=0)),
        "intervals": bootstrap_intervals(statistics, task.scores),
        "signatures": task.signatures(),
        "trivial": {"system": name, "scores": score_predictions(task, guesses, examples)},
    }
