"""Which checkpoints stay: the recipe's `checkpoints` decides, and the last one that verifies is never
deleted.

Cost: before anything is deleted the newest checkpoint is read back and hashed (1.4 GB/s per core, in the
saving thread). With 2,000 checkpoints a save spends the time in LOG.md here; markers are read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trifold.pretrain.checkpoint.checkpoint import verify
from trifold.pretrain.checkpoint.format import COMMIT, CorruptCheckpoint, parse_folder_name, read_marker
from trifold.pretrain.checkpoint.lease import Lease, P, all_folders, valid_among, valid_folders
from trifold.pretrain.config.training import CheckpointConfig
from trifold.pretrain.monitor.events import OnEvent
from trifold.pretrain.storage.storage_path import StoragePath

Losses = tuple[float, float]  # the loss that selects, and the held-out loss, which decides between equals


def folders_to_keep(checkpoints: Sequence[tuple[P, int, Losses | None]], keep: CheckpointConfig) -> set[P]:
    """The folders that stay, of (folder, step, losses) oldest first: the last ones, each multiple, the best
    one.
    """
    stay = {folder for folder, _, _ in checkpoints[-keep.keep_last :]}
    if keep.keep_every:
        stay |= {folder for folder, step, _ in checkpoints if step % keep.keep_every == 0}
    scored = [(losses, folder) for folder, _, losses in checkpoints if losses and math.isfinite(losses[0])]
    if keep.keep_best and scored:
        stay.add(min(scored, key=lambda pair: pair[0])[1])
    return stay


class Retention:
    """Deletes the checkpoints of a run that need not stay, as the holder of its lease."""

    def __init__(self, lease: Lease, keep: CheckpointConfig, on_event: OnEvent) -> None:
        self.lease, self.keep, self.on_event = lease, keep, on_event
        self._losses: dict[str, Losses | None] = {}  # by folder name

    def delete_old(self) -> None:
        """Delete what need not stay, once the newest checkpoint has been read back and verifies; else delete
        nothing and report it.
        """
        folders = valid_folders(self.lease.run)
        checkpoints = [
            (folder, parse_folder_name(folder.name)[1], self._losses_of(folder)) for folder in folders
        ]
        stay = folders_to_keep(checkpoints, self.keep)
        doomed = [folder for folder in folders if folder not in stay]
        if not doomed:
            return
        newest = folders[-1]
        try:
            verify(newest)
        except CorruptCheckpoint as error:
            self.on_event("checkpoint_rejected", checkpoint=newest.name, file=error.file, reason=error.reason)
            return
        # after this, a new generation closes ours with `newest` in it: it has a checkpoint whatever we delete
        self.lease.check()
        for folder in doomed:
            folder.remove_folder(COMMIT)
            self.on_event("checkpoint_deleted", checkpoint=folder.name)

    def sweep(self, step: int) -> None:
        """Remove folders that will never be valid: of earlier generations, and of this one's failed saves
        before `step`.
        """
        self.lease.check()
        folders = all_folders(self.lease.run)
        valid = {folder.name for folder in valid_among(self.lease.run, folders)}
        for folder in folders:
            earlier = parse_folder_name(folder.name) < (self.lease.generation, step)
            if earlier and folder.name not in valid:
                folder.remove_folder(COMMIT)
                self.on_event("checkpoint_swept", checkpoint=folder.name)

    def _losses_of(self, folder: StoragePath) -> Losses | None:
        """The losses that choose the best checkpoint; None where it was not evaluated."""
        if not self.keep.keep_best:
            return None
        if folder.name not in self._losses:
            try:
                self._losses[folder.name] = selection_losses(folder)
            except CorruptCheckpoint:  # not the best of anything; a resume says what is wrong with it
                self._losses[folder.name] = None
        return self._losses[folder.name]


def selection_losses(folder: StoragePath) -> Losses | None:
    """The selection loss of a checkpoint, else its held-out loss, and then the held-out loss; None where it
    was not evaluated.
    """
    state = read_marker(folder).state
    loss = state.heldout_loss if state.selection_loss is None else state.selection_loss
    if loss is None:
        return None
    return loss, math.inf if state.heldout_loss is None else state.heldout_loss
