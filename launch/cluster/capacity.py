"""How many workers of a run the cluster has room for: in, a recipe's `cluster`; out, a number between its
least and its most.

What other runs hold is not counted: this one begins with what is free, and takes more in when they end. A
host counts while Ray calls it alive, nobody drains it, and it takes a connection: Ray needs up to 10 s to
notice a dead one, and a group placed on it would wait for as long.
"""

import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray

from trifold.launch.recipe.schema import ClusterConfig
from trifold.modeling.errors import UserError

ANSWER = 1.0  # seconds in which a host takes a connection
GIVEN_BACK = 2.0  # seconds in which Ray counts as free what a group held that has ended
# seconds for which room must have stayed the same before a running group is ended for it: hosts often come
# together
SETTLED = 5.0


def needs(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker takes of a host."""
    return {"CPU": cluster.cpus_per_worker} | (
        {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}
    )


class FreeWorkers(NamedTuple):
    """For how many workers there is room, up to `cluster.workers`."""

    free: int
    whole: int  # if nobody else used these hosts


Reclaimable = dict[str, dict[str, float]]  # by host: what this run uses there for want of more workers


def free_workers(
    cluster: ClusterConfig, sharing: int, mine: Counter[str] | None = None, lent: Reclaimable | None = None
) -> FreeWorkers:
    """Room on the hosts that are there, for groups of `sharing` workers each; `mine`: this run's workers by
    host, who have theirs; `lent`: what it would give up for others.
    """
    mine, lent = mine or Counter(), lent or {}
    there, free = (
        hosts(),
        ray._private.state.available_resources_per_node(),
    )  # private: what is public adds all hosts up
    fits = (
        mine[node["NodeID"]] + _fits(cluster, *(of.get(node["NodeID"], {}) for of in (free, lent)))
        for node in there
    )
    found = sum(fits), sum(_fits(cluster, node["Resources"]) for node in there)
    return FreeWorkers(*(min(cluster.workers, number) // sharing * sharing for number in found))


def hosts() -> list[dict[str, Any]]:
    """Ray's own records of the hosts that are there."""
    leaving = drained()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    with ThreadPoolExecutor(32) as pool:
        return [node for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if answers]


def drained() -> dict[str, int]:
    """The hosts that Ray is taking away, with the time at which they are gone."""
    return dict(ray._private.state.state.get_draining_nodes())  # private: nothing public tells


def wait_for_workers(
    cluster: ClusterConfig,
    sharing: int,
    seconds: float,
    waiting: Callable[..., None],
    asked: Callable[[], bool],
) -> int:
    """How many workers fit, once they are enough. After `seconds` that they were not, or `asked()`, UserError
    says what there is.

    `waiting(fit=, least=, seconds=)` hears that it takes time.
    """
    began, told = time.monotonic(), False
    while True:
        (fit, whole), waited = free_workers(cluster, sharing), time.monotonic() - began
        enough, settled = fit >= cluster.min_required, fit == whole or waited >= GIVEN_BACK
        if enough and settled:
            return fit
        if not enough and (asked() or (settled and waited >= seconds)):
            raise UserError(_too_few(cluster, fit, seconds))
        if not enough and settled and not told:
            waiting(fit=fit, least=cluster.min_required, seconds=seconds)
            told = True
        time.sleep(0.5)


class ResizePolicy:
    """Whether a running group of `workers` should give way to one of another size: hosts have come, or are
    about to be taken away.
    """

    def __init__(self, cluster: ClusterConfig, sharing: int, workers: int) -> None:
        self.cluster, self.sharing, self.workers, self._fit, self._since = (
            cluster,
            sharing,
            workers,
            workers,
            time.monotonic(),
        )

    def wanted(self, mine: Counter[str], lent: Reclaimable) -> int | None:
        """The other size: more, once it has been the same for a while, or fewer, where hosts are drained (of
        dead ones the group fails).
        """
        now, fit = time.monotonic(), free_workers(self.cluster, self.sharing, mine, lent).free
        if fit != self._fit:
            self._fit, self._since = fit, now
        grown = fit > self.workers and now - self._since >= SETTLED
        return fit if grown or (fit < self.workers and drained()) else None


def _fits(cluster: ClusterConfig, *there: dict[str, float]) -> int:
    return min(
        int(sum(part.get(kind, 0) for part in there) / amount + 1e-6)
        for kind, amount in needs(cluster).items()
    )


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection(
            (node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER
        ).close()
    except OSError:
        return False
    return True


def _too_few(cluster: ClusterConfig, fit: int, seconds: float) -> str:
    total, free = ray.cluster_resources(), ray.available_resources()
    each = " and ".join(f"{amount:g} {kind}s" for kind, amount in needs(cluster).items())
    all_of = " and ".join(
        f"{amount * cluster.min_required:g} {kind}s ({total.get(kind, 0):g} there, {free.get(kind, 0):g} of them"
        " free)"
        for kind, amount in needs(cluster).items()
    )
    waited = f" after {seconds:g} s" if seconds else ""
    return (
        f"{cluster.min_required} workers need {all_of}{waited}: {fit} fit, with {each} each. Lower cluster.workers,"
        " let it begin with fewer"
        " (cluster.min_workers), or let it wait longer for hosts (cluster.wait_at_start=600,"
        " cluster.wait_after_loss)."
    )
