"""What a fine-tuning run is, as plain values: a published folder (or new weights), a task, and pretraining's
own training settings.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from trifold.modeling.config import Lora
from trifold.modeling.generation.config import Generation
from trifold.modeling.settings import Settings
from trifold.pretrain.config.pretraining import InitialModelConfig, TokenizerConfig
from trifold.pretrain.config.training import TrainingConfig


def _asking(prompt: str | None) -> str | None:
    if prompt is not None and "{source}" not in prompt:
        raise ValueError(f"{prompt!r} has no {{source}} in it, where each text is to stand")
    return prompt


PromptConfig = Annotated[str | None, AfterValidator(_asking)]


class ColumnsConfig(Settings):
    """The names of a record's columns, for JSONL, TSV, Parquet and hub sets."""

    source: str = "source"
    target: str = "target"


class TranslationConfig(Settings):
    """Pairs of sentences: two parallel line files joined by a comma, or one file of pairs (.jsonl, .tsv,
    .parquet), or hub:NAME:SPLIT.
    """

    kind: Literal["translation"] = "translation"
    train: tuple[str, ...] = Field(min_length=1)
    dev: tuple[str, ...] = Field(min_length=1)
    columns: ColumnsConfig = ColumnsConfig()
    prompt: PromptConfig = (
        None  # with {source} in it; None: the source alone, and before a decoder's translation a line "=>"
    )
    truncate: bool = False  # cut what does not fit instead of refusing it
    weight: float = Field(default=1.0, gt=0)


class SummarizationConfig(Settings):
    """Documents and their summaries, in the same files as translation's pairs. An encoder picks sentences of
    the document.
    """

    kind: Literal["summarization"] = "summarization"
    train: tuple[str, ...] = Field(min_length=1)
    dev: tuple[str, ...] = Field(min_length=1)
    columns: ColumnsConfig = ColumnsConfig(source="document", target="summary")
    prompt: PromptConfig = None
    truncate: bool = True
    weight: float = Field(default=1.0, gt=0)


class NerConfig(Settings):
    """Entity tags of words, from CoNLL files (columns apart by tab, else by spaces; the last one is the tag),
    or hub:NAME:SPLIT.
    """

    kind: Literal["ner"] = "ner"
    train: tuple[str, ...] = Field(min_length=1)
    dev: tuple[str, ...] = Field(min_length=1)
    crf: bool = False  # score a sentence's labels as one sequence; for recurrent models
    written: bool = False  # a decoder or an encoder-decoder writes the entities instead of labelling words
    prompt: PromptConfig = None
    weight: float = Field(default=1.0, gt=0)


class QaConfig(Settings):
    """Answers as spans of a context, from SQuAD 1.1 or 2.0 JSON, or hub:NAME:SPLIT."""

    kind: Literal["qa"] = "qa"
    train: tuple[str, ...] = Field(min_length=1)
    dev: tuple[str, ...] = Field(min_length=1)
    stride: int = Field(default=64, ge=0)  # tokens that two windows over a long context share
    longest: int = Field(default=30, gt=0)  # tokens of an answer
    cloze: int = Field(
        default=0, ge=0
    )  # questions made of the training contexts, learned along with the asked ones
    prompted: bool = (
        False  # a decoder writes the answer instead of pointing at it; an encoder-decoder always does
    )
    prompt: PromptConfig = None
    weight: float = Field(default=1.0, gt=0)


class MatchingConfig(Settings):
    """Which tokens of a context stand in its question too, from the same files: the first lesson of a model
    that is to find answers.
    """

    kind: Literal["matching"] = "matching"
    train: tuple[str, ...] = Field(min_length=1)
    dev: tuple[str, ...] = Field(min_length=1)
    stride: int = Field(default=64, ge=0)
    cloze: int = Field(default=0, ge=0)
    weight: float = Field(default=1.0, gt=0)


Task = Annotated[
    TranslationConfig | SummarizationConfig | NerConfig | QaConfig | MatchingConfig,
    Field(discriminator="kind"),
]


class FinetuneConfig(TrainingConfig):
    """A run that learns a task."""

    model: InitialModelConfig
    seeds: int = Field(
        default=1, gt=0
    )  # runs that differ by their seed, in RUN/seed-N; the best is published
    tokenizer: TokenizerConfig = (
        TokenizerConfig()
    )  # of a model.config: trained on the task's own text, or a trained one's folder
    task: Task
    more: tuple[
        Task, ...
    ] = ()  # text-to-text tasks learned along, each as often as its weight says; `task` alone is chosen by
    row_length: int = Field(gt=1)  # tokens of a row (of its source side for an encoder-decoder)
    generation: Generation = Generation()
    evaluate_examples: int = Field(default=200, gt=0)  # dev examples during training; the end scores them all
    patience: int = Field(
        default=0, ge=0
    )  # evaluations in a row without a better score before training ends; 0: never
    best: str | None = None  # the score that chooses the best checkpoint; None: the task's own
    freeze: tuple[
        str, ...
    ] = ()  # patterns of parameter names that are not trained, such as embed.* or encoder.blocks.0.*
    lora: Lora | None = (
        None  # train low-rank adapters (and a task's head) alone; what is published has them merged in
    )
    prefetch: int = Field(default=4, ge=1)  # steps prepared ahead

    @model_validator(mode="after")
    def _choosable(self) -> "FinetuneConfig":
        if self.evaluate_every % self.checkpoints.every:
            raise ValueError(
                f"evaluate_every ({self.evaluate_every}) must be a multiple of checkpoints.every"
                f" ({self.checkpoints.every}),"
                " so that every model that is scored can be kept"
            )
        return self
