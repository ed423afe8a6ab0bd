"""How a folder writes text, both ways: Generation -> the fields of generation_config.json, and back.

Stock classes then write with the settings that a task was scored with, and `trifold generate` reads those of
anybody's folder.
"""

from collections.abc import Mapping
from typing import Any

from trifold.modeling.config import Generation

_ALWAYS = {
    "max_new": "max_new_tokens",
    "beams": "num_beams",
    "length_penalty": "length_penalty",
    "sample": "do_sample",
}
_IF_SET = {"min_new": "min_new_tokens", "no_repeat": "no_repeat_ngram_size", "first": "forced_bos_token_id"}
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}  # stock classes warn of them where nothing is drawn


def write_generation(how: Generation) -> dict[str, Any]:
    """The stock fields of these settings; the ids of special tokens are the model's config's."""
    said = how.model_dump()
    given = {
        ours: stock for ours, stock in _IF_SET.items() if said[ours] != Generation.model_fields[ours].default
    }
    names = _ALWAYS | given | (_SAMPLING if how.sample else {})
    return {stock: said[ours] for ours, stock in names.items()}


def read_generation(stock: Mapping[str, Any], roles: Mapping[str, Any]) -> Generation:
    """The settings of a folder's generation_config.json over its config.json, where `roles` gives special
    tokens that go unsaid.
    """
    found = {
        ours: stock[theirs]
        for ours, theirs in {**_ALWAYS, **_IF_SET, **_SAMPLING}.items()
        if stock.get(theirs) is not None
    }
    if not stock.get("is_encoder_decoder"):
        return Generation(**{name: value for name, value in found.items() if name != "first"})
    start = stock.get("decoder_start_token_id", roles["bos"])
    return Generation(**found, start=start, end=stock.get("forced_eos_token_id") is not None)
