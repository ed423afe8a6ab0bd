"""Where the time of a step is spent: a trace for chrome://tracing and a table by module.

An operation counts for the innermost of our modules around it; in backward, for that of the forward operation
it belongs to (they share autograd's sequence number). Outside of modules its name decides. Compiled steps
have no modules: there kernels are distinguished by name alone.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from trifold.launch.bench.report import Row, show
from trifold.launch.terminal import Terminal
from trifold.modeling.block import MLP, Attention, RMSNorm
from trifold.modeling.heads import Head
from trifold.pretrain.distributed import RankInfo

MODULES = {
    Attention: "attention",
    MLP: "activation",
    nn.Linear: "matmul",
    nn.LayerNorm: "norms",
    RMSNorm: "norms",
    Head: "loss",
    nn.Embedding: "embedding",
}
NAMES = {  # the first that is found in an operation's or a kernel's name
    "collectives": "nccl|c10d|gloo|all_?reduce|all_?gather|reduce_scatter",
    "optimizer": "adam|lerp|multi_tensor|foreach|norm_except|linalg_vector_norm|clip",
    "attention": "attention|flash|fmha|flex|sdpa",
    "loss": "log_softmax|_losssum",
    "matmul": r"gemm|matmul|\bmm\b|addmm|bmm|linear|cutlass|nvjet|cudnn_generated",
    "norms": "layer_norm|rsqrt",
    "embedding": "embedding|indexselect",
    "data": "to_copy|memcpy|pin_memory",
}
STEPS = 3


def profile(
    step: Callable[[int], None], model: nn.Module, rank_info: RankInfo, file: Path, console: Terminal
) -> list[Row]:
    """Run a few steps under the profiler, write the trace to `file`, show and return the parts."""
    cuda = rank_info.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with _named(model), torch.profiler.profile(activities=activities) as found:
        began = time.perf_counter()
        for i in range(STEPS):
            step(i)
        if cuda:
            torch.cuda.synchronize()
        wall = (time.perf_counter() - began) / STEPS
    file.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(file))
    parts = _parts(found.events(), cuda)
    busy = sum(parts.values()) / STEPS / 1e6
    shares = {name: us / STEPS / 1e6 for name, us in sorted(parts.items(), key=lambda item: -item[1])}
    shares["host gaps" if cuda else "Python and the rest"] = max(0.0, wall - busy)
    rows: list[Row] = [
        {"": name, "ms a step": 1e3 * seconds, "share %": 100 * seconds / wall}
        for name, seconds in shares.items()
    ]
    show(console, f"where a step of {1e3 * wall:.0f} ms goes, under the profiler (trace: {file})", rows)
    return rows


def _parts(events: Any, cuda: bool) -> dict[str, float]:
    """Microseconds of each part: of kernels on CUDA, else of the operations themselves on the CPU."""
    forward = {
        e.sequence_nr: part
        for e in events
        if e.sequence_nr >= 0 and not _is_backward(e) and (part := _module(e))
    }
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        spent = sum(kernel.duration for kernel in event.kernels) if cuda else event.self_cpu_time_total
        if spent:
            parts[_part(event, forward)] += spent
    return parts


def _part(event: Any, forward: dict[int, str]) -> str:
    names = [event.name, *([kernel.name for kernel in event.kernels])]
    if part := _module(event):
        return part
    above = event
    while above is not None:
        if _is_backward(above) and above.sequence_nr in forward:
            return forward[above.sequence_nr]
        if above.name.startswith("Optimizer.step"):
            return "optimizer"
        above = above.cpu_parent
    return next(
        (part for part, pattern in NAMES.items() if any(re.search(pattern, name.lower()) for name in names)),
        "other",
    )


def _module(event: Any) -> str | None:
    """The part of the innermost module around an operation."""
    while event is not None:
        if event.name.startswith("part:"):
            return event.name.removeprefix("part:")
        event = event.cpu_parent
    return None


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function") or event.name.endswith("Backward")


@contextmanager
def _named(model: nn.Module) -> Iterator[None]:
    """While inside, the modules' forwards stand in the trace as `part:NAME`."""
    open_: list[record_function] = []

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_.append(record_function(f"part:{name}"))
            open_[-1].__enter__()

        return hook

    def after(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    handles = []
    for module in model.modules():
        if name := MODULES.get(type(module)):
            handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
