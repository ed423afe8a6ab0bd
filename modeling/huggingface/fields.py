"""What the configs of all architectures share: special tokens, limits of sizes, comparison, and more."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError

# ours -> stock
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}

# Fields that do not affect the logits: book-keeping, training settings, special tokens (which the tokenizer
# knows), and settings of generation.
_WITHOUT_EFFECT = set(
    """ architectures dtype torch_dtype transformers_version tokenizer_class finetuning_task
    task_specific_params initializer_range initializer_cutoff_factor initializer_factor init_std
    gradient_checkpointing encoder_layerdrop decoder_layerdrop resid_pdrop embd_pdrop attn_pdrop
    sparse_prediction sparse_pred_ignore_index deterministic_flash_attn reference_compile
    repad_logits_with_grad pretraining_tp classifier_pooling directionality id2label label2id
    reorder_and_upcast_attn use_cache output_past output_attentions output_hidden_states pad_token_id
    bos_token_id eos_token_id cls_token_id sep_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id force_bos_token_to_be_generated max_length min_length num_beams early_stopping
    no_repeat_ngram_size length_penalty prefix """.split()
)
_HEADS_OF_OTHERS = ("summary_", "pooler_")  # settings of heads that Trifold does not have

# The sizes of a plausible model, by the last part of a field's name: at least, at most.
_LAYERS, _HEADS, _WIDTH = (1, 1_000), (1, 10_000), (1, 1_000_000)
_LIMITS = {
    "vocab_size": (1, 100_000_000),
    "type_vocab_size": (0, 10_000),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "num_heads"), _HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), _HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "head_dim", "d_kv"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), _WIDTH),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_positions"), (1, 100_000_000)),
    "global_attn_every_n_layers": _LAYERS,
    "local_attention": (0, 100_000_000),
    "pad_token_id": (-1, 100_000_000),
}


def check_sizes(hf: Mapping[str, Any], allow_zero: bool = False) -> None:
    """Raises UserError naming the field of a size that no model has, before it is used."""
    for name, value in flat(hf):
        limits = _LIMITS.get(name.rpartition(".")[2])
        if limits is None or value is None:
            continue
        low, high = (0 if allow_zero else limits[0]), limits[1]
        if type(value) is not int or not low <= value <= high:
            raise UserError(
                f"config.json sets {name} = {value!r}, which must be a number from {low} to {high}"
            )


def activation(hf: Mapping[str, Any], field: str) -> str:
    """Our name of a stock activation. Raises UserError naming the field."""
    for ours, stock in ACTIVATIONS.items():
        if same(hf[field], stock):
            return ours
    raise UserError(
        f"config.json sets {field} = {hf[field]!r}; Trifold has {', '.join(ACTIVATIONS.values())}"
    )


def token_roles(hf: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens that a stock config names, 0 where it names none.

    `start` is the token from which a decoder with a source starts. Of several end tokens the first one
    counts; generation reads the others (generation.py).
    """
    ids = {role: first_token(hf.get(f"{role}_token_id")) for role in ("pad", "bos", "eos")}
    start = first_token(hf.get("decoder_start_token_id"))
    ids["start"] = ids["bos"] if start is None else start
    return {role: token or 0 for role, token in ids.items()}


def first_token(ids: Any) -> Any:
    """The first of several token ids; a single one as it is."""
    if isinstance(ids, list):
        return ids[0] if ids else None
    return ids


def token_ids(special: Mapping[str, int]) -> dict[str, int]:
    """The special tokens that every stock config carries."""
    return {f"{name}_token_id": special[name] for name in ("pad", "bos", "eos")}


def rope(theta: float) -> dict[str, Any]:
    """Plain rotary positions, as transformers 5 writes them."""
    return {"rope_type": "default", "rope_theta": theta}


def label_fields(config: ModelConfig) -> dict[str, Any]:
    """The names of a task head's outputs, by which stock classes know how many there are."""
    names = ("start", "end") if config.spans else config.labels
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The names back, in the order of their numbers."""
    return tuple(name for _, name in sorted(hf["id2label"].items(), key=lambda item: int(item[0])))


def check_heads(config: ModelConfig) -> None:
    """Stock configs require heads to divide the width, even where head_dim is set."""
    if config.dim % config.num_heads:
        raise UserError(f"dim ({config.dim}) is not a multiple of num_heads ({config.num_heads})")


def flat(hf: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested config."""
    for name, value in hf.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def same(a: Any, b: Any) -> bool:
    """Equal values; numbers that differ by rounding alone are equal."""
    number = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
    tanh = ("gelu_new", ACTIVATIONS["gelu_tanh"])  # two names of one function
    return math.isclose(a, b, rel_tol=1e-6) if number else a == b or (a in tanh and b in tanh)


def bears_on_logits(name: str) -> bool:
    """Whether a field of a stock config, by its dotted name, affects the logits."""
    if "dropout" in name or name.startswith(("_", *_HEADS_OF_OTHERS)):
        return False
    return not _WITHOUT_EFFECT & set(name.split("."))


def unexpressed(hf: Mapping[str, Any], rewritten: Mapping[str, Any]) -> Iterator[str]:
    """What of a completed stock config affects the logits and is lost in our ModelConfig, a clause each."""
    theirs, ours = dict(flat(hf)), dict(flat(rewritten))
    for name in {**theirs, **ours}:
        if not bears_on_logits(name):
            continue
        if name not in theirs:
            yield f"lacks {name}"
        elif name not in ours and theirs[name]:
            yield f"sets {name} = {theirs[name]!r}, which Trifold does not have"
        elif name in ours and not same(theirs[name], ours[name]):
            yield f"sets {name} = {theirs[name]!r}, where Trifold has only {ours[name]!r}"


def lost(wanted: ModelConfig, expressed: ModelConfig) -> list[str]:
    """The fields in which an expressed model is not the one that is wanted, a clause each."""
    ours, theirs = meaning(wanted), meaning(expressed)
    return [
        f"{name} {ours.get(name)!r} (it has {theirs.get(name)!r})"
        for name in ours | theirs
        if not same(ours.get(name), theirs.get(name))
    ]


def meaning(config: ModelConfig) -> dict[str, Any]:
    """The fields that affect the logits, in a form in which equal models are equal."""
    training = {"dropout", "label_smoothing", "init_std", "mimetic"}
    fields = config.model_dump(exclude=training | {"global_every"})
    fields["attention_scale"] = config.attention_scale or (config.head_dim or 1) ** -0.5
    fields["norm_places"] = tuple(sorted(config.norm_places))
    layers = range(config.num_layers) if config.local_window else ()
    fields["local_layers"] = [i for i in layers if i % config.global_every]
    if config.position != "rope":
        del fields["rope_theta"]
    if config.position != "rope" or not fields["local_layers"]:
        del fields["local_rope_theta"]
    if not fields["local_layers"]:
        del fields["local_window"]
    return fields


def other_dropouts(hf: Mapping[str, Any], ours: tuple[str, ...]) -> list[str]:
    """The dropout settings of a stock config, as `field = value`, that Trifold does not train with.

    `ours` are the fields that are ModelConfig.dropout; the first one decides.
    """
    fields = dict(flat(hf))
    main = fields.get(ours[0], 0.0) if ours else 0.0
    unused = []
    for name, value in fields.items():
        is_dropout = "dropout" in name or name.endswith(("pdrop", "layerdrop"))
        if name.startswith(_HEADS_OF_OTHERS):
            continue
        if is_dropout and value and not (name in ours and value == main):
            unused.append(f"{name} = {value}")
    return unused
