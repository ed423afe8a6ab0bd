"""What a run writes about itself: metrics.jsonl (one line a step), events.jsonl (starts, saves, failures) and
TensorBoard files.

In: plain numbers from rank 0. Out: files that `cat` reads; half a line, left by a killed process, never
swallows the next one. After a resume the steps since the checkpoint appear again with a higher generation:
the last line of a step counts. Only rank 0 writes metrics: what is scored beside training
(launch/cluster/scoring_actor.py) waits for it in RUN/scoring, and carries the name of its checkpoint.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.monitor.run_folder import log_event, queued_scores
from trifold.pretrain.storage.jsonl import append_line

# Dense bf16 rates from the makers' datasheets, FLOP/s. Any other device is measured.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


class Recorder:
    """Writes a run's metrics and events on rank 0 and nothing elsewhere."""

    def __init__(self, run: Path, place: RankInfo, generation: int) -> None:
        self.run, self.generation, self.active = run, generation, place.rank == 0
        self.board = SummaryWriter(str(run / "tensorboard")) if self.active else None

    def metrics(self, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; the numbers among `values` also go to TensorBoard."""
        if self.board is None:
            return
        append_line(self.run / "metrics.jsonl", {"step": step, **values, "generation": self.generation})
        for name, value in values.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, step)

    def take_queued_scores(self) -> None:
        """Take what was scored beside training into the metrics. Cost where there is nothing: 20 to 60 us."""
        for file in queued_scores(self.run) if self.active else ():
            with suppress(FileNotFoundError):  # a group that was cut off and does not know it yet took it
                record = json.loads(file.read_text())
                file.unlink()
                self.metrics(**record)

    def event(self, event: str, **facts: Any) -> None:
        """One line of events.jsonl: {"time", "event", "generation", facts}. Other ranks than the first report
        what befalls them alone.
        """
        if self.active or event.endswith("_failed") or event == "terminated":
            log_event(self.run, event, generation=self.generation, **facts)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def peak_flops(place: RankInfo, dtype: torch.dtype) -> float:
    """FLOP/s of one rank's device that MFU is measured against: the datasheet's where known, else the best of
    the matrix products of `dtype` that fit into 0.2 s here, on a CPU by one thread, times threads: two that
    wait for each other tell how busy a machine is.
    """
    if place.device == "cuda":
        name = torch.cuda.get_device_name(place.local_rank)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    side = (
        4096 if place.device == "cuda" else 256
    )  # on a busy CPU the larger one never runs undisturbed: 25 GFLOP/s of 80
    a = torch.randn(side, side, device=place.device, dtype=dtype)
    seconds: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    while sum(seconds) < 0.2:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * side**3 / min(seconds) * (1 if place.device == "cuda" else place.threads)
