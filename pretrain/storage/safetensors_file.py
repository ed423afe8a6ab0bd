"""The safetensors format (github.com/huggingface/safetensors), written from host tensors and read in ranges
from a disk or an object store.

    8 bytes: the header's length | header: JSON, name -> dtype, shape, where its bytes lie | the tensors' bytes

In: named tensors; out: their file as pieces, which `storage.write` hashes on the way. safetensors' own
save_file would neither hash nor say that the disk is full, and its reader needs a local file. Cost: a read
fetches AHEAD bytes at once and keeps them, because slices are read in the order in which they lie; from an
object store that is one request for each 16 MiB.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from trifold.pretrain.storage import storage
from trifold.pretrain.storage.storage import Location

DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NAMED = {name: dtype for dtype, name in DTYPES.items()}
AHEAD = 16 << 20


def file_buffers(tensors: dict[str, Tensor]) -> list[memoryview]:
    """A safetensors file, in order: the header, then the tensors, widest type first so that each is
    aligned.
    """
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [
        memoryview(len(text).to_bytes(8, "little") + text),
        *(_bytes(tensor) for tensor in tensors.values()),
    ]


class SafetensorsFile:
    """A file of flat tensors, open for range reads. Its content was verified before: what is read here is not
    checked again.
    """

    def __init__(self, file: Location) -> None:
        self.file = file
        self._size = storage.size(file)
        self._ahead, self._from = b"", 0
        length = int.from_bytes(self._read(0, 8), "little")
        self._header, self._data = json.loads(bytes(self._read(8, 8 + length))), 8 + length

    def read(self, name: str, low: int, high: int) -> Tensor:
        """The elements [low, high) of a flat tensor, as a tensor of its own."""
        facts = self._header[name]
        dtype, start = NAMED[facts["dtype"]], self._data + facts["data_offsets"][0]
        if low == high:
            return torch.empty(0, dtype=dtype)
        found = self._read(start + low * dtype.itemsize, start + high * dtype.itemsize)
        return torch.frombuffer(bytearray(found), dtype=dtype)

    def _read(self, start: int, stop: int) -> memoryview:
        if not self._from <= start <= stop <= self._from + len(self._ahead):
            self._ahead, self._from = (
                storage.read_at(self.file, start, min(max(stop, start + AHEAD), self._size)),
                start,
            )
        return memoryview(self._ahead)[start - self._from : stop - self._from]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
