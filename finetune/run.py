"""A fine-tuning run: a published folder -> the task's head -> pretraining's loop -> scores of the best
checkpoint.

In: a Finetune recipe and rank facts. Out: the run folder, with predictions.jsonl and scores.json (the best
checkpoint on all of dev, beside a trivial system). `train` continues by itself from the newest checkpoint
that verifies; which one was best is read from the checkpoints.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trifold.finetune import config as dials
from trifold.finetune.config import FinetuneConfig
from trifold.finetune.evaluation.model_selection import DevEvaluator
from trifold.finetune.examples.conll import read_tagged_sentences
from trifold.finetune.examples.pairs import read_pairs
from trifold.finetune.examples.squad import read_questions
from trifold.finetune.rows import TaskRows, row_capacity
from trifold.finetune.tasks import open_tasks
from trifold.finetune.tasks.task import Task
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import train_flops_per_row
from trifold.modeling.huggingface.generation import check_expressible
from trifold.modeling.lora import add_lora
from trifold.modeling.transformer import Transformer
from trifold.pretrain.checkpoint.checkpoint import CheckpointState, open_checkpoint
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.loader import Loader
from trifold.pretrain.data.stages import ResolvedStage
from trifold.pretrain.data.tokenizer import tokenizer
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine import memory_estimate
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.initial_model import (
    build_initialised,
    check_same_start,
    ensure_tokenizer,
    fingerprint,
    load_initial_model,
)
from trifold.pretrain.monitor.metrics import Recorder
from trifold.pretrain.session import (
    broadcast_from_rank0,
    newest_checkpoint,
    peak_flops_all_ranks,
    start_attempt,
)
from trifold.pretrain.storage.storage_path import StoragePath
from trifold.pretrain.train import Progress, RunHooks
from trifold.pretrain.train import train as train_loop


def prepare(config: FinetuneConfig, progress: Callable[[str, int], None]) -> None:
    """Put the tokenizer into the run folder, and check the model and every example. Raises UserError naming
    file and line.
    """
    progress("reading examples", 0)
    vocabulary = make_tokenizer(config, progress)
    model, _ = load_initial_model(config.model, Path(config.run))
    if vocabulary.vocab_size > model.vocab_size:
        raise UserError(
            f"{config.run}/tokenizer has {vocabulary.vocab_size} pieces, and model.config.vocab_size is"
            f" {model.vocab_size}: raise it."
        )
    check_examples(config, vocabulary, model)


def check_examples(config: FinetuneConfig, vocabulary: Tokenizer, model: ModelConfig) -> None:
    """Raises UserError, naming file and line, where such a model cannot learn the task from these examples."""
    if config.row_length > model.max_positions:
        longest = f"the longest text that {config.model.folder or 'model.config'} knows ({model.max_positions} tokens)"
        raise UserError(f"row_length ({config.row_length}) exceeds {longest}.")
    check_expressible(config.generation, model.family)
    tasks = open_tasks(config, vocabulary, model.family)
    rows, _ = open_rows(config, tasks, vocabulary)
    config.engine.check_model(tasks[0].with_head(model))
    for side, length in (
        ("row_length", config.row_length),
        ("the target side of a row", rows.capacity.tokens),
    ):
        config.engine.check_sharable(side, length)


def train(config: FinetuneConfig, place: RankInfo) -> None:
    """One rank of a run, from wherever the run stands to its scores. Every rank calls it with the same
    recipe.
    """
    run = Path(config.run)
    vocabulary = Tokenizer.open(run / "tokenizer")
    shape, state = load_initial_model(config.model, Path(config.run))
    tasks = open_tasks(config, vocabulary, shape.family)
    task, model = tasks[0], tasks[0].with_head(shape)
    rows, heldout = open_rows(config, tasks, vocabulary)
    answers = memory_estimate.resolve_auto(
        config, model, [stack([rows.empty_row()] * config.micro_rows)], place
    )
    engine = Engine(_build_trainable(model, state, config), answers, place)
    lease, recorder = start_attempt(config, engine)
    weights = (
        f"new weights (seed {config.seed})" if state is None else f"the weights of {config.model.folder}"
    )
    prints = {"fingerprint": rows.fingerprint, "heldout_fingerprint": heldout.fingerprint}
    recorder.event("data", start=weights, rows_per_epoch=rows.num_rows, waste=rows.padding_fraction, **prints)
    began = broadcast_from_rank0(engine, lambda: fingerprint(config.model))
    judge = DevEvaluator(config, engine, task, heldout)
    facts = {
        "model": model.model_dump(mode="json"),
        "lora_scale": config.lora.scale if config.lora is not None else None,
        "task": {
            "kind": config.task.kind,
            "prompt": getattr(task, "prompt", None),
            "picks": getattr(task, "number", None),
        },
        "start": began,
    }

    def restore() -> Progress | None:
        folder = broadcast_from_rank0(engine, lambda: newest_checkpoint(lease.run, recorder))
        return _resume(folder, engine, config, rows, began, recorder, judge) if folder else None

    def describe(progress: Progress, scores: dict[str, Any]) -> CheckpointState:
        return CheckpointState(
            step=progress.step,
            cursor=progress.step * config.step_rows,
            optimizer_step=engine.optimizer_step,
            skips=progress.skips,
            fingerprint=rows.fingerprint,
            config=config.model_dump(mode="json"),
            heldout_loss=scores.get("heldout_loss"),
            selection_loss=-scores[judge.best] if judge.best in scores else None,
            extra={**progress.kept, "scores": scores, "history": judge.history, "best": judge.best, **facts},
        )

    flops, full = (
        config.step_rows * train_flops_per_row(model, rows.capacity.tokens, rows.capacity.source),
        peak_flops_all_ranks(engine),
    )
    with closing(recorder):
        progress = restore() or Progress()
        if progress.step == 0:
            recorder.metrics(0, **judge.score(0))
        saves = Checkpointer(
            lease,
            place.rank,
            place.world,
            config.checkpoints,
            recorder.event,
            on_written=place.reporter.count_written,
        )
        work = RunHooks(
            partial(_loader, config, rows, engine),
            lambda complete: judge.score(progress.step),
            describe,
            restore,
            lambda step, seconds: flops / seconds / full,
            should_stop_early=judge.should_stop_early,
        )
        train_loop(config, engine, saves, recorder, progress, work)
        if progress.step == config.steps or judge.should_stop_early():
            judge.finish(recorder)


def make_tokenizer(config: FinetuneConfig, progress: Callable[[str, int], None]) -> Tokenizer:
    """The run's tokenizer: the published folder's, the recipe's, or one trained on the training texts."""
    path = config.model.folder or config.tokenizer.path

    def origin() -> list[Any]:
        if path is not None:
            return [Tokenizer.open(path).fingerprint]
        return [config.tokenizer.model_dump(), config.model.model_dump(mode="json"), *_texts(config)]

    def make(folder: Path) -> None:
        if path is not None:
            return Tokenizer.open(path).save(folder, "encoder-decoder")
        assert config.model.config is not None
        tokenizer.train(_texts(config), config.tokenizer, config.model.config.vocab_size, folder)

    return ensure_tokenizer(config, origin, make, progress)


