"""What pretraining and fine-tuning do alike around the training loop: `Run`, one rank of a run.

A run takes the next generation of its folder (`start_attempt`), restores the newest checkpoint that
verifies, checks that it is a checkpoint of this run, loads rows from there, and describes its state for the
next checkpoint. pretrain/run.py and finetune/run.py subclass it with their rows, evaluation and extra
state; train.py has the loop.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import train_flops_per_row
from trifold.pretrain.checkpoint.checkpoint import Checkpoint, newest_verified, open_checkpoint
from trifold.pretrain.checkpoint.lease import Lease, take_generation
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.config.pretraining import InitialModelConfig
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.config_changes import changes_since
from trifold.pretrain.data.loader import Loader
from trifold.pretrain.data.packing import RowCapacity
from trifold.pretrain.data.rows import RowSource
from trifold.pretrain.data.stages import ResolvedStage, locate_step
from trifold.pretrain.distributed import broadcast_from_rank0
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.initial_model import check_same_start, fingerprint
from trifold.pretrain.monitor.metrics import Recorder, peak_flops
from trifold.pretrain.progress import Progress
from trifold.pretrain.storage.storage import checkpoint_root
from trifold.pretrain.storage.storage_path import StoragePath


class TrainingRows(RowSource, Protocol):
    """The rows of a stage."""

    fingerprint: str
    capacity: RowCapacity


class Run:
    """One rank of a run. Every rank calls each method equally often."""

    row_inputs: str  # what rows are made of, for the message that they have changed
    member_names: Sequence[str] = ()  # of a mixture of objectives

    def __init__(
        self,
        config: TrainingConfig,
        initial_model: ModelConfig | InitialModelConfig,
        model: ModelConfig,
        engine: Engine,
        rows: Sequence[TrainingRows],
        stages: Sequence[ResolvedStage],
        prefetch: int,
    ) -> None:
        """Starts an attempt. `rows` are those of each of `stages`; `prefetch` steps of them are made"
        " ahead."""
        self.config, self.initial_model, self.model, self.engine = config, initial_model, model, engine
        self.rank_info = engine.rank_info
        self.rows, self.stages, self.prefetch = rows, stages, prefetch
        self.lease, self.recorder = start_attempt(config, engine)
        self.checkpointer = Checkpointer(
            self.lease,
            self.rank_info.rank,
            self.rank_info.world,
            config.checkpoints,
            self.recorder.event,
            on_written=self.rank_info.reporter.count_written,
        )
        self.start_fingerprint = broadcast_from_rank0(lambda: fingerprint(initial_model))
        self.peak_flops = peak_flops_all_ranks(engine)

    def load(self, progress: Progress) -> Loader:
        """The rows of each step from where the run is."""
        return Loader(
            self.rows,
            self.stages,
            start=progress.step,
            stop=self.config.steps,
            rank=self.engine.rank,
            world=self.engine.world,
            prefetch=self.prefetch,
            skips=progress.skips,
            pin=self.rank_info.device == "cuda",
            counts=self.engine.counts,
        )

    def evaluate(self, progress: Progress, complete: bool) -> dict[str, Any]:
        """Scores of the held-out rows; `complete`: of all of them."""
        raise NotImplementedError

    def should_stop_early(self) -> bool:
        """Whether training ends before its last step."""
        return False

    def finish(self, progress: Progress) -> None:
        """Called once the loop has ended and the last checkpoint is saved."""

    def mfu(self, step: int, seconds: float) -> float:
        """Model FLOP utilisation (Chowdhery et al. 2022, appendix B) of a step that took so long."""
        stage = locate_step(self.stages, step).stage
        capacity = self.rows[stage.stage].capacity
        flops = stage.step_rows * train_flops_per_row(self.model, capacity.tokens, capacity.source)
        return flops / seconds / self.peak_flops

    def describe(self, progress: Progress, scores: dict[str, Any]) -> CheckpointState:
        """The state that a checkpoint records beside the tensors."""
        return CheckpointState(
            **progress.to_state(),
            cursor=locate_step(self.stages, progress.step).row,
            optimizer_step=self.engine.optimizer_step,
            fingerprint=self.rows_at(progress.step).fingerprint,
            config=self.config.model_dump(mode="json"),
            model=self.model.model_dump(mode="json"),
            heldout_loss=scores.get("heldout_loss"),
            selection_loss=self.selection_loss(scores),
            scores=scores,
            start=self.start_fingerprint,
            **self.extra_state(),
        )

    def selection_loss(self, scores: dict[str, Any]) -> float | None:
        """What the best checkpoint has the lowest value of; None: the held-out loss."""
        return None

    def extra_state(self) -> dict[str, Any]:
        """The fields of CheckpointState that this kind of run adds."""
        return {}

    def restore_extra_state(self, state: CheckpointState) -> None:
        """Read back what `extra_state` added."""

    def restore(self) -> Progress | None:
        """Load the newest checkpoint that verifies into the engine. Returns its progress, None where there is
        no checkpoint.

        Raises UserError where it is a checkpoint of another run: of another config, initial model or rows.
        """
        folder = broadcast_from_rank0(lambda: newest_checkpoint(self.lease.run, self.recorder))
        if folder is None:
            return None
        checkpoint = open_checkpoint(folder)
        saved = checkpoint.state
        changes_since(saved.config, self.config, saved.step, self.config.run)
        check_same_start(checkpoint, self.initial_model, self.start_fingerprint)
        self._check_same_rows(checkpoint)
        self.engine.load(checkpoint.read, saved.optimizer_step)
        self.recorder.event("resumed", step=saved.step, checkpoint=folder.name)
        self.restore_extra_state(saved)
        return Progress.from_state(saved)

    def rows_at(self, step: int) -> TrainingRows:
        """The rows that the last of `step` finished steps read. A checkpoint has their fingerprint, so later
        stages may still change.
        """
        return self.rows[locate_step(self.stages, max(step - 1, 0)).stage.stage]

    def _check_same_rows(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        fingerprint = self.rows_at(state.step).fingerprint
        if state.fingerprint != fingerprint:
            raise UserError(
                f"{checkpoint.folder} was trained on rows of fingerprint {state.fingerprint}, and this recipe"
                f" and its data make rows of {fingerprint}: {self.row_inputs} have changed. Give another"
                " `run` folder."
            )
        cursor = locate_step(self.stages, state.step).row
        if state.cursor != cursor:
            raise UserError(
                f"{checkpoint.folder} had read {state.cursor} rows in its {state.step} steps, and this recipe"
                f" reads {cursor}: step_rows or stages have changed. Give another `run` folder."
            )


def start_attempt(config: TrainingConfig, engine: Engine) -> tuple[Lease, Recorder]:
    """Take the run's next generation, on all ranks, and record that the attempt has started."""
    root = checkpoint_root(Path(config.run), config.checkpoints.storage)
    lease = broadcast_from_rank0(lambda: take_generation(root))
    recorder = Recorder(Path(config.run), engine.rank_info, lease.generation)
    lease = replace(lease, run=root.with_options(replace(root.options, on_retry=recorder.event)))
    for file, problem in lease.problems:
        recorder.event("lease_damaged", file=file, reason=problem)
    engine.rank_info.reporter.exit_when(lease.superseded_by, every=root.poll_seconds)
    recorder.event(
        "started",
        world=engine.rank_info.world,
        zero_stage=engine.stage,
        precision=engine.precision,
        recompute=engine.recompute,
        pid=os.getpid(),
    )
    return lease, recorder


def newest_checkpoint(root: StoragePath, recorder: Recorder) -> StoragePath | None:
    """The folder of the newest checkpoint that verifies. Rejected ones are recorded as events."""
    checkpoint = newest_verified(root, recorder.event)
    return None if checkpoint is None else checkpoint.folder


def peak_flops_all_ranks(engine: Engine) -> float:
    """FLOP/s of all ranks' devices together, in the precision in use."""
    dtype = torch.float32 if engine.precision == "fp32" else torch.bfloat16
    local = torch.tensor([peak_flops(engine.rank_info, dtype)], dtype=torch.float64)
    return float(engine.sum_over_ranks(local))
