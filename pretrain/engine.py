"""One optimizer step over all ranks, exactly: DeepSpeed's ZeRO behind six methods.

In: a model made on the CPU in fp32, the recipe, this process's place among the ranks. Out: `train_step` (one mean over all valid targets of
the global step, or nothing at all where anything is not finite), `evaluate`, and `slices` / `load`, through which state moves between any
two worlds and ZeRO stages.
"""

import math
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modeling.batch import Batch
from pretrain.config import Pretrain
from pretrain.optimizer import make_optimizer
from pretrain.slices import Read, Slice, pieces, read_slices, write_slices


@dataclass(frozen=True)
class Place:
    """Where this process stands among the ranks."""

    rank: int
    world: int
    local_rank: int
    device: Literal["cpu", "cuda"]
    init_method: str | None  # how ranks meet, as torch.distributed takes it; None: they have met already, or there is one
    threads: int


@dataclass(frozen=True)
class Step:
    loss: float  # mean over the valid targets of the global step
    grad_norm: float  # of the whole gradient, before clipping
    finite: bool  # False: nothing was changed on any rank


class Engine:
    """Trains `model` as the recipe says. Every rank must make the same calls in the same order."""

    def __init__(self, model: nn.Module, config: Pretrain, place: Place) -> None:
        self.place, self.config = place, config
        torch.set_num_threads(place.threads)
        deepspeed = _deepspeed(place)
        optimizer = make_optimizer(model, config.optimizer)
        self._engine, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=_settings(config, model))
        self._base = self._zero.optimizer
        self.device = self._engine.device
        self.optimizer_step = 0
        self._loss_finite = True
        self._pieces = pieces(self._zero, self._engine.module, config.engine.zero_stage)
        self._make_moments()
        self._take_over_the_verdict()

    def train_step(self, micros: list[Batch], micro_seeds: list[int], count: int, lr_factor: float) -> Step:
        """One optimizer step over this rank's `micros`; `count` valid targets in the whole global step."""
        for group in self._base.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, (micro, seed) in enumerate(zip(micros, micro_seeds, strict=True)):
            self._engine.set_gradient_accumulation_boundary(i == len(micros) - 1)
            torch.manual_seed(seed)
            loss = self._engine(micro.to(self.device))
            loss_sum += loss.detach()
            # DeepSpeed averages over the ranks; scaled so, the result is the gradient of one mean over `count`.
            self._engine.backward(loss * (self.place.world / count), scale_wrt_gas=False)
        loss_mean = self.sum_over_ranks(loss_sum).item() / count
        self._loss_finite = math.isfinite(loss_mean)
        self._engine.step()
        finite = self._engine.was_step_applied()
        self.optimizer_step += finite
        return Step(loss_mean, float(self._engine.get_global_grad_norm()), finite)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(nll_BT, correct_BT) without dropout."""
        self._engine.eval()
        result = self._engine(batch.to(self.device), per_token=True)
        self._engine.train()
        return result

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, on the host's or device's side where it lay."""
        moved = tensor.to(self.device, copy=True)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def slices(self) -> dict[str, Slice]:
        """What this rank owns, copied to host memory."""
        return read_slices(self._pieces, self._base.state)

    def load(self, read: Read, optimizer_step: int) -> None:
        """Take this rank's share from `read(name, start, stop)`; every rank must call it."""
        write_slices(self._pieces, self._base.state, read)
        self.optimizer_step = optimizer_step
        for state in self._base.state.values():
            if "step" in state:
                state["step"].fill_(optimizer_step)
        self._refresh_weights()

    def _make_moments(self) -> None:
        """torch's AdamW would make them in its first step; a resumed run needs them before."""
        for flat in {id(p.flat): p.flat for p in self._pieces if p.parameter.requires_grad}.values():
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            self._base.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **zeros}

    def _take_over_the_verdict(self) -> None:
        zero = self._zero

        def verdict(*args: Any, **kwargs: Any) -> bool:
            zero.overflow = not self._loss_finite
            return zero.overflow

        if self.config.engine.zero_stage == 3:
            zero._overflow_check_and_loss_scale_update = verdict
        else:
            zero.check_grad_overflow, zero.check_overflow = True, verdict

    def _refresh_weights(self) -> None:
        """The model's own weights from the masters."""
        if self.config.engine.zero_stage < 3:
            self._zero.update_lp_params()
            return
        for p in self._pieces:
            p.parameter.ds_tensor.data.view(-1)[: p.numel].copy_(p.of(p.flat))
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def _deepspeed(place: Place) -> Any:
    """DeepSpeed, imported once its accelerator is known, in the process group of all ranks."""
    os.environ["DS_ACCELERATOR"] = place.device
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # deepspeed.initialize takes it from nowhere else
    import deepspeed
    import deepspeed.ops

    # Otherwise init_distributed compiles a kernel (50 s) that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if place.device == "cuda" else "gloo"
        if place.init_method is None:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, place.init_method, rank=place.rank, world_size=place.world, timeout=timedelta(minutes=10))
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _settings(config: Pretrain, model: nn.Module) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation is ours (set_gradient_accumulation_boundary), hence 1 here."""
    bucket = min(500_000_000, 2 * sum(p.numel() for p in model.parameters()))  # DeepSpeed allocates it in every backward
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": 2**62,
        "zero_optimization": {"stage": config.engine.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
    }
    if config.engine.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if config.engine.precision == "autocast":
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings
