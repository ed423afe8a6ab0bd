"""The watchdog over a real rank that waits while its checkpoint is written."""

import subprocess
import sys
import time
from pathlib import Path

from tests.launch.cluster.stand_in import recipe
from trifold.launch.cluster.failure_report import Watchdog
from trifold.launch.cluster.timing import Timing

SAVES = """
import sys, time
from pathlib import Path
import torch
from trifold.pretrain.checkpoint.lease import take_generation
from trifold.pretrain.checkpoint.writing import write_rank
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.monitor.heartbeat import Heartbeat
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.storage_path import StorageOptions

def wait(operation, path):  # a slow disk
    time.sleep(0.3 * (path.suffix == ".safetensors"))

folder = Path(sys.argv[1])
run = DiskPath(folder, StorageOptions(before_write=wait))
lease = take_generation(run)
heartbeat = Heartbeat(folder, 0, "a-host", "its-name", "its.log", 60.0)
heartbeat.set_phase("saving", step=7)
slices = {f"p{i}": Slice(0, (4,), {"fp32": torch.ones(4)}) for i in range(8)}
write_rank(run / "checkpoint", lease, 0, 1, slices, heartbeat.count_written)
time.sleep(100)
"""


def test_a_rank_whose_save_progresses_does_not_hang_and_one_whose_save_stops_is_named(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SAVES, str(tmp_path)])
    try:
        watchdog = Watchdog(recipe(tmp_path, step_timeout=1.5), Timing(stack=0))
        start = time.monotonic()
        while not (tmp_path / "checkpoint" / "rank-00000.json").exists():
            assert watchdog.hanging_rank() is None
            assert time.monotonic() - start < 60 and process.poll() is None
            time.sleep(0.05)
        while (status := watchdog.hanging_rank()) is None:
            assert time.monotonic() - start < 60
            time.sleep(0.05)
        assert (status.rank, status.step, status.phase) == (0, 7, "saving")
    finally:
        process.kill()
        process.wait()
