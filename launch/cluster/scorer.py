"""Scores of a committed checkpoint: losses on the recipe's held-out texts, and scores of its tasks.

A text is scored as training scores its own held-out rows. For a task, the weights that would be published are
fine-tuned by the code of `trifold finetune` in a temporary folder; the comparison with the Hugging Face class
is left to `publish`. One process, no Ray, and nothing is written into the run folder. Cost: the checkpoint is
read once, then each text once, plus each task's own steps.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import trifold.finetune.run
from trifold.launch.recipe.reader import resolve
from trifold.launch.recipe.schema import AnyRecipe, FinetuneRecipe, PretrainRecipe
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import express
from trifold.modeling.transformer import Transformer
from trifold.pretrain.checkpoint.checkpoint import Checkpoint, open_checkpoint, verify
from trifold.pretrain.checkpoint.format import COMMIT, CorruptCheckpoint
from trifold.pretrain.checkpoint.lease import newest_generation, valid_folders
from trifold.pretrain.data import prepare as preparation
from trifold.pretrain.data.corpus import corpus_fingerprint
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.data.shards import Shards
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.evaluate import evaluate
from trifold.pretrain.initial_model import load_initial_model
from trifold.pretrain.monitor.metrics import Recorder
from trifold.pretrain.monitor.run_folder import log_event, queue_scores, queued_scores, scored_checkpoints
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.publish import read_checkpoint_model
from trifold.pretrain.run import shards_folder
from trifold.pretrain.storage.json_files import read_json_object
from trifold.pretrain.storage.storage import checkpoint_root

Tasks = dict[str, FinetuneRecipe]  # by name, to be fine-tuned from a checkpoint


def resolve_tasks(config: PretrainRecipe) -> Tasks:
    """The tasks that `scoring` names. Raises UserError where a recipe cannot be read or a text is missing."""
    for name, sources in config.scoring.held_out.items():
        with _error_context(f"scoring.held_out.{name}"):
            for source in sources:
                corpus_fingerprint(source)
    tasks: Tasks = {}
    for name, path in config.scoring.tasks.items():
        with _error_context(f"scoring.tasks.{name}"):
            task = resolve(path, (), FinetuneRecipe)
        model = task.model.model_copy(update={"folder": config.run, "random": False, "config": None})
        here = task.checkpoints.model_copy(update={"storage": None})
        tasks[name] = task.model_copy(update={"model": model, "checkpoints": here})
    return tasks


def prepare(config: PretrainRecipe, tasks: Tasks, workers: int, progress: Callable[[str, int], None]) -> None:
    """Tokenize the texts and read the examples of all tasks. Raises UserError where the model or its
    tokenizer cannot do a task.
    """
    vocabulary = Tokenizer.open(Path(config.run) / "tokenizer")
    for name, sources in config.scoring.held_out.items():
        with _error_context(f"scoring.held_out.{name}"):
            progress(f"tokenizing {name}", 0)
            for source, folder in zip(sources, _folders(config, name), strict=True):
                preparation.prepare(source, vocabulary, folder, spread=preparation.over_processes(workers))
            _rows(config, name, workers)
    if not tasks:
        return
    model, _ = load_initial_model(config.model, Path(config.run))
    with _error_context("scoring.tasks"):
        express(model, published_folder.special_ids(vocabulary))
    for name, task in tasks.items():
        with _error_context(f"scoring.tasks.{name}"):
            progress(f"reading examples of {name}", 0)
            trifold.finetune.run.check_examples(task, vocabulary, model)


class Scorer:
    """Scores checkpoints of a prepared run, one after another."""

    def __init__(self, config: PretrainRecipe, tasks: Tasks, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config, self.tasks, self.run = config, tasks, Path(config.run)
        self.rank_info = RankInfo.single("cuda" if config.scoring.gpus else "cpu", threads)

    def score(self, name: str) -> dict[str, Any]:
        """A line for the metrics: step, checkpoint, and each score as NAME/SCORE. Raises UserError where the
        checkpoint is damaged or deleted.
        """
        start = time.monotonic()
        checkpoint, model_config, state = self._read(name)
        scores: dict[str, Any] = {}
        model = SingleProcessModel(model_config, state, self.rank_info.device)
        for text in self.config.scoring.held_out:
            rows = _rows(self.config, text)
            metrics = evaluate(model, rows, num_rows=rows.num_rows, micro_rows=self.config.micro_rows)
            scores |= {f"{text}/{score}": value for score, value in metrics.items()}
        for task in self.tasks:
            metrics = self._finetune_and_score(
                self.tasks[task], model_config, state, checkpoint.state.fingerprint
            )
            scores |= {f"{task}/{score}": value for score, value in metrics.items()}
        return {
            "step": checkpoint.state.step,
            "checkpoint": name,
            **scores,
            "scoring_seconds": time.monotonic() - start,
        }

    def _read(self, name: str) -> tuple[Checkpoint, ModelConfig, dict[str, Tensor]]:
        """Verify a checkpoint and read its model into memory; afterwards it may be deleted."""
        folder = checkpoint_root(self.run, self.config.checkpoints.storage) / "checkpoints" / name
        try:
            verify(folder)
            checkpoint = open_checkpoint(folder)
            return checkpoint, *read_checkpoint_model(checkpoint)
        except (CorruptCheckpoint, FileNotFoundError) as error:
            deleted = not (folder / COMMIT).exists()
            raise UserError(
                "it was deleted before it was read (checkpoints.keep_last)" if deleted else str(error)
            ) from error

    def _finetune_and_score(
        self, task: FinetuneRecipe, model_config: ModelConfig, state: dict[str, Tensor], fingerprint: str
    ) -> dict[str, float]:
        """The dev scores of a task's best step; the score that selected it comes first."""
        with tempfile.TemporaryDirectory(prefix="trifold-") as temporary:
            folder, vocabulary = Path(temporary) / "model", Tokenizer.open(self.run / "tokenizer")
            folder.mkdir()
            published_folder.write_folder(folder, model_config, state, vocabulary)
            published_folder.write_record(folder, model_config, vocabulary, fingerprint, {})
            model = task.model.model_copy(update={"folder": str(folder)})
            config = task.model_copy(update={"run": f"{temporary}/run", "model": model})
            trifold.finetune.run.prepare(config, lambda what, done: None)
            trifold.finetune.run.train(config, self.rank_info)
            result = read_json_object(Path(temporary) / "run" / "scores.json")
        return {result["best"]: result["scores"][result["best"]], **result["scores"]}


