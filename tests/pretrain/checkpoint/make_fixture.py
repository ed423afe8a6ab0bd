"""Make the checkpoint that test_format.py loads: `python -m tests.pretrain.checkpoint.make_fixture`.

Whoever changes the format of checkpoints raises FORMAT, runs this, and commits the new folder in place of the
old one.
"""

import shutil
import socket
from pathlib import Path

from tests.pretrain.checkpoint.builders import slices_of, state_of
from trifold.pretrain.checkpoint.format import FORMAT, Origin
from trifold.pretrain.checkpoint.lease import checkpoint_folder, take_generation
from trifold.pretrain.checkpoint.writing import commit, write_rank
from trifold.pretrain.storage.disk import DiskPath

FIXTURES = Path(__file__).with_name("fixtures")


def make_run(folder: Path) -> DiskPath:
    """Generation 1 saves steps 10 and 20 on two ranks, generation 2 closes it, saves step 30 on one."""
    run = DiskPath(folder)
    origin = Origin("a-host", {"python": "3.11.7", "torch": "2.7.1"}, None)
    for steps, world in (((10, 20), 2), ((30,), 1)):
        lease = take_generation(run)
        for step in steps:
            target = checkpoint_folder(run, step, lease.generation)
            for rank in range(world):
                write_rank(target, lease, rank, world, slices_of(step, rank, world))
            commit(target, lease, world, state_of(step), origin, timeout=5)
    return run


def main() -> None:
    socket.gethostname = lambda: "a-host"
    folder = FIXTURES / f"format-{FORMAT}"
    shutil.rmtree(folder, ignore_errors=True)
    make_run(folder)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file())} bytes")


if __name__ == "__main__":
    main()
