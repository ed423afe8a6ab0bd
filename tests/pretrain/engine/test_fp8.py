"""`engine.fp8`, with torchao's emulation: the same rounding on the CPU, through the same code."""

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.modeling.families import RECURRENT
from tests.pretrain.engine.small_engine import changed, engine_of, reader, recipe, rows
from tests.processes import run_processes
from trifold.modeling.batch import IGNORE
from trifold.modeling.config import Lora, ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.lora import add_lora
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.config.training import EngineConfig as EngineConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine import engine as engine_room
from trifold.pretrain.engine.engine import StepResult
from trifold.pretrain.engine.fp8 import to_fp8

BF16 = EngineConfig(precision="bf16")
E4M3, E5M2, ROUNDING = (
    2.0**-4,
    2.0**-3,
    2.0**-8,
)  # unit roundoffs: of 4 bits of significand, of 3, and bf16's own, of 8
STEPS = 12


def shape(family: str = "decoder", **dials: Any) -> ModelConfig:
    sizes = {
        "vocab_size": 101,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "mlp_dim": 48,
    }
    return ModelConfig(family=family, max_positions=64, init_std=0.1, **{**sizes, **dials})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["encoder", "decoder", "encoder-decoder"])
def test_only_linear_maps_inside_blocks_change_and_no_name_does(family):
    model, plain = (
        build(shape(family, head_dense=True), seed=0),
        build(shape(family, head_dense=True), seed=0),
    )
    kept = {name: id(parameter) for name, parameter in model.named_parameters()}
    to_fp8(model, BF16, "cpu", emulate=True)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == kept
    assert model.state_dict().keys() == plain.state_dict().keys()
    now = {name: type(module).__name__ for name, module in model.named_modules()}
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linear if ".blocks." in name}
    assert linear - inside and all(now[name] == "Linear" for name in linear - inside)
    assert {name.rpartition(".")[2] for name in inside} == set("qkvo") | {"gate", "up", "down"}
    assert all(now[name] == "Float8Linear" for name in inside)


def test_a_product_is_off_by_what_eight_bits_round_and_no_more():
    """Each factor is off by half a unit in the last place of e4m3, or by half of what its smallest step is
    after scaling (2^-9 of 448).
    """
    model = build(shape(), seed=0).bfloat16()
    linear, x = (
        model.decoder.blocks[0].mlp.f.up,
        torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16(),
    )
    exact = x.double() @ linear.weight.double().T
    to_fp8(model, BF16, "cpu", emulate=True)
    found = model.decoder.blocks[0].mlp.f.up(x).double()
    off = [
        torch.maximum(E4M3 * t.abs(), t.abs().max() * 2**-10 / 448).double()
        for t in (x, linear.weight.detach())
    ]
    most = (
        off[0] @ linear.weight.abs().double().T
        + x.abs().double() @ off[1].T
        + off[0] @ off[1].T
        + 2 * ROUNDING * exact.abs()
        + 1e-6
    )
    assert ((found - exact).abs() <= most).all()
    assert (found - exact).norm() > 4 * ROUNDING * exact.norm()  # and it is no bf16 product


def _engine(rank_info: RankInfo, stage: int, precision: str, fp8: bool) -> Any:
    config = recipe(stage=stage, precision=precision, fp8=fp8)
    return engine_of(config.model_copy(update={"model": shape(dropout=0.1)}), rank_info)


def _train(engine: Any, steps: range) -> list[StepResult]:
    """The same eight rows again and again, so that there is something to learn."""
    batch = rows(0)
    return [
        engine.train_step([batch], [step], int((batch.targets != IGNORE).sum()), lr_factor=0.3)
        for step in steps
    ]


