"""Importing DeepSpeed without its side effects, and starting it on a model."""

import contextlib
import io
import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from trifold.modeling.transformer import Transformer
from trifold.pretrain.distributed import RankInfo


def import_deepspeed(rank_info: RankInfo) -> Any:
    """The module, for this rank's device. The process group must exist."""
    os.environ["DS_ACCELERATOR"] = rank_info.device  # read once, at the import
    os.environ["LOCAL_RANK"] = str(rank_info.local_rank)  # deepspeed.initialize takes it from nowhere else
    # DeepSpeed calls what torch 2.13 renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    # its autotuner would import mlflow: 2 s of CPU
    mlflow = sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        import deepspeed.ops
    if mlflow is None:
        del sys.modules["mlflow"]

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # otherwise init_distributed compiles a kernel (50 s) that only inference uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def initialize(
    deepspeed: Any, model: Transformer, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> tuple[Any, Any]:
    """DeepSpeed's engine around the model, and its ZeRO optimizer around `optimizer`."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory
        engine, zero, _, _ = deepspeed.initialize(None, model, optimizer, config=config)
    return engine, zero
