"""What a plan says of memory, checkpoints and saves, beside real ones."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.modeling.families import RECURRENT
from tests.pretrain.checkpoint.builders import nothing, state_of
from tests.pretrain.engine.small_engine import engine_of, recipe
from tests.processes import run_processes
from tests.recipes import model_config
from trifold.launch.bench.contenders import bytes_held
from trifold.launch.bench.rows import micros
from trifold.launch.recipe.reader import resolve
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.modeling.config import ModelConfig
from trifold.modeling.flops import num_parameters
from trifold.modeling.transformer import build
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.lease import take_generation
from trifold.pretrain.checkpoint.saving import Checkpointer
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine import auto, memory_estimate
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.storage.disk import DiskPath


def averaging_muon(kind: str) -> PretrainConfig:
    return recipe(kind).model_copy(update={"ema": 0.9 if kind == "muon" else 0.0})


def _checkpointed(rank_info: RankInfo, folder: str) -> dict[str, int]:
    """Tensor bytes of a real checkpoint of each optimizer, read back."""
    found = {}
    for kind in ("adamw", "muon"):
        run, config = DiskPath(Path(folder) / kind), averaging_muon(kind)
        engine = engine_of(config, rank_info)
        saver = Checkpointer(take_generation(run), 0, 1, config.checkpoints, nothing)
        saver.save(state_of(1), engine.slices())
        saver.wait()
        checkpoint = newest_verified(run, nothing)
        assert checkpoint is not None
        found[kind] = sum(
            checkpoint.full(name, key).nbytes for name in checkpoint.names for key in checkpoint.keys(name)
        )
    return found


def test_checkpoint_bytes_are_exact(tmp_path: Path) -> None:
    for kind, found in run_processes(1, _checkpointed, str(tmp_path))[0].items():
        config = averaging_muon(kind)
        assert memory_estimate.checkpoint_bytes(config, model_config(config)) == found


def small(stage: int, precision: str, family: str, per_step: int) -> PretrainRecipe:
    dials = [
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
        "micro_rows=4",
        f"step_rows={4 * per_step}",
    ]
    return resolve(f"configs/demo/{family}.yaml", dials)


def _peak(rank_info: RankInfo, *cell: Any) -> int:
    """Bytes that torch's allocator holds at most, from before the model until after a step."""
    config = small(*cell)
    made = micros(config, config.model.vocab_size, 2, cell[3], "cpu")
    with bytes_held(rank_info) as held:
        engine = Engine(build(model_config(config), 0), config.engine, config.optimizer, rank_info)
        engine.train_step([micro.batch for micro in made], list(range(len(made))), 100, 1.0)
    return held[1]


@pytest.mark.parametrize(
    "cell",
    [
        (1, "bf16", "encoder", 2),
        pytest.param((1, "fp32", "decoder", 1), marks=pytest.mark.proof),
        pytest.param((2, "bf16", "encoder-decoder", 2), marks=pytest.mark.proof),
        pytest.param((1, "autocast", "decoder", 2), marks=pytest.mark.proof),
        pytest.param((3, "fp32", "encoder", 1), marks=pytest.mark.proof),
    ],
    ids=str,
)
def test_the_peak_of_a_real_step_is_within_a_tenth_of_what_was_planned(
    cell: tuple[int, str, str, int],
) -> None:
    config = small(*cell)
    planned = memory_estimate.estimate_memory(
        config, model_config(config), micros(config, config.model.vocab_size, 2, 1, "cpu")[0].batch, 1, "cpu"
    )
    assert planned.total == pytest.approx(run_processes(1, _peak, *cell)[0], rel=0.1)


def test_state_is_shared_out_as_zero_says() -> None:
    """Rajbhandari et al. 2020, figure 1, without gradients: bf16 weights 2, and 12 bytes of state a parameter
    over N ranks.
    """
    for stage, weights in ((1, 1), (3, 8)):
        config = small(stage, "bf16", "decoder", 16)
        size = num_parameters(model_config(config))
        batch = micros(config, config.model.vocab_size, 2, 1, "cpu")[0].batch
        found = memory_estimate.estimate_memory(config, model_config(config), batch, 8, "cpu")
        assert found.weights == 2 * size // weights and found.optimizer == 12 * size // 8


def _offloaded(config: PretrainRecipe) -> PretrainRecipe:
    return config.model_copy(update={"engine": config.engine.model_copy(update={"offload": True})})


