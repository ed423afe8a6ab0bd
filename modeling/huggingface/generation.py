"""A folder's generation settings in both directions: Generation and the fields of generation_config.json.

Stock classes then generate with the settings with which a task was scored, and `trifold generate` with those
of any folder.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from trifold.modeling.config import Family
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.huggingface.fields import first_token

# Ours -> stock. Always written:
_ALWAYS = {
    "max_new": "max_new_tokens",
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "sample": "do_sample",
}
# Written where they are not the default:
_IF_SET = {
    "min_new": "min_new_tokens",
    "no_repeat": "no_repeat_ngram_size",
    "first": "forced_bos_token_id",
    "start": "decoder_start_token_id",
}
# Written and read with sampling only: without it stock classes warn of them, and use none of them.
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}


def write_generation(generation: Generation, eos: int | None = None) -> dict[str, Any]:
    """The stock fields of these settings.

    `eos` is the tokenizer's end token, for a forced end and beside other end tokens; the remaining special
    tokens are config.json's.
    """
    values = generation.model_dump()
    defaults = {name: Generation.model_fields[name].default for name in _IF_SET}
    is_set = {name: stock for name, stock in _IF_SET.items() if values[name] != defaults[name]}
    names = _ALWAYS | is_set | (_SAMPLING if generation.sample else {})
    fields = {stock: values[name] for name, stock in names.items()}
    if generation.end and eos is not None:
        fields["forced_eos_token_id"] = eos
    if generation.more_ends and eos is not None:
        fields["eos_token_id"] = [eos, *(token for token in generation.more_ends if token != eos)]
    return fields


def read_generation(stock: Mapping[str, Any], roles: Mapping[str, Any]) -> Generation:
    """The settings of a folder's generation_config.json over its config.json.

    `roles` has the special tokens that neither names. Raises UserError naming a field whose value is out of
    range. Settings of sampling are ignored where `do_sample` is not set.
    """
    names = _ALWAYS | _IF_SET | (_SAMPLING if stock.get("do_sample") else {})
    values = {name: stock[field] for name, field in names.items() if stock.get(field) is not None}
    values["end"] = stock.get("forced_eos_token_id") is not None
    values["more_ends"] = _several_ends(stock.get("eos_token_id"))
    if stock.get("is_encoder_decoder"):
        values.setdefault("start", roles["bos"])
        for name in ("start", "first"):
            values[name] = first_token(values.get(name))
    else:  # a decoder continues its prompt: no token stands before or is forced behind it
        values = {name: value for name, value in values.items() if name not in ("start", "first")}
    try:
        return Generation(**values)
    except ValidationError as error:
        mistake = error.errors()[0]
        name = str(mistake["loc"][0])
        field = {**names, "more_ends": "eos_token_id"}.get(name, name)
        raise UserError(
            f"generation_config.json (or config.json) sets {field} = {mistake['input']!r}: {mistake['msg']}"
        ) from None


def _several_ends(eos: Any) -> tuple[Any, ...]:
    """All of several end tokens: which of them is the tokenizer's is not known here."""
    return tuple(eos) if isinstance(eos, list) and len(eos) > 1 else ()


def check_expressible(generation: Generation, family: Family) -> None:
    """Raise UserError for settings of a recipe that a published folder of this family cannot hold, so that
    the model would not generate as it was scored.
    """
    if family == "decoder" and generation.first is not None:
        raise UserError(
            f"generation.first ({generation.first}) forces the first token of an encoder-decoder; a decoder"
            " continues its prompt: put the token into the prompt"
        )
