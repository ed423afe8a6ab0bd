"""Scores while a run trains: a Ray actor, in whatever room the workers leave, scores the newest checkpoint,
and the next newest after that.

In: events.jsonl, which says what was committed. Out: a file for each scored checkpoint in RUN/scoring, which
the first rank takes into the metrics. No rank waits, and nothing that goes wrong here ends the run: it is
told in events.jsonl. The actor knows nothing but the name of a checkpoint and writes nothing. Another takes
its place when it was killed, and it ends before another group of workers begins, which may need its room.
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
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.watch.progress import appended
from trifold.pretrain.checkpoint.lease import valid_folders
from trifold.pretrain.monitor.run_folder import log_event, queue_scores, scored_checkpoints
from trifold.pretrain.storage.storage import checkpoint_root

ROOM = 30.0  # seconds until it is told that the scorer finds no room
TRIES = 3  # of one checkpoint, where the scorer's process dies


class BackgroundScorer:
    """The scorer of a run, beside its workers. `look` is called while they train, `leave` before a group
    begins, `last` after training.
    """

    def __init__(self, config: PretrainRecipe, tasks: Tasks) -> None:
        self.config, self.tasks, self.folder = config, tasks, Path(config.run)
        root = checkpoint_root(self.folder, config.checkpoints.storage)
        found = [folder.name for folder in valid_folders(root)]
        self._newest = next(
            (name for name in found[-1:] if name not in scored_checkpoints(self.folder)), None
        )  # to be scored
        self._events = appended(self.folder / "events.jsonl")
        next(self._events)
        self._tries: Counter[str] = Counter()
        self._actor: Any = None
        self._where: Any = None  # asks the actor for its host
        self._node, self._began = "", 0.0
        self._name, self._pending = "", None

    def poll(self) -> None:
        """Hand on what is scored, and begin with the newest checkpoint, if there is one."""
        saved = [event["checkpoint"] for event in next(self._events) if event["event"] == "save_committed"]
        self._newest = next(reversed(saved), self._newest)
        if self._pending is not None and ray.wait([self._pending], timeout=0)[0]:
            self._take()
        if self._pending is None and self._newest is not None:
            self._name, self._newest = self._newest, None
            self._pending = self._scorer().score.remote(self._name)
        if self._where is not None and ray.wait([self._where], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):  # it died meanwhile, as its score will say
                self._node = ray.get(self._where)
            self._where = None
        elif self._where is not None and time.monotonic() - self._began > ROOM:
            self._began = math.inf  # said once
            dials = self.config.scoring
            log_event(
                self.folder,
                "scoring_waits",
                wants=f"{dials.cpus:g} CPU(s)" + (f" and {dials.gpus:g} GPU(s)" if dials.gpus else ""),
            )

    def reclaimable(self) -> Reclaimable:
        """What the actor uses of a host, which a worker may have."""
        return (
            {self._node: {"CPU": self.config.scoring.cpus, "GPU": self.config.scoring.gpus}}
            if self._node
            else {}
        )

    def stop(self) -> None:
        """End the actor, whatever it does: its room may be what the group needs that is to begin."""
        if self._actor is not None:
            ray.kill(self._actor)
        if self._pending is not None:
            self._newest = self._newest or self._name
        self._actor = self._where = self._pending = None
        self._node = ""

    def finish(self, asked: Callable[[], bool]) -> None:
        """Wait for the scores of the last checkpoint, for `scoring.wait` seconds at most or until
        `asked()`.
        """
        deadline = time.monotonic() + self.config.scoring.wait
        self.poll()
        if self._newest is not None:  # it is busy with an older one
            self.stop()
            self.poll()
        if self._pending is not None:
            log_event(self.folder, "scoring_last", checkpoint=self._name, seconds=self.config.scoring.wait)
        while self._pending is not None and not asked() and time.monotonic() < deadline:
            time.sleep(0.2)
            self.poll()
        if self._pending is not None:
            self._failed(
                f"not done within {self.config.scoring.wait:g} s (scoring.wait)"
                if not asked()
                else "the run was asked to end"
            )
        self.stop()

    def _scorer(self) -> Any:
        if self._actor is None:
            dials = self.config.scoring
            self._actor = ray.remote(num_cpus=dials.cpus, num_gpus=dials.gpus)(_OnItsOwn).remote(
                self.config, self.tasks, os.getcwd()
            )
            self._where, self._began = self._actor.host.remote(), time.monotonic()
        return self._actor

    def _take(self) -> None:
        """Hand on what the actor returned, or tell what went wrong."""
        try:
            queue_scores(self.folder, ray.get(self._pending))
        except (
            ray.exceptions.RayActorError
        ):  # killed, or its host is gone: another takes its place, and its work
            self._failed("the scorer's process died")
            self._tries[self._name] += 1
            if self._tries[self._name] == TRIES:
                self._pending = None
            return self.stop()
        except Exception as error:  # whatever a task raises: training is worth more
            self._failed(why(error.cause if isinstance(error, ray.exceptions.RayTaskError) else error))
        self._pending = None

    def _failed(self, reason: str) -> None:
        log_event(self.folder, "scoring_failed", checkpoint=self._name, reason=reason)


class _OnItsOwn(Scorer):
    """The scorer as a process that gives way to whatever else its host computes."""

    def __init__(self, config: PretrainRecipe, tasks: Tasks, here: str) -> None:
        os.nice(19)
        if os.path.isdir(here):  # else the recipe's paths are absolute
            os.chdir(here)
        super().__init__(config, tasks, max(1, int(config.scoring.cpus)))

    def host(self) -> str:
        """Ray's name of the host that this process runs on."""
        return str(ray.get_runtime_context().get_node_id())
