"""ModelConfig: what a model is, as plain values, for all three families, of attention or of recurrent layers.

Its values come from a recipe or a published folder and are validated here; transformer.py builds the model.
"""

from typing import Literal

from pydantic import Field, model_validator

from trifold.modeling.settings import Settings

Family = Literal["decoder", "encoder", "encoder-decoder"]
NormPlace = Literal["pre", "inner", "post"]

# The target of positions where nothing is predicted. Defined here, because tokenizing and packing need no
# torch.
IGNORE = -100

# Fields of models of attention, which recurrent models leave at their defaults.
_ATTENTION_ONLY = (
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
_ATTENTION_SIZES = ("num_heads", "num_kv_heads", "head_dim", "mlp_dim")


class ModelConfig(Settings):
    """The settings of the block `x = post(x + inner(f(pre(x))))` or of recurrent layers, and the rest."""

    family: Family
    vocab_size: int = Field(gt=0)
    dim: int = Field(gt=0)
    num_layers: int = Field(gt=0)  # of each stack: an encoder-decoder has twice as many blocks
    cell: Literal["attention", "rnn", "lstm", "gru"] = "attention"  # the kind of layer
    # How a recurrent decoder attends to its source.
    alignment: Literal["none", "additive", "multiplicative", "hard"] = "none"

    # The sizes of attention layers: all above 0 for attention, all 0 for recurrent layers.
    num_heads: int = Field(default=0, ge=0)
    num_kv_heads: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    mlp_dim: int = Field(default=0, ge=0)

    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    bias: bool = False  # of linear maps and norms
    norm: Literal["rms", "layer"] = "rms"
    norm_places: tuple[NormPlace, ...] = ("pre",)
    norm_eps: float = Field(default=1e-6, gt=0)
    first_attention_norm: bool = True  # False: layer 0 has no norm before attention (ModernBERT)
    embed_norm: bool = False
    final_norm: bool = True

    position: Literal["rope", "learned", "relative", "sinusoidal"] = "rope"
    # The longest document. Learned positions have a table of this size; otherwise it is only documented.
    max_positions: int = Field(gt=0)
    # The first position of learned and sinusoidal schemes (BART: 2); table rows before it are unused.
    position_offset: int = Field(default=0, ge=0)
    # Rows of a table that goes with learned positions; row 0 is added everywhere (BERT).
    token_types: int = Field(default=0, ge=0)
    rope_theta: float = Field(default=10_000.0, gt=0)
    local_window: int = Field(default=0, ge=0)  # keys within this distance; 0: all layers are full
    global_every: int = Field(default=1, gt=0)  # layer i is full when i % global_every == 0
    local_rope_theta: float = Field(default=10_000.0, gt=0)

    attention_scale: float | None = Field(default=None, gt=0)  # None: head_dim ** -0.5
    embed_scale: float = Field(default=1.0, gt=0)
    logit_scale: float = Field(default=1.0, gt=0)

    head_dense: bool = False  # a dense layer, activation and norm before the logits
    task_dense: bool = True  # with head_dense: before a task's logits too (ModernBERT; not BERT)
    logit_bias: bool | Literal["fixed"] = False  # "fixed": added, but not trained (BART)
    tie_embeddings: bool = True
    labels: tuple[str, ...] = ()  # names of classes; a label head then replaces the vocabulary head
    crf: bool = False  # recurrent models with labels: score label sequences as a whole
    spans: bool = False  # a head of two logits, span start and span end, replaces the vocabulary head

    dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)  # of the vocabulary and label heads, in training
    init_std: float = Field(default=0.02, gt=0)
    # Mimetic initialisation (Trockman and Kolter 2023): full layers start by attending to equal tokens.
    mimetic: bool = False

    @model_validator(mode="after")
    def _fields_of_its_cell(self) -> "ModelConfig":
        """Reject fields that the kind of layer requires and lacks, or has and ignores."""
        attention = self.cell == "attention"
        wrong = [name for name in _ATTENTION_SIZES if attention != (getattr(self, name) > 0)]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: attention layers need each above 0, and recurrent ones have none; cell"
                f" is {self.cell}"
            )
        defaults = {name: type(self).model_fields[name].default for name in _ATTENTION_ONLY}
        ignored = [name for name in defaults if getattr(self, name) != defaults[name]]
        if ignored and not attention:
            raise ValueError(f"a model of cell {self.cell} has no {', '.join(ignored)}: remove them")
        if self.alignment != "none" and (attention or self.family != "encoder-decoder"):
            raise ValueError(
                f"alignment ({self.alignment}) is for recurrent encoder-decoders; this model is"
                f" {self.family}, {self.cell}"
            )
        if self.crf and (attention or not self.labels):
            raise ValueError(
                "crf is for label heads of recurrent models: no stock class of other models has one"
            )
        if not attention and self.family != "decoder" and self.dim % 2:
            raise ValueError(
                f"dim ({self.dim}) must be even: a recurrent encoder has two directions of half the width"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions rotate pairs")
        if self.token_types and self.position != "learned":
            raise ValueError(
                f"token_types ({self.token_types}) requires learned positions, and position is"
                f" {self.position}"
            )
        if len(set(self.norm_places)) != len(self.norm_places):
            raise ValueError(f"norm_places {list(self.norm_places)} names a place twice")
        if self.labels and self.spans:
            raise ValueError(
                f"a model has one head: set labels (here {len(self.labels)} of them) or spans, not both"
            )
        return self

    @property
    def outputs(self) -> int:
        """Logits per position of a task's head; 0: a vocabulary head."""
        return 2 if self.spans else len(self.labels)


class Lora(Settings):
    """Which linear maps of the blocks get a low-rank adapter (lora.py), and its size."""

    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16.0, gt=0)  # the adapter's product is scaled by alpha / rank
    targets: tuple[str, ...] = Field(default=("q", "v"), min_length=1)  # of q, k, v, o, gate, up, down

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
