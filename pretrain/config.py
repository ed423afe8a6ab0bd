"""What a pretraining run is, as plain values: the recipe that launch/config.py reads from YAML.

One dial, the rest derived: the world size appears nowhere, accumulation follows from `step_rows` and `micro_rows`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from modeling.config import ModelConfig, Refused, Settings
from pretrain.objectives import config as objectives
from pretrain.objectives.config import Causal as Causal  # recipes made in code find them here
from pretrain.objectives.config import Masked as Masked
from pretrain.objectives.config import Objective
from pretrain.objectives.config import Spans as Spans


class Source(Settings):
    """One corpus. Exactly one of `path` (file, folder, glob, URL: .txt, .jsonl, .parquet, SQuAD's .json; also .gz) and `hub` (an id)."""

    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    text_column: str = "text"  # JSONL, Parquet and hub sets
    documents: Literal["blank_line", "line"] = "blank_line"  # plain text: what ends a document
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either `path` or `hub`, and not both")
        return self


class Data(Settings):
    """What is read, and how it is cut into rows."""

    sources: tuple[Source, ...] = Field(min_length=1)
    heldout: tuple[Source, ...] = ()  # corpora of their own ...
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)  # ... or documents chosen by hash from `sources`
    row_length: int = Field(gt=1)  # tokens of a row (of its source side for spans and continuations)
    cache: str | None = None  # where token shards live; None: inside the run folder
    prefetch: int = Field(default=4, ge=1)  # steps prepared ahead

    @model_validator(mode="after")
    def _one_heldout(self) -> "Data":
        if bool(self.heldout) == (self.heldout_fraction > 0):
            raise ValueError("give either `data.heldout` (corpora) or `data.heldout_fraction` (above 0), and not both")
        return self


TAKEN = re.compile(r"<(pad|s|/s|unk|mask|extra_id_\d\d?|0x[0-9A-F]{2})>")  # what a tokenizer of ours holds in any case (tokenizer.py)


class Tokenizer(Settings):
    """A tokenizer to train (SentencePiece unigram with byte fallback), or a trained one's folder."""

    path: str | None = None  # a folder with tokenizer.json; None: train one of model.vocab_size pieces
    sample_bytes: int = Field(default=10_000_000, gt=0)  # how much text training reads
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    languages: tuple[str, ...] = ()  # codes such as en_XX, each a special token of its own, for models like mBART

    @model_validator(mode="after")
    def _codes(self) -> "Tokenizer":
        for code in self.languages:
            if code.split() != [code] or re.search("[▁\0\ud800-\udfff]", code):  # words.py cuts text there
                raise ValueError(f"languages: the code {code!r} must have a character, and no space, ▁, line end, zero or lone surrogate")
            if TAKEN.fullmatch(code) or self.languages.count(code) > 1:
                raise ValueError(f"languages: {code!r} is a token of every tokenizer, or twice in this list: take another code, as en_XX")
        return self


class Optimizer(Settings):
    """AdamW (Loshchilov and Hutter 2019), or Muon for matrices inside blocks with AdamW for everything else."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(gt=0)
    muon_lr: float = Field(default=0.02, gt=0)
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)  # matrices only, never norms and biases
    clip: float = Field(default=1.0, ge=0)  # largest gradient norm; 0: no clipping
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # each layer learns this much slower than the one above it, embeddings slowest

    @model_validator(mode="after")
    def _averages(self) -> "Optimizer":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must each be at least 0 and below 1")
        return self


class Schedule(Settings):
    """The learning rate as a function of the step, as a factor of the optimizer's `lr`."""

    kind: Literal["cosine", "wsd", "inverse_sqrt"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)  # wsd: the length of the final decay
    final: float = Field(default=0.1, ge=0, le=1)  # the factor at the last step


