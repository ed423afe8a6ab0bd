"""A run from recipe to checkpoints: `prepare` once on the driver (tokenizer, token shards), then `train` on
every rank.

In: a Pretrain recipe and rank facts. Out: the run folder. `train` continues by itself from the newest
checkpoint that verifies.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.modeling.flops import train_flops_per_row
from trifold.pretrain.checkpoint.checkpoint import Checkpoint, CheckpointState, open_checkpoint
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.config.pretraining import InitialModelConfig, PretrainConfig, SourceConfig
from trifold.pretrain.data import prepare as preparation
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.corpus import corpus_fingerprint, documents, is_heldout
from trifold.pretrain.data.loader import Loader
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.data.shards import Shards
from trifold.pretrain.data.stages import locate_step, resolve_stages
from trifold.pretrain.data.tokenizer import tokenizer
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine import memory_estimate
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.evaluate import evaluate, unigram_loss
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
from trifold.pretrain.train import Progress, RunHooks
from trifold.pretrain.train import train as train_loop


def prepare(
    config: PretrainConfig,
    workers: int,
    progress: Callable[[str, int], None],
    spread: preparation.Spread | None = None,
) -> None:
    """Make what training reads and is not there yet: the tokenizer, the token shards, the tables of packed
    rows.

    `workers` processes of this machine tokenize and pack, unless `spread` tokenizes elsewhere.
    `progress(what, done)` hears how far it is. Raises UserError for a corpus or a tokenizer that cannot be
    used.
    """
    vocabulary = make_tokenizer(config, progress)
    for source, folder, heldout_fraction in _sources(config):
        preparation.prepare(
            source,
            vocabulary,
            folder,
            heldout_fraction=heldout_fraction,
            spread=spread or preparation.over_processes(workers),
            progress=lambda documents, _, folder=folder: progress(f"tokenizing {folder.name}", documents),  # type: ignore[misc]
        )
    progress("packing rows", 0)
    open_rows(config, processes=workers)


def make_tokenizer(config: PretrainConfig, progress: Callable[[str, int], None]) -> Tokenizer:
    """The run's tokenizer: a copy of the start's or the recipe's, else one trained on all sources.

    Raises UserError for a start that cannot be used, and a tokenizer with more pieces than the model has.
    """
    shape, _ = load_initial_model(config.model, Path(config.run))
    config.fits(shape)
    path = config.model.folder if isinstance(config.model, InitialModelConfig) else config.tokenizer.path
    sources, fraction = config.data.sources, config.data.heldout_fraction

    def origin() -> list[Any]:
        if path is not None:
            return [Tokenizer.open(path).fingerprint, shape.family]
        return [
            config.tokenizer.model_dump(),
            shape.family,
            shape.vocab_size,
            fraction,
            *map(corpus_fingerprint, sources),
        ]

    def make(folder: Path) -> None:
        if path is not None:
            return Tokenizer.open(path).save(folder, shape.family)
        texts = (text for source in sources for text in documents(source) if not is_heldout(text, fraction))
        tokenizer.train(texts, config.tokenizer, shape.vocab_size, folder)

    found = ensure_tokenizer(config, origin, make, progress)
    if found.vocab_size > shape.vocab_size:
        raise UserError(
            f"the tokenizer in {config.run} has {found.vocab_size} pieces, model.vocab_size is"
            f" {shape.vocab_size}: raise it"
        )
    return found


def train(config: PretrainConfig, place: RankInfo) -> None:
    """One rank of a run, from wherever the run stands to its last step. Every rank calls it with the same
    recipe.
    """
    run = Path(config.run)
    rows, heldout = open_rows(config)
    model, weights = load_initial_model(config.model, run)
    plan = resolve_stages(config)
    micros = (stack([r.empty_row()] * part.micro_rows) for part, r in zip(plan, rows, strict=True))
    answers = memory_estimate.resolve_auto(config, model, micros, place)
    engine = Engine(build_initialised(model, weights, config.seed), answers, place, len(heldout.member_names))
    lease, recorder = start_attempt(config, engine)
    start = broadcast_from_rank0(engine, lambda: fingerprint(config.model))
    facts = [
        {**part._asdict(), "rows_per_epoch": r.num_rows, "waste": r.padding_fraction}
        for part, r in zip(plan, rows, strict=True)
    ]
    prints = {"fingerprint": rows[-1].fingerprint, "heldout_fingerprint": heldout.fingerprint}
    recorder.event("data", **facts[-1], **prints, heldout_rows=heldout.num_rows, earlier_stages=facts[:-1])

    def restore() -> Progress | None:
        folder = broadcast_from_rank0(engine, lambda: newest_checkpoint(lease.run, recorder))
        return _resume(open_checkpoint(folder), engine, config, rows, start, recorder) if folder else None

    def describe(progress: Progress, scores: dict[str, Any]) -> CheckpointState:
        return CheckpointState(
            step=progress.step,
            cursor=locate_step(plan, progress.step).row,
            optimizer_step=engine.optimizer_step,
            skips=progress.skips,
            fingerprint=_rows_at(config, rows, progress.step).fingerprint,
            config=config.model_dump(mode="json"),
            heldout_loss=scores.get("heldout_loss"),
            extra={**progress.kept, "scores": scores, "model": model.model_dump(mode="json"), "start": start},
        )

    full = peak_flops_all_ranks(engine)

    def mfu(step: int, seconds: float) -> float:
        stage = locate_step(plan, step).stage
        capacity = rows[stage.stage].capacity
        flops_per_row = train_flops_per_row(model, capacity.tokens, capacity.source)
        return stage.step_rows * flops_per_row / seconds / full

    score = partial(_evaluate_heldout, config, engine, rows[-1], heldout, model.vocab_size)
    with closing(recorder):
        progress = restore() or Progress()
        if progress.step == 0:
            recorder.metrics(0, **score(False))
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
            score,
            describe,
            restore,
            mfu,
            parts=heldout.member_names,
        )
        train_loop(config, engine, saves, recorder, progress, work)


def open_rows(config: PretrainConfig, processes: int = 1) -> tuple[list[Rows], Rows]:
    """The rows of a prepared run: to train on, for each of its parts (stages.py), and held out."""
    vocabulary, cache = Tokenizer.open(Path(config.run) / "tokenizer"), shards_folder(config)
    made = [(Shards(folder / "train"), Shards(folder / "heldout")) for _, folder, _ in _sources(config)]
    training = [shards for shards, _ in made[: len(config.data.sources)]]
    heldout = [shards for _, shards in made if shards.num_documents] or [made[0][1]]
    if config.data.heldout:  # corpora of their own: all of their documents
        heldout = [shards for shards, _ in made[len(config.data.sources) :]]
    rows: list[Rows] = []
    for part in resolve_stages(config):
        after = (rows[-1], part.first_row) if rows else None
        same = bool(rows) and rows[-1].row_length == part.row_length  # the same rows in other steps
        rows.append(
            rows[-1]
            if same
            else Rows.for_training(config, vocabulary, training, cache, processes, part.row_length, after)
        )
    return rows, Rows.heldout(config, vocabulary, heldout, cache, processes)


def shards_folder(config: PretrainConfig) -> Path:
    """Where a run's token shards and tables of rows are."""
    return Path(config.data.cache or Path(config.run) / "shards")


