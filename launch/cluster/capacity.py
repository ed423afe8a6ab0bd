"""How many workers of a run fit on the cluster: a number between `cluster.min_workers` and `cluster.workers`.

What other runs use is not counted: a run starts with what is free and grows when others end. A host counts
while Ray reports it alive, nobody drains it, and it accepts a connection: Ray takes up to 10 s to notice a
dead one, and a group placed on it would wait for as long.
"""

import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import ray

from trifold.launch.cluster.timing import Timing
from trifold.launch.recipe.schema import ClusterConfig
from trifold.modeling.errors import UserError

POLL = 0.5  # seconds between two counts while workers are waited for

Reclaimable = dict[
    str, dict[str, float]
]  # by host: resources that this run gives back when a worker needs them


class FreeWorkers(NamedTuple):
    """How many workers fit, up to `cluster.workers`."""

    free: int
    total: int  # if nobody else used these hosts


def resources_per_worker(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker uses of a host."""
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return resources


def free_workers(
    cluster: ClusterConfig,
    group_size: int,
    timing: Timing,
    running: Counter[str] | None = None,
    reclaimable: Reclaimable | None = None,
) -> FreeWorkers:
    """How many workers fit on the available hosts, in groups of `group_size` that share rows.

    `running` counts this run's workers by host, `reclaimable` are resources that it would give back.
    """
    running, reclaimable = running or Counter(), reclaimable or {}
    # private: the public function adds all hosts up
    available = ray._private.state.available_resources_per_node()
    free = total = 0
    for node in hosts(timing):
        name = node["NodeID"]
        free += running[name] + _num_fitting(cluster, available.get(name, {}), reclaimable.get(name, {}))
        total += _num_fitting(cluster, node["Resources"])
    rounded = [min(cluster.workers, number) // group_size * group_size for number in (free, total)]
    return FreeWorkers(*rounded)


def hosts(timing: Timing) -> list[dict[str, Any]]:
    """Ray's records of the available hosts."""
    draining = draining_hosts()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining]
    with ThreadPoolExecutor(32) as pool:
        reachable = list(pool.map(partial(_is_reachable, timeout=timing.connect), nodes))
    return [node for node, answers in zip(nodes, reachable, strict=True) if answers]


def draining_hosts() -> dict[str, int]:
    """The hosts that Ray is taking away, each with the time at which it will be gone."""
    return dict(ray._private.state.state.get_draining_nodes())  # private: there is no public way


def wait_for_workers(
    cluster: ClusterConfig,
    group_size: int,
    seconds: float,
    on_wait: Callable[..., None],
    stop_requested: Callable[[], bool],
    timing: Timing,
) -> int:
    """Return how many workers fit, as soon as they are at least `cluster.min_required`.

    `on_wait(fit=, least=, seconds=)` is called once if it takes time. Raises UserError after `seconds`, or
    when `stop_requested()`, with what there is.
    """
    start, reported = time.monotonic(), False
    while True:
        fit, total = free_workers(cluster, group_size, timing)
        waited = time.monotonic() - start
        enough = fit >= cluster.min_required
        settled = fit == total or waited >= timing.release
        if enough and settled:
            return fit
        if not enough and (stop_requested() or (settled and waited >= seconds)):
            raise UserError(_too_few(cluster, fit, seconds))
        if not enough and settled and not reported:
            on_wait(fit=fit, least=cluster.min_required, seconds=seconds)
            reported = True
        time.sleep(POLL)


class ResizePolicy:
    """Decides whether a running group of `workers` gives way to one of another size."""

    def __init__(self, cluster: ClusterConfig, group_size: int, workers: int, timing: Timing) -> None:
        self.cluster, self.group_size, self.workers, self.timing = cluster, group_size, workers, timing
        self._fit, self._since = workers, time.monotonic()

    def new_size(self, running: Counter[str], reclaimable: Reclaimable) -> int | None:
        """A larger size, once it has been stable for a while; a smaller one where hosts are being drained
        (when a host dies the group fails instead). None to stay.
        """
        now = time.monotonic()
        fit = free_workers(self.cluster, self.group_size, self.timing, running, reclaimable).free
        if fit != self._fit:
            self._fit, self._since = fit, now
        grows = fit > self.workers and now - self._since >= self.timing.resize
        shrinks = fit < self.workers and bool(draining_hosts())
        return fit if grows or shrinks else None


def _num_fitting(cluster: ClusterConfig, *resources: dict[str, float]) -> int:
    """Workers that fit into the sum of these resources of one host."""
    counts = []
    for kind, amount in resources_per_worker(cluster).items():
        available = sum(resource.get(kind, 0) for resource in resources)
        counts.append(int(available / amount + 1e-6))
    return min(counts)


def _is_reachable(node: dict[str, Any], timeout: float) -> bool:
    try:
        socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=timeout
        ).close()
    except OSError:
        return False
    return True


def _too_few(cluster: ClusterConfig, fit: int, seconds: float) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    each, required = [], []
    for kind, amount in resources_per_worker(cluster).items():
        each.append(f"{amount:g} {kind}s")
        present = f"{total.get(kind, 0):g} present, {free.get(kind, 0):g} of them free"
        required.append(f"{amount * cluster.min_required:g} {kind}s ({present})")
    waited = f" after {seconds:g} s" if seconds else ""
    return (
        f"{cluster.min_required} workers need {' and '.join(required)}{waited}: {fit} fit, with"
        f" {' and '.join(each)} each. Lower cluster.workers, allow a smaller start with"
        f" cluster.min_workers, or"
        " wait longer for hosts with cluster.wait_at_start=600 (cluster.wait_after_loss after a failure)."
    )
