"""The driver of a run, as two people start it."""

import subprocess
import sys

from tests.launch.command_line import trifold, write_tiny

HOLDS = """
import sys, time
from pathlib import Path
from trifold.pretrain.checkpoint.driver_claim import DriverClaim
from trifold.pretrain.storage.disk import DiskPath
with DriverClaim(DiskPath(Path(sys.argv[1])), renew_seconds=0.2):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_driver_is_told_who_holds_the_run_and_ends(tmp_path):
    folder = write_tiny(tmp_path)
    command = [sys.executable, "-c", HOLDS, str(folder / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            result = trifold(folder, "pretrain", "tiny.yaml")
        finally:
            holder.kill()
    assert result.code == 1 and "run is driven by a driver on " in result.err
    assert f"(process {holder.pid}, since 20" in result.err
    assert not (folder / "run" / "config.yaml").exists()
