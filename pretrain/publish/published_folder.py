"""A published folder: what stock Hugging Face classes load, and what Trifold reads back to train on.

    config.json  generation_config.json  model.safetensors (or shards and model.safetensors.index.json)  the tokenizer's files
    README.md (the model card)  trifold.json: the exact ModelConfig, fingerprints, provenance, and every other file's size and sha256
In: tensors under stock names. Out: files, and back. Only safetensors are read, never a pickle.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trifold.modeling.config import Generation, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.huggingface import decoding, export, restore
from trifold.modeling.huggingface.generation import write_generation
from trifold.pretrain.data.tokenizer.special_tokens import missing_file_error
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.storage import storage

RECORD, CARD, INDEX, GENERATION = (
    "trifold.json",
    "README.md",
    "model.safetensors.index.json",
    "generation_config.json",
)
SHARD_BYTES = 5_000_000_000  # the most in one file


def write_folder(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    how: Generation | None = None,
) -> dict[str, Any]:
    """Write what the stock classes load: weights, configs, tokenizer. Returns config.json's content.

    `how` is the way in which the model is to write text; None: greedy, up to the longest document it knows.
    """
    hf, tensors = export(config, state, special_ids(tokenizer), dtype)
    write_tensors(folder, tensors, shard_bytes)
    write_json(folder / "config.json", hf)
    if config.family != "encoder" and not config.outputs:
        ids = {name: value for name, value in hf.items() if name.endswith("_token_id")}
        said = (
            {"do_sample": False, "max_length": config.max_positions} if how is None else write_generation(how)
        )
        write_json(folder / GENERATION, {**ids, **said})
    tokenizer.save(folder, config.family)
    return hf


def write_record(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, data_fingerprint: str, origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Write trifold.json over all files that are there now. Returns its content."""
    fingerprints = {"data": data_fingerprint, "tokenizer": tokenizer.fingerprint}
    record = {
        "model": config.model_dump(mode="json"),
        "fingerprints": fingerprints,
        **origin,
        "files": measure(folder),
    }
    write_json(folder / RECORD, record)
    return record


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that stock configs name; `start` is what a decoder that reads a source starts with."""
    return {"pad": tokenizer.pad, "bos": tokenizer.bos, "eos": tokenizer.eos, "start": tokenizer.start}


def load_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of a published folder, ours or anybody's of a known architecture: (config, fp32 state dict).

    Raises UserError naming the file, setting or tensor that does not fit.
    """
    config, state = restore(read_json(folder / "config.json"), read_tensors(folder))
    if record := read_record(folder):  # training settings (dropout) have no place in config.json
        recorded = recorded_config(record)
        config = config.model_copy(
            update={dial: getattr(recorded, dial) for dial in ("dropout", "init_std", "mimetic")}
        )
    return config, state


def open_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer. Raises UserError where it is not the one that its model was trained with."""
    found = Tokenizer.open(folder)
    if record := read_record(folder):
        trained = record["fingerprints"].get("tokenizer")
        if trained != found.fingerprint:
            raise UserError(
                f"{folder}: its tokenizer's fingerprint is {found.fingerprint}, its model was trained with"
                f" {trained}: restore the folder."
            )
    return found


def read_generation(folder: Path) -> Generation:
    """How a folder's model writes text, if nobody says otherwise."""
    return decoding(
        read_json(folder / "config.json"),
        read_json(folder / GENERATION) if (folder / GENERATION).exists() else {},
    )


def recorded_config(record: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig that trifold.json holds."""
    try:
        return ModelConfig.model_validate_json(json.dumps(record["model"]))
    except ValidationError as error:
        wrong = ", ".join(
            dict.fromkeys(".".join(map(str, mistake["loc"])) or mistake["msg"] for mistake in error.errors())
        )
        raise UserError(
            f"{RECORD} describes a model that this version of Trifold does not know ({wrong})"
        ) from None


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """model.safetensors, or shards of at most `shard_bytes` with an index (a larger tensor is a shard of its
    own).
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by stock name. Raises UserError naming the file that is missing, broken or not
    as its index says.
    """
    if not (folder / INDEX).exists():
        return _read_file(folder / "model.safetensors")
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise UserError(
            f"{folder / INDEX} has no weight_map that names a file for each tensor: copy or publish it again"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        shard = _read_file(folder / name)
        indexed = {tensor for tensor, file in where.items() if file == name}
        if shard.keys() != indexed:
            raise UserError(
                f"{folder / name} and {INDEX} disagree on {', '.join(sorted(shard.keys() ^ indexed)[:4])}"
            )
        tensors |= shard
    return tensors


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file but trifold.json and the model card, which people edit."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (RECORD, CARD))
    return {path.name: storage.measure(path)._asdict() for path in files}


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing_file_error(path, f"a published folder holds {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not whole JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object of names and values")
    return content


def read_record(folder: Path) -> dict[str, Any]:
    """trifold.json, with all that is read from it; {} where there is none, in a folder made elsewhere."""
    if not (folder / RECORD).exists():
        return {}
    record = read_json(folder / RECORD)
    if missing := {"model", "fingerprints", "files"} - record.keys():
        raise UserError(
            f"{folder / RECORD} lacks {', '.join(sorted(missing))}: publish again, or copy the file again"
        )
    return record


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        pickles = ", ".join(sorted(other.name for other in path.parent.glob("*.bin")))
        hint = (
            f"; {pickles} may be a pickle, which could run code, and is not read: convert it to safetensors"
            if pickles
            else ""
        )
        raise UserError(f"there is no {path}{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not whole ({error}): copy or publish it again") from None
