"""The config of a run: the settings of pretraining or fine-tuning, plus where it trains, what is scored in
the background, and which trackers follow it.
"""

import os
import re
import shlex
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from trifold.finetune.config import FinetuneConfig
from trifold.modeling.settings import Settings
from trifold.pretrain.config.pretraining import PretrainConfig, SourceConfig


class ClusterConfig(Settings):
    """Where a run trains. No setting here changes what is trained."""

    workers: int = Field(default=1, ge=0)  # 0: in this process, without Ray
    min_workers: int | None = Field(
        default=None, gt=0
    )  # with how few the run continues when hosts are lost; None: all of them
    wait_at_start: float = Field(default=0, ge=0)  # seconds to wait for hosts before the first attempt
    wait_after_loss: float = Field(default=600, ge=0)  # seconds to wait until min_workers fit again
    step_timeout: float = Field(
        default=600, gt=0
    )  # seconds without progress of any rank after which the group counts as hanging
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    threads_per_worker: int = Field(default=0, ge=0)  # 0: the machine's cores shared among its workers
    max_restarts: int = Field(
        default=3, ge=0
    )  # after failures in a row, with no checkpoint saved between them

    def threads(self, ranks: int) -> int:
        """CPU threads of each rank, with so many `ranks` on this machine."""
        return self.threads_per_worker or max(1, (os.cpu_count() or 1) // ranks)

    @property
    def min_required(self) -> int:
        """The number of workers without which the run waits."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _range(self) -> "ClusterConfig":
        if self.min_required > self.workers > 0:
            raise ValueError(f"min_workers ({self.min_workers}) exceeds workers ({self.workers})")
        return self


class ScoringConfig(Settings):
    """What is scored during training: always the newest checkpoint, in a process that no rank waits for."""

    held_out: dict[str, tuple[SourceConfig, ...]] = Field(
        default={}
    )  # texts by name, under the recipe's own objective
    tasks: dict[str, str] = Field(
        default={}
    )  # fine-tuning recipes by name: the checkpoint is fine-tuned by each and scored
    cpus: float = Field(default=1, ge=0)  # 0: share the CPUs of the workers
    gpus: float = Field(default=0, ge=0)
    wait: float = Field(
        default=600, ge=0
    )  # seconds to wait at the end of the run for the scores of its last checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.held_out, *self.tasks)

    @model_validator(mode="after")
    def _named(self) -> "ScoringConfig":
        for name in self.names:
            if not re.fullmatch(r"[\w-]+", name) or self.names.count(name) > 1:
                raise ValueError(
                    f"{name!r} prefixes the names of its scores: it must be unique, of letters, digits, - and"
                    " _"
                )
        return self


def _whole_groups(config: Any) -> Any:
    """Raises UserError where sequence_parallel does not divide the numbers of workers."""
    for workers in (config.cluster.workers or 1, config.cluster.min_required or 1):
        config.engine.data_parallel_size(workers)
    return config


class PretrainRecipe(PretrainConfig):
    """The config of a pretraining run."""

    command: ClassVar[str] = "pretrain"
    cluster: ClusterConfig = ClusterConfig()
    scoring: ScoringConfig = ScoringConfig()
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()  # in addition to the TensorBoard files
    _groups = model_validator(mode="after")(_whole_groups)


class FinetuneRecipe(FinetuneConfig):
    """The config of a fine-tuning run."""

    command: ClassVar[str] = "finetune"
    cluster: ClusterConfig = ClusterConfig()
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    _groups = model_validator(mode="after")(_whole_groups)


AnyRecipe = PretrainRecipe | FinetuneRecipe


R = TypeVar("R", PretrainRecipe, FinetuneRecipe)


S = TypeVar("S", bound=Settings)


def resume_command(config: AnyRecipe) -> str:
    """The command that resumes a run."""
    return shlex.join(["trifold", config.command, f"{config.run}/config.yaml"])
