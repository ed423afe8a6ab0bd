"""The config that every run of the training loop shares, from text or on a task: optimizer, schedule, engine,
checkpoints, bad steps.
"""

from typing import Literal

from pydantic import Field, model_validator

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.settings import Settings


class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019), or Muon for matrices inside blocks and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    muon_lr: float = Field(default=0.02, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)  # matrices only, never norms and biases
    clip: float = Field(default=1.0, ge=0)  # largest gradient norm; 0: no clipping
    # the learning rate of a layer, as a factor of that of the layer above; embeddings have the lowest
    layer_decay: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _check_betas(self) -> "OptimizerConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must each be at least 0 and below 1")
        return self


class ScheduleConfig(Settings):
    """The learning rate as a function of the step, as a factor of the optimizer's `lr`."""

    kind: Literal["cosine", "wsd", "inverse_sqrt"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)  # wsd: the length of the final decay
    final: float = Field(default=0.1, ge=0, le=1)  # the factor at the last step


class EngineConfig(Settings):
    """How the computation is distributed and rounded. Nothing here changes the result beyond rounding."""

    zero_stage: Literal[1, 2, 3] = 1
    # bf16: bf16 weights with an fp32 master copy; autocast: fp32 weights; auto: bf16 where every rank's
    # device is fast in it, else fp32
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "fp32"
    # activations, block by block; auto: where memory would not suffice otherwise (memory_estimate.py)
    recompute: Literal["auto"] | bool = False
    compile: bool = False  # in training: the full model, at zero_stage 3 block by block (compile.py)
    # with compile: one launch each for forward and backward; pays where a step is short
    cuda_graphs: bool = False
    # matrix products inside blocks, in bf16 training on GPUs that support it (fp8.py)
    fp8: bool = False
    offload: bool = False  # optimizer state in host memory
    # ranks that share each row, a slice of its positions each: for long rows (sequence_parallel.py)
    sequence_parallel: int = Field(default=1, gt=0)

    def data_parallel_size(self, ranks: int) -> int:
        """The number of groups with different rows. Raises UserError where a group is not full."""
        if ranks % self.sequence_parallel:
            raise UserError(
                f"engine.sequence_parallel ({self.sequence_parallel}) ranks share each row, and {ranks}"
                " ranks are not a multiple of that: change it, or the number of workers"
            )
        return ranks // self.sequence_parallel

    def check_sharable(self, what: str, length: int) -> None:
        """Raises UserError where rows of this length cannot be cut into equal slices. `what`: its recipe
        key.
        """
        if length % self.sequence_parallel:
            raise UserError(
                f"{what} ({length}) must be a multiple of engine.sequence_parallel"
                f" ({self.sequence_parallel}), so that ranks get equal slices"
            )

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError where ranks cannot share this model's rows, or it has no blocks to compile."""
        if self.compile and self.zero_stage == 3 and model.cell != "attention":
            raise UserError(
                f"engine.compile compiles block by block at zero_stage 3, and a model of cell {model.cell}"
                " has no blocks: set it to false, or zero_stage to 1 or 2"
            )
        setting = f"engine.sequence_parallel ({self.sequence_parallel})"
        if self.sequence_parallel > 1 and model.spans:
            raise UserError(
                f"{setting} ranks share each row, and a span head compares all positions of a row: set it"
                " to 1"
            )
        if self.sequence_parallel > 1 and model.cell != "attention":
            raise UserError(
                f"{setting} ranks share each row, and a model of cell {model.cell} reads it position by"
                " position: set it to 1"
            )
        for key, heads in (("num_heads", model.num_heads), ("num_kv_heads", model.num_kv_heads)):
            if heads % self.sequence_parallel:
                raise UserError(
                    f"model.{key} ({heads}) must be a multiple of {setting}: each rank computes an equal"
                    " share of the heads"
                )

    @model_validator(mode="after")
    def _check_combinations(self) -> "EngineConfig":
        if self.fp8 and self.zero_stage == 3:
            raise ValueError(
                "fp8 does not work with zero_stage 3, because its linear maps keep every gathered weight"
                " until backward: use zero_stage 2"
            )
        if self.fp8 and self.precision in ("fp32", "autocast"):
            raise ValueError(
                f"fp8 requires precision bf16, not {self.precision}: set precision to bf16, or fp8 to false"
            )
        if self.cuda_graphs and not self.compile:
            raise ValueError(
                "cuda_graphs requires compiled code: set compile to true, or cuda_graphs to false"
            )
        if self.cuda_graphs and self.zero_stage == 3:
            raise ValueError(
                "cuda_graphs reads weights at fixed addresses, and zero_stage 3 gathers them at others:"
                " set it to false"
            )
        if self.cuda_graphs and self.sequence_parallel > 1:
            raise ValueError(
                f"cuda_graphs cannot capture the communication of sequence_parallel"
                f" ({self.sequence_parallel}) ranks: set it to false"
            )
        return self


class CheckpointConfig(Settings):
    """When to save and what to keep. The last verified checkpoint is never deleted."""

    every: int = Field(default=500, gt=0)  # steps
    keep_last: int = Field(default=2, gt=0)
    keep_every: int = Field(default=0, ge=0)  # steps; 0: none beyond the last
    keep_best: bool = True  # the lowest held-out loss
    # a folder or URL (s3://, gs://, abfs://) that holds those of run NAME in storage/NAME; None: the run
    # folder
    storage: str | None = None


class SpikesConfig(Settings):
    """Bad steps: a loss or gradient norm that is not finite, or that exceeds a multiple of the median of the
    last `window` applied steps.

    A bad step is applied on no rank. skip: the run continues with the next step. rollback: it returns to the
    last verified checkpoint and never reads the step's rows again; the step is taken with the rows after
    them. stop: the run ends and names the rows.
    """

    policy: Literal["skip", "rollback", "stop"] = "skip"
    loss: float | None = Field(default=None, gt=1)  # times the median; None: bad only where it is not finite
    grad_norm: float | None = Field(default=None, gt=1)  # the same, before clipping
    # steps; until that many were applied, only values that are not finite are bad
    window: int = Field(default=100, gt=0)


class TrainingConfig(Settings):
    """What every run of the training loop needs: `steps` optimizer steps of `step_rows` rows."""

    run: str = Field(min_length=1)  # the run folder
    seed: int = Field(default=0, ge=0)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    steps: int = Field(gt=0)
    step_rows: int = Field(gt=0)  # rows of one optimizer step, over all ranks
    micro_rows: int = Field(gt=0)  # rows of one forward/backward on one rank
    # decay per step of the averaged weights, such as 0.999; 0: no averages
    ema: float = Field(default=0.0, ge=0, lt=1)
    evaluate_every: int = Field(default=500, gt=0)  # steps
    spikes: SpikesConfig = SpikesConfig()
    nonfinite_limit: int = Field(default=5, gt=0)  # bad steps in a row before the run stops

    @model_validator(mode="after")
    def _check_steps(self) -> "TrainingConfig":
        if self.micro_rows > self.step_rows:
            raise ValueError(f"micro_rows ({self.micro_rows}) exceeds step_rows ({self.step_rows})")
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) and decay_steps"
                f" ({self.schedule.decay_steps}) together exceed steps ({self.steps})"
            )
        return self
