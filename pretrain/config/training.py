"""TODO"""

from typing import Literal

from pydantic import Field, model_validator

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.settings import Settings
from trifold.pretrain.config.objectives import CausalConfig as CausalConfig
from trifold.pretrain.config.objectives import MaskedConfig as MaskedConfig
from trifold.pretrain.config.objectives import SpansConfig as SpansConfig


class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019), or Muon for matrices inside blocks with AdamW for everything
    else.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    muon_lr: float = Field(default=0.02, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)  # matrices only, never norms and biases
    clip: float = Field(default=1.0, ge=0)  # largest gradient norm; 0: no clipping
    layer_decay: float = Field(
        default=1.0, gt=0, le=1
    )  # each layer learns this much slower than the one above it, embeddings slowest

    @model_validator(mode="after")
    def _averages(self) -> "OptimizerConfig":
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
    """How the arithmetic is spread and rounded. Nothing here changes what is computed beyond rounding."""

    zero_stage: Literal[1, 2, 3] = 1
    # bf16: weights too, fp32 master; autocast: fp32 weights; auto: bf16 where every rank's device is fast in
    # it, else fp32 (precision.py)
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "fp32"
    recompute: Literal["auto"] | bool = (
        False  # activations, block by block; auto: where memory would not suffice without (budget.py)
    )
    compile: bool = False  # training: the whole model, at stage 3 block by block (compile.py)
    cuda_graphs: bool = (
        False  # with compile: forward and backward are launched as one each; pays where a step is short
    )
    fp8: bool = (
        False  # products of the linear maps inside blocks, in bf16 training on GPUs that have it (fp8.py)
    )
    offload: bool = False  # optimizer state in host memory
    sequence_parallel: int = Field(
        default=1, gt=0
    )  # ranks that share each row, a slice of the positions each: for long rows (sequence.py)

    def data_parallel_size(self, ranks: int) -> int:
        """How many groups with rows of their own so many ranks make. Raises UserError where one of them would
        not be whole.
        """
        if ranks % self.sequence_parallel:
            raise UserError(
                f"engine.sequence_parallel ({self.sequence_parallel}) ranks share each row, and {ranks}"
                " ranks are no multiple of that:"
                " change it, or the number of workers"
            )
        return ranks // self.sequence_parallel

    def check_sharable(self, what: str, length: int) -> None:
        """Raises UserError where rows cannot be cut into slices of one length."""
        if length % self.sequence_parallel:
            raise UserError(
                f"{what} ({length}) must be a multiple of engine.sequence_parallel"
                f" ({self.sequence_parallel}), to be cut up"
            )

    def check_model(self, model: ModelConfig) -> None:
        """Raises UserError where ranks cannot share the rows of this model, or it has no blocks to compile."""
        if self.compile and self.zero_stage == 3 and model.cell != "attention":
            raise UserError(
                f"engine.compile goes block by block at zero_stage 3, and a model of cell {model.cell} has"
                " no blocks:"
                " set it to false, or zero_stage to 1 or 2"
            )
        said = f"engine.sequence_parallel ({self.sequence_parallel})"
        if self.sequence_parallel > 1 and (model.cell != "attention" or model.spans):
            what = (
                "a head of spans compares all of a row"
                if model.spans
                else f"a model of cell {model.cell} reads it step by step"
            )
            raise UserError(f"{said} ranks share each row, and {what}: set it to 1")
        for dial in ("num_heads", "num_kv_heads"):
            if (heads := getattr(model, dial)) % self.sequence_parallel:
                raise UserError(
                    f"model.{dial} ({heads}) must be a multiple of {said}: each rank attends with a share of"
                    " the heads"
                )

    @model_validator(mode="after")
    def _go_together(self) -> "EngineConfig":
        if self.fp8 and self.zero_stage == 3:
            raise ValueError(
                "fp8 does not go with zero_stage 3, as its linear maps keep every gathered weight until"
                " backward: take 2"
            )
        if self.fp8 and self.precision in ("fp32", "autocast"):
            raise ValueError(
                f"fp8 wants precision bf16, and it is {self.precision}: set that, or fp8 to false"
            )
        if self.cuda_graphs and not self.compile:
            raise ValueError(
                "cuda_graphs launches compiled code at once: set compile to true, or cuda_graphs to false"
            )
        if self.cuda_graphs and self.zero_stage == 3:
            raise ValueError(
                "cuda_graphs reads weights where they lay before, and zero_stage 3 gathers them elsewhere:"
                " set it to false"
            )
        if self.cuda_graphs and self.sequence_parallel > 1:
            raise ValueError(
                f"cuda_graphs holds no exchange between sequence_parallel ({self.sequence_parallel}) ranks:"
                " set it to false"
            )
        return self


class CheckpointConfig(Settings):
    """When to save and what to keep. The last verified checkpoint is never deleted."""

    every: int = Field(default=500, gt=0)  # steps
    keep_last: int = Field(default=2, gt=0)
    keep_every: int = Field(default=0, ge=0)  # steps; 0: none beyond the last
    keep_best: bool = True  # the lowest held-out loss
    storage: str | None = (
        # a folder or URL (s3://, gs://, abfs://) that holds those of NAME in storage/NAME; None: the run
        # folder
        None
    )


class SpikesConfig(Settings):
    """Bad steps: a loss or gradient norm that is not finite, or more than so many times the median of the
    last `window` applied steps.

    A bad step is applied on no rank. skip: the run goes on with the next step. rollback: it goes back to the
    last verified checkpoint and never reads the step's rows again; the step is taken with the rows after
    them. stop: it ends, saying which rows.
    """

    policy: Literal["skip", "rollback", "stop"] = "skip"
    loss: float | None = Field(default=None, gt=1)  # times the median; None: bad only where it is not finite
    grad_norm: float | None = Field(default=None, gt=1)  # the same, before clipping
    window: int = Field(
        default=100, gt=0
    )  # steps; until so many were applied, only what is not finite is bad


class TrainingConfig(Settings):
    """What every run of the training loop needs, from text or on a task: `steps` optimizer steps of
    `step_rows` rows.
    """

    run: str = Field(min_length=1)  # the run folder
    seed: int = Field(default=0, ge=0)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    steps: int = Field(gt=0)
    step_rows: int = Field(gt=0)  # rows of one optimizer step, over all ranks
    micro_rows: int = Field(gt=0)  # rows of one forward/backward on one rank
    ema: float = Field(
        default=0.0, ge=0, lt=1
    )  # decay per step of the averaged weights, such as 0.999; 0: none are kept
    evaluate_every: int = Field(default=500, gt=0)  # steps
    spikes: SpikesConfig = SpikesConfig()
    nonfinite_limit: int = Field(default=5, gt=0)  # bad steps in a row before the run stops

    @model_validator(mode="after")
    def _steps_fit_together(self) -> "TrainingConfig":
        if self.micro_rows > self.step_rows:
            raise ValueError(f"micro_rows ({self.micro_rows}) exceeds step_rows ({self.step_rows})")
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) and decay_steps"
                f" ({self.schedule.decay_steps})"
                f" together exceed steps ({self.steps})"
            )
        return self
