"""What is wrong with a cluster, one sentence each, out of the plain facts that its machines gave. Pure: no
machine is asked here.

In: facts by node (facts.py), and what was measured between the nodes. Out: findings, each with what to mend,
or to know.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from trifold.launch.jobs.node_facts import Facts, Quick, Storage

PYTHONS = ("3.11", "3.12")
_GIB = 2**30


class Finding(NamedTuple):
    fix: bool  # else only worth knowing
    sentence: str


@dataclass
class Examined:
    """What was found out about a cluster; lists run along `nodes`."""

    nodes: list[Facts]
    folder: str
    clocks: list[float]  # seconds that each is ahead of the driver
    unreachable: list[tuple[str, str, str]]  # from, to (hosts), why
    unread: list[str]  # hosts that do not read what the first one wrote into the folder
    storage: list[Storage]
    token: bool | None  # whether the job server asks for one; None: there is none
    silent: list[tuple[str, str]] = field(default_factory=list)  # nodes that could not be asked, and why
    ranks: int = 0  # in the all-reduce, over ...
    backend: str = ""
    seconds: list[float] = field(default_factory=list)  # of each size; none where it failed, for this reason:
    failed: str = ""


def diagnose(found: Examined) -> list[Finding]:
    """Everything to mend or to know, worst first."""
    findings = [
        Finding(True, f"{host} could not be asked: {why}. Look into its log, or take it out of the cluster.")
        for host, why in found.silent
    ]
    findings += [*_versions(found), *_gpus(found), *network(found), *_machine(found), *_storage(found)]
    if found.failed:
        findings.append(
            Finding(
                True, f"{found.ranks} nodes could not add up numbers over {found.backend}: {found.failed}."
            )
        )
    if found.token is False:
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


def groups(found: Examined, fact: Callable[[Facts], str]) -> dict[str, list[str]]:
    """Hosts by what they say, the most frequent first."""
    said: dict[str, list[str]] = {}
    for node in found.nodes:
        said.setdefault(fact(node), []).append(node["host"])
    return dict(sorted(said.items(), key=lambda item: -len(item[1])))


def some(hosts: Iterable[str]) -> str:
    """A few hosts by name, many by number."""
    names = list(dict.fromkeys(hosts))
    return ", ".join(names) if len(names) < 5 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def _versions(found: Examined) -> list[Finding]:
    findings = []
    for name in found.nodes[0]["versions"]:
        by_version = groups(found, lambda node, name=name: node["versions"][name])  # type: ignore[misc]
        if missing := by_version.get("none"):
            findings.append(
                Finding(
                    True,
                    f"{some(missing)} has no {name} where its Ray runs: pip install -c constraints.txt -e ."
                    " there.",
                )
            )
        elif len(by_version) > 1:
            said = "; ".join(f"{version} on {some(hosts)}" for version, hosts in by_version.items())
            findings.append(
                Finding(
                    True,
                    f"{name} differs ({said}): install the same release everywhere, as constraints.txt has"
                    " it.",
                )
            )
    return findings


def _gpus(found: Examined) -> list[Finding]:
    findings = [
        Finding(
            True,
            f"{node['host']} has {len(node['gpus'])} GPUs with driver {node['driver']}, and torch"
            f" {node['versions']['torch']} can use"
            f" {node['cuda_devices']}: install the torch build for that driver's CUDA.",
        )
        for node in found.nodes
        if len(node["gpus"]) != node["cuda_devices"]
    ]
    kinds = groups(found, lambda node: _gpu(node) if node["gpus"] else "")
    if len(kinds.keys() - {""}) > 1:
        said = "; ".join(f"{kind} on {some(hosts)}" for kind, hosts in kinds.items() if kind)
        findings.append(Finding(False, f"GPUs differ ({said}): each step takes as long as the slowest one."))
    return findings


def _gpu(node: Facts) -> str:
    return f"{len(node['gpus'])} {' and '.join(sorted(set(node['gpus'])))}, driver {node['driver']}"


def network(found: Examined) -> list[Finding]:
    """What keeps the nodes from speaking to each other."""
    findings = []
    for node in found.nodes:
        library = "NCCL" if node["gpus"] else "GLOO"
        if node["asked"] and not node["interface"]:
            findings.append(
                Finding(
                    True,
                    f"{node['host']} is told {library}_SOCKET_IFNAME={node['asked']} and has no such"
                    " interface: name one it has.",
                )
            )
        elif len(found.nodes) > 1 and node["interface"] in ("", "lo"):
            findings.append(
                Finding(
                    True,
                    f"collectives on {node['host']} would use {node['interface'] or 'no interface'}, where"
                    " no other host reaches it: set"
                    f" {library}_SOCKET_IFNAME to the interface of {node['address']} where `ray start` runs.",
                )
            )
    for other, why in dict.fromkeys((other, why) for _, other, why in found.unreachable):
        hosts = some(host for host, *rest in found.unreachable if rest == [other, why])
        findings.append(
            Finding(
                True,
                f"{hosts} cannot reach {other} on a free port ({why}): open all ports between the hosts.",
            )
        )
    if len(mtus := groups(found, lambda node: str(node["mtu"]))) > 1:
        said = "; ".join(f"{mtu} on {some(hosts)}" for mtu, hosts in mtus.items())
        findings.append(
            Finding(False, f"the interfaces' MTU differs ({said}): large messages may stall; set one value.")
        )
    return findings


def _machine(found: Examined) -> list[Finding]:
    findings = [
        Finding(
            True,
            f"{node['host']}'s clock is {ahead:+.1f} s off this one's: switch NTP on, or logs and events do"
            " not line up.",
        )
        for node, ahead in zip(found.nodes, found.clocks, strict=True)
        if abs(ahead) > 1
    ]
    if small := [node["host"] for node in found.nodes if node["shm"] < _GIB]:
        findings.append(
            Finding(
                True,
                f"/dev/shm of {some(small)} has less than 1 GiB free, and Ray and NCCL need it: start the"
                " container with --shm-size=8g.",
            )
        )
    return findings


def _storage(found: Examined) -> list[Finding]:
    findings = []
    broken = {
        node["host"]: one["error"]
        for node, one in zip(found.nodes, found.storage, strict=True)
        if one["error"]
    }
    if found.unread:
        findings.append(
            Finding(
                True,
                f"{some(found.unread)} does not see what {found.nodes[0]['host']} wrote to {found.folder}:"
                " mount the same storage there on"
                " all hosts.",
            )
        )
    for why in dict.fromkeys(broken.values()):
        hosts = some(host for host, error in broken.items() if error == why)
        findings.append(
            Finding(
                True, f"{hosts} cannot write to {found.folder} ({why}): runs are written there by every host."
            )
        )
    if any(0 < one["free"] < 10 * _GIB for one in found.storage):
        free = min(one["free"] for one in found.storage if one["free"])
        findings.append(
            Finding(
                False,
                f"{found.folder} has {free / _GIB:.1f} GiB free; `trifold plan` says what a run's"
                " checkpoints take.",
            )
        )
    return findings