class Engine(Settings):
    """How the arithmetic is spread and rounded. Nothing here changes what is computed beyond rounding."""

    zero_stage: Literal[1, 2, 3] = 1
    # bf16: weights too, fp32 master; autocast: fp32 weights; auto: bf16 where every rank's device is fast in it, else fp32 (precision.py)
    precision: Literal["auto", "fp32", "bf16", "autocast"] = "fp32"
    recompute: Literal["auto"] | bool = False  # activations, block by block; auto: where memory would not suffice without (budget.py)
    compile: bool = False  # training: the whole model, at stage 3 block by block (compile.py)
    cuda_graphs: bool = False  # with compile: forward and backward are launched as one each; pays where a step is short
    fp8: bool = False  # products of the linear maps inside blocks, in bf16 training on GPUs that have it (fp8.py)
    offload: bool = False  # optimizer state in host memory
    sequence_parallel: int = Field(default=1, gt=0)  # ranks that share each row, a slice of the positions each: for long rows (sequence.py)

    def groups(self, ranks: int) -> int:
        """How many groups with rows of their own so many ranks make. Raises Refused where one of them would not be whole."""
        if ranks % self.sequence_parallel:
            raise Refused(
                f"engine.sequence_parallel ({self.sequence_parallel}) ranks share each row, and {ranks} ranks are no multiple of that:"
                " change it, or the number of workers"
            )
        return ranks // self.sequence_parallel

    def shares(self, what: str, length: int) -> None:
        """Raises Refused where rows cannot be cut into slices of one length."""
        if length % self.sequence_parallel:
            raise Refused(f"{what} ({length}) must be a multiple of engine.sequence_parallel ({self.sequence_parallel}), to be cut up")

    def fits(self, model: ModelConfig) -> None:
        """Raises Refused where ranks cannot share the rows of this model, or it has no blocks to compile."""
        if self.compile and self.zero_stage == 3 and model.cell != "attention":
            raise Refused(
                f"engine.compile goes block by block at zero_stage 3, and a model of cell {model.cell} has no blocks:"
                " set it to false, or zero_stage to 1 or 2"
            )
        said = f"engine.sequence_parallel ({self.sequence_parallel})"
        if self.sequence_parallel > 1 and (model.cell != "attention" or model.spans):
            what = "a head of spans compares all of a row" if model.spans else f"a model of cell {model.cell} reads it step by step"
            raise Refused(f"{said} ranks share each row, and {what}: set it to 1")
        for dial in ("num_heads", "num_kv_heads"):
            if (heads := getattr(model, dial)) % self.sequence_parallel:
                raise Refused(f"model.{dial} ({heads}) must be a multiple of {said}: each rank attends with a share of the heads")

    @model_validator(mode="after")
    def _go_together(self) -> "Engine":
        if self.fp8 and self.zero_stage == 3:
            raise ValueError("fp8 does not go with zero_stage 3, as its linear maps keep every gathered weight until backward: take 2")
        if self.fp8 and self.precision in ("fp32", "autocast"):
            raise ValueError(f"fp8 wants precision bf16, and it is {self.precision}: set that, or fp8 to false")
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs launches compiled code at once: set compile to true, or cuda_graphs to false")
        if self.cuda_graphs and self.zero_stage == 3:
            raise ValueError("cuda_graphs reads weights where they lay before, and zero_stage 3 gathers them elsewhere: set it to false")
        if self.cuda_graphs and self.sequence_parallel > 1:
            raise ValueError(f"cuda_graphs holds no exchange between sequence_parallel ({self.sequence_parallel}) ranks: set it to false")
        return self


class Checkpoints(Settings):
    """When to save and what to keep. The last verified checkpoint is never deleted."""

    every: int = Field(default=500, gt=0)  # steps
    keep_last: int = Field(default=2, gt=0)
    keep_every: int = Field(default=0, ge=0)  # steps; 0: none beyond the last
    keep_best: bool = True  # the lowest held-out loss
    storage: str | None = None  # a folder or URL (s3://, gs://, abfs://) that holds those of NAME in storage/NAME; None: the run folder


class Spikes(Settings):
    """Bad steps: a loss or gradient norm that is not finite, or more than so many times the median of the last `window` applied steps.

    A bad step is applied on no rank. skip: the run goes on with the next step. rollback: it goes back to the last verified checkpoint and
    never reads the step's rows again; the step is taken with the rows after them. stop: it ends, saying which rows.
    """

    policy: Literal["skip", "rollback", "stop"] = "skip"
    loss: float | None = Field(default=None, gt=1)  # times the median; None: bad only where it is not finite
    grad_norm: float | None = Field(default=None, gt=1)  # the same, before clipping
    window: int = Field(default=100, gt=0)  # steps; until so many were applied, only what is not finite is bad


