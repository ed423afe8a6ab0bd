"""What is wrong with a cluster, one sentence each, from the facts that its nodes gave. No machine is
contacted here.

Facts by node (node_facts.py) and measurements between the nodes come in; findings come out, each to fix or to
note.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from trifold.launch.jobs.node_facts import Facts, Quick, Storage

PYTHONS = ("3.11", "3.12")
_GIB = 2**30


class Finding(NamedTuple):
    fix: bool  # False: only to note
    sentence: str


@dataclass
class ClusterFacts:
    """The facts of a cluster; lists are parallel to `nodes`."""

    nodes: list[Facts]
    folder: str
    clocks: list[float]  # seconds that each is ahead of the driver
    unreachable: list[tuple[str, str, str]]  # from, to (hosts), why
    unread: list[str]  # hosts that do not read what the first one wrote into the folder
    storage: list[Storage]
    token: bool | None  # whether the job server asks for one; None: there is none
    silent: list[tuple[str, str]] = field(default_factory=list)  # nodes that gave no answer, and why
    ranks: int = 0  # in the all-reduce, over ...
    backend: str = ""
    seconds: list[float] = field(default_factory=list)  # of each size; none where it failed, for this reason:
    failed: str = ""


def diagnose(cluster: ClusterFacts) -> list[Finding]:
    """Everything to fix or to note; what must be fixed comes first."""
    findings = [
        Finding(True, f"{host} gave no answer: {why}. Check its log, or remove it from the cluster.")
        for host, why in cluster.silent
    ]
    findings += [
        *_versions(cluster),
        *_gpus(cluster),
        *network(cluster),
        *_machine(cluster),
        *_storage(cluster),
    ]
    if cluster.failed:
        findings.append(
            Finding(
                True,
                f"{cluster.ranks} nodes could not all-reduce over {cluster.backend}: {cluster.failed}.",
            )
        )
    if cluster.token is False:
        findings.append(
            Finding(
                True,
                "the job server answers without a token, so whoever reaches it runs code there: set"
                " RAY_AUTH_MODE=token and restart.",
            )
        )
    return sorted(findings, key=lambda finding: not finding.fix)


def before_submit(here: dict[str, str], there: Quick, folder: str, code: bool) -> list[str]:
    """What keeps a job from training: `here` the submitter's versions, `there` the head's facts; `code`: the
    job brings its Trifold.
    """
    host, versions, wrong = there["host"], there["versions"], []
    if not versions["python"].startswith(PYTHONS):
        wrong.append(f"{host} has Python {versions['python']}, and Trifold needs {' or '.join(PYTHONS)}")
    if missing := [name for name in ("torch", "deepspeed") if versions[name] == "none"]:
        wrong.append(
            f"{host} has no {' and no '.join(missing)} where its Ray runs: pip install -c constraints.txt -e"
            " . there"
        )
    if not code and versions["trifold"] != here["trifold"]:
        has = "no Trifold" if versions["trifold"] == "none" else f"Trifold {versions['trifold']}"
        wrong.append(
            f"{host} has {has}, and here is {here['trifold']}: install that one there, or ship yours with"
            " --code"
        )
    if not there["shared"]:
        wrong.append(
            f"{host} does not see what was written to {folder} here: the run folder must lie on storage that"
            " the cluster shares"
        )
    return wrong


def groups(cluster: ClusterFacts, fact: Callable[[Facts], str]) -> dict[str, list[str]]:
    """Hosts by what they say, the most frequent first."""
    hosts: dict[str, list[str]] = {}
    for node in cluster.nodes:
        hosts.setdefault(fact(node), []).append(node["host"])
    return dict(sorted(hosts.items(), key=lambda item: -len(item[1])))


def join_names(hosts: Iterable[str]) -> str:
    """A few hosts by name, many by number."""
    names = list(dict.fromkeys(hosts))
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _versions(cluster: ClusterFacts) -> list[Finding]:
    findings = []
    for name in cluster.nodes[0]["versions"]:
        by_version = groups(cluster, lambda node, name=name: node["versions"][name])  # type: ignore[misc]
        if missing := by_version.get("none"):
            findings.append(
                Finding(
                    True,
                    f"{join_names(missing)} has no {name} where its Ray runs: pip install -c"
                    f" constraints.txt -e ."
                    " there.",
                )
            )
        elif len(by_version) > 1:
            values = "; ".join(f"{version} on {join_names(hosts)}" for version, hosts in by_version.items())
            findings.append(
                Finding(
                    True,
                    f"{name} differs ({values}): install the same release everywhere, as constraints.txt has"
                    " it.",
                )
            )
    return findings


def _gpus(cluster: ClusterFacts) -> list[Finding]:
    findings = [
        Finding(
            True,
            f"{node['host']} has {len(node['gpus'])} GPUs with driver {node['driver']}, and torch"
            f" {node['versions']['torch']} can use"
            f" {node['cuda_devices']}: install the torch build for that driver's CUDA.",
        )
        for node in cluster.nodes
        if len(node["gpus"]) != node["cuda_devices"]
    ]
    kinds = groups(cluster, lambda node: _gpu(node) if node["gpus"] else "")
    if len(kinds.keys() - {""}) > 1:
        values = "; ".join(f"{kind} on {join_names(hosts)}" for kind, hosts in kinds.items() if kind)
        findings.append(
            Finding(False, f"GPUs differ ({values}): each step takes as long as the slowest one.")
        )
    return findings


def _gpu(node: Facts) -> str:
    return f"{len(node['gpus'])} {' and '.join(sorted(set(node['gpus'])))}, driver {node['driver']}"


def network(cluster: ClusterFacts) -> list[Finding]:
    """What keeps the nodes from speaking to each other."""
    findings = []
    for node in cluster.nodes:
        library = "NCCL" if node["gpus"] else "GLOO"
        if node["asked"] and not node["interface"]:
            findings.append(
                Finding(
                    True,
                    f"{node['host']} is told {library}_SOCKET_IFNAME={node['asked']} and has no such"
                    " interface: name one it has.",
                )
            )
        elif len(cluster.nodes) > 1 and node["interface"] in ("", "lo"):
            findings.append(
                Finding(
                    True,
                    f"collectives on {node['host']} would use {node['interface'] or 'no interface'}, where"
                    " no other host reaches it: set"
                    f" {library}_SOCKET_IFNAME to the interface of {node['address']} where `ray start` runs.",
                )
            )
    for other, why in dict.fromkeys((other, why) for _, other, why in cluster.unreachable):
        hosts = join_names(host for host, *rest in cluster.unreachable if rest == [other, why])
        findings.append(
            Finding(
                True,
                f"{hosts} cannot reach {other} on a free port ({why}): open all ports between the hosts.",
            )
        )
    if len(mtus := groups(cluster, lambda node: str(node["mtu"]))) > 1:
        values = "; ".join(f"{mtu} on {join_names(hosts)}" for mtu, hosts in mtus.items())
        findings.append(
            Finding(
                False, f"the interfaces' MTU differs ({values}): large messages may stall; set one value."
            )
        )
    return findings


def _machine(cluster: ClusterFacts) -> list[Finding]:
    findings = [
        Finding(
            True,
            f"{node['host']}'s clock is {ahead:+.1f} s off this one's: switch NTP on, or logs and events do"
            " not line up.",
        )
        for node, ahead in zip(cluster.nodes, cluster.clocks, strict=True)
        if abs(ahead) > 1
    ]
    if small := [node["host"] for node in cluster.nodes if node["shm"] < _GIB]:
        findings.append(
            Finding(
                True,
                f"/dev/shm of {join_names(small)} has less than 1 GiB free, and Ray and NCCL need it:"
                f" start the"
                " container with --shm-size=8g.",
            )
        )
    return findings


def _storage(cluster: ClusterFacts) -> list[Finding]:
    findings = []
    broken = {
        node["host"]: one["error"]
        for node, one in zip(cluster.nodes, cluster.storage, strict=True)
        if one["error"]
    }
    if cluster.unread:
        findings.append(
            Finding(
                True,
                f"{join_names(cluster.unread)} does not see what {cluster.nodes[0]['host']} wrote to"
                f" {cluster.folder}:"
                " mount the same storage there on"
                " all hosts.",
            )
        )
    for why in dict.fromkeys(broken.values()):
        hosts = join_names(host for host, error in broken.items() if error == why)
        findings.append(
            Finding(
                True,
                f"{hosts} cannot write to {cluster.folder} ({why}): runs are written there by every host.",
            )
        )
    if any(0 < one["free"] < 10 * _GIB for one in cluster.storage):
        free = min(one["free"] for one in cluster.storage if one["free"])
        findings.append(
            Finding(
                False,
                f"{cluster.folder} has {free / _GIB:.1f} GiB free; `trifold plan` says what a run's"
                " checkpoints take.",
            )
        )
    return findings