def _sources(config: PretrainConfig) -> Iterator[tuple[SourceConfig, Path, float]]:
    """Every corpus, the folder of its shards, and the share of its documents that is held out."""
    for number, source in enumerate(config.data.sources):
        yield source, shards_folder(config) / f"source-{number}", config.data.heldout_fraction
    for number, source in enumerate(config.data.heldout):
        yield source, shards_folder(config) / f"heldout-{number}", 0.0


def _evaluate_heldout(
    config: PretrainConfig, engine: Engine, rows: Rows, heldout: Rows, vocab_size: int, complete: bool
) -> dict[str, Any]:
    """Held-out losses, by the averaged weights too where there are any; `complete`: of all rows, beside the
    simplest model's.
    """
    num_rows = heldout.num_rows if complete else config.evaluate_rows
    scores = evaluate(engine, heldout, num_rows=num_rows, micro_rows=config.micro_rows)
    if complete and engine.place.rank == 0:
        scores["unigram_loss"] = unigram_loss(rows, heldout, vocab_size)
    if config.ema:
        with engine.use_ema_weights():
            averaged = evaluate(engine, heldout, num_rows=num_rows, micro_rows=config.micro_rows)
        scores |= {f"{name}_ema": averaged[name] for name in averaged if name != "heldout_targets"}
    return scores


def _rows_at(config: PretrainConfig, rows: list[Rows], step: int) -> Rows:
    """Those that the last of `step` finished steps read. A stage that is yet to come is no part of their
    fingerprint.
    """
    return rows[locate_step(resolve_stages(config), max(step - 1, 0)).stage.stage]


def _resume(
    checkpoint: Checkpoint,
    engine: Engine,
    config: PretrainConfig,
    rows: list[Rows],
    start: str | None,
    recorder: Recorder,
) -> Progress:
    """Put a checkpoint's weights and moments into the engine; where it stood. `start`: the fingerprint of
    where the run started from.
    """
    check_same_start(checkpoint, config.model, start)
    state, fingerprint = checkpoint.state, _rows_at(config, rows, checkpoint.state.step).fingerprint
    if state.fingerprint != fingerprint:
        raise UserError(
            f"{checkpoint.folder} was trained on rows of fingerprint {state.fingerprint}, and this recipe"
            " and its text make rows of"
            f" {fingerprint}: corpus, tokenizer, row length, stages, objective, weights or (in another"
            " version of Trifold) the way rows are"
            " made have changed. Give another `run` folder."
        )
    if state.cursor != (cursor := locate_step(resolve_stages(config), state.step).row):
        raise UserError(
            f"{checkpoint.folder} had read {state.cursor} rows in its {state.step} steps, and this recipe"
            f" reads {cursor} in as many:"
            " step_rows or stages have changed. Give another `run` folder."
        )
    engine.load(checkpoint.read, state.optimizer_step)
    recorder.event("resumed", step=state.step, checkpoint=checkpoint.folder.name)
    return Progress.of(state)


def _loader(config: PretrainConfig, rows: list[Rows], engine: Engine, progress: Progress) -> Loader:
    return Loader(
        rows,
        resolve_stages(config),
        start=progress.step,
        stop=config.steps,
        rank=engine.rank,
        world=engine.world,
        prefetch=config.data.prefetch,
        skips=progress.skips,
        pin=engine.place.device == "cuda",
        counts=engine.counts,
    )
