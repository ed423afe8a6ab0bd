"""What the ranks of a run record: metrics.jsonl (one line a step), events.jsonl (starts, saves, failures) and
TensorBoard files.

After a resume the steps since the checkpoint appear again with a higher generation: the last line of a step
counts. Only rank 0 writes metrics: scores that are computed beside training (launch/cluster/scoring_actor.py)
wait for it in RUN/scoring and carry the name of their checkpoint.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.monitor.events import EVENTS, EventName
from trifold.pretrain.monitor.run_folder import log_event, queued_scores
from trifold.pretrain.storage.jsonl import append_line

# Dense bf16 rates from the makers' datasheets, FLOP/s. Any other device is measured.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


class Recorder:
    """Writes a run's metrics and events on rank 0; on other ranks only the events that concern each rank."""

    def __init__(self, run: Path, rank_info: RankInfo, generation: int) -> None:
        self.run, self.generation, self.active = run, generation, rank_info.rank == 0
        self.board = SummaryWriter(str(run / "tensorboard")) if self.active else None

    def metrics(self, step: int, **values: Any) -> None:
        """One line of metrics.jsonl; the floats among `values` also go to TensorBoard."""
        if self.board is None:
            return
        append_line(self.run / "metrics.jsonl", {"step": step, **values, "generation": self.generation})
        for name, value in values.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, step)

    def take_queued_scores(self) -> None:
        """Move the scores that were computed beside training into the metrics. Costs 20 to 60 us where there
        are none.
        """
        for file in queued_scores(self.run) if self.active else ():
            with suppress(FileNotFoundError):  # a superseded group that does not know it yet took it
                scores = json.loads(file.read_text())
                file.unlink()
                self.metrics(**scores)

    def event(self, event: EventName, **facts: Any) -> None:
        """One line of events.jsonl."""
        if self.active or EVENTS[event].every_rank:
            log_event(self.run, event, generation=self.generation, **facts)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def peak_flops(rank_info: RankInfo, dtype: torch.dtype) -> float:
    """FLOP/s of one rank's device, which MFU is relative to: the datasheet's where known, else measured.

    The measurement is the best of the matrix products of `dtype` that fit into 0.2 s, on a CPU by one thread,
    times threads: two threads that wait for each other measure how busy a machine is.
    """
    if rank_info.device == "cuda":
        name = torch.cuda.get_device_name(rank_info.local_rank)
        for model, peak in PEAK_FLOPS.items():
            if model in name:
                return peak
    # on a busy CPU the larger product never runs undisturbed: 25 GFLOP/s of 80
    side = 4096 if rank_info.device == "cuda" else 256
    a = torch.randn(side, side, device=rank_info.device, dtype=dtype)
    seconds: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    while sum(seconds) < 0.2:
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * side**3 / min(seconds) * (1 if rank_info.device == "cuda" else rank_info.threads)
