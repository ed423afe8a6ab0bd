"""`trifold doctor`: the facts of every node of a cluster, whether the nodes reach each other and share a
folder, and what to fix.

A cluster to join (or this machine as one) and the folder of the runs come in; one table and the findings come
out. One actor per node, which reserves nothing, so that a cluster can be checked while it trains. Cost: one
machine 9 s, a head and three hosts of one machine 15 s, most of it Ray's start and the imports of torch.
"""

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.table import Table

from trifold.launch.cluster import connection
from trifold.launch.jobs import node_facts
from trifold.launch.jobs.findings import ClusterFacts, diagnose, groups, join_names, network
from trifold.launch.jobs.node_facts import SIZES, Node
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError

import ray  # isort: skip (after trifold, which sets what it reads when it is imported)
import requests
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.cloudpickle.register_pickle_by_value(node_facts)  # the nodes may have another Trifold, or none


def doctor(address: str | None, storage: Path, console: Terminal) -> None:
    """Check the cluster at `address` (HOST:PORT), or this machine. Raises UserError when something must be
    fixed.
    """
    connection.join(address)
    with console.status("checking every node"):
        cluster = check_cluster(storage)
    console.print(table(cluster))
    findings = diagnose(cluster)
    for finding in findings:
        console.print(
            f"{'fix' if finding.fix else 'note'}: {finding.sentence}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if count := sum(finding.fix for finding in findings):
        raise UserError(f"{count} of these must be fixed before a run is safe here.")
    console.print("Nothing to fix.")


def check_cluster(storage: Path) -> ClusterFacts:
    """Collect the facts of all nodes of the cluster that was joined, and let them connect to each other."""
    folder = str(node_facts.nearest(storage.resolve()))
    alive = sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"]
    )
    actors = [_actor(node) for node in alive]
    answers = _collect(
        [actor.facts.remote(node["NodeManagerAddress"]) for actor, node in zip(actors, alive, strict=True)]
    )
    silent = [
        (node["NodeManagerHostname"], str(why))
        for node, why in zip(alive, answers, strict=True)
        if isinstance(why, _NoAnswer)
    ]
    keep = [i for i, answer in enumerate(answers) if not isinstance(answer, _NoAnswer)]
    nodes, actors, alive = [answers[i] for i in keep], [actors[i] for i in keep], [alive[i] for i in keep]
    if not nodes:
        raise UserError(f"none of the cluster's {len(silent)} nodes answers: {silent[0][1]}.")

    cluster = ClusterFacts(
        nodes,
        folder,
        [_clock_offset(actor) for actor in actors],
        _unreachable(nodes, actors),
        [],
        [],
        _token(),
        silent,
    )
    if not any(finding.fix for finding in network(cluster)):
        _all_reduce(cluster, actors, alive)
    _storage(cluster, actors)  # last: who hangs on a dead mount answers nothing after it
    for actor in actors:
        ray.kill(actor)
    return cluster


class _NoAnswer(Exception):
    """Why a node gave no answer."""


def _actor(node: dict[str, Any]) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(Node).options(num_cpus=0, scheduling_strategy=there).remote()


def _collect(pending: list[Any], seconds: float = 90) -> list[Any]:
    """The results in order; a _NoAnswer in place of one that did not arrive."""
    ready, _ = ray.wait(pending, num_returns=len(pending), timeout=seconds)
    results: list[Any] = []
    for reference in pending:
        if reference not in ready:
            results.append(_NoAnswer(f"no answer within {seconds:g} s"))
            continue
        try:
            results.append(ray.get(reference))
        except ray.exceptions.RayError as error:
            text = str(getattr(error, "cause", None) or error)
            results.append(_NoAnswer(text.strip().splitlines()[-1].strip().rstrip(".")))
    return results


def _clock_offset(actor: Any) -> float:
    """Seconds by which a node's clock is ahead of this one's, by the quickest of three calls."""
    tries = []
    for _ in range(3):
        before = time.time()
        there = ray.get(actor.now.remote())
        after = time.time()
        tries.append((after - before, there - (before + after) / 2))
    return min(tries)[1]


def _unreachable(nodes: list[node_facts.Facts], actors: list[Any]) -> list[tuple[str, str, str]]:
    """Every node opens a free port. Returns the pairs of hosts that cannot connect, each with the reason."""
    ports = ray.get([actor.listen.remote(node["address"]) for actor, node in zip(actors, nodes, strict=True)])
    peers = [(node["address"], port) for node, port in zip(nodes, ports, strict=True)]
    reached = ray.get([actor.reach.remote(peers) for actor in actors])
    return [
        (node["host"], other["host"], why)
        for node, answers in zip(nodes, reached, strict=True)
        for other, why in zip(nodes, answers, strict=True)
        if why
    ]


def _token() -> bool | None:
    """Whether the job server rejects requests without a token; None: there is no job server."""
    url = ray._private.worker.get_dashboard_url()
    if not url:
        return None
    try:
        return requests.get(f"http://{url}/api/version", timeout=5).status_code == 401
    except requests.RequestException:
        return None


