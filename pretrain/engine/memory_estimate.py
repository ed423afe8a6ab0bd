"""What a run needs, in closed form, before it starts: bytes of memory, of checkpoints and of communication,
and the best interval between saves.

The memory of a rank is its state by ZeRO stage (Rajbhandari et al. 2020, section 3, and DeepSpeed's own
buffers) plus what a micro batch holds (counted by modeling/activation_memory.py). Divided by the
allocator's peak in real steps on the CPU it was 0.994 to 1.000 in three cells, and within a tenth in the
five of tests/pretrain/engine/test_memory_estimate.py.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from trifold.modeling.activation_memory import MicroMemory, measure_micro_memory
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import num_parameters
from trifold.modeling.transformer import Transformer
from trifold.pretrain.config.training import EngineConfig, TrainingConfig
from trifold.pretrain.engine.optimizer import make_optimizer
from trifold.pretrain.engine.zero.settings import BUCKET

MAX_LIVE_ZERO3 = 10**9  # elements that DeepSpeed keeps gathered at stage 3 (stage3_max_live_parameters)


class RankMemory(NamedTuple):
    """Bytes of one rank at the peak of a step, by their purpose."""

    weights: int
    optimizer: int  # fp32 masters, moments, averaged weights
    gradients: int
    buckets: int  # what DeepSpeed reduces gradients in
    activations: int  # that the backward reads
    working: int  # temporary: logits of a chunk, gradients in progress, gathered weights

    @property
    def total(self) -> int:
        return sum(self)


def estimate_memory(
    config: TrainingConfig, model: ModelConfig, batch: Batch, world: int, device: str
) -> RankMemory:
    """The peak of a step whose micro batches have the shapes of `batch`."""
    size, micro = num_parameters(model), _micro_memory(config, model, batch, device)
    if config.engine.zero_stage == 3:
        return _zero3_memory(config, size, micro, world)
    if _uses_fused_zero1(config.engine):
        return _fused_zero1_memory(config, size, micro, world)
    return _zero12_memory(config, size, micro, world, model)


def device_memory(device: str, ranks: int, number: int = 0) -> float:
    """Bytes that a rank may use on this machine: those of CUDA device `number`, or its share of the main
    memory. Raises UserError where there is no CUDA device.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                "this machine has no CUDA device: give --memory-gib and --tokens-per-second of one"
            )
        return float(torch.cuda.get_device_properties(number).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def largest_micro(
    config: TrainingConfig,
    model: ModelConfig,
    rows: Callable[[int], Batch],
    world: int,
    device: str,
    free: float,
) -> int:
    """The largest number of rows of a micro batch that fits into `free` bytes, from the memory of four rows
    and of eight.
    """
    four, eight = (estimate_memory(config, model, rows(n), world, device).total for n in (4, 8))
    bytes_per_row = (eight - four) / 4
    return max(0, math.floor(4 + (free - four) / bytes_per_row))


def checkpoint_bytes(config: TrainingConfig, model: ModelConfig) -> int:
    """Tensor bytes of a checkpoint, over all ranks: fp32 masters, and the moments and averages of what is
    trained.
    """
    with torch.device("meta"):
        meta_model = Transformer(model)
        groups = make_optimizer(meta_model, config.optimizer, torch.float32).param_groups
    numel = sum(p.numel() for p in meta_model.parameters())
    for group in groups:
        moments = 1 if "momentum" in group else 2
        averages = 1 if config.ema else 0
        numel += (moments + averages) * sum(p.numel() for p in group["params"])
    return 4 * numel


def gradient_bytes(config: TrainingConfig, model: ModelConfig, world: int, micros: int) -> float:
    """Bytes that each rank sends in a step with `micros` micro batches of its own, by ring algorithms (ZeRO,
    section 7).

    Stages 1 and 2: gradients to their owners, weights back; the fused ZeRO-1 step sends gradients in fp32.
    Stage 3: weights for forward and for backward, and gradients, in every micro. Sequence parallelism adds
    `sequence_parallel_bytes`.
    """
    engine, low = config.engine, _low_precision_bytes(config.engine)
    size = num_parameters(model) * (world - 1) / world  # elements that a ring sends
    if _uses_fused_zero1(engine):
        return size * (4 + low)
    return size * low * {1: 2, 2: micros + 1, 3: 3 * micros}[engine.zero_stage]


def sequence_parallel_bytes(config: TrainingConfig, model: ModelConfig, batch: Batch, device: str) -> int:
    """Bytes that each rank sends to the ranks that share its rows, in a micro batch with the shapes of
    `batch`.
    """
    if config.engine.sequence_parallel == 1:
        return 0
    return _micro_memory(config, model, batch, device).sent


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds between saves that lose the least time (Daly 2006, equation 37; its first term is Young 1974:
    sqrt(2 stall M)). `stall`: seconds that a save stops training.
    """
    if stall >= 2 * between_failures:
        return between_failures
    share = stall / (2 * between_failures)
    return math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(share) / 3 + share / 9) - stall


def lost_fraction(interval: float, stall: float, restart: float, between_failures: float) -> float:
    """The share of time that saves, repeated steps (half an interval per failure) and restarts take (Young
    1974).
    """
    return stall / interval + (interval / 2 + restart) / between_failures


def _uses_fused_zero1(engine: EngineConfig) -> bool:
    """Whether steps are those of zero/zero1_step.py: complete gradients in fp32, no buckets."""
    return engine.zero_stage == 1 and not engine.offload


def _micro_memory(config: TrainingConfig, model: ModelConfig, batch: Batch, device: str) -> MicroMemory:
    engine = config.engine
    recompute = engine.recompute is True
    return measure_micro_memory(model, batch, engine.precision, recompute, device, engine.sequence_parallel)


def _low_precision_bytes(engine: EngineConfig) -> int:
    """Bytes of an element of the weights that are multiplied."""
    return 2 if engine.precision == "bf16" else 4


def _accumulates(config: TrainingConfig, world: int) -> bool:
    """Whether a rank has several micro batches in a step."""
    return config.step_rows > config.micro_rows * config.engine.data_parallel_size(world)


def _zero3_memory(config: TrainingConfig, size: int, micro: MicroMemory, world: int) -> RankMemory:
    low = _low_precision_bytes(config.engine)
    gathered = low * min(size, MAX_LIVE_ZERO3) if world > 1 else 0
    return RankMemory(
        weights=low * size // world,
        optimizer=_optimizer_bytes(config, size, world),
        gradients=low * size // world,
        buckets=low * min(BUCKET, 2 * size),
        activations=micro.kept,
        working=micro.peak - micro.kept + gathered,
    )


def _fused_zero1_memory(config: TrainingConfig, size: int, micro: MicroMemory, world: int) -> RankMemory:
    low = _low_precision_bytes(config.engine)
    return RankMemory(
        weights=low * size,
        optimizer=_optimizer_bytes(config, size, world),
        gradients=4 * size + (low * size if _accumulates(config, world) else 0),
        buckets=0,
        activations=micro.kept,
        working=micro.peak - micro.kept,
    )


def _zero12_memory(
    config: TrainingConfig, size: int, micro: MicroMemory, world: int, model: ModelConfig
) -> RankMemory:
    engine, low = config.engine, _low_precision_bytes(config.engine)
    gradients = 0
    if _accumulates(config, world) and not engine.offload:
        gradients = 4 * size // world
    elif _accumulates(config, world) and (engine.zero_stage, engine.precision) == (1, "bf16"):
        gradients = 4 * size  # offload sums in host memory, but in bf16 at stage 1 the fp32 sum is here too
    bucket = low * min(BUCKET, 2 * size)
    head_gradient = 4 * model.vocab_size * model.dim  # exists when the bucket is made
    return RankMemory(
        weights=low * size,
        optimizer=_optimizer_bytes(config, size, world),
        gradients=gradients,
        buckets=bucket,
        activations=micro.kept,
        working=max(head_gradient, micro.peak - micro.kept - bucket),
    )


def _optimizer_bytes(config: TrainingConfig, size: int, world: int) -> int:
    """This rank's shard of fp32 masters, two moments and averaged weights, where they are on the device."""
    return 0 if config.engine.offload else 4 * (3 + (config.ema > 0)) * size // world