def _curves_and_changes(rank_info: RankInfo) -> dict[str, Any]:
    with pytest.raises(UserError, match="on the CPU"):
        _engine(rank_info, 1, "bf16", True)
    engine_room.to_fp8 = partial(to_fp8, emulate=True)
    found: dict[str, Any] = {
        name: _train(_engine(rank_info, 1, name, False), range(STEPS)) for name in ("fp32", "bf16")
    }
    for stage in (1, 2):
        fp8, plain = _engine(rank_info, stage, "bf16", True), _engine(rank_info, stage, "bf16", False)
        found[f"fp8 at {stage}"] = _train(fp8, range(STEPS))
        state = fp8.slices()
        straight = _train(fp8, range(3))
        plain.load(reader([state]), STEPS)
        moved = changed(state, plain.slices())
        _train(plain, range(2))
        back = plain.slices()
        fp8.load(reader([back]), STEPS + 2)
        moved += changed(back, fp8.slices())
        fp8.load(reader([state]), STEPS)
        found[f"states at {stage}"] = (moved, _train(fp8, range(3)) == straight)
        found[f"text at {stage}"] = fp8.evaluate(rows(1))[0].isfinite().all().item()
    return found


@cache
def curves() -> dict[str, Any]:
    return run_processes(1, _curves_and_changes)[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_in_fp8_stay_as_near_to_fp32_as_its_rounding_says(stage):
    """To first order a loss is off in proportion to the unit roundoff, and the coarsest here, e5m2's, is 32
    times that of bf16.
    """
    losses = {
        name: torch.tensor([step.loss for step in curves()[name]])
        for name in ("fp32", "bf16", f"fp8 at {stage}")
    }
    off = {name: (losses[name] - losses["fp32"]).abs().mean() for name in losses}
    assert losses["fp32"][-1] < 0.8 * losses["fp32"][0]
    assert off["bf16"] < off[f"fp8 at {stage}"] < E5M2 / ROUNDING * off["bf16"]
    assert all(step.applied for step in curves()[f"fp8 at {stage}"])


@pytest.mark.parametrize("stage", [1, 2])
def test_a_state_goes_on_exactly_in_fp8_and_moves_between_runs_with_it_and_without(stage):
    assert curves()[f"states at {stage}"] == ([], True)
    assert curves()[f"text at {stage}"]


def _adapted(model: Transformer) -> None:
    add_lora(model, Lora(), seed=0)


@pytest.mark.parametrize(
    ("settings", "dials", "change", "said"),
    [
        ({"precision": "fp32"}, {}, None, "precision bf16, got fp32"),
        ({}, {"mlp_dim": 40}, None, r"multiples of 16, and decoder.blocks.0.mlp.f.gate.weight is 40 x 32"),
        ({}, {"dim": 40}, None, r"multiples of 16, and decoder.blocks.0.attn.f.q.weight is 32 x 40"),
        ({}, {}, _adapted, "lora"),
    ],
)
def test_what_does_not_go_with_fp8_is_refused(
    settings, dials, change: Callable[[Transformer], None] | None, said
):
    model = build(shape(**dials), seed=0)
    if change is not None:
        change(model)
    with pytest.raises(UserError, match=said):
        to_fp8(model, EngineConfig(**{"precision": "bf16", **settings}), "cpu", emulate=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "fp32"}, "precision bf16, not fp32"),
        ({"precision": "autocast"}, "precision bf16, not autocast"),
        ({"precision": "bf16", "zero_stage": 3}, "zero_stage 3"),
    ],
)
def test_a_recipe_that_does_not_go_with_fp8_is_refused_before_anything_is_made(settings, said):
    assert EngineConfig(fp8=True, precision="auto").fp8
    with pytest.raises(ValueError, match=said):
        EngineConfig(fp8=True, **settings)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="cell gru"):
        to_fp8(build(RECURRENT["gru decoder"], seed=0), BF16, "cpu", emulate=True)


def test_a_device_without_fp8_is_refused(monkeypatch):
    model = build(shape(), seed=0)
    with pytest.raises(UserError, match="on the CPU"):
        to_fp8(model, BF16, "cpu")
    # Mocked, because there is no such GPU here.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an A100")
    with pytest.raises(UserError, match=r"8.9, and an A100 has 8.0"):
        to_fp8(model, BF16, "cuda")
    assert not any(type(module).__name__ == "Float8Linear" for module in model.modules())


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match="extra `fp8`"):
        to_fp8(build(shape(), seed=0), BF16, "cpu", emulate=True)
