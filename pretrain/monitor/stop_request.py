"""Whether somebody asked a run to save and end: in, SIGTERM or a file in its folder; out, a yes or no before
each step.

Apart from the loop, because Ray's workers hear SIGTERM before they import torch.
"""

import signal
import threading
from pathlib import Path
from types import FrameType


class StopRequest:
    """Somebody asked these ranks to save and return: SIGTERM to one of their processes (its host goes away),
    or a file in the run folder: `stop` from a person, `regroup` from the driver, which goes on with more
    workers.
    """

    terminated = False  # of this process, whoever listened

    def __init__(self, run: Path) -> None:
        self.files = (run / "stop", run / "regroup")
        if (
            threading.current_thread() is threading.main_thread()
        ):  # else whoever owns the process has called `hear` there
            self.hear()

    @classmethod
    def hear(cls) -> None:
        """Take SIGTERM as a request, in this process from now on; only its main thread can say so."""
        cls.terminated = False
        signal.signal(signal.SIGTERM, cls._terminate)

    @classmethod
    def _terminate(cls, number: int, frame: FrameType | None) -> None:
        cls.terminated = True

    def asked(self) -> bool:
        return self.terminated or any(file.exists() for file in self.files)
