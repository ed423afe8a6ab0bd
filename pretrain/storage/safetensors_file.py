"""The safetensors format (github.com/huggingface/safetensors): written as file buffers, read in ranges.

    8 bytes: the header's length
    header: JSON, name -> dtype, shape, data_offsets
    the tensors' bytes

`file_buffers` turns named tensors into buffers, which `StoragePath.write` writes and hashes;
`SafetensorsFile` reads ranges of tensors back from a disk or an object store. safetensors' own save_file does
not hash and hides that the disk is full, and its reader requires a local file.

Cost: a read fetches READ_AHEAD bytes at once and keeps them, because slices are read in file order; from an
object store that is one request for each 16 MiB.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from trifold.pretrain.storage.storage_path import StoragePath

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
_DTYPE_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
READ_AHEAD = 16 << 20


def file_buffers(tensors: dict[str, Tensor]) -> list[memoryview]:
    """A safetensors file as its header and the bytes of each tensor, widest dtype first, so that each is
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
    length = len(text).to_bytes(8, "little")
    return [memoryview(length + text), *(_bytes(tensor) for tensor in tensors.values())]


class SafetensorsFile:
    """A file of flat tensors, open for range reads. Its content was verified before, not again."""

    def __init__(self, file: StoragePath) -> None:
        self.file = file
        self._size = file.size()
        self._buffer, self._buffer_start = b"", 0
        length = int.from_bytes(self._read(0, 8), "little")
        self._header = json.loads(bytes(self._read(8, 8 + length)))
        self._data_start = 8 + length

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of the elements [start, stop) of a flat tensor."""
        facts = self._header[name]
        dtype = _DTYPE_BY_NAME[facts["dtype"]]
        if start == stop:
            return torch.empty(0, dtype=dtype)
        first_byte = self._data_start + facts["data_offsets"][0]
        content = self._read(first_byte + start * dtype.itemsize, first_byte + stop * dtype.itemsize)
        return torch.frombuffer(bytearray(content), dtype=dtype)

    def _read(self, start: int, stop: int) -> memoryview:
        if not self._buffer_start <= start <= stop <= self._buffer_start + len(self._buffer):
            self._buffer = self.file.read_at(start, min(max(stop, start + READ_AHEAD), self._size))
            self._buffer_start = start
        return memoryview(self._buffer)[start - self._buffer_start : stop - self._buffer_start]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data
