"""TODO"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among the ranks."""

    rank: int
    world: int
    local_rank: int  # among the ranks of this machine
    device: Literal["cpu", "cuda"]
    init_method: (
        str | None
    )  # how the ranks meet, as torch.distributed takes it; None: they have met already, or there is one
    threads: int
