"""Scores while a run trains: a Ray actor scores the newest checkpoint, then the newest after that, with the
resources that the workers leave.

It reads in events.jsonl which checkpoints were committed, and leaves a file for each scored one in
RUN/scoring, which rank 0 takes into the metrics. No rank waits, and no failure here ends the run: it is
recorded in events.jsonl. The actor receives only the name of a checkpoint and writes nothing. It is replaced
when it is killed, and ended before a new group of workers starts, which may need its resources.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from trifold.launch.cluster.capacity import Reclaimable
from trifold.launch.cluster.scorer import Scorer, Tasks, why
from trifold.launch.cluster.timing import Timing
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.watch.progress import appended
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.monitor.run_folder import log_event, queue_scores, scored_checkpoints
from trifold.pretrain.storage.storage import checkpoint_root

MAX_TRIES = 3  # of one checkpoint, where the scorer's process dies
POLL = 0.2  # seconds between two looks while the last scores are waited for


class BackgroundScorer:
    """The scorer of a run. The driver calls `poll` while workers train, `stop` before a group starts, and
    `finish` after training.
    """

    def __init__(self, config: PretrainRecipe, tasks: Tasks, timing: Timing = Timing()) -> None:  # noqa: B008
        self.config, self.tasks, self.timing = config, tasks, timing
        self.folder = Path(config.run)
        root = checkpoint_root(self.folder, config.checkpoints.storage)
        newest = [folder.name for folder in valid_folders(root)][-1:]
        unscored = set(newest) - scored_checkpoints(self.folder)
        self._next: str | None = next(iter(unscored), None)  # the checkpoint to score next
        self._events = appended(self.folder / "events.jsonl")
        next(self._events)
        self._tries: Counter[str] = Counter()
        self._actor: Any = None
        self._host: Any = None  # the pending question on which host the actor is
        self._node, self._started = "", 0.0
        self._current, self._pending = "", None  # the checkpoint that is being scored, and its result

    def poll(self) -> None:
        """Collect a finished score; start scoring the newest checkpoint."""
        for event in next(self._events):
            if event.get("event") == "save_committed":
                self._next = event["checkpoint"]
        if _is_ready(self._pending):
            self._collect()
        if self._pending is None and self._next is not None:
            self._current, self._next = self._next, None
            self._pending = self._get_actor().score.remote(self._current)
        self._check_placement()

    def reclaimable(self) -> Reclaimable:
        """The resources of a host that the actor uses and gives back when a worker needs them."""
        if not self._node:
            return {}
        return {self._node: {"CPU": self.config.scoring.cpus, "GPU": self.config.scoring.gpus}}

    def stop(self) -> None:
        """End the actor, whatever it does: the group that is about to start may need its resources."""
        if self._actor is not None:
            ray.kill(self._actor)
        if self._pending is not None:
            self._next = self._next or self._current
        self._actor = self._host = self._pending = None
        self._node = ""

    def finish(self, stop_requested: Callable[[], bool]) -> None:
        """Wait for the scores of the last checkpoint, for at most `scoring.wait` seconds or until
        `stop_requested()`.
        """
        wait = self.config.scoring.wait
        deadline = time.monotonic() + wait
        self.poll()
        if self._next is not None:  # the actor is busy with an older one
            self.stop()
            self.poll()
        if self._pending is not None:
            log_event(self.folder, "scoring_last", checkpoint=self._current, seconds=wait)
        while self._pending is not None and not stop_requested() and time.monotonic() < deadline:
            time.sleep(POLL)
            self.poll()
        if self._pending is not None:
            stopped = stop_requested()
            self._fail(
                "the run was asked to stop" if stopped else f"not done within {wait:g} s (scoring.wait)"
            )
        self.stop()

    def _get_actor(self) -> Any:
        if self._actor is None:
            scoring = self.config.scoring
            actor_class = ray.remote(num_cpus=scoring.cpus, num_gpus=scoring.gpus)(_ScoringActor)
            self._actor = actor_class.remote(self.config, self.tasks, os.getcwd())
            self._host, self._started = self._actor.host.remote(), time.monotonic()
        return self._actor

    def _check_placement(self) -> None:
        """Learn the actor's host; report once if it cannot be placed."""
        if self._host is None:
            return
        if _is_ready(self._host):
            with suppress(ray.exceptions.RayError):  # it died meanwhile, as its score will show
                self._node = ray.get(self._host)
            self._host = None
        elif time.monotonic() - self._started > self.timing.scorer:
            self._started = math.inf
            scoring = self.config.scoring
            required = f"{scoring.cpus:g} CPU(s)"
            if scoring.gpus:
                required += f" and {scoring.gpus:g} GPU(s)"
            log_event(self.folder, "scoring_waits", wants=required)

    def _collect(self) -> None:
        """Queue what the actor returned for the metrics, or record what went wrong."""
        try:
            queue_scores(self.folder, ray.get(self._pending))
        except ray.exceptions.RayActorError:  # killed, or its host is gone: another actor repeats the work
            self._fail("the scorer's process died")
            self._tries[self._current] += 1
            if self._tries[self._current] == MAX_TRIES:
                self._pending = None
            return self.stop()
        except Exception as error:  # any error of a task: training continues
            self._fail(why(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error))
        self._pending = None

    def _fail(self, reason: str) -> None:
        log_event(self.folder, "scoring_failed", checkpoint=self._current, reason=reason)


class _ScoringActor(Scorer):
    """The scorer as a process of low priority."""

    def __init__(self, config: PretrainRecipe, tasks: Tasks, folder: str) -> None:
        os.nice(19)
        if os.path.isdir(folder):  # otherwise the recipe's paths must be absolute
            os.chdir(folder)
        super().__init__(config, tasks, max(1, int(config.scoring.cpus)))

    def host(self) -> str:
        """Ray's name of the host that this process runs on."""
        return str(ray.get_runtime_context().get_node_id())


def _is_ready(reference: Any) -> bool:
    return reference is not None and bool(ray.wait([reference], timeout=0)[0])
