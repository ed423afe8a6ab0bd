"""How a folder's model writes text, both ways: Generation -> the fields of generation_config.json, and back.

Stock classes then write with the settings that a task was scored with, and `trifold generate` reads those of
anybody's folder.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from trifold.modeling.config import Family, Generation
from trifold.modeling.errors import UserError

_ALWAYS = {
    "max_new": "max_new_tokens",
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "sample": "do_sample",
}
_IF_SET = {
    "min_new": "min_new_tokens",
    "no_repeat": "no_repeat_ngram_size",
    "first": "forced_bos_token_id",
    "start": "decoder_start_token_id",
}
# Stock classes warn of these where nothing is drawn, and use none of them.
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p"}


def write_generation(generation: Generation, eos: int | None = None) -> dict[str, Any]:
    """The stock fields of these settings. `eos` is the token that a forced end writes; the other special
    tokens are config.json's.
    """
    values = generation.model_dump()
    defaults = {name: Generation.model_fields[name].default for name in _IF_SET}
    set_here = {name: stock for name, stock in _IF_SET.items() if values[name] != defaults[name]}
    names = _ALWAYS | set_here | (_SAMPLING if generation.sample else {})
    fields = {stock: values[name] for name, stock in names.items()}
    return fields | ({"forced_eos_token_id": eos} if generation.end and eos is not None else {})


def read_generation(stock: Mapping[str, Any], roles: Mapping[str, Any]) -> Generation:
    """The settings of a folder's generation_config.json over its config.json, where `roles` gives the special
    tokens that neither names.

    Raises UserError naming a field whose value is out of range. Settings of sampling are not looked at where
    nothing is drawn.
    """
    names = _ALWAYS | _IF_SET | (_SAMPLING if stock.get("do_sample") else {})
    values = {name: stock[field] for name, field in names.items() if stock.get(field) is not None}
    values["end"] = stock.get("forced_eos_token_id") is not None
    if stock.get("is_encoder_decoder"):
        values.setdefault("start", roles["bos"])
    else:  # a decoder continues its prompt: no token stands before or is forced behind it
        values = {name: value for name, value in values.items() if name not in ("start", "first")}
    try:
        return Generation(**values)
    except ValidationError as error:
        mistake = error.errors()[0]
        field = names.get(str(mistake["loc"][0]), mistake["loc"][0])
        raise UserError(
            f"generation_config.json (or config.json) sets {field} = {mistake['input']!r}: {mistake['msg']}"
        ) from None


def check_expressible(generation: Generation, family: Family) -> None:
    """Raise UserError for settings of a recipe that a published folder of this family cannot hold, so that
    the model would not write as it was scored.
    """
    if family == "decoder" and generation.first is not None:
        raise UserError(
            f"generation.first ({generation.first}) forces the first token of an encoder-decoder; a decoder"
            " continues its prompt: put the token into the prompt"
        )
