"""ZeRO-3 compiled block by block, in real processes: the same steps, one graph for each kind of block, no
weight kept for the backward.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.modeling.families import RECURRENT
from tests.pretrain.engine.sequence_recipes import CASES, of_family
from tests.pretrain.engine.small_engine import engine_of, reader
from tests.processes import run_processes
from trifold.launch.bench.rows import Micro, micros
from trifold.modeling.block import Block
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.transformer import Transformer
from trifold.pretrain.config import training
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.distributed import RankInfo, all_gather
from trifold.pretrain.engine import engine as engines
from trifold.pretrain.engine.engine import Engine, StepResult
from trifold.pretrain.engine.zero import settings

KINDS = {"llama": 1, "modernbert": 2, "t5gemma": 2}  # of blocks: a window or none, another memory or none
FROZEN = {"frozen embeddings, recompute": ("embed.",), "frozen below": ("embed.", "decoder.blocks.0.")}
CELLS: dict[str, dict[str, Any]] = {
    "recompute": {"recompute": True},
    "bf16": {"precision": "bf16"},
    "autocast, recompute": {"precision": "autocast", "recompute": True},
    "offload": {"offload": True},
    **{name: {"recompute": "recompute" in name} for name in FROZEN},
}


def at(name: str, **engine: Any) -> PretrainConfig:
    config = of_family(name, 1, 1)
    model = config.model.model_copy(update={"dropout": 0.1})
    optimizer = config.optimizer.model_copy(
        update={"eps": 1e-4}
    )  # or a gradient that is nothing but rounding would move its weight
    return config.model_copy(
        update={"model": model, "optimizer": optimizer, "engine": training.EngineConfig(**engine)}
    )


def by(backend: Any) -> CompileCounterWithBackend:
    """From here on graphs are made by this backend and counted, and a graph break is an error. DeepSpeed
    shards all weights and releases them at once, as it does where there are more than its thresholds.
    """
    graphs = CompileCounterWithBackend(backend)
    torch.compile = partial(_compile, backend=graphs, fullgraph=True)
    engines.deepspeed_config = _sharded
    return graphs


_compile, _settings = torch.compile, settings.deepspeed_config


def _sharded(*args: Any) -> dict[str, Any]:
    settings = _settings(*args)
    thresholds = ("param_persistence_threshold", "max_reuse_distance", "prefetch_bucket_size")
    settings["zero_optimization"] |= {f"stage3_{name}": 0 for name in thresholds}
    return settings


def stepped(engine: Engine, config: PretrainConfig, *numbers: int) -> list[StepResult]:
    """Steps of two micros on each rank."""
    made = micros(config, 301, 3, 2 * engine.world * (1 + max(numbers)), "cpu")
    steps = []
    for number in numbers:
        all_of_it = made[2 * engine.world * number :][: 2 * engine.world]
        mine: list[Micro] = all_of_it[engine.rank :: engine.world]
        seeds = [100 * number + 10 * i + engine.rank for i in range(2)]
        steps.append(
            engine.train_step(
                [micro.batch for micro in mine], seeds, sum(micro.targets for micro in all_of_it), 1.0
            )
        )
    return steps


def kept(engine: Engine, config: PretrainConfig) -> int:
    """Bytes of gathered weights of blocks that are alive between forward and backward."""
    storages: list[Any] = []

    def watch(block: nn.Module, _: Any) -> None:
        assert all(p.numel() == getattr(p, "ds_numel", None) for p in block.parameters())
        storages.extend(weakref.ref(p.untyped_storage()) for p in block.parameters())

    hooks = [
        block.register_forward_pre_hook(watch)
        for block in engine._engine.module.modules()
        if isinstance(block, Block)
    ]
    loss = engine._engine(micros(config, 301, 3, 1, "cpu")[0].batch).total
    found = sum(storage.nbytes() for made in storages if (storage := made()) is not None)
    engine._engine.set_gradient_accumulation_boundary(False)
    engine._engine.backward(loss)
    for hook in hooks:
        hook.remove()
    return found


def _family(rank_info: RankInfo, name: str, graphs: CompileCounterWithBackend) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage, compiled in ((1, False), (3, False), (3, True)):
        torch._dynamo.reset()
        graphs.frame_count = 0
        config = at(name, zero_stage=stage, compile=compiled)
        engine = engine_of(config, rank_info)
        steps, counted = stepped(engine, config, 0, 1), graphs.frame_count
        nll = engine.evaluate(micros(config, 301, 3, 1, "cpu")[0].batch)[0]
        if name != "modernbert":
            engine.generate([[7, 8, 9]], Generation(max_new=2), bos=1, eos=2, pad=0)
        state = all_gather(engine.slices())
        steps += stepped(engine, config, 2)
        found[f"ZeRO-{stage}{', compiled' * compiled}"] = (steps, (counted, graphs.frame_count), state, nll)
    config = at(name)
    back = engine_of(config, rank_info)
    back.load(reader(state), 2)
    found["continued"] = stepped(back, config, 2)
    found["kept"] = kept(engine, config)
    return found


def _families(rank_info: RankInfo, backend: str, names: Sequence[str]) -> dict[str, Any]:
    graphs = by(backend)
    return {name: _family(rank_info, name, graphs) for name in names}


def _cheap(rank_info: RankInfo) -> tuple[dict[str, Any], dict[str, list[list[StepResult]]]]:
    return _families(rank_info, "aot_eager", ["t5gemma"]), _cells(rank_info, ["frozen embeddings, recompute"])


def assert_same_training(found: dict[str, Any]) -> None:
    for name, runs in found.items():
        steps, graphs, state, nll = runs["ZeRO-3, compiled"]
        for other in ("ZeRO-1", "ZeRO-3"):
            expected, none, weights, plain = runs[other]
            assert none == (0, 0)
            assert [(s.loss, s.grad_norm) for s in steps] == [
                pytest.approx((s.loss, s.grad_norm), rel=1e-5) for s in expected
            ], name
            torch.testing.assert_close(nll, plain, rtol=1e-4, atol=1e-4)
            ours, theirs = reader(state), reader(weights)
            for parameter in {parameter for rank in state for parameter in rank}:
                for key, values in ours(parameter, 0, None).items():
                    torch.testing.assert_close(
                        values,
                        theirs(parameter, 0, None)[key],
                        rtol=1e-3,
                        atol=2e-5,
                        msg=f"{parameter} {key}",
                    )
        assert runs["continued"][0].loss == pytest.approx(steps[2].loss, rel=1e-5), "at ZeRO-1"
        assert graphs == (KINDS[name], KINDS[name]), "each kind of block is compiled once, for training alone"
        assert runs["kept"] == 0


def test_blocks_compiled_at_stage_3_take_the_steps_of_uncompiled_ones_and_keep_no_weights() -> None:
    families, cells = run_processes(2, _cheap, timeout=280)[0]
    assert_same_training(families)
    assert_same_steps(cells)


def _cells(rank_info: RankInfo, names: Sequence[str]) -> dict[str, list[list[StepResult]]]:
    """The same steps of each cell, uncompiled and compiled."""
    by("aot_eager")
    cells, found = CELLS | {"shared rows": {"sequence_parallel": 2}}, {}
    for name in names:

        def freeze(model: Transformer, frozen: tuple[str, ...] = FROZEN.get(name, ())) -> None:
            for parameter in (p for n, p in model.named_parameters() if n.startswith(frozen)):
                parameter.requires_grad_(False)

        torch._dynamo.reset()
        configs = [at("llama", zero_stage=3, compile=compiled, **cells[name]) for compiled in (False, True)]
        found[name] = [stepped(engine_of(config, rank_info, freeze), config, 0, 1, 2) for config in configs]
    return found


def assert_same_steps(found: dict[str, list[list[StepResult]]]) -> None:
    for name, (plain, compiled) in found.items():
        low = "bf16" in name or "autocast" in name
        for one, other in zip(plain, compiled, strict=True):
            assert other.loss == pytest.approx(one.loss, rel=1e-3 if low else 1e-6), name
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=3e-2 if low else 1e-6), name


@pytest.mark.proof
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_blocks_go_with_recomputation_precisions_offload_frozen_weights_and_shared_rows(
    world: int,
) -> None:
    assert_same_steps(run_processes(world, _cells, [*CELLS, *["shared rows"] * (world == 2)], timeout=280)[0])


@pytest.mark.proof
def test_blocks_of_the_real_compiler_train_as_uncompiled_ones() -> None:
    assert_same_training(run_processes(2, _families, "inductor", [*CASES], timeout=580)[0])


def test_what_stage_3_cannot_compile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero_stage 3 gathers them at others"):
        training.EngineConfig(zero_stage=3, compile=True, cuda_graphs=True)
    with pytest.raises(UserError, match=r"block by block at zero_stage 3, and a model of cell lstm"):
        training.EngineConfig(zero_stage=3, compile=True).check_model(RECURRENT["lstm decoder"])
