"""A published folder: what stock Hugging Face classes load, and what Trifold reads back to train on.

config.json             the stock class's settings
generation_config.json  how the model writes text
model.safetensors       or shards and model.safetensors.index.json (weights.py)
tokenizer.json ...      the tokenizer's files
README.md               the model card
trifold.json            the exact ModelConfig, fingerprints, provenance, size and sha256 of every other file
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from trifold.modeling.config import Family, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.huggingface import ImportedModel, decoding, export, recognise, understand
from trifold.modeling.huggingface.generation import check_expressible, write_generation
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import weights
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.foreign_files import check_folder
from trifold.pretrain.storage.json_files import read_json_object, write_json

RECORD, CARD, CONFIG, GENERATION = "trifold.json", "README.md", "config.json", "generation_config.json"
_TRAINING_SETTINGS = ("dropout", "init_std", "mimetic")  # they have no place in config.json
# What reading a value of the wrong kind raises: a list where a number should be, a size of 0 or of 2^63.
_BAD_VALUES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError)
_RECORD_TYPES = {
    **{"model": dict, "fingerprints": dict, "files": dict},
    **{"task": dict, "generation": dict, "carried": list},
}
_PURPOSE = "a published folder holds config.json"


def write_folder(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = weights.SHARD_BYTES,
    generation: Generation | None = None,
    *,
    extra_tensors: Mapping[str, Tensor] | None = None,
    initial_generation: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write what the stock classes load: weights, configs, tokenizer. Returns the content of config.json.
    `extra_tensors` are carried along under their stock names.

    `generation` is how the model writes text; None: as `initial_generation`, the generation_config.json of
    the folder that training started from, or else greedily, up to the longest document that the model can
    read.
    """
    stock_config, tensors = export(config, state, special_ids(tokenizer), dtype)
    extra = {name: tensor.to(dtype) for name, tensor in (extra_tensors or {}).items()}
    weights.write_tensors(folder, tensors | extra, shard_bytes)
    write_json(folder / CONFIG, stock_config)
    if config.family != "encoder" and not config.outputs:
        write_json(
            folder / GENERATION,
            _generation_fields(config, stock_config, generation, initial_generation or {}),
        )
    tokenizer.save(folder, tokenizer_family(config))
    _write_tokenizer_settings(folder, config, tokenizer)
    return stock_config


def write_record(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, data_fingerprint: str, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Write trifold.json over all files that are there now. Returns its content."""
    record = {
        "model": config.model_dump(mode="json"),
        "fingerprints": {"data": data_fingerprint, "tokenizer": tokenizer.fingerprint},
        **origin,
        "files": measure(folder),
    }
    write_json(folder / RECORD, record)
    return record


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that stock configs name; `start` is the first token of a decoder that reads a source."""
    return {"pad": tokenizer.pad, "bos": tokenizer.bos, "eos": tokenizer.eos, "start": tokenizer.start}


def tokenizer_family(config: ModelConfig) -> Family:
    """The family whose special tokens stand around texts: every model that answers questions reads a question
    and its context with EOS behind both, as an encoder does.
    """
    return "encoder" if config.spans else config.family


def load_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a published folder, ours or anybody's of a known architecture: (config, fp32 state dict).

    Raises UserError naming the file, setting or tensor that does not fit.
    """
    found = recognise_folder(folder, read_config(folder), weights.read_tensors(folder))
    return _with_training_settings(found.config, folder), found.state


def load_config(folder: Path) -> ModelConfig:
    """The model's config alone, with `tie_embeddings` as config.json has it."""
    _, config = understand(read_config(folder))
    return _with_training_settings(config, folder)


def _with_training_settings(config: ModelConfig, folder: Path) -> ModelConfig:
    """With those of trifold.json, where the folder has one."""
    record = read_record(folder)
    if not record:
        return config
    recorded = recorded_config(record)
    return config.model_copy(update={name: getattr(recorded, name) for name in _TRAINING_SETTINGS})


def recognise_folder(
    folder: Path, stock_config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ImportedModel:
    """The model that config.json and the tensors of a folder mean. Raises UserError naming the setting or
    tensor that does not fit, whatever values a stranger's file holds.
    """
    path = folder / CONFIG
    for name, value in stock_config.items():  # each layer would be built before its tensors are missed
        is_count = name == "n_layer" or name.endswith("_layers")
        if is_count and isinstance(value, int) and value > len(tensors):
            raise UserError(f"{path} sets {name} = {value:,}, and the folder holds {len(tensors)} tensors")
    try:
        return recognise(stock_config, tensors)
    except UserError:
        raise
    except _BAD_VALUES as error:
        raise UserError(f"{path} cannot be read as a model ({type(error).__name__}: {error})") from error


def open_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer. Raises UserError where it is not the one that its model was trained with."""
    tokenizer = Tokenizer.open(folder)
    if record := read_record(folder):
        trained_with = record["fingerprints"].get("tokenizer")
        if trained_with != tokenizer.fingerprint:
            raise UserError(
                f"{folder}: its tokenizer's fingerprint is {tokenizer.fingerprint}, its model was trained"
                f" with {trained_with}: restore the folder."
            )
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises UserError where the folder asks for code or files from elsewhere."""
    config = read_json_object(folder / CONFIG, _PURPOSE)
    check_folder(folder)
    return config


def read_generation(folder: Path) -> Generation:
    """How a folder's model writes text by default."""
    path = folder / GENERATION
    config, settings = read_config(folder), read_json_object(path) if path.exists() else {}
    try:
        return decoding(config, settings)
    except UserError:
        raise
    except _BAD_VALUES as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def read_record(folder: Path) -> dict[str, Any]:
    """trifold.json, complete; {} for a folder that has none, because it was made elsewhere."""
    path = folder / RECORD
    if not path.exists():
        return {}
    record = read_json_object(path)
    needed = ("model", "fingerprints", "files")
    if missing := {name for name in needed if record.get(name) is None}:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: publish again, or copy the file again")
    for name, kind in _RECORD_TYPES.items():
        if record.get(name) is not None and not isinstance(record[name], kind):
            raise UserError(f"{path} holds a {type(record[name]).__name__} as {name}: copy the file again")
    return record


def recorded_config(record: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that trifold.json holds."""
    try:
        return ModelConfig.model_validate_json(json.dumps(record["model"]))
    except ValidationError as error:
        names = [".".join(map(str, mistake["loc"])) or mistake["msg"] for mistake in error.errors()]
        raise UserError(
            f"{RECORD} describes a model that this version of Trifold does not know"
            f" ({', '.join(dict.fromkeys(names))})"
        ) from None


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but trifold.json and the model card, which people edit."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (RECORD, CARD))
    return {path.name: DiskPath(path).measure()._asdict() for path in files}


def _generation_fields(
    config: ModelConfig,
    stock_config: Mapping[str, Any],
    generation: Generation | None,
    initial: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of generation_config.json: the special tokens of config.json, and the settings."""
    token_ids = {name: value for name, value in stock_config.items() if name.endswith("_token_id")}
    ends, eos = initial.get("eos_token_id"), token_ids.get("eos_token_id")
    if generation is None and initial:
        several_ends = {"eos_token_id": ends} if isinstance(ends, list) and eos in ends else {}
        return {**initial, **token_ids, **several_ends}
    if generation is None:
        return {**token_ids, "do_sample": False, "max_length": config.max_positions}
    check_expressible(generation, config.family)
    return {**token_ids, **write_generation(generation, token_ids["eos_token_id"])}


def _write_tokenizer_settings(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Complete tokenizer_config.json: stock classes cut texts at the longest one that the model can read, and
    pad prompts on the left, because generated text continues the right end.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json_object(path)
    longest = settings.get("model_max_length")
    if not isinstance(longest, int) or not 0 < longest <= config.max_positions:
        settings["model_max_length"] = config.max_positions
    if config.family == "decoder" and not config.outputs:
        settings["padding_side"] = "left"
    if config.token_types > 1:  # whether stock classes give types, whatever their defaults are
        types = ["token_type_ids"] if tokenizer.gives_token_types else []
        settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
    write_json(path, settings)