def _all_reduce(cluster: ClusterFacts, actors: list[Any], alive: list[dict[str, Any]]) -> None:
    """Time a process group with one rank on every node that has CPUs or GPUs; with two ranks on a single
    node.
    """
    places = [i for i, node in enumerate(alive) if {"CPU", "GPU"} & node["Resources"].keys()]
    more = [_actor(alive[places[0]])] if len(places) == 1 else []
    ranks = [actors[i] for i in places] + more
    gpus = all(cluster.nodes[i]["cuda_devices"] > len(more) for i in places)
    devices = [0 if i < len(places) else 1 for i in range(len(ranks))] if gpus else [None] * len(ranks)
    cluster.ranks, cluster.backend = len(ranks), "nccl" if gpus else "gloo"
    first = cluster.nodes[places[0]]["address"]
    meet = (first, ray.get(ranks[0].listen.remote(first)))
    answers = _collect(
        [actor.all_reduce.remote(rank, len(ranks), meet, devices[rank]) for rank, actor in enumerate(ranks)]
    )
    if failures := [str(answer) for answer in answers if isinstance(answer, _NoAnswer)]:
        cluster.failed = failures[0]
    else:
        cluster.seconds = [max(times) for times in zip(*answers, strict=True)]
    for actor in more:
        ray.kill(actor)


def _storage(cluster: ClusterFacts, actors: list[Any]) -> None:
    """The first node writes a probe that all must read; then all write at once, as in a save."""
    probe = str(Path(cluster.folder) / f".trifold-probe-{uuid4().hex}")
    if _collect([actors[0].write.remote(probe)]) == [""]:
        seen = _collect([actor.read.remote(probe) for actor in actors])
        cluster.unread = [
            node["host"] for node, sees in zip(cluster.nodes, seen, strict=True) if sees is not True
        ]
        Path(probe).unlink(missing_ok=True)
    answers = _collect([actor.storage.remote(cluster.folder) for actor in actors])
    cluster.storage = [
        {"error": str(one), "free": 0.0, "rate": 0.0} if isinstance(one, _NoAnswer) else one
        for one in answers
    ]


def table(cluster: ClusterFacts) -> Table:
    """One row per fact: a common value once, different values with their hosts, numbers as a range."""
    table = Table(
        "",
        "",
        title=f"{len(cluster.nodes)} nodes" if len(cluster.nodes) > 1 else "this machine",
        show_header=False,
    )
    table.add_row("hosts", join_names(f"{node['host']} ({node['address']})" for node in cluster.nodes))
    for name in cluster.nodes[0]["versions"]:
        table.add_row(name, _by_value(groups(cluster, lambda node, name=name: node["versions"][name])))  # type: ignore[misc]
    table.add_row(
        "GPUs",
        _by_value(
            groups(cluster, lambda node: f"{len(node['gpus'])} {node['gpus'][0]}" if node["gpus"] else "none")
        ),
    )
    if any(node["driver"] for node in cluster.nodes):
        table.add_row("driver", _by_value(groups(cluster, lambda node: node["driver"] or "none")))
    table.add_row(
        "collectives use", _by_value(groups(cluster, lambda node: node["interface"] or "no interface"))
    )
    table.add_row("all-reduce", _collective(cluster))
    table.add_row(
        "ports",
        "every host reaches every other"
        if not cluster.unreachable
        else f"{len(cluster.unreachable)} connections failed",
    )
    table.add_row("clocks, ms ahead", _range([1000 * ahead for ahead in cluster.clocks], "{:+.1f}"))
    table.add_row("memory free, GiB", _range([node["memory"][0] / 2**30 for node in cluster.nodes], "{:.1f}"))
    table.add_row("/dev/shm free, GiB", _range([node["shm"] / 2**30 for node in cluster.nodes], "{:.1f}"))
    written = [one for one in cluster.storage if not one["error"]]
    table.add_row(
        "run folder",
        f"{cluster.folder}, "
        + (f"not seen by {join_names(cluster.unread)}" if cluster.unread else "seen by all"),
    )
    if written:
        table.add_row("  free, GiB", _range([one["free"] / 2**30 for one in written], "{:.1f}"))
        table.add_row("  MB/s to disk, all at once", _range([one["rate"] / 1e6 for one in written], "{:.0f}"))
    table.add_row(
        "job server", {None: "none", True: "asks for a token", False: "takes anybody"}[cluster.token]
    )
    return table


def _collective(cluster: ClusterFacts) -> str:
    if not cluster.seconds:
        return cluster.failed or "not tried"
    times = ", ".join(
        f"{size >> 10:,} KiB in {1000 * seconds:.2f} ms ({size / seconds / 1e6:.0f} MB/s)"
        for size, seconds in zip(SIZES, cluster.seconds, strict=True)
    )
    return f"{cluster.ranks} ranks over {cluster.backend}: {times}"


def _by_value(by_value: dict[str, list[str]]) -> str:
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({join_names(hosts)})" for value, hosts in by_value.items())


def _range(numbers: list[float], shape: str) -> str:
    least, most = shape.format(min(numbers)), shape.format(max(numbers))
    return least if least == most else f"{least} to {most}"
