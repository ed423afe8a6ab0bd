"""The waiting times of a run on a cluster, in seconds; tests pass smaller ones."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    connect: float = 1.0  # within which a host must accept a connection to count as reachable
    release: float = 2.0  # until Ray counts the resources of an ended group as free
    resize: float = (
        5.0  # for which free capacity must be stable before a group is resized: hosts often come together
    )
    stack: float = 3.0  # by which the stacks of hanging ranks, each written on its own clock, may be late
    monitor: float = 2.0  # between two looks at all ranks and hosts
    peer_failure: float = (
        10.0  # before a rank reports a lost peer, so that the rank that died is reported first
    )
    scorer: float = 30.0  # until it is reported that the scorer cannot be placed
