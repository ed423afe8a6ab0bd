"""A pretraining run: `prepare` once on the driver (tokenizer, token shards, tables of packed rows), then
`train` on every rank.

`train` continues from the newest checkpoint that verifies. What is common with fine-tuning is in session.py.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trifold.modeling.batch import Batch
from trifold.modeling.errors import UserError
from trifold.pretrain.config.pretraining import InitialModelConfig, PretrainConfig, SourceConfig
from trifold.pretrain.data import prepare as preparation
from trifold.pretrain.data.collate import stack
from trifold.pretrain.data.corpus import corpus_fingerprint, documents, is_heldout
from trifold.pretrain.data.rows import Rows
from trifold.pretrain.data.shards import Shards
from trifold.pretrain.data.stages import resolve_stages
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import start_engine
from trifold.pretrain.evaluate import evaluate, unigram_loss
from trifold.pretrain.initial_model import (
    TokenizerSource,
    build_initialised,
    carry_initial_folder,
    ensure_tokenizer,
    load_initial_model,
)
from trifold.pretrain.progress import Progress
from trifold.pretrain.session import Run
from trifold.pretrain.storage.atomic import replace_file
from trifold.pretrain.storage.json_files import read_json_object
from trifold.pretrain.train import train as train_loop

# in the run folder, also where data.cache is elsewhere: what each folder of token shards was made of
SHARD_RECIPES = "shards/recipes.json"


def prepare(
    config: PretrainConfig,
    workers: int,
    progress: Callable[[str, int], None],
    spread: preparation.Spread | None = None,
) -> None:
    """Make what training reads and does not exist yet: the tokenizer, the token shards, the tables of packed
    rows.

    `workers` processes of this machine tokenize and pack, unless `spread` tokenizes elsewhere.
    `progress(what, done)` is called as it proceeds. Raises UserError for a corpus or a tokenizer that
    cannot be used.
    """
    tokenizer = make_tokenizer(config, progress)
    recipes = {}
    for source, folder, heldout_fraction in _sources(config):
        training, _ = preparation.prepare(
            source,
            tokenizer,
            folder,
            heldout_fraction=heldout_fraction,
            spread=spread or preparation.over_processes(workers),
            progress=lambda documents, _, folder=folder: progress(f"tokenizing {folder.name}", documents),  # type: ignore[misc]
        )
        recipes[folder.name] = training.index["recipe"]
    recipes_file = Path(config.run) / SHARD_RECIPES
    recipes_file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(recipes_file, json.dumps(recipes))
    progress("packing rows", 0)
    open_rows(config, processes=workers)


def make_tokenizer(config: PretrainConfig, progress: Callable[[str, int], None]) -> Tokenizer:
    """The run's tokenizer: a copy of the initial model's or the recipe's, else one trained on all sources.

    Raises UserError for an initial model that cannot be used, and a tokenizer larger than the model's
    vocabulary.
    """
    model, _ = load_initial_model(config.model, Path(config.run))
    config.fits(model)
    sources, fraction = config.data.sources, config.data.heldout_fraction

    def texts() -> Iterator[str]:
        for source in sources:
            yield from (text for text in documents(source) if not is_heldout(text, fraction))

    source = TokenizerSource(
        path=config.model.folder if isinstance(config.model, InitialModelConfig) else config.tokenizer.path,
        family=model.family,
        texts=texts,
        made_of=lambda: [fraction, *map(corpus_fingerprint, sources)],
        vocab_size=model.vocab_size,
    )
    carry_initial_folder(config.model, Path(config.run))
    tokenizer = ensure_tokenizer(config, config.tokenizer, source, progress)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer in {config.run} has {tokenizer.vocab_size} pieces, and model.vocab_size is"
            f" {model.vocab_size}: raise it"
        )
    return tokenizer


def train(config: PretrainConfig, rank_info: RankInfo) -> None:
    """Train one rank of a run, from where the run is to its last step. Every rank calls it with the same
    config.
    """
    train_loop(PretrainingRun(config, rank_info))


class PretrainingRun(Run):
    """One rank of a pretraining run."""

    row_inputs = (
        "corpus, tokenizer, row length, stages, objective, weights or (in another version of Trifold) the way"
        " rows are made"
    )

    def __init__(self, config: PretrainConfig, rank_info: RankInfo) -> None:
        self.pretrain_config = config
        rows, self.heldout = open_rows(config)
        self.member_names = self.heldout.member_names
        model, weights = load_initial_model(config.model, Path(config.run))
        stages = resolve_stages(config)
        engine = start_engine(
            lambda: build_initialised(model, weights, config.seed),
            model,
            config,
            (empty_micro(r, stage.micro_rows) for r, stage in zip(rows, stages, strict=True)),
            rank_info,
            len(self.member_names),
        )
        super().__init__(config, config.model, model, engine, rows, stages, config.data.prefetch)
        self.last_rows = rows[-1]
        self._record_data(rows)

    def _record_data(self, rows: list[Rows]) -> None:
        stages = [
            {**stage._asdict(), "rows_per_epoch": r.num_rows, "waste": r.padding_fraction}
            for stage, r in zip(self.stages, rows, strict=True)
        ]
        self.recorder.event(
            "data",
            **stages[-1],
            fingerprint=rows[-1].fingerprint,
            heldout_fingerprint=self.heldout.fingerprint,
            heldout_rows=self.heldout.num_rows,
            earlier_stages=stages[:-1],
        )

    def evaluate(self, progress: Progress, complete: bool) -> dict[str, Any]:
        """Held-out losses, also those of the averaged weights. `complete`: of all rows, with the loss of a
        unigram model.
        """
        config = self.pretrain_config
        num_rows = self.heldout.num_rows if complete else config.evaluate_rows
        scores = evaluate(self.engine, self.heldout, num_rows=num_rows, micro_rows=config.micro_rows)
        if complete and self.rank_info.rank == 0:
            scores["unigram_loss"] = unigram_loss(self.last_rows, self.heldout, self.model.vocab_size)
        if config.ema:
            with self.engine.use_ema_weights():
                averaged = evaluate(
                    self.engine, self.heldout, num_rows=num_rows, micro_rows=config.micro_rows
                )
            del averaged["heldout_targets"]  # the same
            scores |= {f"{name}_ema": score for name, score in averaged.items()}
        return scores


def empty_micro(rows: Rows, micro_rows: int) -> Batch:
    """A micro batch of padding, which has the shapes of every other."""
    return stack([rows.empty_row()] * micro_rows)


def open_rows(config: PretrainConfig, processes: int = 1) -> tuple[list[Rows], Rows]:
    """The rows of a prepared run: those to train on, for each of its stages, and the held-out ones.

    Raises UserError where the token shards are not those that `prepare` made: they were damaged, or another
    run that shares data.cache has replaced them.
    """
    tokenizer, cache = Tokenizer.open(Path(config.run) / "tokenizer"), shards_folder(config)
    recipes = read_json_object(Path(config.run) / SHARD_RECIPES, "`prepare` writes it")
    shards = []
    for _, folder, _ in _sources(config):
        pair = Shards(folder / "train"), Shards(folder / "heldout")
        for half in pair:
            half.check_made_with(tokenizer.fingerprint, recipes.get(folder.name))
        shards.append(pair)

    num_sources = len(config.data.sources)
    training = [train for train, _ in shards[:num_sources]]
    if config.data.heldout:  # separate corpora: all of their documents
        heldout = [train for train, _ in shards[num_sources:]]
    else:
        heldout = [held for _, held in shards if held.num_documents] or [shards[0][1]]

    rows: list[Rows] = []
    for stage in resolve_stages(config):
        if rows and rows[-1].row_length == stage.row_length:
            rows.append(rows[-1])  # the same rows in other steps
            continue
        continued = (rows[-1], stage.first_row) if rows else None
        rows.append(
            Rows.for_training(config, tokenizer, training, cache, processes, stage.row_length, continued)
        )
    return rows, Rows.heldout(config, tokenizer, heldout, cache, processes)


def shards_folder(config: PretrainConfig) -> Path:
    """The folder of a run's token shards and tables of rows."""
    return Path(config.data.cache or Path(config.run) / "shards")


def _sources(config: PretrainConfig) -> Iterator[tuple[SourceConfig, Path, float]]:
    """Each corpus, the folder of its shards, and the fraction of its documents that is held out."""
    for number, source in enumerate(config.data.sources):
        yield source, shards_folder(config) / f"source-{number}", config.data.heldout_fraction
    for number, source in enumerate(config.data.heldout):
        yield source, shards_folder(config) / f"heldout-{number}", 0.0
