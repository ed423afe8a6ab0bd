"""Activation memory of one forward and backward, measured before training: the model's code on fake tensors.

From a model's config, a batch's shape and the precision to bytes. Nothing is derived on paper, so a new
setting or layer is counted as it is. It measures the uncompiled model; a compiled one keeps less. Cost: 0.1 s
a layer, whatever its size, and no memory.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.sequence_parallel import SequenceShard
from trifold.modeling.transformer import Transformer


class MicroMemory(NamedTuple):
    """Bytes of one micro batch beyond the weights themselves."""

    kept: int  # alive after forward: what backward reads
    peak: int  # the most that is alive at a time, including gradients of the weights
    gradients: int  # of the weights, alive after backward
    sent: int = 0  # to the ranks that share the rows


class _LiveStorage(TorchDispatchMode):
    """Counts, while active, the bytes of all live tensors that operations create, and their peak."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return outputs

    def _freed(self, size: int) -> None:
        self.now -= size


def measure_micro_memory(
    config: ModelConfig, batch: Batch, precision: str, recompute: bool, device: str, sharing: int = 1
) -> MicroMemory:
    """The memory of forward and backward of a micro batch, on one of `sharing` ranks that share rows.

    `precision` and `recompute` are those of the recipe's `engine`. For `cuda` two substitutions make the
    CPU's code allocate what the GPU's does: fp16 for bf16 (equal sizes, and no explicit bf16 attention), and
    no segments or windows, whose masks are blocks on CUDA and dense on the CPU.
    """
    if device == "cuda" and config.cell == "attention" and not config.spans:
        config = config.model_copy(update={"local_window": 0})
        batch = replace(batch, segments=None, source_segments=None)
    low = torch.bfloat16 if device == "cpu" else torch.float16
    sent = 0

    def swap(x: Tensor) -> Tensor:
        nonlocal sent
        sent += x.nbytes // sharing * (sharing - 1)
        return torch.empty_like(x)

    with FakeTensorMode() as mode:
        tensors = {name: tensor for name, tensor in vars(batch).items() if tensor is not None}
        fakes: dict[str, Any] = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        fake = Batch(**{"segments": None, **fakes})
        model = _fake_model(config, low if precision == "bf16" else torch.float32)
        model.recompute(recompute)
        if sharing > 1:
            shard = SequenceShard(0, sharing, swap)
            model.set_sequence_shard(shard)
            fake = shard.local(fake)

        autocast = torch.autocast("cpu", low, enabled=precision == "autocast")
        with _LiveStorage(model.parameters()) as live, autocast:
            loss = model(fake).total
            kept = live.now
            loss.backward()
            return MicroMemory(kept, live.peak, _gradients(model), sent)


def _fake_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Made in its dtype: fake weights cannot be cast."""
    torch.set_default_dtype(dtype)
    try:
        return Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)


def _gradients(model: nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
