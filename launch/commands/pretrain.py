"""`trifold pretrain`, `prepare` and `tokenizer`: what they prepare, and the table of results.

A resolved recipe comes in; the run folder holds tokenizer, token shards, checkpoints and metrics afterwards.
"""

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from trifold.launch.cluster import scorer
from trifold.launch.commands.plan import compare_to_measured
from trifold.launch.commands.run import Progress, drive, watch_run_folder
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.pretrain import run
from trifold.pretrain.config.objectives import MixtureConfig, member_labels
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.monitor.run_folder import metrics_backwards

COLUMNS = {  # of the table of results: heading and metric
    "nats per target": "heldout_loss",
    "a unigram": "unigram_loss",
    "accuracy": "accuracy",
    "bits per byte": "bits_per_byte",
}


def make_tokenizer(config: PretrainRecipe, console: Terminal) -> Tokenizer:
    """Train the recipe's tokenizer, or copy the one it names, into the run folder."""
    with watch_run_folder(config, console) as watcher:
        return run.make_tokenizer(config, watcher.prepared)


def prepare(config: PretrainRecipe, console: Terminal, address: str | None = None) -> None:
    """Make tokenizer, token shards and packed rows in the run folder. Text is tokenized on this machine, or
    on all nodes of the cluster at `address`.
    """
    spread = None
    if address is not None:
        from trifold.launch.cluster.tokenize_tasks import over_cluster

        spread = over_cluster(address)
    with watch_run_folder(config, console) as watcher:
        run.prepare(config, os.cpu_count() or 1, watcher.prepared, spread)


def pretrain(config: PretrainRecipe, console: Terminal, address: str | None = None) -> None:
    """Train a recipe until it is finished, or until a signal stops it with a save."""
    tasks = scorer.resolve_tasks(config)

    def prepare_all(config: PretrainRecipe, progress: Progress) -> None:
        run.prepare(config, os.cpu_count() or 1, progress)
        scorer.prepare(config, tasks, os.cpu_count() or 1, progress)

    drive(config, prepare_all, run.train, console, address, tasks if config.scoring.names else None)

    console.print(results(config))
    if (comparison := compare_to_measured(config)) is not None:
        console.print(comparison)


def results(config: PretrainRecipe) -> Table:
    """The first, best and last evaluation on held-out text, next to a unigram model's loss."""
    columns = dict(COLUMNS)
    if isinstance(config.objective, MixtureConfig):
        columns |= {label: f"heldout_loss_{label}" for label in member_labels(config.objective)}
    table = Table(title=f"{config.run}: {config.objective.kind} on held-out text")
    for heading in ("step", *columns):
        table.add_column(heading, justify="right")

    evaluations = [*metrics_backwards(Path(config.run), "heldout_loss")][::-1]
    for record in _first_best_last(evaluations):
        values = [f"{record[metric]:.3f}" if metric in record else "" for metric in columns.values()]
        table.add_row(str(record["step"]), *values)
    return table


def _first_best_last(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """These three without repetition; none where there are none."""
    if not evaluations:
        return []
    best = min(evaluations, key=lambda record: record["heldout_loss"])
    chosen = [evaluations[0], best, evaluations[-1]]
    return [record for i, record in enumerate(chosen) if record not in chosen[:i]]
