"""`trifold bench save`: what a checkpoint of a recipe costs: how long training waits, the background writes,
a resume reads.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from trifold.launch.bench.contenders import timed_step
from trifold.launch.bench.report import Row, machine, show
from trifold.launch.bench.train import field
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import newest_verified, open_checkpoint
from trifold.pretrain.checkpoint.lease import take_generation
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.storage.disk import DiskPath

SAVES = 5


class Costs(NamedTuple):
    """Seconds of one rank's checkpoint of `size` bytes: medians of the saves."""

    size: int
    waits: float  # training: the copy to host memory, and the call
    written: float  # in the background, until it counts
    verified: float  # at a resume
    read: float
    copied: float  # a plain copy of as many bytes


def bench(
    config: PretrainRecipe, rank_info: RankInfo, console: Terminal, *, folder: Path, out: Path | None
) -> None:
    """Measure in a new folder below `folder`, which is removed, and show."""
    [racer] = field(config, rank_info, 0, ())
    racer.model, racer.step = racer.make()
    for i in range(2):
        timed_step(racer, rank_info, i)
    assert racer.engine is not None
    found = measure(racer.engine, config, folder)
    named = {
        "training waits (copy and call)": found.waits,
        "written and committed, in the background": found.written,
        "verified, at a resume": found.verified,
        "read back, at a resume": found.read,
        "a plain host copy of as many bytes": found.copied,
    }
    rows: list[Row] = [
        {"": name, "MB/s": found.size / seconds / 1e6, "seconds": seconds, "MB": found.size / 1e6}
        for name, seconds in named.items()
    ]
    every, step = config.checkpoints.every, racer.seconds[-1]
    share = found.waits / (every * step + found.waits)
    rows.insert(1, {"": f"of training, saved every {every} steps of {step:.2g} s", "share %": 100 * share})
    show(
        console,
        f"{config.run}: one rank's checkpoint\n{machine(rank_info.device, rank_info.threads)}",
        rows,
        out,
    )


def measure(engine: Engine, config: PretrainRecipe, folder: Path) -> Costs:
    """Real saves of an engine into a run of their own below `folder`, and the newest one read back."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-save-") as made:
        run = DiskPath(Path(made))
        written = []

        def heard(event: str, **facts: Any) -> None:
            if event == "save_committed":
                written.append(facts["seconds"])

        saver = Checkpointer(take_generation(run), 0, 1, config.checkpoints, heard)
        waits = []
        for step in range(1, SAVES + 1):
            began = time.perf_counter()
            slices = engine.slices()
            saver.save(
                CheckpointState(
                    step=step,
                    cursor=step,
                    optimizer_step=step,
                    skips=[],
                    fingerprint="bench",
                    config={},
                    model={},
                ),
                slices,
            )
            waits.append(time.perf_counter() - began)
            saver.wait()
        if saver.failed is not None:
            raise UserError(f"a save below {folder} failed: {saver.failed}")
        verified, found = _timed(lambda: newest_verified(run, heard))
        read, _ = _timed(lambda: engine.load(open_checkpoint(found.folder).read, engine.optimizer_step))
    size = sum(tensor.nbytes for piece in slices.values() for tensor in piece.tensors.values())
    flat = torch.zeros(size // 4)
    copied = median(_timed(flat.clone)[0] for _ in range(SAVES))
    return Costs(size, median(waits), median(written), verified, read, copied)


def _timed(work: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    done = work()
    return time.perf_counter() - began, done
