"""What is measured of one run of a comparison: curve, scores, speed and attention maps, as plain values."""

import math
from dataclasses import dataclass
from pathlib import Path

from trifold.launch.compare.probes import Map
from trifold.pretrain.storage.jsonl import read_lines


@dataclass(frozen=True)
class Point:
    """A held-out loss, and what had been spent on training steps by then."""

    tokens: int
    seconds: float
    cpu_seconds: float  # of the first rank's process
    loss: float


@dataclass(frozen=True)
class Bin:
    """The score of the sentences of one length, with its interval."""

    words: float  # mean length of the source
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """One model and all that was measured of it."""

    name: str
    group: str  # runs of one group are compared with each other
    cell: str
    attends: bool  # to its source, or to what it read
    on_cpu: bool
    parameters: int
    steps: int
    curve: list[Point]
    scores: dict[str, str]
    by_length: list[Bin]
    reach: list[float]
    speed: dict[int, float]
    maps: list[Map]


def curve(folder: Path) -> list[Point]:
    """Each evaluation, after the tokens and seconds of the steps before it; of a step that was done twice the
    later one counts.
    """
    lines = read_lines(folder / "metrics.jsonl")
    steps = {line["step"]: line for line in lines if "seconds" in line}
    scored = {line["step"]: line["heldout_loss"] for line in lines if "heldout_loss" in line}
    done = sorted(steps)
    spent = {0: (0, 0.0, 0.0)}
    for before, step in zip([0, *done], done, strict=False):
        line = steps[step]
        spent[step] = (
            line["tokens"],
            spent[before][1] + line["seconds"],
            spent[before][2] + line.get("cpu_seconds", math.nan),
        )
    return [Point(*spent[step], loss) for step, loss in sorted(scored.items())]
