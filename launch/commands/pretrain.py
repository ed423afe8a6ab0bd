"""One `trifold pretrain`: the recipe settled with its run folder, data prepared, ranks placed, progress
shown, and a stop that saves.

In: a recipe. Out: the trained run folder. With 0 workers the same training function runs in this process,
without Ray: for debugging, profiling and benchmarks.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table

from trifold.launch.cluster import scorer
from trifold.launch.commands.plan import compare_to_measured
from trifold.launch.recipe.changes import reconcile_run_folder
from trifold.launch.recipe.schema import AnyRecipe, PretrainRecipe, resume_command
from trifold.launch.watch.progress import ProgressWatcher
from trifold.launch.watch.trackers import tracking
from trifold.pretrain import run
from trifold.pretrain.config.objectives import MixtureConfig, member_labels
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.monitor.run_folder import last_outcome, metrics_backwards


def make_tokenizer(config: PretrainRecipe, console: Console) -> Tokenizer:
    """Train (or take over) the recipe's tokenizer into its run folder."""
    with _prepare_run_folder(config, console) as watch:
        return run.make_tokenizer(config, watch.prepared)


def prepare(config: PretrainRecipe, console: Console, address: str | None = None) -> None:
    """Make tokenizer, token shards and packed rows in the run folder; tokenizing on this machine, or on all
    of the cluster at `address`.
    """
    spread = None
    if address is not None:
        from trifold.launch.cluster.tokenize_tasks import over_cluster

        spread = over_cluster(address)
    with _prepare_run_folder(config, console) as watch:
        run.prepare(config, os.cpu_count() or 1, watch.prepared, spread)


def pretrain(config: PretrainRecipe, console: Console, address: str | None = None) -> None:
    """Train a recipe to its end, or until SIGTERM or Ctrl-C: then the run is saved, and the process exits
    with 128 + the signal.
    """
    folder, tasks = Path(config.run), scorer.resolve_tasks(config)
    connect(config, address)
    with _prepare_run_folder(config, console) as watch, tracking(config, console):
        run.prepare(config, os.cpu_count() or 1, watch.prepared)
        scorer.prepare(config, tasks, os.cpu_count() or 1, watch.prepared)
        with stopping(folder) as stop:
            _train(config, tasks, address, stop)
    if last_outcome(folder) == "stopped":
        console.print(
            f"Continue with: {resume_command(config)}", markup=False, highlight=False, soft_wrap=True
        )
        raise SystemExit(
            128 + (stop.number or signal.SIGTERM)
        )  # in this process the training loop hears SIGTERM itself
    console.print(scores(config))
    if (table := compare_to_measured(config)) is not None:
        console.print(table)


def connect(config: AnyRecipe, address: str | None) -> None:
    """Join the cluster that is asked for, before anything is made for it. Raises UserError where nobody
    answers.
    """
    if address is not None and config.cluster.workers > 0:
        from trifold.launch.cluster import driver

        driver.join(address)


def _train(config: PretrainRecipe, tasks: scorer.Tasks, address: str | None, stop: "StopSignal") -> None:
    """Train, with a scorer beside it where one is asked for; without Ray this process scores the last
    checkpoint afterwards.
    """
    folder, wanted = Path(config.run), bool(config.scoring.names)
    if config.cluster.workers == 0:
        run.train(config, single_rank(config))
        if wanted and last_outcome(folder) == "finished":
            scorer.score_here(config, tasks)
    else:
        from trifold.launch.cluster import driver, scoring_actor  # import Ray: 2 s

        beside = scoring_actor.BackgroundScorer(config, tasks) if wanted else None
        driver.run(config, run.train, address, stop.asked, beside)
        if beside is not None and last_outcome(folder) == "finished":
            beside.finish(stop.asked)
    scorer.join(config)


def scores(config: PretrainRecipe) -> Table:
    """What the run's evaluations found on the held-out text: first, best and last, beside the simplest model
    there is; of a mixture the loss of each part too.
    """
    found = [*metrics_backwards(Path(config.run), "heldout_loss")][::-1]
    table = Table(title=f"{config.run}: {config.objective.kind} on held-out text")
    parts = member_labels(config.objective) if isinstance(config.objective, MixtureConfig) else []
    for name in ("step", "nats per target", "a unigram", "right", "bits per byte", *parts):
        table.add_column(name, justify="right")
    wanted = (
        "heldout_loss",
        "unigram_loss",
        "accuracy",
        "bits_per_byte",
        *(f"heldout_loss_{part}" for part in parts),
    )
    for record in dict.fromkeys(
        (0, min(range(len(found)), key=lambda i: found[i]["heldout_loss"]), len(found) - 1)
    ):
        shown = found[record]
        table.add_row(str(shown["step"]), *(f"{shown[name]:.3f}" if name in shown else "" for name in wanted))
    return table


class StopSignal:
    """Whether somebody asked this run to stop, and by which signal. Ranks see the file `stop` in the run
    folder, on any host.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "stop"
        self.number: int | None = None

    def asked(self) -> bool:
        return self.number is not None or self.file.exists()

    def ask(self, number: int, frame: FrameType | None) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for a save
        self.number = number
        self.file.touch()


@contextmanager
def stopping(folder: Path) -> Iterator[StopSignal]:
    """While inside, SIGTERM and Ctrl-C ask the run to finish its step, save and return."""
    stop = StopSignal(folder)
    for request in (stop.file, folder / "regroup"):  # what a killed process left
        request.unlink(missing_ok=True)
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.file.unlink(missing_ok=True)


def _prepare_run_folder(config: PretrainRecipe, console: Console) -> ProgressWatcher:
    """The recipe agreed with its run folder, and that folder watched."""
    for change in reconcile_run_folder(config):
        console.print(
            f"{change.key}: {change.old!r} so far, {change.new!r} from here",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return ProgressWatcher(Path(config.run), config.steps, console)


def single_rank(config: PretrainRecipe) -> RankInfo:
    """This process as the only rank."""
    return RankInfo(
        0, 1, 0, "cuda" if config.cluster.gpus_per_worker else "cpu", None, config.cluster.threads(1)
    )
