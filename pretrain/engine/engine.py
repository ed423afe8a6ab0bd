"""One optimizer step over all ranks, exactly: DeepSpeed's ZeRO behind a few methods.

An `Engine` is made of a model (on the CPU, in fp32), the recipe's engine and optimizer settings, and this
process's rank. `train_step` takes one step with the mean over all valid targets of the global step, or
changes nothing at all where anything is not finite or beyond a limit. `slices` and `load` move the state
between any two world sizes and ZeRO stages.

Private attributes of DeepSpeed 0.19 are used here, in zero/slices.py, zero/step_guard.py and
zero/zero1_step.py (which lists them); tests/pretrain/engine/test_engine.py covers each stage and precision.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trifold.modeling.batch import Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.generation.config import Generation
from trifold.modeling.generation.generate import generate
from trifold.modeling.transformer import Transformer
from trifold.pretrain.checkpoint.slice import ReadSlice, Slice
from trifold.pretrain.config.training import EngineConfig, OptimizerConfig, TrainingConfig
from trifold.pretrain.distributed import RankInfo, all_gather, join_process_group
from trifold.pretrain.engine.auto import resolve_auto
from trifold.pretrain.engine.compile import compile_blocks, compile_whole, restore_plain_linear
from trifold.pretrain.engine.fp8 import to_fp8
from trifold.pretrain.engine.muon import FlatRange, Muon, assign_owners
from trifold.pretrain.engine.optimizer import initial_state, make_optimizer
from trifold.pretrain.engine.sequence_parallel import SequenceParallelGroup
from trifold.pretrain.engine.spikes import UNLIMITED, StepLimits
from trifold.pretrain.engine.zero.settings import deepspeed_config
from trifold.pretrain.engine.zero.slices import flat_tensors, fragments, read_slices, write_slices
from trifold.pretrain.engine.zero.start_deepspeed import import_deepspeed, initialize
from trifold.pretrain.engine.zero.step_guard import StepGuard
from trifold.pretrain.monitor.memory_meter import MemoryMeter, keep_freed_pages


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the valid targets of the global step
    grad_norm: float  # of all gradients, before clipping; infinite where the loss alone was bad
    applied: bool  # False: no weight and no moment was changed on any rank
    member_losses: list[float]  # of a mixture of objectives: the sum of the losses of each member ...
    member_targets: list[float]  # ... and the number of its targets


def start_engine(
    build: Callable[[], Transformer],
    model: ModelConfig,
    config: TrainingConfig,
    micros: Iterable[Batch],
    rank_info: RankInfo,
    num_members: int = 0,
) -> "Engine":
    """The engine of a recipe: meets the other ranks, resolves `auto` (for micro batches like `micros`),
    builds the model.
    """
    rank_info.reporter.set_phase("meeting the other ranks")
    join_process_group(rank_info)
    resolved = resolve_auto(config, model, micros, rank_info)
    return Engine(build(), resolved.engine, resolved.optimizer, rank_info, config.ema, num_members)


class Engine:
    """Trains a model. Every rank makes the same calls in the same order.

    `rank` and `world` count the groups of ranks that have rows of their own (all ranks, unless
    sequence_parallel ranks share each row); `counts` is False where an earlier rank has the same rows.
    """

    def __init__(
        self,
        model: Transformer,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        rank_info: RankInfo,
        ema: float = 0.0,
        num_members: int = 0,
    ) -> None:
        """`config` has no `auto` (engine/auto.py resolves it). `ema`: the decay of the averaged weights, 0
        for none. `num_members`: of a mixture of objectives, whose losses are summed separately.
        """
        assert config.precision != "auto" and config.recompute != "auto", config
        self.rank_info, self.config, self.num_members = rank_info, config, num_members
        self.stage, self.precision, self.recompute = config.zero_stage, config.precision, config.recompute
        self._ema_decay = ema
        self.optimizer_step = 0

        torch.set_num_threads(rank_info.threads)
        join_process_group(rank_info)
        deepspeed = import_deepspeed(rank_info)
        self._sequence_group = SequenceParallelGroup(rank_info.rank, rank_info.world, config)
        self.rank, self.world, self.counts = self._sequence_group.data_rank
        self.meter = MemoryMeter(rank_info.device, model)
        if rank_info.device == "cpu":
            keep_freed_pages()

        # The order matters: the optimizer's groups hold the model's parameters before DeepSpeed replaces
        # them, and DeepSpeed must see the forward that it is to call.
        torch_optimizer = make_optimizer(model, optimizer, self._newton_schulz_dtype())
        self._prepare_model(model)
        settings = deepspeed_config(config, optimizer.clip, model, rank_info.device)
        self._engine, self._zero = initialize(deepspeed, model, torch_optimizer, settings)
        self._step_guard = self._install_step()

        self.device: torch.device = self._engine.device
        self._rng = self._random_generator()
        self._optimizer: torch.optim.AdamW = self._zero.optimizer
        self._fragments = fragments(self._zero, self._engine.module, self.stage)
        self._create_optimizer_state()

    def _newton_schulz_dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def _prepare_model(self, model: Transformer) -> None:
        """Sequence parallelism, recomputation, fp8, autocast and compilation, in this order."""
        config, device = self.config, self.rank_info.device
        model.set_sequence_shard(self._sequence_group.shard)
        model.recompute(bool(config.recompute))
        if config.fp8:
            to_fp8(model, config, device)
        if config.precision == "autocast":
            # Not DeepSpeed's torch_autocast: that gathers weights and reduces gradients in bf16, and at stage
            # 3 no two runs agree.
            model.forward = torch.autocast(device, torch.bfloat16)(model.forward)  # type: ignore[method-assign]
        if config.compile and self.stage == 3:
            compile_blocks(model)
        elif config.compile:
            compile_whole(model, config.cuda_graphs)

    def _install_step(self) -> StepGuard | None:
        """What decides whether a step is applied: our own step at ZeRO-1 (returns None), else a guard around
        DeepSpeed's.
        """
        if self.config.compile and self.stage == 3:
            restore_plain_linear()
        if self.stage == 1 and not self.config.offload:
            # imported here, because it imports DeepSpeed, which must know its accelerator before
            from trifold.pretrain.engine.zero.zero1_step import install_fused_zero1_step

            install_fused_zero1_step(self._engine, self._zero)
            return None
        return StepGuard(self._zero, self.stage)

    def _random_generator(self) -> torch.Generator:
        """The generator that dropout draws from."""
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index]
        return torch.default_generator

    def train_step(
        self,
        micros: list[Batch],
        micro_seeds: list[int],
        count: int,
        lr_factor: float,
        limits: StepLimits = UNLIMITED,
    ) -> StepResult:
        """One optimizer step.

        `micros` are this rank's micro batches: at least one, the same number on every rank. `micro_seeds`
        seed dropout. `count` is the number of valid targets in all ranks' micros together. A step beyond
        `limits` is not applied.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor

        # the sum of all losses; of each member's losses; the number of each member's targets
        sums = torch.zeros(1 + 2 * self.num_members, dtype=torch.float64, device=self.device)
        for i, (micro, seed) in enumerate(zip(micros, micro_seeds, strict=True)):
            self._engine.set_gradient_accumulation_boundary(i == len(micros) - 1)
            self._rng.manual_seed(seed + self._sequence_group.index)
            batch = self._sequence_group.slice(micro.to(self.device))

            self.rank_info.reporter.set_phase("forward", micro=i)
            if self.config.cuda_graphs:
                torch.compiler.cudagraph_mark_step_begin()  # the memory of the last one's outputs is free
            losses = self._engine(batch)
            if batch.parts is not None:
                sums[1:] += batch.by_part(losses.nll, self.num_members).flatten()
            sums[0].add_(losses.total.detach())  # in place: += would copy the sum onto itself

            self.rank_info.reporter.set_phase("backward", micro=i)
            # DeepSpeed averages gradients over ranks; with this factor the average is the gradient of one
            # mean over `count` targets.
            self._engine.backward(losses.total * (self.rank_info.world / count), scale_wrt_gas=False)

        self.rank_info.reporter.set_phase("optimizer step")
        (loss_sum, *member_sums), applied, norm = self._step(self.sum_over_ranks(sums), count, limits)
        if applied:
            self.optimizer_step += 1
            if self._ema_decay:
                self._update_ema()
        else:
            self._drop_offloaded_gradients()
        member_losses, targets = member_sums[: self.num_members], member_sums[self.num_members :]
        return StepResult(loss_sum / count, norm, applied, member_losses, targets)

    def _step(self, sums: Tensor, count: int, limits: StepLimits) -> tuple[list[float], bool, float]:
        """The optimizer's step, where it is allowed. Returns `sums` (the loss first) on the host, whether it
        was applied, and the gradient norm.
        """
        if self._step_guard is None:
            self._zero.set_loss_and_limits(sums[0] / count, limits)
            self._engine.step()
            *values, norm, rejected = torch.cat(
                [sums, self._zero.outcome]
            ).tolist()  # waits for the device once
            return values, not rejected, norm

        values = sums.tolist()
        self._step_guard.set_loss_and_limits(values[0] / count, limits)
        self._engine.step()
        applied = self._engine.was_step_applied()
        norm = float(self._engine.get_global_grad_norm()) if applied else self._step_guard.norm
        return values, applied, norm

    def _drop_offloaded_gradients(self) -> None:
        """With offload DeepSpeed keeps the gradients of a skipped step, and the next step would add to
        them.
        """
        gradients = getattr(self._zero, "averaged_gradients", {})
        for group in gradients:
            gradients[group] = None

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses (B, T) fp32 and correctness (B, T) bool of this rank's batch, without dropout. Ranks call it
        equally often.
        """
        losses = self._forward_eval(self._engine, batch)
        return self._sequence_group.gather(losses.nll), self._sequence_group.gather(losses.correct)

    def logits(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) of this rank's batch, without dropout. Ranks call it equally often. Memory: B T V
        elements.
        """
        model: Transformer = self._engine.module
        with self._autocast():
            return self._sequence_group.gather(self._forward_eval(model.logits, batch))

    def _autocast(self) -> torch.autocast:
        """For calls of the model's methods; its `forward` has its own."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "autocast")

    @torch.no_grad()
    def _forward_eval(self, forward: Callable[[Batch], Any], batch: Batch) -> Any:
        """`forward` of this rank's slice of a batch, without dropout."""
        self.rank_info.reporter.set_phase("evaluating")
        self._engine.eval()
        result = forward(self._sequence_group.slice(batch.to(self.device)))
        self._engine.train()
        return result

    def generate(
        self, prompts: list[list[int]], config: Generation, *, bos: int, eos: int, pad: int
    ) -> list[list[int]]:
        """This rank's texts, as token ids.

        Ranks call it equally often and take as many steps as the rank that needs most, because stage 3
        gathers weights in each. Forward passes call the model's modules, not DeepSpeed's `forward`.
        """
        self.rank_info.reporter.set_phase("generating")
        model = self._engine.module
        with self._sequence_group.disabled(model), self._autocast():
            return generate(
                model, prompts, config, bos=bos, eos=eos, pad=pad, any_rank_unfinished=self._any_rank
            )

    def gather(self, values: list[Any]) -> list[list[Any]]:
        """The lists of all ranks that have rows of their own, on every rank."""
        return all_gather(values)[:: self.rank_info.world // self.world]

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's `tensor`, on the device of `tensor`."""
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def slices(self) -> dict[str, Slice]:
        """This rank's share of the state by parameter name, copied to host memory. The ranks' shares together
        hold every element once.
        """
        return read_slices(self._fragments, self._optimizer.state)

    def load(self, read: ReadSlice, optimizer_step: int) -> None:
        """Load this rank's share of the state from `read(name, start, stop)`, saved at any world size and
        stage.
        """
        self.rank_info.reporter.set_phase("loading a checkpoint")
        write_slices(self._fragments, self._optimizer.state, read)
        self.optimizer_step = optimizer_step
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(optimizer_step)
        self._refresh_weights()

    def _any_rank(self, unfinished: bool) -> bool:
        return self.sum_over_ranks(torch.tensor([float(unfinished)])).item() > 0

    @contextlib.contextmanager
    def use_ema_weights(self) -> Iterator[None]:
        """Within the context the model has the averaged weights, to evaluate; afterwards its trained ones
        again, bit for bit.

        Cost: gathering the model's weights from the masters twice, and one flat tensor of memory.
        """
        self._swap_ema()
        try:
            yield
        finally:
            self._swap_ema()

    @torch.no_grad()
    def _swap_ema(self) -> None:
        for flat, _ in flat_tensors(self._zero, self.stage):
            average = self._optimizer.state[flat]["ema"]
            trained = flat.detach().clone()
            flat.copy_(average)
            average.copy_(trained)
        self._refresh_weights()

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Move the averaged weights towards the trained ones: an exponential moving average in which the
        initial weights have no share.

        After t applied steps it is sum d^(t-i) w_i / sum d^(t-i) over steps i = 1..t: Adam's bias
        correction (Kingma and Ba 2015, section 3) as a rate that depends on t. Where it is turned on for an
        older run, the loaded weights stand for the average so far. Memory: 4 bytes a parameter, sharded
        over the ranks, and as much in a checkpoint. Cost: one pass over the masters.
        """
        rate = (1 - self._ema_decay) / (1 - self._ema_decay**self.optimizer_step)
        for flat, _ in flat_tensors(self._zero, self.stage):
            self._optimizer.state[flat]["ema"].lerp_(flat.detach(), rate)

    def _create_optimizer_state(self) -> None:
        """The state that torch's optimizer would make in its first step: a resumed run loads into it."""
        flats = flat_tensors(self._zero, self.stage)
        for flat, group in flats:
            self._optimizer.state[flat] = initial_state(flat, group)
            if self._ema_decay:
                self._optimizer.state[flat]["ema"] = flat.detach().clone()
        if isinstance(self._optimizer, Muon):
            self._assign_muon_owners(self._optimizer, [flat for flat, _ in flats])

    def _assign_muon_owners(self, muon: Muon, flats: list[Tensor]) -> None:
        """Tell Muon where each rank's fragments of each matrix lie in the flat tensors."""
        local: list[dict[str, Any]] = []
        for flat in flats:
            held = [f for f in self._fragments if f.flat is flat]
            local.append({f.name: (f.shape, FlatRange(f.start, f.numel, f.offset)) for f in held})
        ranks = all_gather(local)
        muon.tables = {id(flat): assign_owners([rank[i] for rank in ranks]) for i, flat in enumerate(flats)}

    def _refresh_weights(self) -> None:
        """Set the model's own weights from the fp32 masters."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        # small ones stay gathered, and all_gather would pass them over
        self._zero._partition_all_parameters()
        for fragment in self._fragments:
            shard = fragment.parameter.ds_tensor.data.view(-1)
            shard[: fragment.numel].copy_(fragment.view(fragment.flat))
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