def open_rows(
    config: FinetuneConfig, tasks: Sequence[Task], vocabulary: Tokenizer
) -> tuple[TaskRows, TaskRows]:
    """The rows to train on, of all tasks by weight, and those of the first task's dev examples."""
    sets = [task.segments(task.train) for task in tasks]
    dev = [tasks[0].segments(tasks[0].dev)]
    room = row_capacity([*sets, *dev], config.row_length)
    weights = [getattr(task, "weight", 1.0) for task in (config.task, *config.more)]
    return TaskRows(sets, room, vocabulary.pad, weights, config.seed), TaskRows(
        dev, room, vocabulary.pad, [1.0], None
    )


def _loader(config: FinetuneConfig, rows: TaskRows, engine: Engine, progress: Progress) -> Loader:
    return Loader(
        [rows],
        [ResolvedStage(config.row_length, config.step_rows, config.micro_rows)],
        start=progress.step,
        stop=config.steps,
        rank=engine.rank,
        world=engine.world,
        prefetch=config.prefetch,
        skips=progress.skips,
        pin=engine.place.device == "cuda",
        counts=engine.counts,
    )


def _build_trainable(
    model: ModelConfig, state: dict[str, Tensor] | None, config: FinetuneConfig
) -> Transformer:
    """The model as training begins: with adapters, and with what the recipe freezes."""
    made = build_initialised(model, state, config.seed)
    if config.lora is not None:
        add_lora(made, config.lora, config.seed)
    for pattern in config.freeze:
        frozen = [
            parameter.requires_grad_(False)
            for name, parameter in made.named_parameters()
            if fnmatchcase(name, pattern)
        ]
        if not frozen:
            raise UserError(
                f"freeze: no parameter is named like {pattern!r}; there are"
                f" {', '.join(list(made.state_dict())[:5])}, ..."
            )
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise UserError(f"freeze: {', '.join(config.freeze)} leave nothing to train.")
    return made


def _resume(
    folder: StoragePath,
    engine: Engine,
    config: FinetuneConfig,
    rows: TaskRows,
    began: str | None,
    recorder: Recorder,
    judge: DevEvaluator,
) -> Progress:
    checkpoint = open_checkpoint(folder)
    check_same_start(checkpoint, config.model, began)
    state = checkpoint.state
    if state.fingerprint != rows.fingerprint:
        raise UserError(
            f"{folder} was trained on examples of fingerprint {state.fingerprint}, and this recipe makes"
            f" rows of {rows.fingerprint}: files,"
            " tokenizer, prompt, row length or weights have changed. Give another `run` folder."
        )
    engine.load(checkpoint.read, state.optimizer_step)
    recorder.event("resumed", step=state.step, checkpoint=folder.name)
    judge.history = [(step, score) for step, score in state.extra["history"]]
    return Progress.of(state)


def _texts(config: FinetuneConfig) -> Iterator[str]:
    """What a tokenizer is trained on: all training texts, of both sides."""
    for task in (config.task, *config.more):
        if isinstance(task, dials.TranslationConfig | dials.SummarizationConfig):
            for pair in read_pairs(task.train, task.columns.source, task.columns.target):
                yield from (pair.source, *pair.targets)
        elif isinstance(task, dials.NerConfig):
            yield from (sentence.text for place in task.train for sentence in read_tagged_sentences(place))
        else:
            questions = [question for place in task.train for question in read_questions(place)]
            yield from (
                *(question.question for question in questions),
                *dict.fromkeys(question.context for question in questions),
            )
