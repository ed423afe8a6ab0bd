"""Which special token plays which part: in, a tokenizer folder's files; out, the tokens by role.

A folder names its marks in tokenizer_config.json. Published kinds differ: BERT's [CLS] and [SEP] begin and
end a text; GPT-2's <|endoftext|> does both, and pads; T5 has no begin, and its padding starts the decoder;
mBART's and NLLB's start is in config.json.
"""

from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.storage.foreign_files import check_settings
from trifold.pretrain.storage.json_files import read_json_object

# the settings that name it, the first that there is; and the usual names, for folders that name none at all
_ROLES = {
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "bos": (("bos_token", "cls_token"), ("<s>", "[CLS]", "<|endoftext|>")),
    "eos": (("eos_token", "sep_token"), ("</s>", "[SEP]", "<|endoftext|>")),
    "unk": (("unk_token",), ("<unk>", "[UNK]", "<|endoftext|>")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
}
_NAMES = [name for names, _ in _ROLES.values() for name in names]
START = "trifold_decoder_start"  # our own setting, in folders that were copied away from their config.json


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, in which every mark is a string and START says what starts a
    decoder, where known.

    Raises UserError where one is missing or broken, names a mark that tokenizer.json has not, or none that ends
    a text.
    """
    spec, settings = (
        read_json_object(folder / name, "a tokenizer folder holds tokenizer.json and tokenizer_config.json")
        for name in ("tokenizer.json", "tokenizer_config.json")
    )
    check_settings(folder / "tokenizer_config.json", settings)
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    for name in _NAMES:
        if isinstance(mark := settings.get(name), dict):
            settings[name] = mark = mark["content"]
        if mark is not None and mark not in added.values():
            raise UserError(
                f"{folder}: tokenizer_config.json gives {mark!r} as {name}, which is no added token of"
                " tokenizer.json"
            )
    if (folder / "config.json").exists():
        start = read_json_object(folder / "config.json").get("decoder_start_token_id")
        settings |= {START: added[start]} if start in added else {}
    if special_tokens(spec, settings)["eos"] is None:
        raise UserError(
            f"{folder}: tokenizer_config.json names no token that ends a text (eos_token or sep_token), and"
            " all training needs one"
        )
    return spec, settings


def special_tokens(spec: dict[str, Any], settings: dict[str, Any]) -> dict[str, str | None]:
    """The token of each role: pad, bos, eos, unk, mask and start (of a decoder that reads a source); None
    where there is none.

    What ends a text pads where nothing else does, and begins one where nothing else does. A decoder starts
    with what the folder says, else with what begins a text, else (T5) with the padding.
    """
    added = [token["content"] for token in spec["added_tokens"]]
    tokens: dict[str, str | None] = {}
    for role, (names, usual) in _ROLES.items():
        found = (
            [settings.get(name) for name in names]
            if settings.keys() & set(_NAMES)
            else [name for name in usual if name in added]
        )
        tokens[role] = next((token for token in found if token is not None), None)
    start = settings.get(START) or tokens["bos"] or tokens["pad"]
    return tokens | {
        "pad": tokens["pad"] or tokens["eos"],
        "bos": tokens["bos"] or tokens["eos"],
        "start": start,
    }
