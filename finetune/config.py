"""The config of a fine-tuning run, as plain values: a published folder (or new weights), a task, and
pretraining's own training settings.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from trifold.modeling.config import Lora
from trifold.modeling.generation.config import Generation
from trifold.modeling.settings import Settings
from trifold.pretrain.config.pretraining import InitialModelConfig, TokenizerConfig
from trifold.pretrain.config.training import TrainingConfig

Split = Literal["train", "dev", "test"]
# sacrebleu's tokenizers; the last three are SentencePiece models
Tokenization = Literal["none", "13a", "intl", "char", "zh", "ja-mecab", "ko-mecab"]
SentencePieceTokenization = Literal["flores101", "flores200", "spBLEU-1K"]


def _check_prompt(prompt: str | None) -> str | None:
    if prompt is not None and "{source}" not in prompt:
        raise ValueError(f"{prompt!r} has no {{source}} in it, where each text is to stand")
    return prompt


PromptConfig = Annotated[str | None, AfterValidator(_check_prompt)]


class SplitColumnsConfig(Settings):
    """The columns of one split, where they differ from those of the others."""

    source: str | None = None
    target: str | tuple[str, ...] | None = None  # several columns: several references


class ColumnsConfig(Settings):
    """The names of a record's columns, for JSONL, TSV, Parquet and hub sets."""

    source: str = "source"
    target: str = "target"
    train: SplitColumnsConfig = SplitColumnsConfig()
    dev: SplitColumnsConfig = SplitColumnsConfig()
    test: SplitColumnsConfig = SplitColumnsConfig()

    def of(self, split: Split) -> tuple[str, str | tuple[str, ...]]:
        """The source column and the target columns of a split."""
        changes: SplitColumnsConfig = getattr(self, split)
        return changes.source or self.source, changes.target or self.target


class TaggedColumnsConfig(Settings):
    """The columns of words and tags: numbers for a CoNLL file (1 is the first, -1 the last), names for a hub
    set.
    """

    word: int | str | None = None  # None: 1, or tokens
    tag: int | str | None = None  # None: -1, or ner_tags


class TaskConfig(Settings):
    """What the config of every task has."""

    train: tuple[str, ...] = Field(min_length=1)
    dev: tuple[str, ...] = Field(min_length=1)  # chooses the checkpoint
    test: tuple[str, ...] = ()  # scored once, after the checkpoint was chosen
    weight: float = Field(default=1.0, gt=0)

    def files(self, split: Split) -> tuple[str, ...]:
        """The files and hub sets of a split."""
        return {"train": self.train, "dev": self.dev, "test": self.test}[split]


class TranslationConfig(TaskConfig):
    """Pairs of sentences: two parallel line files joined by a comma, or one file of pairs (.jsonl, .tsv,
    .parquet), or hub:NAME:SPLIT.
    """

    kind: Literal["translation"] = "translation"
    columns: ColumnsConfig = ColumnsConfig()
    # With {source} in it; None: the source alone, and before a decoder's translation a line "=>"
    prompt: PromptConfig = None
    truncate: bool = False  # cut what does not fit instead of refusing it
    skip_empty: bool = False  # leave out pairs without text on one side instead of refusing them
    language: str | None = None  # of the targets, such as ja; None: found from the text
    tokenize: Tokenization | SentencePieceTokenization | None = None  # of BLEU; None: by the language


class SummarizationConfig(TaskConfig):
    """Documents and their summaries, in the same files as translation's pairs. An encoder picks sentences of
    the document.
    """

    kind: Literal["summarization"] = "summarization"
    columns: ColumnsConfig = ColumnsConfig(source="document", target="summary")
    prompt: PromptConfig = None
    truncate: bool = True
    skip_empty: bool = False
    language: str | None = None  # of the summaries; English words are stemmed; None: stem words in a-z


class NerConfig(TaskConfig):
    """Entity tags of words, from CoNLL files (columns separated by tabs, else by spaces), or
    hub:NAME:SPLIT.
    """

    kind: Literal["ner"] = "ner"
    columns: TaggedColumnsConfig = TaggedColumnsConfig()
    crf: bool = False  # score a sentence's labels as one sequence; for recurrent models
    written: bool = False  # a decoder or an encoder-decoder writes the entities instead of labelling words
    prompt: PromptConfig = None


class QaConfig(TaskConfig):
    """Answers as spans of a context, from SQuAD 1.1 or 2.0 JSON, or hub:NAME:SPLIT."""

    kind: Literal["qa"] = "qa"
    stride: int = Field(default=64, ge=0)  # tokens that two windows over a long context share
    longest: int = Field(default=30, gt=0)  # tokens of an answer at most
    cloze: int = Field(default=0, ge=0)  # questions made of the training contexts, learned along
    # A decoder writes the answer instead of pointing at it; an encoder-decoder always does
    prompted: bool = False
    prompt: PromptConfig = None


class MatchingConfig(TaskConfig):
    """Which tokens of a context stand in its question too, from the same files: the first lesson of a model
    that is to find answers.
    """

    kind: Literal["matching"] = "matching"
    stride: int = Field(default=64, ge=0)
    cloze: int = Field(default=0, ge=0)


Task = Annotated[
    TranslationConfig | SummarizationConfig | NerConfig | QaConfig | MatchingConfig,
    Field(discriminator="kind"),
]


class FinetuneConfig(TrainingConfig):
    """A run that learns a task."""

    model: InitialModelConfig
    seeds: int = Field(default=1, gt=0)  # runs in RUN/seed-N that differ by their seed
    # Of a model.config: trained on the task's own text, or a trained one's folder
    tokenizer: TokenizerConfig = TokenizerConfig()
    task: Task
    # Text-to-text tasks learned along, each as often as its weight says; `task` alone chooses the checkpoint
    more: tuple[Task, ...] = ()
    row_length: int = Field(gt=1)  # tokens of a row (of its source side for an encoder-decoder)
    generation: Generation = Generation()
    evaluate_examples: int = Field(default=200, gt=0)  # dev examples during training; the end scores all
    # Evaluations in a row without a better score before training ends; 0: never
    patience: int = Field(default=0, ge=0)
    best: str | None = None  # the score that chooses the best checkpoint; None: the task's own
    # Patterns of parameter names that are not trained, such as embed.* or encoder.blocks.0.*
    freeze: tuple[str, ...] = ()
    # Train low-rank adapters (and a task's head) alone; what is published has them merged in
    lora: Lora | None = None
    prefetch: int = Field(default=4, ge=1)  # steps prepared ahead

    @model_validator(mode="after")
    def _every_score_can_be_kept(self) -> "FinetuneConfig":
        if self.evaluate_every % self.checkpoints.every:
            raise ValueError(
                f"evaluate_every ({self.evaluate_every}) must be a multiple of checkpoints.every"
                f" ({self.checkpoints.every}),"
                " so that every model that is scored can be kept"
            )
        return self
