"""TODO"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.lease import Lease, take_generation
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.monitor.metrics import Recorder, peak_flops
from trifold.pretrain.storage.storage import checkpoint_root
from trifold.pretrain.storage.storage_path import StoragePath

T = TypeVar("T")


def start_attempt(config: TrainingConfig, engine: Engine) -> tuple[Lease, Recorder]:
    """All ranks of an attempt begin: they take the run's next generation, and say that they have started."""
    root = checkpoint_root(Path(config.run), config.checkpoints.storage)
    generation = broadcast_from_rank0(engine, lambda: take_generation(root).generation)
    recorder = Recorder(Path(config.run), engine.place, generation)
    options = replace(root.options, on_retry=recorder.event)
    lease = Lease(root.with_options(options), generation)
    engine.place.reporter.exit_when(lease.superseded_by, every=root.poll_seconds)
    chosen = {"zero_stage": engine.stage, "precision": engine.precision, "recompute": engine.recompute}
    recorder.event("started", world=engine.place.world, **chosen, pid=os.getpid())
    return lease, recorder


def newest_checkpoint(root: StoragePath, recorder: Recorder) -> StoragePath | None:
    """The folder of the newest checkpoint that verifies; what was passed over goes to events.jsonl."""
    checkpoint = newest_verified(root, recorder.event)
    return None if checkpoint is None else checkpoint.folder


def peak_flops_all_ranks(engine: Engine) -> float:
    """FLOP/s of all ranks' devices together, in the precision in use."""
    dtype = torch.float32 if engine.precision == "fp32" else torch.bfloat16
    return float(engine.sum_over_ranks(torch.tensor([peak_flops(engine.place, dtype)], dtype=torch.float64)))


def broadcast_from_rank0(engine: Engine, ask: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; what it refuses, every rank refuses."""
    found: list[Any] = [None, None]
    if engine.place.rank == 0:
        try:
            found[0] = ask()
        except UserError as refusal:
            found[1] = refusal
    dist.broadcast_object_list(found, src=0, device=engine.device)
    if found[1] is not None:
        raise found[1]
    return found[0]
