"""What a run will need, before it starts, in closed form: in, a recipe and the number of ranks; out, bytes
and seconds.

Memory of a rank = state by ZeRO stage (Rajbhandari et al. 2020, section 3, and DeepSpeed's own buffers) +
what a micro batch holds (modeling/activation_memory.py counts it). Over the allocator's peak in real steps on
the CPU: 0.994 to 1.000 in three cells, within a tenth in the five of
tests/pretrain/engine/test_memory_estimate.py.
"""

import math
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch

from trifold.modeling.activation_memory import MicroMemory, measure_micro_memory
from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.flops import num_parameters
from trifold.modeling.transformer import Transformer
from trifold.pretrain.config.training import EngineConfig, TrainingConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.optimizer import make_optimizer
from trifold.pretrain.engine.precision import resolve_precision
from trifold.pretrain.engine.zero.settings import BUCKET

T = TypeVar("T", bound=TrainingConfig)

MEMORY_HEADROOM = 0.9  # of a device's memory: what is counted here is within a tenth of the peak


class RankMemory(NamedTuple):
    """Bytes of one rank at the peak of a step, by part."""

    weights: int
    optimizer: int  # fp32 masters, moments, averaged weights
    gradients: int
    buckets: int  # what DeepSpeed reduces gradients in
    activations: int  # what the backward reads
    working: int  # logits of a chunk, gradients under way

    @property
    def total(self) -> int:
        return sum(self)


def estimate_memory(
    config: TrainingConfig, model: ModelConfig, batch: Batch, world: int, device: str
) -> RankMemory:
    """The peak of a step whose micro batches look like `batch`."""
    return _memory(config, num_parameters(model), _held(config, model, batch, device), world, model)


def device_memory(device: str, ranks: int, number: int = 0) -> float:
    """Bytes that a rank may use here: of CUDA device `number`, or its share of the machine's."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device here: give --memory-gib and --tokens-per-second of one")
        return float(torch.cuda.get_device_properties(number).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def needs_recompute(
    config: TrainingConfig, model: ModelConfig, micros: Iterable[Batch], world: int, device: str, free: float
) -> bool:
    """Whether a rank with `free` bytes recomputes. `engine.recompute: auto`: where one of these micro batches
    does not fit without.

    All weights count as trained and the model as uncompiled, so it may recompute where that was not needed,
    not the other way round.
    """
    if config.engine.recompute != "auto":
        return config.engine.recompute
    blocks = model.cell == "attention"
    return blocks and any(
        estimate_memory(config, model, batch, world, device).total > MEMORY_HEADROOM * free
        for batch in micros
    )


def resolve_auto(config: T, model: ModelConfig, micros: Iterable[Batch], place: RankInfo) -> T:
    """The recipe with `auto` answered for precision and recomputation by this rank's device alone; `agreed`
    hears the others.
    """
    mine, free = (
        resolve_precision(config, place.device),
        device_memory(place.device, place.world, place.local_rank),
    )
    on = needs_recompute(mine, model, micros, place.world, place.device, free)
    return mine.model_copy(update={"engine": mine.engine.model_copy(update={"recompute": on})})


def largest_micro(
    config: TrainingConfig,
    model: ModelConfig,
    rows: Callable[[int], Batch],
    world: int,
    device: str,
    free: float,
) -> int:
    """The most rows of a micro batch that fit into `free` bytes: what a row holds is the difference of eight
    rows to four.
    """
    four, eight = (estimate_memory(config, model, rows(n), world, device).total for n in (4, 8))
    return max(0, math.floor(4 + (free - four) / ((eight - four) / 4)))


def checkpoint_bytes(config: TrainingConfig, model: ModelConfig) -> int:
    """Tensor bytes of a checkpoint, over all ranks: fp32 masters, and of what is trained its moments and
    averages.
    """
    with torch.device("meta"):
        made = Transformer(model)
        groups = make_optimizer(made, config.optimizer, torch.float32).param_groups
    moments = sum(p.numel() * (1 if "momentum" in group else 2) for group in groups for p in group["params"])
    averaged = sum(p.numel() for group in groups for p in group["params"]) if config.ema else 0
    return 4 * (sum(p.numel() for p in made.parameters()) + moments + averaged)


def gradient_bytes(config: TrainingConfig, model: ModelConfig, world: int, micros: int) -> float:
    """Bytes that each rank sends in a step with `micros` micro batches of its own, as rings send them (ZeRO,
    section 7).

    Stages 1 and 2: gradients to their owners, weights back; at stage 1 those gradients are fp32 (lean.py).
    Stage 3: weights for forward and for backward, gradients, in every micro. What ranks that share rows send
    each other is `exchanged`.
    """
    engine, size = config.engine, num_parameters(model) * (world - 1) / world
    low = 2 if engine.precision == "bf16" else 4
    if _uses_fused_zero1(engine):
        return size * (4 + low)
    return size * low * {1: 2, 2: micros + 1, 3: 3 * micros}[engine.zero_stage]


def sequence_parallel_bytes(config: TrainingConfig, model: ModelConfig, batch: Batch, device: str) -> int:
    """Bytes that each rank sends to those that share its rows, in a micro batch like `batch`."""
    return _held(config, model, batch, device).sent if config.engine.sequence_parallel > 1 else 0


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds from save to save that lose the least (Daly 2006, equation 37; its first term is Young 1974:
    sqrt(2 stall M)).
    """
    if stall >= 2 * between_failures:
        return between_failures
    share = stall / (2 * between_failures)
    return math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(share) / 3 + share / 9) - stall