class Training(Settings):
    """What every run of the training loop needs, from text or on a task: `steps` optimizer steps of `step_rows` rows."""

    run: str = Field(min_length=1)  # the run folder
    seed: int = Field(default=0, ge=0)
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    checkpoints: Checkpoints = Checkpoints()
    steps: int = Field(gt=0)
    step_rows: int = Field(gt=0)  # rows of one optimizer step, over all ranks
    micro_rows: int = Field(gt=0)  # rows of one forward/backward on one rank
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay per step of the averaged weights, such as 0.999; 0: none are kept
    evaluate_every: int = Field(default=500, gt=0)  # steps
    spikes: Spikes = Spikes()
    nonfinite_limit: int = Field(default=5, gt=0)  # bad steps in a row before the run stops

    @model_validator(mode="after")
    def _steps_fit_together(self) -> "Training":
        if self.micro_rows > self.step_rows:
            raise ValueError(f"micro_rows ({self.micro_rows}) exceeds step_rows ({self.step_rows})")
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps ({self.schedule.warmup_steps}) and decay_steps ({self.schedule.decay_steps})"
                f" together exceed steps ({self.steps})"
            )
        return self


class Stage(Settings):
    """An earlier part of a run: its first steps, or those after the stage before. What is not given is the recipe's own."""

    steps: int = Field(gt=0)
    row_length: int | None = Field(default=None, gt=1)
    step_rows: int | None = Field(default=None, gt=0)
    micro_rows: int | None = Field(default=None, gt=0)


class Start(Settings):
    """Where the model comes from: a published folder, or a configuration with new weights."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    folder: str | None = Field(default=None, alias="from")  # a published folder: its shape, tokenizer and weights ...
    random: bool = False  # ... or, when true, new weights in the same shape: what pretraining was worth
    config: ModelConfig | None = None  # without a folder: new weights, and the recipe's own `tokenizer`
    dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_place(self) -> "Start":
        if (self.folder is None) == (self.config is None):
            raise ValueError("give either model.from (a published folder) or model.config (new weights), and not both")
        return self


def _said(model: Any) -> str:
    return "start" if isinstance(model, Start) or (isinstance(model, dict) and "from" in model) else "new"


Model = Annotated[Annotated[ModelConfig, Tag("new")] | Annotated[Start, Tag("start")], Discriminator(_said)]


class Pretrain(Training):
    """A run that learns from text."""

    model: Model  # its dials, for new weights, or `from`: a published folder to go on from
    tokenizer: Tokenizer = Tokenizer()
    data: Data
    objective: Objective
    stages: tuple[Stage, ...] = ()  # short rows first, small steps first; after the last one the recipe's own values hold
    evaluate_rows: int = Field(default=256, gt=0)  # held-out rows during training; the end evaluates them all

    def fits(self, model: ModelConfig) -> None:
        """Raises Refused where this model is of another family than the objective trains, shorter than the rows, or cannot be shared."""
        if model.family != (family := objectives.family(self.objective)):
            raise Refused(f"the {self.objective.kind} objective trains a model of family {family}, not {model.family}")
        if self.data.row_length > model.max_positions:
            raise Refused(f"data.row_length ({self.data.row_length}) exceeds model.max_positions ({model.max_positions})")
        self.engine.fits(model)
        self.engine.shares("data.row_length", self.data.row_length)
        for number, stage in enumerate(self.stages):
            if (stage.row_length or 0) > model.max_positions:
                raise Refused(f"stages.{number}.row_length ({stage.row_length}) exceeds model.max_positions ({model.max_positions})")
            self.engine.shares(f"stages.{number}.row_length", stage.row_length or self.data.row_length)

    @model_validator(mode="after")
    def _fits_together(self) -> "Pretrain":
        if isinstance(self.model, ModelConfig):
            self.fits(self.model)
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> "Pretrain":
        for number, stage in enumerate(self.stages):
            step_rows, micro_rows = stage.step_rows or self.step_rows, stage.micro_rows or self.micro_rows
            if micro_rows > step_rows:
                raise ValueError(f"stages.{number} has micro_rows {micro_rows}, which exceeds its step_rows {step_rows}")
        if (earlier := sum(stage.steps for stage in self.stages)) >= self.steps:
            raise ValueError(
                f"the stages take {earlier} steps together and leave none of `steps` ({self.steps}) to the recipe's own values"
            )
        return self
