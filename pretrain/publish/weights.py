"""The tensors of a published folder: model.safetensors, or shards and model.safetensors.index.json.

    8 bytes: the header's length | header: JSON, name -> dtype, shape, where its bytes lie | the tensors'
    bytes (github.com/huggingface/safetensors)

Only safetensors files that lie in the folder are read, never a pickle; a link is followed, as in a hub cache
(snapshots/COMMIT/model.safetensors -> ../../blobs/HASH). Each header is checked against the size of its file
before memory is taken for what it announces.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trifold.modeling.errors import UserError
from trifold.pretrain.storage.foreign_files import is_plain_name
from trifold.pretrain.storage.json_files import check_regular_file, read_json_object, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the largest file that is written
_MAX_HEADER_BYTES = 16 << 20  # 100,000 tensors have about 12 MB
_DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    """Write model.safetensors, or shards of at most `shard_bytes` and an index. A larger tensor has its own
    shard.
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return save_tensors(folder / WEIGHTS, shards[0])

    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file, marked as torch's as stock classes require."""
    save_file(dict(tensors), path, metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by their stock names. Raises UserError naming the file that is missing, damaged
    or not as the index has it.
    """
    if not (folder / INDEX).exists():
        return _read_file(folder / WEIGHTS)

    weight_map = _read_weight_map(folder / INDEX)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = _read_file(folder / name)
        indexed = {tensor for tensor, file in weight_map.items() if file == name}
        if shard.keys() != indexed:
            different = ", ".join(sorted(shard.keys() ^ indexed)[:4])
            raise UserError(f"{folder / name} and {INDEX} disagree on {different}")
        tensors |= shard
    return tensors


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(
            f"{path} has no weight_map that names a file for each tensor: copy or publish it again"
        )
    for tensor, file in weight_map.items():
        if not is_plain_name(file) or not file.endswith(".safetensors"):
            raise UserError(
                f"{path} names {file!r} for {tensor}; only .safetensors files of the folder itself are read"
            )
    return weight_map


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
        )
        raise UserError(f"there is no {path}{hint if pickles else ''}")
    check_regular_file(path)
    if problem := _header_problem(path):
        raise UserError(f"{path} is damaged ({problem}): copy or publish it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy or publish it again") from None


def _header_problem(path: Path) -> str | None:
    """What is wrong with the header of a safetensors file; None where it describes exactly these bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"its header should have {length:,} bytes, and the file has {size:,}"
        if length > _MAX_HEADER_BYTES:
            return f"its header has {length:,} bytes; at most {_MAX_HEADER_BYTES:,} are read"
        content = file.read(length)
    try:
        header = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return f"its header is not JSON: {error}"
    if not isinstance(header, dict):
        return f"its header is a {type(header).__name__}, not an object of names and tensors"

    header.pop("__metadata__", None)
    for name, info in header.items():
        if problem := _tensor_problem(info):
            return f"the header of {name!r} {problem}"
    return _layout_problem(header, size - 8 - length)


def _tensor_problem(info: Any) -> str | None:
    """What is wrong with the entry of one tensor: its dtype, its shape, or their product."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        return "lacks dtype, shape or data_offsets"
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        return f"has the dtype {dtype!r}; Trifold reads {', '.join(_DTYPE_BYTES)}"
    if not _are_sizes(shape):
        return f"has the shape {str(shape)[:80]}"
    if not _are_sizes(offsets) or len(offsets) != 2:
        return f"has the data_offsets {str(offsets)[:80]}"
    need, have = math.prod(shape) * _DTYPE_BYTES[dtype], offsets[1] - offsets[0]
    if need != have:
        return f"needs {need:,} bytes for the shape {shape} in {dtype}, and has {have:,}"
    return None


def _are_sizes(values: Any) -> bool:
    """Whether a value is a list of a few integers that can be sizes of a tensor."""
    if not isinstance(values, list) or len(values) > 8:
        return False
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def _layout_problem(header: Mapping[str, Any], size: int) -> str | None:
    """What is wrong with where the tensors lie: one after the other, without a gap or an overlap."""
    end = 0
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin = info["data_offsets"][0]
        if begin != end:
            return f"{name!r} begins at byte {begin:,} of the data, and the tensor before it ends at {end:,}"
        end = info["data_offsets"][1]
    if end != size:
        return f"its tensors have {end:,} bytes, and the file holds {size:,}"
    return None
