"""What the configs of all architectures share: activations, rotary positions, special tokens, and comparing
by meaning.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}  # ours -> stock

# Fields that do not bear on the logits: book-keeping, training-time settings, special tokens (which the
# tokenizer knows), generation.
_FREE = {
    *(
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "initializer_range",
        "initializer_cutoff_factor",
        "use_cache",
    ),
    *(
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "cls_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "pretraining_tp",
    ),
    *(
        "sparse_prediction",
        "sparse_pred_ignore_index",
        "deterministic_flash_attn",
        "classifier_pooling",
        "max_length",
    ),
    *(
        "id2label",
        "label2id",
        "gradient_checkpointing",
        "reference_compile",
        "repad_logits_with_grad",
        "init_std",
        "initializer_factor",
    ),
    *(
        "forced_bos_token_id",
        "forced_eos_token_id",
        "force_bos_token_to_be_generated",
        "num_beams",
        "early_stopping",
        "min_length",
    ),
    *(
        "no_repeat_ngram_size",
        "length_penalty",
        "task_specific_params",
        "prefix",
        "output_past",
        "tokenizer_class",
        "finetuning_task",
    ),
    *(
        "encoder_layerdrop",
        "decoder_layerdrop",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "directionality",
        "output_attentions",
    ),
    *("output_hidden_states", "reorder_and_upcast_attn"),
}
_HEADS_OF_OTHERS = ("summary_", "pooler_")  # settings of heads that none of our classes has


def activation(hf: Mapping[str, Any], field: str) -> str:
    """Our name of a stock activation. Raises UserError naming the field."""
    for ours, stock in ACTIVATIONS.items():
        if same(hf[field], stock):
            return ours
    raise UserError(
        f"config.json sets {field} = {hf[field]!r}; Trifold has {', '.join(ACTIVATIONS.values())}"
    )


def token_roles(hf: Mapping[str, Any]) -> dict[str, int]:
    """The special tokens that a stock config names, 0 where it names none; `start` is what a decoder starts
    from.
    """
    ids = {role: hf.get(f"{role}_token_id") for role in ("pad", "bos", "eos")}
    ids["start"] = hf.get("decoder_start_token_id", ids["bos"])
    return {role: (found[0] if isinstance(found, list) else found) or 0 for role, found in ids.items()}


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


def whole_heads(config: ModelConfig) -> None:
    """Stock configs insist on this, even where head_dim is given."""
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
    """Whether a field of a stock config, by its dotted name, says what model it is."""
    return not (
        _FREE & set(name.split(".")) or "dropout" in name or name.startswith(("_", *_HEADS_OF_OTHERS))
    )


def unexpressed(hf: Mapping[str, Any], rewritten: Mapping[str, Any]) -> Iterator[str]:
    """What of a completed stock config bears on the logits and would not come back from our ModelConfig, a
    clause each.
    """
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


def lost(wanted: ModelConfig, said: ModelConfig) -> list[str]:
    """The dials by which the model that was said is not the one that was wanted, a clause each."""
    ours, theirs = meaning(wanted), meaning(said)
    return [
        f"{dial} {ours.get(dial)!r} (it has {theirs.get(dial)!r})"
        for dial in ours | theirs
        if not same(ours.get(dial), theirs.get(dial))
    ]


def meaning(config: ModelConfig) -> dict[str, Any]:
    """The dials that bear on the logits, in a form where equal models are equal."""
    dials = config.model_dump(exclude={"dropout", "label_smoothing", "init_std", "mimetic", "global_every"})
    dials["attention_scale"] = config.attention_scale or (config.head_dim or 1) ** -0.5
    dials["norm_places"] = tuple(sorted(config.norm_places))
    dials["local_layers"] = [
        i for i in range(config.num_layers) if config.local_window and i % config.global_every
    ]
    if config.position != "rope":
        del dials["rope_theta"]
    if config.position != "rope" or not dials["local_layers"]:
        del dials["local_rope_theta"]
    if not dials["local_layers"]:
        del dials["local_window"]
    return dials
