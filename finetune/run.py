"""A fine-tuning run: a published folder, the task's head, the training loop, and the scores of the best
checkpoint.

`prepare` checks model and examples on the driver; `train`, on every rank, continues from the newest
checkpoint that verifies. The run folder gets predictions.jsonl and scores.json (the best checkpoint on all
of dev, beside a trivial system); which checkpoint is best is read from the checkpoints. What is common with
pretraining is in pretrain/session.py.
"""

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from trifold.finetune.config import FinetuneConfig, NerConfig, SummarizationConfig, TranslationConfig
from trifold.finetune.evaluation.model_selection import DevEvaluator
from trifold.finetune.rows import TaskRows, row_capacity
from trifold.finetune.tasks import open_tasks
from trifold.finetune.tasks.ner import read_sentences
from trifold.finetune.tasks.qa import read_all
from trifold.finetune.tasks.task import Task
from trifold.finetune.tasks.translation import read_split
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface.generation import check_expressible
from trifold.modeling.lora import add_lora
from trifold.modeling.transformer import Transformer
from trifold.pretrain.checkpoint.state import CheckpointState, TaskState
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.stages import ResolvedStage
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import start_engine
from trifold.pretrain.initial_model import (
    TokenizerSource,
    build_initialised,
    carry_initial_folder,
    ensure_tokenizer,
    load_initial_model,
)
from trifold.pretrain.progress import Progress
from trifold.pretrain.session import Run
from trifold.pretrain.train import train as train_loop


def prepare(config: FinetuneConfig, progress: Callable[[str, int], None]) -> None:
    """Put the tokenizer into the run folder, and check the model and every example. Raises UserError naming
    file and line.
    """
    progress("reading examples", 0)
    tokenizer = make_tokenizer(config, progress)
    model, _ = load_initial_model(config.model, Path(config.run))
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"{config.run}/tokenizer has {tokenizer.vocab_size} pieces, and model.config.vocab_size is"
            f" {model.vocab_size}: raise it."
        )
    check_examples(config, tokenizer, model)


