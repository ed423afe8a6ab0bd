"""Judges a model while it learns a task: scores of some dev examples, which step was best, when it is enough,
and all of dev at the end.

In: the engine in the middle of training, all ranks side by side. Out: scores, predictions.jsonl, and of the
best checkpoint scores.json.
"""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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
    resumes sets it back.
    """

    def __init__(self, config: FinetuneConfig, engine: Engine, task: Task, heldout: TaskRows) -> None:
        self.config, self.engine, self.task, self.heldout = config, engine, task, heldout
        self.history: list[tuple[int, float]] = []
        self.run, self.best = Path(config.run), config.best or task.best
        self.chosen = evenly_spaced(task.dev, config.evaluate_examples)

    def score(self, step: int) -> dict[str, Any]:
        """Scores of the chosen dev examples. Raises UserError where the score to choose by is none of them."""
        share = -(-self.heldout.num_rows * len(self.chosen) // len(self.task.dev))
        losses, predictions = self._asked(self.chosen, share)
        scores = score_predictions(self.task, predictions, self.chosen)
        if self.best not in scores:  # of a loss the highest would be the worst
            raise UserError(f"`best` is {self.best!r}; the scores of this task are {', '.join(scores)}.")
        self.history.append((step, scores[self.best]))
        self._write(self.chosen, predictions)
        return losses | scores

    def should_stop_early(self) -> bool:
        """Whether the score has not become better for `patience` evaluations in a row."""
        values = [value for _, value in self.history]
        return (
            0 < self.config.patience <= len(values) - 1 - values.index(max(values, default=0.0))
            if values
            else False
        )

    def finish(self, recorder: Recorder) -> None:
        """Score the best checkpoint on all of dev."""
        home = checkpoint_root(self.run, self.config.checkpoints.storage)
        step = broadcast_from_rank0(partial(best_step, home))
        assert step is not None, "the last step is scored before this"
        checkpoint = open_checkpoint(broadcast_from_rank0(lambda: verified_folder_of_step(home, step)))
        self.engine.load(checkpoint.read, checkpoint.state.optimizer_step)
        losses, predictions = self._asked(self.task.dev, self.heldout.num_rows)
        self._write(self.task.dev, predictions)
        if self.engine.rank_info.rank == 0:
            found = {
                "task": self.config.task.kind,
                "best": self.best,
                "step": step,
                **losses,
                **report(self.task, predictions),
            }
            write_json(self.run / "scores.json", found)
            recorder.event("scored", step=step, **found["scores"])

    def _asked(self, examples: Sequence[Any], num_rows: int) -> tuple[dict[str, Any], list[Any]]:
        """The losses of the first held-out rows, and predictions for examples, by the weights that would be
        published.
        """
        config, engine = self.config, self.engine
        judged: AbstractContextManager[None] = engine.use_ema_weights() if config.ema else nullcontext()
        with judged:
            losses = evaluate(engine, self.heldout, num_rows=num_rows, micro_rows=config.micro_rows)
            return losses, self.task.predict(
                engine, examples, config.generation, config.micro_rows * config.row_length
            )

    def _write(self, examples: Sequence[Any], predictions: Sequence[Any]) -> None:
        if self.engine.rank_info.rank == 0:
            lines = (
                json.dumps(self.task.record(*pair), ensure_ascii=False) + "\n"
                for pair in zip(examples, predictions, strict=True)
            )
            fresh = self.run / "predictions.jsonl.fresh"
            fresh.write_text("".join(lines), encoding="utf-8")
            fresh.replace(self.run / "predictions.jsonl")


def best_step(home: StoragePath) -> int | None:
    """The step of the committed checkpoint with the highest score; of equals the earliest. None where none
    was scored.
    """
    states = [marker.state for marker in intact_markers(home)]
    scored = [(state.selection_loss, state.step) for state in states if state.selection_loss is not None]
    return min(scored)[1] if scored else None
