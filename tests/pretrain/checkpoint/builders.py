"""Small runs with real checkpoints: two ranks, three parameters, numbers that differ at each step."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.pretrain.checkpoint.failpoints import append_note
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.format import unseal
from trifold.pretrain.checkpoint.lease import Lease, Superseded, checkpoint_folder, take_generation
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.checkpoint.slice import Slice
from trifold.pretrain.checkpoint.state import CheckpointState, TaskState
from trifold.pretrain.checkpoint.writing import write_rank
from trifold.pretrain.config.training import CheckpointConfig
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.storage_path import StoragePath

KEEP_ONE = CheckpointConfig(keep_last=1, keep_best=False)
KEEP_TWO = CheckpointConfig(keep_last=2, keep_best=False)


def nothing(event: str, **facts: Any) -> None:
    """An on_event that nobody reads."""


class Events(list[dict[str, Any]]):
    """An on_event that keeps what it receives."""

    def __call__(self, event: str, **facts: Any) -> None:
        self.append({"kind": event} | facts)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self if event["kind"] == kind]


def state_of(step: int, heldout_loss: float | None = None) -> CheckpointState:
    return CheckpointState(
        step=step,
        cursor=step * 8,
        optimizer_step=step - 1,
        skips=[(3, 4)],
        fingerprint="fingerprint",
        config={"engine": {"zero_stage": 1}},
        model={"dim": 6},
        tokens=7,
        skipped_in_a_row=1,
        recent=[(2.5, 0.5)],
        scores={"heldout_loss": heldout_loss},
        heldout_loss=heldout_loss,
        task=TaskState("qa", None, None, "f1", [(1, 0.25)]),
    )


def lease_of(run: StoragePath, generation: int = 1) -> Lease:
    """The lease of a generation that has claimed."""
    claim = unseal((run / "lease" / f"{generation:06d}").read_bytes())
    assert claim is not None
    return Lease(run, generation, claim)


def tensors_of(step: int) -> dict[str, Tensor]:
    """A little model's numbers, different at each step."""
    return {
        "wte.weight": torch.arange(60.0).view(10, 6) + step,
        "norm.weight": torch.arange(7.0) - step,
        "scale": torch.tensor(step / 3),
    }


def slices_of(step: int, rank: int, world: int) -> dict[str, Slice]:
    """A rank's share of them, with a moment for all but `scale`."""
    slices = {}
    for name, tensor in tensors_of(step).items():
        start, stop = (tensor.numel() * index // world for index in (rank, rank + 1))
        fp32 = tensor.flatten()[start:stop]
        if fp32.numel():
            tensors = {"fp32": fp32} if name == "scale" else {"fp32": fp32, "exp_avg": fp32 * 2}
            slices[name] = Slice(start, tuple(tensor.shape), tensors)
    return slices


def save(
    lease: Lease, step: int, keep: CheckpointConfig = KEEP_TWO, on_event: Any = nothing, world: int = 2
) -> None:
    """A save by `world` ranks, in a fixed order: rank 0 last."""
    folder = checkpoint_folder(lease.run, step, lease.generation)
    for rank in range(1, world):
        write_rank(folder, lease, rank, world, slices_of(step, rank, world))
    checkpointer = Checkpointer(lease, 0, world, keep, on_event, timeout=5)
    checkpointer.save(state_of(step), slices_of(step, 0, world))
    checkpointer.wait()


def attempt(run: StoragePath, step: int, notes: Path) -> None:
    """A full attempt, for a process of its own: claim, read the newest, save, delete the one before."""

    def on_event(event: str, **facts: Any) -> None:
        append_note(notes, event, facts)

    lease = take_generation(run)
    newest_verified(run, on_event)
    save(lease, step, KEEP_ONE, on_event)


def save_in(lease: Lease, step: int, notes: Path) -> None:
    """`save`, for a process of its own."""

    def on_event(event: str, **facts: Any) -> None:
        append_note(notes, event, facts)

    try:
        save(lease, step, KEEP_ONE, on_event)
    except Superseded as error:
        on_event("superseded", reason=str(error))


def newest_step(run: StoragePath) -> int:
    """The step of the newest verified checkpoint, whose content is compared number for number."""
    checkpoint = newest_verified(run, Events())
    assert checkpoint is not None
    step = checkpoint.state.step
    assert checkpoint.state == state_of(step)
    for name, tensor in tensors_of(step).items():
        assert torch.equal(checkpoint.full(name), tensor)
        if name != "scale":
            assert torch.equal(checkpoint.full(name, "exp_avg"), tensor * 2)
    return step


def new_run(folder: Path) -> DiskPath:
    """A run with a committed checkpoint of step 10 by generation 1, two ranks."""
    folder.mkdir()
    run = DiskPath(folder)
    save(take_generation(run), 10)
    return run
