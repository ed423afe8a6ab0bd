"""Scores a model while it learns a task: some dev examples at each evaluation, which step was best, when to
stop early, and at the end all of dev and test.

The engine during training comes in, on all ranks side by side. Scores and predictions.jsonl go out, and of
the best checkpoint scores.json. Test examples are scored once, after dev has chosen the checkpoint.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from trifold.finetune.config import FinetuneConfig
from trifold.finetune.evaluation.evaluate import evenly_spaced, report, score_predictions
from trifold.finetune.rows import TaskRows
from trifold.finetune.tasks.task import Task
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import intact_markers, open_checkpoint
from trifold.pretrain.distributed import broadcast_from_rank0
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.evaluate import evaluate
from trifold.pretrain.monitor.metrics import Recorder
from trifold.pretrain.publish.publish import verified_folder_of_step
from trifold.pretrain.storage.json_files import write_json
from trifold.pretrain.storage.storage import checkpoint_root
from trifold.pretrain.storage.storage_path import StoragePath


class DevEvaluator:
    """Scores a run's model on its task. `history` holds (step, score) of the evaluations so far; a run that
    resumes restores it.
    """

    def __init__(self, config: FinetuneConfig, engine: Engine, task: Task, heldout: TaskRows) -> None:
        self.config, self.engine, self.task, self.heldout = config, engine, task, heldout
        self.history: list[tuple[int, float]] = []
        self.run, self.best = Path(config.run), config.best or task.best
        self.chosen = evenly_spaced(task.dev, config.evaluate_examples)

    def score(self, step: int) -> dict[str, Any]:
        """Scores of the chosen dev examples. Raises UserError where `best` is none of them."""
        num_rows = -(-self.heldout.num_rows * len(self.chosen) // len(self.task.dev))
        losses, predictions = self._predict(self.chosen, num_rows)
        self.task.calibrate(predictions, self.chosen)
        scores = score_predictions(self.task, predictions, self.chosen)
        if self.best not in scores:  # of a loss the highest would be the worst
            raise UserError(f"`best` is {self.best!r}; the scores of this task are {', '.join(scores)}.")
        self.history.append((step, scores[self.best]))
        self._write("predictions.jsonl", self.chosen, predictions)
        threshold = self.task.settings().get("threshold")
        return losses | scores | ({} if threshold is None else {"threshold": threshold})

    def should_stop_early(self) -> bool:
        """Whether the score has not become better for `patience` evaluations in a row."""
        values = [value for _, value in self.history]
        if not values or not self.config.patience:
            return False
        return len(values) - 1 - values.index(max(values)) >= self.config.patience

    def finish(self, recorder: Recorder) -> None:
        """Score the best checkpoint on all of dev, and then on test."""
        root = checkpoint_root(self.run, self.config.checkpoints.storage)
        step = broadcast_from_rank0(partial(best_step, root))
        assert step is not None, "the last step is scored before this"
        checkpoint = open_checkpoint(broadcast_from_rank0(lambda: verified_folder_of_step(root, step)))
        self.engine.load(checkpoint.read, checkpoint.state.optimizer_step)

        losses, predictions = self._predict(self.task.dev, self.heldout.num_rows)
        # Dev chooses the threshold that is published with these weights; test has no part in it
        self.task.restore(checkpoint.state.scores)
        self._write("predictions.jsonl", self.task.dev, predictions)
        result = {"task": self.config.task.kind, "best": self.best, "step": step, **losses}
        result |= report(self.task, predictions, self.task.dev)
        if self.task.test:
            _, predictions = self._predict(self.task.test, 0)
            self._write("predictions-test.jsonl", self.task.test, predictions)
            result["test"] = report(self.task, predictions, self.task.test)
        if not any(score for _, score in self.history):
            note = f"every dev score ({self.best}) was 0: step {step} has the lowest held-out loss."
            self.task.notes.append(note)
            recorder.event("note", text=note)
        if self.engine.rank_info.rank == 0:
            write_json(self.run / "scores.json", result | {"notes": self.task.notes})
            recorder.event("scored", step=step, **result["scores"])

    def _predict(self, examples: Sequence[Any], num_rows: int) -> tuple[dict[str, Any], list[Any]]:
        """The losses of the first held-out rows, and predictions for examples, by the weights that would be
        published.
        """
        config, engine = self.config, self.engine
        weights: AbstractContextManager[None] = engine.use_ema_weights() if config.ema else nullcontext()
        with weights:
            losses = {}
            if num_rows:
                losses = evaluate(engine, self.heldout, num_rows=num_rows, micro_rows=config.micro_rows)
            tokens = config.micro_rows * config.row_length
            return losses, self.task.predict(engine, examples, config.generation, tokens)

    def _write(self, name: str, examples: Sequence[Any], predictions: Sequence[Any]) -> None:
        if self.engine.rank_info.rank == 0:
            write_predictions(self.run / name, self.task, examples, predictions)


def write_predictions(path: Path, task: Task, examples: Sequence[Any], predictions: Sequence[Any]) -> None:
    """A JSON line for each example, in a file that is complete or not there."""
    lines = []
    for example, prediction in zip(examples, predictions, strict=True):
        line = json.dumps(task.record(example, prediction), ensure_ascii=False, allow_nan=False)
        lines.append(line + "\n")
    new = path.with_name(f"{path.name}.fresh")
    new.write_text("".join(lines), encoding="utf-8")
    new.replace(path)


def best_step(root: StoragePath) -> int | None:
    """The step of the committed checkpoint with the highest score; of equals the one with the lowest held-out
    loss, then the earliest. None where none was scored.
    """
    ranked = []
    for state in (marker.state for marker in intact_markers(root)):
        if state.selection_loss is not None:
            loss = inf if state.heldout_loss is None else state.heldout_loss
            ranked.append((state.selection_loss, loss, state.step))
    return min(ranked)[2] if ranked else None
