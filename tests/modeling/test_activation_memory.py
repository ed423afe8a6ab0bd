"""What is counted on fake tensors beside what torch really keeps and holds."""

import itertools
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.modeling.families import CONFIGS
from tests.modeling.operation_counts import batch
from trifold.modeling.activation_memory import MicroMemory, measure_micro_memory
from trifold.modeling.batch import Batch
from trifold.modeling.transformer import build

FAMILIES = ("llama", "modernbert", "t5gemma")


def rows(one: Batch, number: int) -> Batch:
    """That row so often. One alone holds as little as the scratch of kernels does: some 4 KB a thread, on
    CPUs without AVX-512.
    """
    repeated: Any = {
        name: None if value is None else value.repeat(number, 1) for name, value in vars(one).items()
    }
    return Batch(**repeated)


def really_kept(name: str, given: Batch, recompute: bool) -> int:
    """Bytes of all that autograd saves in the forward of the real model, each storage once, without the
    weights and the batch.
    """
    model = build(CONFIGS[name], 0)
    model.recompute(recompute)
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *(v for v in vars(given).values() if v is not None))
    }
    expected: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        expected.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(given).total
    assert loss.requires_grad
    return sum(
        tensor.untyped_storage().nbytes() for pointer, tensor in expected.items() if pointer not in known
    )


def really_held(name: str, given: Batch, recompute: bool) -> MicroMemory:
    """The same by torch's own allocator, as the profiler hears it."""
    model = build(CONFIGS[name], 0)
    model.recompute(recompute)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        model(given).total.backward()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = sorted(
        (e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    )
    live = list(itertools.accumulate(size for _, size in changes))
    return MicroMemory(0, max(live), live[-1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_backward_will_read_is_what_torch_saves(name: str, recompute: bool) -> None:
    given = batch(name, 0)
    counted, real = (
        measure_micro_memory(CONFIGS[name], given, "fp32", recompute, "cpu"),
        really_kept(name, given, recompute),
    )
    if recompute:  # saved by hand, past the hooks: the inputs of the blocks
        assert counted.kept < measure_micro_memory(CONFIGS[name], given, "fp32", False, "cpu").kept / 2
    else:
        assert counted.kept == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_peak_and_the_gradients_are_those_of_the_allocator(name: str, recompute: bool) -> None:
    given = rows(batch(name, 0), 16)
    counted, real = (
        measure_micro_memory(CONFIGS[name], given, "fp32", recompute, "cpu"),
        really_held(name, given, recompute),
    )
    assert counted.peak == pytest.approx(real.peak, rel=0.02)
    assert counted.gradients == pytest.approx(real.gradients, rel=0.02)
