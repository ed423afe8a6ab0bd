"""One optimizer step over all ranks, exactly: DeepSpeed's ZeRO behind a few methods.

In: a model made on the CPU in fp32, the recipe, this process's place among the ranks. Out: `train_step` (one
mean over all valid targets of the global step, or nothing at all where anything is not finite or beyond a
limit), `evaluate`, and `slices` / `load`, through which state moves between any two worlds and ZeRO stages.
Private parts of DeepSpeed 0.19 that this file, slices.py and veto.py lean on are marked;
tests/pretrain/engine/test_engine.py covers each.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trifold.modeling.batch import Batch
from trifold.modeling.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.transformer import Transformer
from trifold.pretrain.checkpoint.slice import ReadSlice, Slice
from trifold.pretrain.config.training import TrainingConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.compile import compile_blocks, compile_whole, restore_plain_linear
from trifold.pretrain.engine.fp8 import to_fp8
from trifold.pretrain.engine.muon import FlatRange, Muon, assign_owners
from trifold.pretrain.engine.optimizer import initial_state, make_optimizer
from trifold.pretrain.engine.precision import agree_across_ranks
from trifold.pretrain.engine.sequence_parallel import SequenceParallelGroup
from trifold.pretrain.engine.spikes import UNLIMITED, StepLimits
from trifold.pretrain.engine.zero.settings import deepspeed_config
from trifold.pretrain.engine.zero.slices import flat_tensors, fragments, read_slices, write_slices
from trifold.pretrain.engine.zero.step_guard import StepGuard
from trifold.pretrain.monitor.memory_meter import MemoryMeter, keep_freed_pages


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the valid targets of the global step
    grad_norm: float  # of the whole gradient, before clipping; infinite where the loss alone was bad
    applied: bool  # False: no weight and no moment was changed on any rank
    part_sums: list[float]  # of a mixture: the sum of the losses of each part ...
    part_counts: list[float]  # ... and its targets


class Engine:
    """Trains `model` as the recipe says. Every rank makes the same calls in the same order."""

    def __init__(
        self, model: Transformer, config: TrainingConfig, place: RankInfo, num_parts: int = 0
    ) -> None:
        """`num_parts`: of a mixture of objectives, whose losses are told apart."""
        self.num_parts = num_parts
        self.place, self.stage, self._decay = place, config.engine.zero_stage, config.ema
        torch.set_num_threads(place.threads)
        self.place.reporter.set_phase("meeting the other ranks")
        deepspeed = _deepspeed(place)
        self._neighbours = SequenceParallelGroup(place.rank, place.world, config.engine)
        self.rank, self.world, self.counts = self._neighbours.data_rank
        model.set_sequence_shard(self._neighbours.shared)
        config = agree_across_ranks(config, place.device)
        self.precision, self.recompute = config.engine.precision, config.engine.recompute is True
        self.meter = MemoryMeter(place.device, model)
        if place.device == "cpu":
            keep_freed_pages()
        low = self.precision != "fp32"
        optimizer = make_optimizer(model, config.optimizer, torch.bfloat16 if low else torch.float32)
        model.recompute(self.recompute)
        if config.engine.fp8:
            to_fp8(model, config.engine, place.device)
        if self.precision == "autocast":
            # Not DeepSpeed's torch_autocast: that gathers weights and reduces gradients in bf16, and at stage
            # 3 no two runs agree.
            model.forward = torch.autocast(place.device, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        self._graphs = config.engine.cuda_graphs
        if config.engine.compile and self.stage == 3:
            compile_blocks(model)
        elif config.engine.compile:
            compile_whole(model, self._graphs)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory
            self._engine, self._zero, _, _ = deepspeed.initialize(
                None, model, optimizer, config=deepspeed_config(config, model, place.device)
            )
        leans = self.stage == 1 and not config.engine.offload
        if leans:
            from trifold.pretrain.engine.zero.zero1_step import (
                install_fused_zero1_step,  # DeepSpeed must know its accelerator before it is imported
            )

            install_fused_zero1_step(self._engine, self._zero)
        if config.engine.compile and self.stage == 3:
            restore_plain_linear()
        self.device: torch.device = self._engine.device
        cuda = self.device.type == "cuda"
        self._chance = torch.cuda.default_generators[self.device.index] if cuda else torch.default_generator
        self.optimizer_step = 0
        self._autocast = self.precision == "autocast"
        self._base: torch.optim.AdamW = self._zero.optimizer
        self._pieces = fragments(self._zero, self._engine.module, self.stage)
        self._create_optimizer_state()
        self._veto = None if leans else StepGuard(self._zero, self.stage)

    def train_step(
        self,
        micros: list[Batch],
        micro_seeds: list[int],
        count: int,
        lr_factor: float,
        limits: StepLimits = UNLIMITED,
    ) -> StepResult:
        """One optimizer step. `micros` are this rank's (at least one, as many on every rank, another number
        at the next step if need be), `count` the valid targets of all ranks' micros together; beyond `limits`
        it is not applied.
        """
        for group in self._base.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        sums = torch.zeros(
            1 + 2 * self.num_parts, dtype=torch.float64, device=self.device
        )  # of the losses; by part; targets by part
        for i, (micro, seed) in enumerate(zip(micros, micro_seeds, strict=True)):
            self._engine.set_gradient_accumulation_boundary(i == len(micros) - 1)
            self._chance.manual_seed(seed + self._neighbours.place)
            here = self._neighbours.slice(micro.to(self.device))
            self.place.reporter.set_phase("forward", micro=i)
            if self._graphs:
                torch.compiler.cudagraph_mark_step_begin()  # what the last one left may be written over
            loss = self._engine(here)
            if here.parts is not None:
                loss, nll_BT = loss
                sums[1:] += here.by_part(nll_BT, self.num_parts).flatten()
            sums[0] += loss.detach()
            # DeepSpeed averages gradients over ranks: scaled so, their sum is the gradient of one mean over
            # `count`.
            self.place.reporter.set_phase("backward", micro=i)
            self._engine.backward(loss * (self.place.world / count), scale_wrt_gas=False)
        self.place.reporter.set_phase("optimizer step")
        (loss_sum, *part_sums), applied, norm = self._step(self.sum_over_ranks(sums), count, limits)
        self.optimizer_step += applied
        if applied and self._decay:
            self._update_ema()
        if not applied and hasattr(self._zero, "averaged_gradients"):
            for key in (
                self._zero.averaged_gradients
            ):  # with offload DeepSpeed forgets to drop them, and the next step would add to them
                self._zero.averaged_gradients[key] = None
        return StepResult(
            loss_sum / count, norm, applied, part_sums[: self.num_parts], part_sums[self.num_parts :]
        )

    def _step(self, sums: Tensor, count: int, limits: StepLimits) -> tuple[list[float], bool, float]:
        """DeepSpeed's step, where it is allowed. Returns `sums`, the loss first, whether it was applied, and
        the gradient's norm.
        """
        if self._veto is None:
            self._zero.set_loss_and_limits(sums[0] / count, limits)
            self._engine.step()
            *numbers, norm, refused = torch.cat([sums, self._zero.outcome]).tolist()
            return numbers, not refused, norm
        numbers = sums.tolist()
        self._veto.set_loss_and_limits(numbers[0] / count, limits)
        self._engine.step()
        applied = self._engine.was_step_applied()
        return numbers, applied, float(self._engine.get_global_grad_norm()) if applied else self._veto.norm

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses (B, T) fp32 and correctness (B, T) bool of this rank's batch, without dropout; ranks call it
        equally often.
        """
        nll, correct = self._forward_eval(batch, per_token=True)
        return self._neighbours.gather(nll), self._neighbours.gather(correct)

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) of this rank's batch, without dropout; ranks call it equally often, and the larger
        calls cost memory.
        """
        return self._neighbours.gather(self._forward_eval(batch, logits=True))

    @torch.no_grad()
    def _forward_eval(self, batch: Batch, **what: bool) -> Any:
        self.place.reporter.set_phase("evaluating")
        self._engine.eval()
        found = self._engine(self._neighbours.slice(batch.to(self.device)), **what)
        self._engine.train()
        return found

    def generate(
        self, prompts: list[list[int]], how: Generation, *, bos: int, eos: int, pad: int
    ) -> list[list[int]]:
        """This rank's texts. Ranks call it equally often and take as many steps as the rank that needs most
        (stage 3 gathers weights in each); the forward passes go past DeepSpeed's own `forward`, to the
        model's parts.
        """
        self.place.reporter.set_phase("generating")
        model, autocast = (
            self._engine.module,
            torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast),
        )
        with self._neighbours.disabled(model), autocast:
            return generate(model, prompts, how, bos=bos, eos=eos, pad=pad, anyone=self._any_rank)

    def gather(self, mine: list[Any]) -> list[list[Any]]:
        """The list of every rank that has rows of its own, on every rank."""
        everyone: list[Any] = [None] * self.place.world
        dist.all_gather_object(everyone, mine)
        return everyone[:: self.place.world // self.world]

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, on the device where it lay."""
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def slices(self) -> dict[str, Slice]:
        """This rank's share of the state by parameter name, copied to host memory; all ranks' together hold
        every element once.
        """
        return read_slices(self._pieces, self._base.state)

    def load(self, read: ReadSlice, optimizer_step: int) -> None:
        """Take this rank's share of the state from `read(name, start, stop)`, written at whatever world and
        stage.
        """
        self.place.reporter.set_phase("loading a checkpoint")
        write_slices(self._pieces, self._base.state, read)
        self.optimizer_step = optimizer_step
        for state in self._base.state.values():
            if "step" in state:
                state["step"].fill_(optimizer_step)
        self._refresh_weights()

    def _any_rank(self, going: bool) -> bool:
        return self.sum_over_ranks(torch.tensor([float(going)])).item() > 0

    @contextlib.contextmanager
    def use_ema_weights(self) -> Iterator[None]:
        """While inside, the model has the averaged weights; afterwards its own again, bit for bit. Only to
        evaluate.

        Cost: twice the gathering of the model's weights from the masters, and one flat tensor more while it
        swaps.
        """
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        for flat, _ in flat_tensors(self._zero, self.stage):
            average = self._base.state[flat]["ema"]
            kept = flat.detach().clone()
            flat.copy_(average)
            average.copy_(kept)
        self._refresh_weights()

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Move the averaged weights towards the trained ones: an exponential moving average without a share
        of the initial weights.

        After t applied steps it is sum d^(t-i) w_i / sum d^(t-i) over steps i = 1..t: Adam's correction of
        the bias (Kingma and Ba 2015, section 3) as a rate that depends on t. Turned on for an older run, the
        loaded weights stand for the average so far. Memory: 4 bytes a parameter, shared among the ranks, and
        as much in a checkpoint; cost: one pass over the masters.
        """
        rate = (1 - self._decay) / (1 - self._decay**self.optimizer_step)
        for flat, _ in flat_tensors(self._zero, self.stage):
            self._base.state[flat]["ema"].lerp_(flat.detach(), rate)

    def _create_optimizer_state(self) -> None:
        shared = flat_tensors(self._zero, self.stage)
        for flat, group in shared:
            self._base.state[flat] = initial_state(flat, group)
            if self._decay:
                self._base.state[flat]["ema"] = flat.detach().clone()
        if isinstance(self._base, Muon):
            mine = [
                {
                    p.name: (p.shape, FlatRange(p.start, p.numel, p.offset))
                    for p in self._pieces
                    if p.flat is flat
                }
                for flat, _ in shared
            ]
            everyone: list[Any] = [None] * self.place.world
            dist.all_gather_object(everyone, mine)
            self._base.tables = {
                id(flat): assign_owners([rank[i] for rank in everyone]) for i, (flat, _) in enumerate(shared)
            }

    def _refresh_weights(self) -> None:
        """The model's own weights from the fp32 masters."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        # small ones stay gathered, and all_gather would pass them over
        self._zero._partition_all_parameters()
        for p in self._pieces:
            p.parameter.ds_tensor.data.view(-1)[: p.numel].copy_(p.view(p.flat))
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)


def _deepspeed(place: RankInfo) -> Any:
    """DeepSpeed, imported once its accelerator is known, in the process group of all ranks."""
    os.environ["DS_ACCELERATOR"] = place.device
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # deepspeed.initialize takes it from nowhere else
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"torch\.distributed"
    )  # DeepSpeed calls what torch 2.13 renamed
    mlflow = sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # its autotuner would import it: 2 s of CPU for nothing
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        import deepspeed.ops
    if mlflow is None:
        del sys.modules["mlflow"]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Otherwise init_distributed compiles a kernel (50 s) that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "nccl" if place.device == "cuda" else "gloo"
        if place.init_method is None:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(
                backend,
                place.init_method,
                rank=place.rank,
                world_size=place.world,
                timeout=timedelta(minutes=10),
            )
    if place.device == "cuda":
        torch.cuda.set_device(place.local_rank)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed
