"""Which checkpoints stay. In: a run folder and the recipe's `checkpoints`. Out: fewer folders, never the last
one that verifies.

Cost: before anything is deleted the newest checkpoint is read back and hashed (1.4 GB/s per core, in the
saving thread).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trifold.pretrain.checkpoint.checkpoint import CorruptCheckpoint, read_marker, verify
from trifold.pretrain.checkpoint.lease import COMMIT, Lease, P, all_folders, parse_folder_name, valid_folders
from trifold.pretrain.config.training import CheckpointConfig
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.storage.storage_path import StoragePath


def folders_to_keep(found: Sequence[tuple[P, int, float | None]], keep: CheckpointConfig) -> set[P]:
    """The folders that stay, of (folder, step, held-out loss) oldest first: the last ones, each multiple, the
    best one.
    """
    stay = {folder for folder, _, _ in found[-keep.keep_last :]}
    if keep.keep_every:
        stay |= {folder for folder, step, _ in found if step % keep.keep_every == 0}
    judged = [(loss, folder) for folder, _, loss in found if loss is not None and math.isfinite(loss)]
    if keep.keep_best and judged:
        stay.add(min(judged, key=lambda pair: pair[0])[1])
    return stay


def retain(lease: Lease, keep: CheckpointConfig, on_event: OnEvent) -> None:
    """Delete what need not stay, once the newest checkpoint has been read back and verifies; else delete
    nothing and say so.
    """
    found = [
        (folder, parse_folder_name(folder.name)[1], _selection_loss(folder))
        for folder in valid_folders(lease.run)
    ]
    stay = folders_to_keep(found, keep)
    doomed = [folder for folder, _, _ in found if folder not in stay]
    if not doomed:
        return
    newest = found[-1][0]
    try:
        verify(newest)
    except CorruptCheckpoint as error:
        on_event("checkpoint_rejected", checkpoint=newest.name, file=error.file, reason=error.reason)
        return
    # after this, a new generation closes ours with `newest` in it: it has a checkpoint whatever we delete
    lease.check()
    for folder in doomed:
        folder.remove_folder(COMMIT)
        on_event("checkpoint_deleted", checkpoint=folder.name)


def sweep(lease: Lease, step: int, on_event: OnEvent) -> None:
    """Remove folders that will never count: of earlier generations, and of this one's failed saves before
    `step`.
    """
    lease.check()
    counting = set(valid_folders(lease.run))
    for folder in all_folders(lease.run):
        if folder not in counting and parse_folder_name(folder.name) < (lease.generation, step):
            folder.remove_folder(COMMIT)
            on_event("checkpoint_swept", checkpoint=folder.name)


def _selection_loss(folder: StoragePath) -> float | None:
    try:
        state = read_marker(folder)["state"]
    except CorruptCheckpoint:  # not the best of anything; reading it for a resume says what is wrong
        return None
    loss = state["heldout_loss"] if state.get("selection_loss") is None else state["selection_loss"]
    return None if loss is None else float(loss)
