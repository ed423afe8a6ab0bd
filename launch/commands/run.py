"""The driver of a run, shared by `trifold pretrain` and `trifold finetune`.

`drive` takes the resolved recipe and two functions: `prepare(config, progress)` makes data in the run folder,
`train(config, rank_info)` trains there as one rank. It compares the recipe with the run folder, shows
progress, feeds the trackers, starts the ranks and turns SIGTERM, SIGHUP and Ctrl-C into a save. With
`cluster.workers=0` the same training function runs in this process, without Ray: for debugging, profiling and
benchmarks.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from trifold.launch.cluster import scorer
from trifold.launch.cluster.sudden_death import reported_if_killed
from trifold.launch.recipe.changes import reconcile_run_folder
from trifold.launch.recipe.schema import AnyRecipe, PretrainRecipe, resume_command
from trifold.launch.terminal import Terminal
from trifold.launch.watch.progress import ProgressWatcher
from trifold.launch.watch.trackers import tracking
from trifold.pretrain.checkpoint.driver_claim import DriverClaim
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.initial_model import start_notes
from trifold.pretrain.monitor.run_folder import last_outcome
from trifold.pretrain.storage.storage import checkpoint_root

Progress = Callable[[str, int], None]  # what is being prepared, and how many are done
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def drive(
    config: Any,
    prepare: Callable[[Any, Progress], None],
    train: Callable[[Any, RankInfo], None],
    console: Terminal,
    address: str | None = None,
    tasks: scorer.Tasks | None = None,
) -> None:
    """Train until the run is finished or asked to stop.

    `tasks` are the fine-tuning recipes with which checkpoints are scored in the background; None scores none.
    A stopped run has been saved: the command that resumes it is printed, and SystemExit carries 128 + the
    signal. Raises UserError when the run cannot continue.
    """
    folder = Path(config.run)
    for note in start_notes(config.model):
        console.print_line(note)
    root = checkpoint_root(folder, config.checkpoints.storage)
    _connect(config, address)
    with (
        DriverClaim(root, console.print_line) as claim,
        watch_run_folder(config, console) as watcher,
        tracking(config, console),
    ):
        prepare(config, watcher.prepared)
        with stopping(folder) as stop:
            if config.cluster.workers == 0:
                _train_here(config, train, tasks)
            else:
                _train_on_cluster(config, train, tasks, address, stop, claim)
            scorer.flush_scores(config)

    if last_outcome(folder) == "stopped":
        console.print_line(f"Continue with: {resume_command(config)}")
        # without a number the training loop in this process took SIGTERM itself
        raise SystemExit(128 + (stop.number or signal.SIGTERM))


def watch_run_folder(config: AnyRecipe, console: Terminal) -> ProgressWatcher:
    """Compare the recipe with its run folder, print what changed, and return a watcher of the folder."""
    for change in reconcile_run_folder(config):
        console.print_line(f"{change.key}: {change.old!r} so far, {change.new!r} from here")
    return ProgressWatcher(Path(config.run), config.steps, console)


def single_rank(config: AnyRecipe) -> RankInfo:
    """This process as the only rank."""
    device: Literal["cpu", "cuda"] = "cuda" if config.cluster.gpus_per_worker else "cpu"
    return RankInfo.single(device, config.cluster.threads(1))


class StopSignal:
    """Whether this run was asked to stop, and by which signal.

    Ranks on every host see the file `stop` in the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "stop"
        self.number: int | None = None

    def requested(self) -> bool:
        return self.number is not None or self.file.exists()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the save
        if number == signal.SIGHUP:
            _detach_from_terminal()
        self.number = number
        self.file.touch()


@contextmanager
def stopping(folder: Path) -> Iterator[StopSignal]:
    """While inside, SIGTERM, SIGHUP and Ctrl-C make the run finish its step, save and return."""
    stop = StopSignal(folder)
    for leftover in (stop.file, folder / "regroup"):  # requests to a process that was killed
        leftover.unlink(missing_ok=True)

    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        if not (number == signal.SIGHUP and previous[number] == signal.SIG_IGN):  # nohup
            signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        stop.file.unlink(missing_ok=True)


def _connect(config: AnyRecipe, address: str | None) -> None:
    """Join the cluster before anything is written. Raises UserError where none answers."""
    if address is not None and config.cluster.workers > 0:
        from trifold.launch.cluster import connection

        connection.join(address)


def _train_here(
    config: AnyRecipe, train: Callable[[Any, RankInfo], None], tasks: scorer.Tasks | None
) -> None:
    """Train as a single rank in this process; afterwards score the last checkpoint."""
    train(config, single_rank(config))
    if tasks is not None and last_outcome(Path(config.run)) == "finished":
        assert isinstance(config, PretrainRecipe)
        scorer.score_here(config, tasks)


def _train_on_cluster(
    config: AnyRecipe,
    train: Callable[[Any, RankInfo], None],
    tasks: scorer.Tasks | None,
    address: str | None,
    stop: StopSignal,
    claim: DriverClaim,
) -> None:
    """Train on Ray workers, while an actor scores checkpoints in the background."""
    from trifold.launch.cluster import driver, scoring_actor  # import Ray: 2 s

    background = None
    if tasks is not None:
        assert isinstance(config, PretrainRecipe)
        background = scoring_actor.BackgroundScorer(config, tasks)
    with reported_if_killed(config):
        driver.run(config, train, address, stop.requested, background, claim.check)
    if background is not None and last_outcome(Path(config.run)) == "finished":
        background.finish(stop.requested)


def _detach_from_terminal() -> None:
    """Send output nowhere: the terminal is gone, and writing to it would raise OSError before the save."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(null, stream.fileno())
    os.close(null)