def lost_fraction(interval: float, stall: float, restart: float, between_failures: float) -> float:
    """The share of the time that saves, repeated steps (half an interval a failure) and restarts take (Young
    1974).
    """
    return stall / interval + (interval / 2 + restart) / between_failures


def _uses_fused_zero1(engine: EngineConfig) -> bool:
    """Whether the optimizer's steps are ours (lean.py): whole gradients in fp32, no buckets."""
    return engine.zero_stage == 1 and not engine.offload


def _held(config: TrainingConfig, model: ModelConfig, batch: Batch, device: str) -> MicroMemory:
    engine = config.engine
    return measure_micro_memory(
        model, batch, engine.precision, engine.recompute is True, device, engine.sequence_parallel
    )


def _memory(
    config: TrainingConfig, size: int, micro: MicroMemory, world: int, model: ModelConfig
) -> RankMemory:
    engine, accumulates = (
        config.engine,
        config.step_rows > config.micro_rows * config.engine.data_parallel_size(world),
    )
    low = 2 if engine.precision == "bf16" else 4
    bucket = low * min(BUCKET, 2 * size)
    own = 4 * (3 + (config.ema > 0)) * size // world
    weights, gradients = low * size, 0
    if engine.zero_stage == 3:
        weights, gradients = low * size // world, low * size // world
        working = (
            micro.peak - micro.kept + (low * min(size, 10**9) if world > 1 else 0)
        )  # gathered weights: stage3_max_live_parameters
    elif _uses_fused_zero1(engine):
        gradients, bucket = 4 * size + (low * size if accumulates else 0), 0
        working = micro.peak - micro.kept
    else:
        if (
            accumulates and engine.offload
        ):  # added up in host memory; in bf16 at stage 1 their sum in fp32 is here too
            gradients = 4 * size if (engine.zero_stage, engine.precision) == (1, "bf16") else 0
        elif accumulates:
            gradients = 4 * size // world
        first = 4 * model.vocab_size * model.dim  # the head's gradient is there when the bucket is made
        working = max(first, micro.peak - micro.kept - bucket)
    return RankMemory(weights, 0 if engine.offload else own, gradients, bucket, micro.kept, working)
