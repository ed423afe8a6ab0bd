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

from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.huggingface import decoding, export, restore, understand
from trifold.modeling.huggingface.generation import check_expressible, write_generation
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.publish import weights
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.json_files import read_json_object, write_json

RECORD, CARD, CONFIG, GENERATION = "trifold.json", "README.md", "config.json", "generation_config.json"
# Not every stock config has a place for them.
_TRAINING_SETTINGS = ("dropout", "init_std", "mimetic")
_PURPOSE = "a published folder holds config.json"


def write_folder(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = weights.SHARD_BYTES,
    generation: Generation | None = None,
) -> dict[str, Any]:
    """Write what the stock classes load: weights, configs, tokenizer. Returns the content of config.json.

    `generation` is how the model writes text; None: greedily, up to the longest document that it can read.
    """
    stock_config, tensors = export(config, state, special_ids(tokenizer), dtype)
    weights.write_tensors(folder, tensors, shard_bytes)
    write_json(folder / CONFIG, stock_config)
    if config.family != "encoder" and not config.outputs:
        write_json(folder / GENERATION, _generation_fields(config, stock_config, generation))
    tokenizer.save(folder, config.family)
    _write_tokenizer_settings(folder, config)
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


def load_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a published folder, ours or anybody's of a known architecture: (config, fp32 state dict).

    Raises UserError naming the file, setting or tensor that does not fit.
    """
    config, state = restore(read_config(folder), weights.read_tensors(folder))
    return _with_training_settings(config, folder), state


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
    """The content of config.json."""
    return read_json_object(folder / CONFIG, _PURPOSE)


def read_generation(folder: Path) -> Generation:
    """How a folder's model writes text by default."""
    path = folder / GENERATION
    return decoding(read_config(folder), read_json_object(path) if path.exists() else {})


def read_record(folder: Path) -> dict[str, Any]:
    """trifold.json, complete; {} for a folder that has none, because it was made elsewhere."""
    path = folder / RECORD
    if not path.exists():
        return {}
    record = read_json_object(path)
    if missing := {"model", "fingerprints", "files"} - record.keys():
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: publish again, or copy the file again")
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
    config: ModelConfig, stock_config: Mapping[str, Any], generation: Generation | None
) -> dict[str, Any]:
    """The content of generation_config.json: the special tokens of config.json, and the settings."""
    token_ids = {name: value for name, value in stock_config.items() if name.endswith("_token_id")}
    if generation is None:
        return {**token_ids, "do_sample": False, "max_length": config.max_positions}
    check_expressible(generation, config.family)
    return {**token_ids, **write_generation(generation, token_ids["eos_token_id"])}


def _write_tokenizer_settings(folder: Path, config: ModelConfig) -> None:
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
    write_json(path, settings)
