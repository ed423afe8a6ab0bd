"""Where a process stands among the ranks of a run, and to whom it reports what it is doing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol


class Reporter(Protocol):
    """What a rank tells about itself while it works (monitor/heartbeat.py)."""

    def set_phase(self, phase: str, **position: Any) -> None:
        """The rank begins a phase. `step` and `rows` hold until they are given again, `micro` for this phase."""

    def count_written(self) -> None:
        """A buffer of this rank's share of a checkpoint is written."""

    def exit_when(self, check: Callable[[], str | None], every: float) -> None:
        """End this process, whatever it waits for, once `check`, called each `every` seconds, returns why."""


class Silent:
    """A Reporter that reports to nobody: tests, and runs in one process."""

    def set_phase(self, phase: str, **position: Any) -> None: ...

    def count_written(self) -> None: ...

    def exit_when(self, check: Callable[[], str | None], every: float) -> None: ...


@dataclass(frozen=True)
class RankInfo:
    """Where this process stands among the ranks."""

    rank: int
    world: int
    local_rank: int  # among the ranks of this machine
    device: Literal["cpu", "cuda"]
    init_method: (
        str | None
    )  # as torch.distributed takes it; None: the process group exists, or there is one rank
    threads: int
    reporter: Reporter = field(default=Silent(), compare=False, repr=False)
