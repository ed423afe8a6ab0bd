"""What a model is, as plain values: ModelConfig, one frozen set of dials for all three families, of attention
or of recurrent cells.

In: literals from a recipe or a published folder. Out: a validated value; building the model is
transformer.py's business.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["decoder", "encoder", "encoder-decoder"]
NormPlace = Literal["pre", "inner", "post"]
IGNORE = (
    -100
)  # a target that is not counted; here, because whoever tokenizes and packs text does so without torch


class Settings(BaseModel):
    """A frozen, strictly typed group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# What blocks of attention have and recurrent layers have not.
_OF_BLOCKS = (
    "gated",
    "norm_places",
    "first_attention_norm",
    "embed_norm",
    "final_norm",
    "position",
    "position_offset",
    "token_types",
    "rope_theta",
    "local_window",
    "global_every",
    "local_rope_theta",
    "attention_scale",
    "mimetic",
)


class ModelConfig(Settings):
    """The dials of one Block, `x = post(x + inner(sublayer(pre(x))))`, or of recurrent layers, and of what
    stands around them.
    """

    family: Family
    vocab_size: int = Field(gt=0)
    dim: int = Field(gt=0)
    num_layers: int = Field(gt=0)  # of each stack: an encoder-decoder has twice as many blocks
    cell: Literal["attention", "rnn", "lstm", "gru"] = "attention"  # what layers are made of
    alignment: Literal["none", "additive", "multiplicative", "hard"] = (
        "none"  # how a recurrent decoder looks at its source
    )
    num_heads: int = Field(
        default=0, ge=0
    )  # this and the next three: above 0 for attention, and recurrent layers have none
    num_kv_heads: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    mlp_dim: int = Field(default=0, ge=0)
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    bias: bool = False  # linears and norms alike
    norm: Literal["rms", "layer"] = "rms"
    norm_places: tuple[NormPlace, ...] = ("pre",)
    norm_eps: float = Field(default=1e-6, gt=0)
    first_attention_norm: bool = True  # False: layer 0 has no norm before attention (ModernBERT)
    embed_norm: bool = False
    final_norm: bool = True
    position: Literal["rope", "learned", "relative", "sinusoidal"] = "rope"
    max_positions: int = Field(
        gt=0
    )  # the longest document: a table's size (learned), a promise to readers (otherwise)
    position_offset: int = Field(
        default=0, ge=0
    )  # what learned and sinusoidal positions count from (BART: 2); rows before it are unused
    token_types: int = Field(
        default=0, ge=0
    )  # rows of a table beside the learned positions; row 0 is added everywhere (BERT)
    rope_theta: float = Field(default=10_000.0, gt=0)
    local_window: int = Field(default=0, ge=0)  # keys within this distance; 0: every layer is global
    global_every: int = Field(default=1, gt=0)  # layer i is global when i % global_every == 0
    local_rope_theta: float = Field(default=10_000.0, gt=0)
    attention_scale: float | None = Field(default=None, gt=0)  # None: head_dim ** -0.5
    embed_scale: float = Field(default=1.0, gt=0)
    logit_scale: float = Field(default=1.0, gt=0)
    head_dense: bool = False  # dense, activation, norm before the logits
    task_dense: bool = True  # where head_dense: before a task's logits too (ModernBERT; not BERT)
    logit_bias: bool | Literal["fixed"] = False  # "fixed": added, but never trained (BART)
    tie_embeddings: bool = True
    labels: tuple[str, ...] = ()  # names; a label head stands in place of the vocabulary head
    crf: bool = False  # label heads of recurrent models: the sequence of labels is scored as a whole
    spans: bool = False  # a head of two logits stands there: does an answer begin here, does it end here
    dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1
    )  # of the training loss of the vocabulary and label heads
    init_std: float = Field(default=0.02, gt=0)
    mimetic: bool = False  # begin with global layers that look at equal tokens

    @model_validator(mode="after")
    def _has_its_parts(self) -> "ModelConfig":
        """A dial that does nothing is refused, and so is one that is missing."""
        attends = self.cell == "attention"
        if wrong := [
            dial
            for dial in ("num_heads", "num_kv_heads", "head_dim", "mlp_dim")
            if attends != (getattr(self, dial) > 0)
        ]:
            raise ValueError(
                f"{', '.join(wrong)}: attention layers need each above 0, and recurrent ones have none; cell"
                f" is {self.cell}"
            )
        fields = type(self).model_fields
        if idle := [
            dial for dial in _OF_BLOCKS if not attends and getattr(self, dial) != fields[dial].default
        ]:
            raise ValueError(f"a model of cell {self.cell} has no {', '.join(idle)}: leave them out")
        if self.alignment != "none" and (attends or self.family != "encoder-decoder"):
            raise ValueError(
                f"alignment ({self.alignment}) is for recurrent encoder-decoders; this model is:"
                f" {self.family}, {self.cell}"
            )
        if self.crf and (attends or not self.labels):
            raise ValueError(
                "crf is for the label heads of recurrent models: no stock class of the others has it"
            )
        if not attends and self.family != "decoder" and self.dim % 2:
            raise ValueError(
                f"dim ({self.dim}) must be even: a recurrent encoder reads both ways, with half of it each"
            )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "ModelConfig":
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of numbers"
            )
        if self.token_types and self.position != "learned":
            raise ValueError(
                f"token_types ({self.token_types}) stand beside learned positions, and position is"
                f" {self.position}"
            )
        if len(set(self.norm_places)) != len(self.norm_places):
            raise ValueError(f"norm_places {list(self.norm_places)} names a place twice")
        if self.labels and self.spans:
            raise ValueError(
                f"a model has one head: give labels ({len(self.labels)} of them) or spans, and not both"
            )
        return self

    @property
    def outputs(self) -> int:
        """Logits per position of a task's head; 0: the vocabulary head."""
        return 2 if self.spans else len(self.labels)


class Generation(Settings):
    """How text is generated. The most likely next token each time, unless `sample` or `beams` says
    otherwise.
    """

    max_new: int = Field(default=128, gt=0)  # tokens at most
    min_new: int = Field(default=0, ge=0)  # tokens before the text may end
    no_repeat: int = Field(
        default=0, ge=0
    )  # n-grams of this length come once, the prompt's included; 0: they may come again
    beams: int = Field(default=1, gt=0)
    length_penalty: float = 1.0  # a beam's score is the sum of its log-probabilities / length ** this
    num_best: int = Field(default=1, gt=0)  # how many of the beams `hypotheses` returns
    start: int | None = Field(
        default=None, ge=0
    )  # the token from which an encoder-decoder starts to write; None: bos
    first: int | None = Field(
        default=None, ge=0
    )  # the token that is written first whatever the scores, such as a language's code
    end: bool = False  # the last token that `max_new` allows is the end, whatever the scores
    sample: bool = False
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)  # draw among the k most likely tokens; 0: among all
    top_p: float = Field(
        default=1.0, gt=0, le=1
    )  # draw among the most likely tokens that together have this probability
    seed: int = Field(default=0, ge=0)


class Lora(Settings):
    """Which linear maps of the blocks get an adapter, and how large."""

    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16.0, gt=0)  # the product counts alpha / rank times
    targets: tuple[str, ...] = Field(default=("q", "v"), min_length=1)  # of q, k, v, o, gate, up, down

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