def check_examples(config: FinetuneConfig, tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises UserError, naming file and line, where this model cannot learn the task from these examples."""
    if config.row_length > model.max_positions:
        raise UserError(
            f"row_length ({config.row_length}) exceeds the longest text that"
            f" {config.model.folder or 'model.config'} can read ({model.max_positions} tokens)."
        )
    check_expressible(config.generation, model.family)
    tasks = open_tasks(config, tokenizer, model.family)
    rows, _ = open_rows(config, tasks, tokenizer)
    config.engine.check_model(tasks[0].with_head(model))
    config.engine.check_sharable("row_length", config.row_length)
    config.engine.check_sharable("the target side of a row", rows.capacity.tokens)


def train(config: FinetuneConfig, rank_info: RankInfo) -> None:
    """Train one rank of a run, from where the run is to its scores. Every rank calls it with the same
    config.
    """
    train_loop(FinetuningRun(config, rank_info))


class FinetuningRun(Run):
    """One rank of a fine-tuning run."""

    row_inputs = "files, tokenizer, prompt, row length or weights"

    def __init__(self, config: FinetuneConfig, rank_info: RankInfo) -> None:
        tokenizer = Tokenizer.open(Path(config.run) / "tokenizer")
        initial, weights = load_initial_model(config.model, Path(config.run))
        tasks = open_tasks(config, tokenizer, initial.family)
        self.task = tasks[0]
        rows, heldout = open_rows(config, tasks, tokenizer)
        model = self.task.with_head(initial)
        engine = start_engine(
            lambda: _build_trainable(model, weights, config),
            model,
            config,
            [stack([rows.empty_row()] * config.micro_rows)],
            rank_info,
        )
        stage = ResolvedStage(config.row_length, config.step_rows, config.micro_rows)
        super().__init__(config, config.model, model, engine, [rows], [stage], config.prefetch)
        self.dev = DevEvaluator(config, engine, self.task, heldout)
        self.lora_scale = config.lora.scale if config.lora is not None else None
        self.recorder.event(
            "data",
            start=f"new weights (seed {config.seed})"
            if weights is None
            else f"the weights of {config.model.folder}",
            rows_per_epoch=rows.num_rows,
            waste=rows.padding_fraction,
            fingerprint=rows.fingerprint,
            heldout_fingerprint=heldout.fingerprint,
        )
        for note in self.task.notes:
            self.recorder.event("note", text=note)

    def evaluate(self, progress: Progress, complete: bool) -> dict[str, Any]:
        """Scores of some dev examples; those of all are computed by `finish`, of the best checkpoint."""
        return self.dev.score(progress.step)

    def should_stop_early(self) -> bool:
        return self.dev.should_stop_early()

    def finish(self, progress: Progress) -> None:
        """Score the best checkpoint on all of dev, unless the run is to be continued."""
        if progress.step == self.config.steps or self.should_stop_early():
            self.dev.finish(self.recorder)

    def selection_loss(self, scores: dict[str, Any]) -> float | None:
        return -scores[self.dev.best] if self.dev.best in scores else None

    def extra_state(self) -> dict[str, Any]:
        """The scores so far, and what publishing needs of the task."""
        settings = self.task.settings()
        task = TaskState(
            kind=self.dev.config.task.kind,
            prompt=settings.get("prompt"),
            picks=settings.get("picks"),
            best=self.dev.best,
            history=list(self.dev.history),
        )
        return {"lora_scale": self.lora_scale, "task": task}

    def restore_extra_state(self, state: CheckpointState) -> None:
        assert state.task is not None, "a fine-tuning run resumes its own checkpoints"
        self.dev.history = list(state.task.history)


def make_tokenizer(config: FinetuneConfig, progress: Callable[[str, int], None]) -> Tokenizer:
    """The run's tokenizer: the published folder's, the recipe's, or one trained on the training texts."""
    model = config.model.config
    source = TokenizerSource(
        path=config.model.folder or config.tokenizer.path,
        family="encoder-decoder",
        texts=lambda: _texts(config),
        made_of=lambda: [config.model.model_dump(mode="json"), *_texts(config)],
        vocab_size=model.vocab_size if model is not None else 0,
    )
    carry_initial_folder(config.model, Path(config.run))
    return ensure_tokenizer(config, config.tokenizer, source, progress)


def open_rows(
    config: FinetuneConfig, tasks: Sequence[Task], tokenizer: Tokenizer
) -> tuple[TaskRows, TaskRows]:
    """The rows to train on, of all tasks by weight, and those of the first task's dev examples."""
    train = [task.segments(task.train) for task in tasks]
    dev = [tasks[0].segments(tasks[0].dev)]
    capacity = row_capacity([*train, *dev], config.row_length)
    weights = [getattr(task, "weight", 1.0) for task in (config.task, *config.more)]
    return (
        TaskRows(train, capacity, tokenizer.pad, weights, config.seed),
        TaskRows(dev, capacity, tokenizer.pad, [1.0], None),
    )


def _build_trainable(
    model: ModelConfig, state: dict[str, Tensor] | None, config: FinetuneConfig
) -> Transformer:
    """The model as training begins: with adapters, and with the parameters frozen that the recipe freezes."""
    transformer = build_initialised(model, state, config.seed)
    if config.lora is not None:
        add_lora(transformer, config.lora, config.seed)
    parameters = dict(transformer.named_parameters())
    for pattern in config.freeze:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(
                f"freeze: no parameter has a name like {pattern!r}; there are"
                f" {', '.join(list(parameters)[:5])}, ..."
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"freeze: {', '.join(config.freeze)} leave nothing to train.")
    return transformer


def _texts(config: FinetuneConfig) -> Iterator[str]:
    """The texts that a tokenizer is trained on: those of all training examples, of both sides."""
    for task in (config.task, *config.more):
        if isinstance(task, TranslationConfig | SummarizationConfig):
            for pair in read_split(task, "train", []):
                yield from (pair.source, *pair.targets)
        elif isinstance(task, NerConfig):
            yield from (sentence.text for sentence in read_sentences(task, task.train))
        else:
            questions = read_all(task.train)
            yield from (question.question for question in questions)
            yield from dict.fromkeys(question.context for question in questions)
