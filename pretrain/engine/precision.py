"""What `engine.precision: auto` stands for on a device: bf16 weights where it multiplies matrices faster in
bf16 than in fp32, else fp32; and one answer of all ranks.

In: a recipe and a device. Out: the recipe with a precision. A CPU without bf16 instructions emulates them:
one core of an EPYC with AVX2 reaches 1 GFLOP/s in bf16 and 45 in fp32, one of a Xeon with AMX 20 times its
fp32 rate.
"""

from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from trifold.pretrain.config.training import TrainingConfig

T = TypeVar("T", bound=TrainingConfig)


def resolve_precision(config: T, device: str) -> T:
    """The recipe as this device would train it. For `cuda` where there is none, as a current GPU would."""
    return _at(config, precision=_fastest(device)) if config.engine.precision == "auto" else config


def agree_across_ranks(config: T, device: str) -> T:
    """The recipe as all ranks of the process group train it: where `auto` would differ between their devices,
    in fp32; with recomputation where one of them needs it.
    """
    mine = resolve_precision(config, device)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine.engine.precision, mine.engine.recompute is True))
    precisions, recomputes = zip(*everyone, strict=True)
    return _at(
        mine, precision=precisions[0] if len(set(precisions)) == 1 else "fp32", recompute=any(recomputes)
    )


def _at(config: T, **answers: Any) -> T:
    return config.model_copy(update={"engine": config.engine.model_copy(update=answers)})


def _fastest(device: str) -> Literal["fp32", "bf16"]:
    if device == "cuda":
        fast = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"
