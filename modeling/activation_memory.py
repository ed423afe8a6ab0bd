"""What one forward and backward of a model holds in memory, counted before there is any: the model's own code
run on fake tensors.

In: a model's config, a batch's shape, the precision. Out: bytes. Nothing is derived on paper, so a new dial
or layer is counted as it is. It counts the uncompiled model: a compiled one keeps less. Cost: 0.1 s a layer,
whatever its size; no memory.
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

    kept: int  # alive when the forward has ended: what backward will read
    peak: int  # the most alive at a time, gradients of the weights included
    gradients: int  # of the weights, alive when the backward has ended
    sent: int = 0  # to the ranks that share its rows


class _LiveStorage(TorchDispatchMode):
    """While inside, counts the bytes of all tensors that operations make and that are still alive, and the
    most there were.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


def measure_micro_memory(
    config: ModelConfig, batch: Batch, precision: str, recompute: bool, device: str, sharing: int = 1
) -> MicroMemory:
    """What forward and backward of a micro batch hold, on one of `sharing` ranks. `precision` and `recompute`
    are the recipe's engine's.

    For `cuda` bf16 is counted as fp16, which has its size and never takes the attention that is written out
    for bf16 on the CPU; and documents and windows count as nothing, because its kernels know them in blocks,
    where the CPU's want masks of whole rows.
    """
    if device == "cuda" and config.cell == "attention" and not config.spans:
        config, batch = (
            config.model_copy(update={"local_window": 0}),
            replace(batch, segments=None, source_segments=None),
        )
    low = torch.bfloat16 if device == "cpu" else torch.float16
    sent = 0

    def swap(x: Tensor) -> Tensor:
        nonlocal sent
        sent += x.nbytes // sharing * (sharing - 1)
        return torch.empty_like(x)

    with FakeTensorMode() as mode:
        given: dict[str, Any] = {
            name: mode.from_tensor(value) for name, value in vars(batch).items() if value is not None
        }
        fake = Batch(**{"segments": None, **given})
        torch.set_default_dtype(low if precision == "bf16" else torch.float32)  # fake weights cannot be cast
        try:
            model = Transformer(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.recompute(recompute)
        if sharing > 1:
            shared = SequenceShard(0, sharing, swap)
            model.set_sequence_shard(shared)
            fake = shared.local(fake)
        with (
            _LiveStorage(model.parameters()) as live,
            torch.autocast("cpu", low, enabled=precision == "autocast"),
        ):
            loss = model(fake)
            kept = live.now
            loss.backward()
            return MicroMemory(kept, live.peak, _gradients(model), sent)


def _gradients(model: nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