def test_with_offload_bf16_at_stage_1_has_a_bucket_and_the_sum_of_gradients_and_no_state() -> None:
    config = _offloaded(small(1, "bf16", "decoder", 16))
    size = num_parameters(model_config(config))
    found = memory_estimate.estimate_memory(
        config, model_config(config), micros(config, config.model.vocab_size, 2, 1, "cpu")[0].batch, 8, "cpu"
    )
    assert (found.weights, found.optimizer, found.gradients, found.buckets) == (
        2 * size,
        0,
        4 * size,
        2 * 2 * size,
    )


def _offloaded_peak(rank_info: RankInfo, per_step: int) -> int:
    config = _offloaded(small(1, "bf16", "encoder", per_step))
    made = micros(config, config.model.vocab_size, 2, per_step, "cpu")
    with bytes_held(rank_info) as held:
        engine = Engine(build(model_config(config), 0), config.engine, config.optimizer, rank_info)
        engine.train_step([micro.batch for micro in made], list(range(len(made))), 100, 1.0)
    return held[1]


@pytest.mark.proof
@pytest.mark.parametrize("per_step", [1, 2])
def test_a_real_step_with_offload_holds_what_was_planned_and_on_the_cpu_what_is_offloaded_too(
    per_step: int,
) -> None:
    config = _offloaded(small(1, "bf16", "encoder", per_step))
    planned = memory_estimate.estimate_memory(
        config, model_config(config), micros(config, config.model.vocab_size, 2, 1, "cpu")[0].batch, 1, "cpu"
    ).total
    host = 12 + 4 + 2 * per_step  # fp32 state and gradients, weights on their way back, gradients added up
    assert planned + host * num_parameters(model_config(config)) == pytest.approx(
        run_processes(1, _offloaded_peak, per_step)[0], rel=0.1
    )


def test_the_largest_micro_batch_fits_and_one_row_more_does_not() -> None:
    config = small(1, "bf16", "decoder", 1)

    def rows(n: int) -> Any:
        return micros(config.model_copy(update={"micro_rows": n}), config.model.vocab_size, 2, 1, "cpu")[
            0
        ].batch

    free = memory_estimate.estimate_memory(config, model_config(config), rows(11), 1, "cpu").total
    assert memory_estimate.largest_micro(config, model_config(config), rows, 1, "cpu", free) in (10, 11, 12)


def test_auto_recomputes_where_memory_would_not_suffice_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "all_gather", lambda answer: [answer])  # without a process group
    config = small(1, "fp32", "decoder", 1)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"recompute": "auto"})})
    batch = micros(config, config.model.vocab_size, 2, 1, "cpu")[0].batch
    needed = (
        memory_estimate.estimate_memory(config, model_config(config), batch, 1, "cpu").total
        / auto.MEMORY_HEADROOM
    )

    def chosen(model: ModelConfig, free: float) -> bool:
        return auto.needs_recompute(config, model, [batch], 1, "cpu", free)

    assert not chosen(model_config(config), needed) and chosen(model_config(config), needed - 1)
    assert not chosen(RECURRENT["gru decoder"], 1.0)  # has no blocks to recompute
    for rank_info in (
        RankInfo.single(),
        RankInfo(3, 10**9, 0, "cpu", None, 1),
    ):  # a rank of so many has a few bytes
        assert auto.resolve_auto(config, model_config(config), [batch], rank_info).engine.recompute == (
            rank_info.world > 1
        )


@pytest.mark.parametrize(("stall", "between"), [(0.5, 3600.0), (20.0, 3600.0), (60.0, 600.0)])
def test_the_best_interval_loses_the_least_of_all(stall: float, between: float) -> None:
    """Against Daly's exact model (2006, equation 20) by search: M e^(R/M) (e^((t + d) / M) - 1) / t, R =
    0.
    """

    def cost(t: float) -> float:
        return between * math.expm1((t + stall) / between) / t

    best = min((cost(t), t) for t in (between * 1.02**i / 1000 for i in range(400)))[1]
    assert memory_estimate.best_interval(stall, between) == pytest.approx(best, rel=0.05)
    assert memory_estimate.best_interval(stall, between) < math.sqrt(2 * stall * between) + stall


def test_traffic_is_twice_the_weights_a_step_and_at_stage_3_three_times_a_micro_batch() -> None:
    config = small(1, "fp32", "decoder", 16)
    whole = num_parameters(model_config(config)) * 7 / 8
    cells = [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
    found = [
        memory_estimate.gradient_bytes(small(*cell, "decoder", 16), model_config(config), 8, 2)
        for cell in cells
    ]
    assert found == pytest.approx([whole * 2 * 4, whole * (4 + 2), whole * 3 * 2, whole * 6 * 2])