def score_here(config: PretrainRecipe, tasks: Tasks) -> None:
    """Score the last checkpoint in this process. An error is recorded and ends nothing."""
    run = Path(config.run)
    name = valid_folders(checkpoint_root(run, config.checkpoints.storage))[-1].name
    if name not in scored_checkpoints(run):
        try:
            queue_scores(run, Scorer(config, tasks, config.cluster.threads(1)).score(name))
        except Exception as error:  # whatever a task raises: the run is trained
            log_event(run, "scoring_failed", checkpoint=name, reason=why(error))


def why(error: BaseException) -> str:
    """An error in one line."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]


def flush_scores(config: AnyRecipe) -> None:
    """Move the scores that arrived after the last step into the metrics. The ranks have ended, so this
    process writes for them.
    """
    run = Path(config.run)
    if queued_scores(run):
        generation = newest_generation(checkpoint_root(run, config.checkpoints.storage))
        with closing(Recorder(run, RankInfo.single(), generation)) as recorder:
            recorder.take_queued_scores()


class SingleProcessModel:
    """A model that scores rows in one process, with the interface of the engine."""

    rank, world, counts = 0, 1, True

    def __init__(self, model_config: ModelConfig, state: dict[str, Tensor], device: str) -> None:
        self.device, self.model = device, Transformer(model_config)
        self.model.load_state_dict(state)
        self.model.to(device).eval()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = self.model(batch.to(self.device))
        return losses.nll, losses.correct

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values


def _folders(config: PretrainRecipe, name: str) -> list[Path]:
    """The token shards of a text's sources."""
    return [
        shards_folder(config) / f"scoring-{name}-{number}"
        for number in range(len(config.scoring.held_out[name]))
    ]


def _rows(config: PretrainRecipe, name: str, processes: int = 1) -> Rows:
    """A text's rows under the recipe's objective: all of its documents, as with `data.heldout`."""
    vocabulary = Tokenizer.open(Path(config.run) / "tokenizer")
    shards = [Shards(folder / "train") for folder in _folders(config, name)]
    for corpus in shards:
        corpus.check_made_with(vocabulary.fingerprint, None)
    return Rows.heldout(config, vocabulary, shards, shards_folder(config), processes)


@contextmanager
def _error_context(key: str) -> Iterator[None]:
    """Prefix a UserError with the key it is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
