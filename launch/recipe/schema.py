"""TODO"""

import os
import re
import shlex
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from trifold.finetune.config import FinetuneConfig
from trifold.modeling.settings import Settings
from trifold.pretrain.config.pretraining import PretrainConfig, SourceConfig


class ClusterConfig(Settings):
    """Where a run trains. Nothing here changes what is trained."""

    workers: int = Field(default=1, ge=0)  # 0: in this process, without Ray
    min_workers: int | None = Field(
        default=None, gt=0
    )  # with how few the run goes on when hosts are lost; without it: all of them
    wait_at_start: float = Field(default=0, ge=0)  # seconds for hosts that are not there yet
    wait_after_loss: float = Field(default=600, ge=0)  # seconds for at least min_workers to fit again
    step_timeout: float = Field(
        default=600, gt=0
    )  # seconds without a word from any rank after which they count as hanging
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    threads_per_worker: int = Field(default=0, ge=0)  # 0: the machine's cores shared among its workers
    max_restarts: int = Field(
        default=3, ge=0
    )  # after failures in a row, with no checkpoint saved between them

    def threads(self, ranks: int) -> int:
        """Of each of so many ranks on this machine."""
        return self.threads_per_worker or max(1, (os.cpu_count() or 1) // ranks)

    @property
    def min_required(self) -> int:
        """The workers that the run needs to go on."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _range(self) -> "ClusterConfig":
        if self.min_required > self.workers > 0:
            raise ValueError(f"min_workers ({self.min_workers}) exceeds workers ({self.workers})")
        return self


class ScoringConfig(Settings):
    """What is scored beside training: always the newest checkpoint, in a process of its own that no rank
    waits for.
    """

    held_out: dict[str, tuple[SourceConfig, ...]] = Field(
        default={}
    )  # texts by name, under the recipe's own objective
    tasks: dict[str, str] = Field(
        default={}
    )  # fine-tuning recipes by name: the checkpoint is taught each, and scored as the recipe says
    cpus: float = Field(default=1, ge=0)  # 0: those of the workers, as far as they leave them idle
    gpus: float = Field(default=0, ge=0)
    wait: float = Field(
        default=600, ge=0
    )  # seconds, at the end of the run, for the scores of its last checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.held_out, *self.tasks)

    @model_validator(mode="after")
    def _named(self) -> "ScoringConfig":
        if wrong := [
            name for name in self.names if not re.fullmatch(r"[\w-]+", name) or self.names.count(name) > 1
        ]:
            raise ValueError(
                f"{wrong[0]!r} stands before the names of its scores: letters, digits, - and _, and no"
                " second one like it"
            )
        return self


def _whole_groups(config: Any) -> Any:
    """Raises UserError for workers that cannot share rows as the engine's settings say."""
    for workers in (config.cluster.workers or 1, config.cluster.min_required or 1):
        config.engine.data_parallel_size(workers)
    return config


class PretrainRecipe(PretrainConfig):
    """What is trained, and where."""

    command: ClassVar[str] = "pretrain"
    cluster: ClusterConfig = ClusterConfig()
    scoring: ScoringConfig = ScoringConfig()
    trackers: tuple[
        Literal["mlflow", "wandb"], ...
    ] = ()  # told what the run records, beside its TensorBoard files
    _groups = model_validator(mode="after")(_whole_groups)


class FinetuneRecipe(FinetuneConfig):
    """What learns a task, and where."""

    command: ClassVar[str] = "finetune"
    cluster: ClusterConfig = ClusterConfig()
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()
    _groups = model_validator(mode="after")(_whole_groups)


AnyRecipe = PretrainRecipe | FinetuneRecipe


R = TypeVar("R", PretrainRecipe, FinetuneRecipe)


S = TypeVar("S", bound=Settings)


def resume_command(config: AnyRecipe) -> str:
    """The command that continues a run."""
    return shlex.join(["trifold", config.command, f"{config.run}/config.yaml"])
