"""`trifold doctor`: what every machine of a cluster is, whether they reach each other and share a folder, and
what to mend.

In: a cluster to join (or this machine as one), and the folder where runs go. Out: one table and the findings.
One actor on each node, which reserves nothing, so that a cluster which trains can be examined. Cost: one
machine 9 s, a head and three hosts of one machine 15 s, most of it Ray's start and the imports of torch.
"""

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.table import Table

from trifold.launch.cluster import connection
from trifold.launch.jobs import node_facts
from trifold.launch.jobs.findings import Examined, diagnose, groups, network, some
from trifold.launch.jobs.node_facts import SIZES, Node
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError

import ray  # isort: skip (after cluster, which sets what it reads when it is imported)
import requests
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.cloudpickle.register_pickle_by_value(node_facts)  # the nodes may have another Trifold, or none


def doctor(address: str | None, storage: Path, console: Terminal) -> None:
    """Examine the cluster at `address` (HOST:PORT), or this machine; UserError when something must be
    mended.
    """
    connection.join(address)
    with console.status("asking every node"):
        found = examine(storage)
    console.print(table(found))
    findings = diagnose(found)
    for finding in findings:
        console.print(
            f"{'mend' if finding.fix else 'know'}: {finding.sentence}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if count := sum(finding.fix for finding in findings):
        raise UserError(f"{count} of these must be mended before a run is safe here.")
    console.print("Nothing to mend.")


def examine(storage: Path) -> Examined:
    """Ask all nodes of the cluster that was joined, and let them speak to each other."""
    folder = str(node_facts.nearest(storage.resolve()))
    alive = sorted(
        (node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeManagerAddress"]
    )
    actors = [_actor(node) for node in alive]
    told = _asked(
        [actor.facts.remote(node["NodeManagerAddress"]) for actor, node in zip(actors, alive, strict=True)]
    )
    silent = [
        (node["NodeManagerHostname"], str(why))
        for node, why in zip(alive, told, strict=True)
        if isinstance(why, _Silent)
    ]
    keep = [i for i, answer in enumerate(told) if not isinstance(answer, _Silent)]
    nodes, actors, alive = [told[i] for i in keep], [actors[i] for i in keep], [alive[i] for i in keep]
    if not nodes:
        raise UserError(f"none of the cluster's {len(silent)} nodes answers: {silent[0][1]}.")

    found = Examined(
        nodes,
        folder,
        [_ahead(actor) for actor in actors],
        _unreachable(nodes, actors),
        [],
        [],
        _token(),
        silent,
    )
    if not any(finding.fix for finding in network(found)):
        _all_reduce(found, actors, alive)
    _storage(found, actors)  # last: who hangs on a dead mount answers nothing after it
    for actor in actors:
        ray.kill(actor)
    return found


class _Silent(Exception):
    """A node that gave no answer, and why."""


def _actor(node: dict[str, Any]) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(Node).options(num_cpus=0, scheduling_strategy=there).remote()


def _asked(answers: list[Any], seconds: float = 90) -> list[Any]:
    """The answers in their order; in place of one that did not come, a _Silent."""
    ready, _ = ray.wait(answers, num_returns=len(answers), timeout=seconds)
    told: list[Any] = []
    for answer in answers:
        try:
            told.append(ray.get(answer) if answer in ready else _Silent(f"no answer within {seconds:g} s"))
        except ray.exceptions.RayError as error:
            told.append(
                _Silent(
                    str(getattr(error, "cause", None) or error).strip().splitlines()[-1].strip().rstrip(".")
                )
            )
    return told


def _ahead(actor: Any) -> float:
    """Seconds by which a node's clock is ahead of this one's, by the quickest of three questions."""
    tries = []
    for _ in range(3):
        before = time.time()
        there = ray.get(actor.now.remote())
        after = time.time()
        tries.append((after - before, there - (before + after) / 2))
    return min(tries)[1]


def _unreachable(nodes: list[node_facts.Facts], actors: list[Any]) -> list[tuple[str, str, str]]:
    """Every node opens a free port; who cannot connect to whom, and why."""
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
    """Whether the job server refuses who comes without a token."""
    url = ray._private.worker.get_dashboard_url()
    if not url:
        return None
    try:
        return requests.get(f"http://{url}/api/version", timeout=5).status_code == 401
    except requests.RequestException:
        return None


def _all_reduce(found: Examined, actors: list[Any], alive: list[dict[str, Any]]) -> None:
    """A process group of one rank on every node that has CPUs or GPUs to give; of two ranks where that is one
    node.
    """
    places = [i for i, node in enumerate(alive) if {"CPU", "GPU"} & node["Resources"].keys()]
    more = [_actor(alive[places[0]])] if len(places) == 1 else []
    ranks = [actors[i] for i in places] + more
    gpus = all(found.nodes[i]["cuda_devices"] > len(more) for i in places)
    devices = [0 if i < len(places) else 1 for i in range(len(ranks))] if gpus else [None] * len(ranks)
    found.ranks, found.backend = len(ranks), "nccl" if gpus else "gloo"
    first = found.nodes[places[0]]["address"]
    meet = (first, ray.get(ranks[0].listen.remote(first)))
    told = _asked(
        [actor.all_reduce.remote(rank, len(ranks), meet, devices[rank]) for rank, actor in enumerate(ranks)]
    )
    if failures := [str(answer) for answer in told if isinstance(answer, _Silent)]:
        found.failed = failures[0]
    else:
        found.seconds = [max(times) for times in zip(*told, strict=True)]
    for actor in more:
        ray.kill(actor)


def _storage(found: Examined, actors: list[Any]) -> None:
    """The first node writes a probe that all must read; then all write at once, as they do when a run
    saves.
    """
    probe = str(Path(found.folder) / f".trifold-probe-{uuid4().hex}")
    if _asked([actors[0].write.remote(probe)]) == [""]:
        seen = _asked([actor.read.remote(probe) for actor in actors])
        found.unread = [
            node["host"] for node, sees in zip(found.nodes, seen, strict=True) if sees is not True
        ]
        Path(probe).unlink(missing_ok=True)
    told = _asked([actor.storage.remote(found.folder) for actor in actors])
    found.storage = [
        {"error": str(one), "free": 0.0, "rate": 0.0} if isinstance(one, _Silent) else one for one in told
    ]


def table(found: Examined) -> Table:
    """One row a fact: what all hosts say alike once, what differs with the hosts that say it, numbers from
    the least to the most.
    """
    table = Table(
        "",
        "",
        title=f"{len(found.nodes)} nodes" if len(found.nodes) > 1 else "this machine",
        show_header=False,
    )
    table.add_row("hosts", some(f"{node['host']} ({node['address']})" for node in found.nodes))
    for name in found.nodes[0]["versions"]:
        table.add_row(name, _said(groups(found, lambda node, name=name: node["versions"][name])))  # type: ignore[misc]
    table.add_row(
        "GPUs",
        _said(
            groups(found, lambda node: f"{len(node['gpus'])} {node['gpus'][0]}" if node["gpus"] else "none")
        ),
    )
    if any(node["driver"] for node in found.nodes):
        table.add_row("driver", _said(groups(found, lambda node: node["driver"] or "none")))
    table.add_row("collectives use", _said(groups(found, lambda node: node["interface"] or "no interface")))
    table.add_row("all-reduce", _collective(found))
    table.add_row(
        "ports",
        "each host reaches each other"
        if not found.unreachable
        else f"{len(found.unreachable)} connections failed",
    )
    table.add_row("clocks, ms ahead", _range([1000 * ahead for ahead in found.clocks], "{:+.1f}"))
    table.add_row("memory free, GiB", _range([node["memory"][0] / 2**30 for node in found.nodes], "{:.1f}"))
    table.add_row("/dev/shm free, GiB", _range([node["shm"] / 2**30 for node in found.nodes], "{:.1f}"))
    written = [one for one in found.storage if not one["error"]]
    table.add_row(
        "runs go to",
        f"{found.folder}, " + (f"not seen by {some(found.unread)}" if found.unread else "seen by all"),
    )
    if written:
        table.add_row("  free, GiB", _range([one["free"] / 2**30 for one in written], "{:.1f}"))
        table.add_row("  MB/s to disk, all at once", _range([one["rate"] / 1e6 for one in written], "{:.0f}"))
    table.add_row("job server", {None: "none", True: "asks for a token", False: "takes anybody"}[found.token])
    return table


def _collective(found: Examined) -> str:
    if not found.seconds:
        return found.failed or "not tried"
    times = ", ".join(
        f"{size >> 10:,} KiB in {1000 * seconds:.2f} ms ({size / seconds / 1e6:.0f} MB/s)"
        for size, seconds in zip(SIZES, found.seconds, strict=True)
    )
    return f"{found.ranks} ranks over {found.backend}: {times}"


def _said(by_value: dict[str, list[str]]) -> str:
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({some(hosts)})" for value, hosts in by_value.items())


def _range(numbers: list[float], shape: str) -> str:
    least, most = shape.format(min(numbers)), shape.format(max(numbers))
    return least if least == most else f"{least} to {most}"
