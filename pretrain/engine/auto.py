"""What `auto` in a recipe's `engine` stands for: `precision` by the device's speed, `recompute` by its
memory.

`resolve_auto` is called once, before the engine is made, and gives every rank the same config. The other
functions answer for one device without a process group (`trifold plan`, benchmarks).

A CPU without bf16 instructions emulates them: one core of an EPYC with AVX2 reaches 1 GFLOP/s in bf16 and 45
in fp32, one of a Xeon with AMX 20 times its fp32 rate.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import torch

from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.distributed import RankInfo, all_gather
from trifold.pretrain.engine.memory_estimate import device_memory, estimate_memory

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)

MEMORY_HEADROOM = 0.9  # of a device's memory: estimates are within a tenth of the peak


def resolve_auto(
    config: ConfigT, model: ModelConfig, micros: Iterable[Batch], rank_info: RankInfo
) -> ConfigT:
    """The config without `auto`, the same on all ranks of the process group; each rank calls it once.

    Where `precision: auto` differs between the ranks' devices, all train in fp32. With `recompute: auto` all
    ranks recompute where one of them needs it for one of `micros`, the micro batches of each stage.
    """
    local = resolve_precision(config, rank_info.device)
    memory = device_memory(rank_info.device, rank_info.world, rank_info.local_rank)
    recompute = needs_recompute(local, model, micros, rank_info.world, rank_info.device, memory)

    answers = all_gather((local.engine.precision, recompute))
    precisions = {precision for precision, _ in answers}
    return _with_engine(
        config,
        precision=precisions.pop() if len(precisions) == 1 else "fp32",
        recompute=any(recompute for _, recompute in answers),
    )


def resolve_precision(config: ConfigT, device: str) -> ConfigT:
    """The config with the precision that this device trains fastest in, where the recipe says `auto`.

    For `cuda` on a machine without one: as a current GPU would.
    """
    if config.engine.precision != "auto":
        return config
    return _with_engine(config, precision=_fastest_precision(device))


def needs_recompute(
    config: TrainingConfig,
    model: ModelConfig,
    micros: Iterable[Batch],
    world: int,
    device: str,
    memory: float,
) -> bool:
    """Whether a rank with `memory` bytes recomputes activations.

    `engine.recompute: auto` does so where one of the micro batches does not fit otherwise. All weights
    count as trained and the model as uncompiled, so it may recompute where that was not needed, not the
    other way round.
    """
    if config.engine.recompute != "auto":
        return config.engine.recompute
    if model.cell != "attention":
        return False  # recurrent models have no blocks to recompute
    peaks = (estimate_memory(config, model, batch, world, device).total for batch in micros)
    return any(peak > MEMORY_HEADROOM * memory for peak in peaks)


def _with_engine(config: ConfigT, **values: Any) -> ConfigT:
    return config.model_copy(update={"engine": config.engine.model_copy(update=values)})


def _fastest_precision(device: str) -> Literal["fp32", "bf16"]:
    if device == "cuda":
        fast_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast_bf16 else "fp32"
