"""The config of a pretraining run: typed, frozen values that launch/recipe/reader.py reads from YAML. The
keys of a recipe are the names of the fields.

The number of ranks appears nowhere: gradient accumulation follows from `step_rows`, `micro_rows` and the
ranks there are.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.settings import Settings
from trifold.pretrain.config import objectives
from trifold.pretrain.config.objectives import AnyObjective
from trifold.pretrain.config.objectives import (
    CausalConfig as CausalConfig,  # recipes made in code find them here
)
from trifold.pretrain.config.objectives import MaskedConfig as MaskedConfig
from trifold.pretrain.config.objectives import SpansConfig as SpansConfig
from trifold.pretrain.config.training import TrainingConfig


class SourceConfig(Settings):
    """One corpus: either `path` (file, folder, glob or URL of .txt, .jsonl, .parquet or SQuAD's .json; also
    .gz) or `hub` (an id).
    """

    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    split: str = "train"
    text_column: str = "text"  # JSONL, Parquet and hub sets
    documents: Literal["blank_line", "line"] = "blank_line"  # plain text: what separates documents
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check_one_location(self) -> "SourceConfig":
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either `path` or `hub`, not both")
        return self


class DataConfig(Settings):
    """The corpora, and how they are cut into rows."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    heldout: tuple[SourceConfig, ...] = ()  # separate corpora ...
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1)  # ... or documents chosen by hash from `sources`
    row_length: int = Field(gt=1)  # tokens in a row (on its source side for spans and continuations)
    cache: str | None = None  # the folder of token shards; None: inside the run folder
    prefetch: int = Field(default=4, ge=1)  # steps prepared ahead

    @model_validator(mode="after")
    def _check_one_heldout(self) -> "DataConfig":
        if bool(self.heldout) == (self.heldout_fraction > 0):
            raise ValueError(
                "give either `data.heldout` (corpora) or `data.heldout_fraction` (above 0), and not both"
            )
        return self


# tokens of every tokenizer that is trained here (tokenizer.py)
RESERVED_TOKENS = re.compile(r"<(pad|s|/s|unk|mask|extra_id_\d\d?|0x[0-9A-F]{2})>")


class TokenizerConfig(Settings):
    """A tokenizer to train (SentencePiece unigram with byte fallback), or the folder of an existing one."""

    path: str | None = None  # a folder with tokenizer.json; None: train one of model.vocab_size pieces
    sample_bytes: int = Field(default=10_000_000, gt=0)  # of text that training reads
    character_coverage: float = Field(default=0.9995, gt=0, le=1)
    languages: tuple[str, ...] = ()  # codes such as en_XX, each a special token, for models like mBART

    @model_validator(mode="after")
    def _check_codes(self) -> "TokenizerConfig":
        for code in self.languages:
            if code.split() != [code] or re.search(
                "[▁\0\ud800-\udfff]", code
            ):  # word_cache.py cuts text there
                raise ValueError(
                    f"languages: the code {code!r} must not be empty or contain a space, ▁, line end, zero or"
                    " lone surrogate"
                )
            if RESERVED_TOKENS.fullmatch(code) or self.languages.count(code) > 1:
                raise ValueError(
                    f"languages: {code!r} is a token of every tokenizer, or occurs twice in this list: use"
                    " another code, such as en_XX"
                )
        return self


class StageConfig(Settings):
    """The first steps of a run, or those after the previous stage. Values that are not given are the
    recipe's.
    """

    steps: int = Field(gt=0)
    row_length: int | None = Field(default=None, gt=1)
    step_rows: int | None = Field(default=None, gt=0)
    micro_rows: int | None = Field(default=None, gt=0)


class InitialModelConfig(Settings):
    """Where the model comes from: a published folder, or a configuration with new weights."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    # a published folder: its shape, tokenizer and weights ...
    folder: str | None = Field(default=None, alias="from")
    random: bool = False  # ... or new weights of the same shape, a baseline without pretraining
    config: ModelConfig | None = None  # without a folder: new weights, and the recipe's `tokenizer`
    dropout: float | None = Field(default=None, ge=0, lt=1)  # None: that of the folder or of `config`
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_one_origin(self) -> "InitialModelConfig":
        if (self.folder is None) == (self.config is None):
            raise ValueError(
                "give either model.from (a published folder) or model.config (new weights), not both"
            )
        return self


def _model_kind(model: Any) -> str:
    has_origin = isinstance(model, InitialModelConfig) or (isinstance(model, dict) and "from" in model)
    return "start" if has_origin else "new"


Model = Annotated[
    Annotated[ModelConfig, Tag("new")] | Annotated[InitialModelConfig, Tag("start")],
    Discriminator(_model_kind),
]


class PretrainConfig(TrainingConfig):
    """A run that trains on text."""

    model: Model  # a configuration for new weights, or `from`: a published folder to continue from
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    objective: AnyObjective
    # such as short rows first, or small steps first; after the last one the recipe's own values hold
    stages: tuple[StageConfig, ...] = ()
    evaluate_rows: int = Field(default=256, gt=0)  # held-out rows during training; the end evaluates them all

    def fits(self, model: ModelConfig) -> None:
        """Raises UserError where this model is of another family than the objective trains, has fewer
        positions than the rows, or cannot be shared among ranks as `engine` requires.
        """
        family = objectives.family_of(self.objective)
        if model.family != family:
            raise UserError(
                f"the {self.objective.kind} objective trains a model of family {family}, not {model.family}"
            )
        if self.data.row_length > model.max_positions:
            raise UserError(
                f"data.row_length ({self.data.row_length}) exceeds model.max_positions"
                f" ({model.max_positions})"
            )
        self.engine.check_model(model)
        self.engine.check_sharable("data.row_length", self.data.row_length)
        for number, stage in enumerate(self.stages):
            if (stage.row_length or 0) > model.max_positions:
                raise UserError(
                    f"stages.{number}.row_length ({stage.row_length}) exceeds model.max_positions"
                    f" ({model.max_positions})"
                )
            self.engine.check_sharable(
                f"stages.{number}.row_length", stage.row_length or self.data.row_length
            )

    @model_validator(mode="after")
    def _check_model(self) -> "PretrainConfig":
        if isinstance(self.model, ModelConfig):
            self.fits(self.model)
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> "PretrainConfig":
        for number, stage in enumerate(self.stages):
            step_rows, micro_rows = stage.step_rows or self.step_rows, stage.micro_rows or self.micro_rows
            if micro_rows > step_rows:
                raise ValueError(
                    f"stages.{number} has micro_rows {micro_rows}, which exceeds its step_rows {step_rows}"
                )
        earlier = sum(stage.steps for stage in self.stages)
        if earlier >= self.steps:
            raise ValueError(
                f"the stages take {earlier} steps together, which leaves none of `steps` ({self.steps}) for"
                " the recipe's own values"
            )
        return self
