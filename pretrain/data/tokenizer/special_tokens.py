"""The special tokens of a tokenizer by their roles: the files of its folder come in, a token for each role
goes out.

A folder names its special tokens in tokenizer_config.json. Published kinds differ: BERT's [CLS] and [SEP]
begin and end a text; GPT-2's <|endoftext|> does both, and pads; T5 has no begin, and its padding starts the
decoder; mBART's and NLLB's start is in config.json.
"""

from pathlib import Path
from typing import Any

from trifold.modeling.errors import UserError
from trifold.pretrain.storage.foreign_files import check_settings
from trifold.pretrain.storage.json_files import read_json_object

# the settings that name it, in order of precedence; and the usual names, for folders that name none at all
_ROLES = {
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "bos": (("bos_token", "cls_token"), ("<s>", "[CLS]", "<|endoftext|>")),
    "eos": (("eos_token", "sep_token"), ("</s>", "[SEP]", "<|endoftext|>")),
    "unk": (("unk_token",), ("<unk>", "[UNK]", "<|endoftext|>")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
}
_NAMES = [name for names, _ in _ROLES.values() for name in names]
START = "trifold_decoder_start"  # our own setting, in folders that were copied without their config.json


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, in which every special token is a string and START names the
    token that starts a decoder, where known.

    Raises UserError where one is missing or damaged, names a special token that tokenizer.json has not, or
    none that ends a text.
    """
    contents = "a tokenizer folder holds tokenizer.json and tokenizer_config.json"
    spec = read_json_object(folder / "tokenizer.json", contents)
    settings = read_json_object(folder / "tokenizer_config.json", contents)
    check_settings(folder / "tokenizer_config.json", settings)
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    for name in _NAMES:
        token = settings.get(name)
        if isinstance(token, dict):
            token = settings[name] = token["content"]
        if token is not None and token not in added.values():
            raise UserError(
                f"{folder}: tokenizer_config.json gives {token!r} as {name}, which is no added token of"
                " tokenizer.json"
            )
    if (folder / "config.json").exists():
        start = read_json_object(folder / "config.json").get("decoder_start_token_id")
        if start in added:
            settings[START] = added[start]
    if special_tokens(spec, settings)["eos"] is None:
        raise UserError(
            f"{folder}: tokenizer_config.json names no token that ends a text (eos_token or sep_token), and"
            " all training needs one"
        )
    return spec, settings


def special_tokens(spec: dict[str, Any], settings: dict[str, Any]) -> dict[str, str | None]:
    """The token of each role: pad, bos, eos, unk, mask and start (of a decoder that reads a source); None
    where there is none.

    The end token also pads, or begins a text, where there is no other token for that. A decoder starts with
    the token that the folder names, else with the one that begins a text, else (T5) with the padding.
    """
    added = [token["content"] for token in spec["added_tokens"]]
    tokens: dict[str, str | None] = {}
    for role, (names, usual) in _ROLES.items():
        if settings.keys() & set(_NAMES):
            candidates = [settings.get(name) for name in names]
        else:
            candidates = [name for name in usual if name in added]
        tokens[role] = next((token for token in candidates if token is not None), None)
    start = settings.get(START) or tokens["bos"] or tokens["pad"]
    return tokens | {
        "pad": tokens["pad"] or tokens["eos"],
        "bos": tokens["bos"] or tokens["eos"],
        "start": start,
    }
