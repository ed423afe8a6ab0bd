"""Parameter groups, schedules and Muon, against their definitions and torch's own Muon."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.processes import run_processes
from trifold.modeling.config import ModelConfig
from trifold.modeling.transformer import build
from trifold.pretrain.config.training import OptimizerConfig, ScheduleConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.muon import FlatRange, Muon, assign_owners
from trifold.pretrain.engine.optimizer import initial_state, lr_factor, make_optimizer

KINDS = ("cosine", "wsd", "inverse_sqrt")


@given(st.sampled_from(KINDS), st.integers(0, 50), st.integers(1, 50), st.integers(2, 100), st.floats(0, 1))
def test_learning_rate_rises_to_one_falls_to_final_and_never_jumps(
    kind: Any, warmup: int, decay: int, rest: int, final: float
) -> None:
    steps = warmup + decay + rest
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay, final=final)
    factors = [lr_factor(schedule, step, steps) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors[:-1])
    assert factors[warmup] == pytest.approx(1)
    assert factors[-1] == pytest.approx(final)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    last = steps - 1
    falls = {
        "cosine": math.pi / 2 / (last - warmup),
        "wsd": 1 / decay,
        "inverse_sqrt": (1 - math.sqrt((warmup + 1) / (warmup + 2))) / (1 - math.sqrt((warmup + 1) / steps)),
    }
    largest = max(1 / (warmup + 1), (1 - final) * falls[kind])
    assert max(abs(b - a) for a, b in pairwise(factors)) <= largest + 1e-9


def test_schedules_by_hand() -> None:
    cosine = ScheduleConfig(kind="cosine", warmup_steps=4, final=0.1)
    assert [lr_factor(cosine, step, 105) for step in (0, 3, 4, 54, 104)] == pytest.approx(
        [0.2, 0.8, 1, 0.55, 0.1]
    )
    wsd = ScheduleConfig(kind="wsd", warmup_steps=0, decay_steps=10, final=0.0)
    assert [lr_factor(wsd, step, 100) for step in (0, 50, 89, 94, 99)] == pytest.approx([1, 1, 1, 0.5, 0])
    assert lr_factor(ScheduleConfig(kind="wsd", decay_steps=0), 99, 100) == 1
    root = ScheduleConfig(kind="inverse_sqrt", warmup_steps=9, final=0.0)
    assert lr_factor(root, 39, 1000) == pytest.approx((0.5 - 0.1) / 0.9)
    assert lr_factor(ScheduleConfig(warmup_steps=5), 4, 5) == pytest.approx(5 / 6)  # all warm-up


CONFIG = ModelConfig(
    family="encoder-decoder",
    vocab_size=50,
    dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    bias=True,
    position="relative",
    max_positions=32,
    tie_embeddings=False,
)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_trained_parameter_is_in_one_group_and_only_matrices_decay(kind: Any) -> None:
    model = build(CONFIG, seed=0)
    frozen = next(p for name, p in model.named_parameters() if ".blocks." in name)
    frozen.requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(kind=kind, lr=0.5, muon_lr=0.25), torch.float32)
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(groups) == len(set(groups)) and set(groups) == set(names) - {frozen}
    for group in optimizer.param_groups:
        muon = "momentum" in group
        assert group["lr"] == group["base_lr"] == (0.25 if muon else 0.5)
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.ndim >= 2)
            assert muon == (kind == "muon" and p.ndim == 2 and ".blocks." in names[p]), names[p]


SHAPES = {"a": (33, 33), "b": (101, 7), "c": (5, 40), "d": (64, 3)}


def _sharded_muon(place: RankInfo, layout: str) -> list[Tensor]:
    """Three steps on this rank's part of the four matrices; the whole result on every rank."""
    dist.init_process_group("gloo", place.init_method, rank=place.rank, world_size=place.world)
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    if layout == "one after another":  # stages 1 and 2: the ranks' parts of one long tensor
        part = -(-sum(sizes.values()) // place.world)
        starts = [sum(list(sizes.values())[:i]) for i in range(len(sizes))]
        low = place.rank * part
        spans = {
            name: (max(low, s) - s, max(0, min(low + part, s + sizes[name]) - max(low, s)))
            for name, s in zip(sizes, starts, strict=True)
        }
    else:  # stage 3: every rank a part of each, the last one shorter
        parts = {name: -(-size // place.world) for name, size in sizes.items()}
        spans = {
            name: (place.rank * part, max(0, min(part, sizes[name] - place.rank * part)))
            for name, part in parts.items()
        }
    mine, pieces, offset = {}, [], 0
    for name, (start, numel) in spans.items():
        if numel:
            mine[name] = (SHAPES[name], FlatRange(start, numel, offset))
            pieces.append((name, start, numel))
            offset += numel

    def own(values: list[Tensor]) -> Tensor:
        flats = dict(zip(SHAPES, (v.flatten() for v in values), strict=True))
        return torch.cat(
            [flats[name][start : start + numel] for name, start, numel in pieces] + [torch.zeros(3)]
        )  # and padding

    flat = own(_values(0)).requires_grad_()
    group = {"params": [flat], "lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    optimizer = Muon([group], torch.bfloat16, fused=True)
    optimizer.state[flat] = initial_state(flat, group)
    everyone: list[Any] = [None] * place.world
    dist.all_gather_object(everyone, mine)
    optimizer.tables[id(flat)] = assign_owners(everyone)
    for step in (1, 2, 3):
        flat.grad = own(_values(step))
        optimizer.step()
    whole = [torch.zeros(shape).flatten() for shape in SHAPES.values()]
    for values, (name, start, numel) in zip(
        flat.detach().split([n for _, _, n in pieces] + [3]), pieces, strict=False
    ):
        whole[list(SHAPES).index(name)][start : start + numel] = values
    for values in whole:
        dist.all_reduce(values)
    return whole


def _values(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES.values()]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, "one after another"), (3, "one after another"), (3, "a part of each")]
)
def test_sharded_muon_equals_torch(world: int, layout: str) -> None:
    parameters = [v.requires_grad_() for v in _values(0)]
    optimizer = torch.optim.Muon(parameters, lr=0.1, weight_decay=0.2, momentum=0.9)
    for step in (1, 2, 3):
        for p, grad in zip(parameters, _values(step), strict=True):
            p.grad = grad
        optimizer.step()
    for found, expected in zip(run_processes(world, _sharded_muon, layout)[0], parameters, strict=True):
        torch.testing.assert_close(found, expected.detach().flatten(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (40, 6), (6, 40)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    from trifold.pretrain.engine.muon import _orthogonalise

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(_orthogonalise(x, torch.float32)) / math.sqrt(max(1, shape[0] / shape[1]))
    assert values.min() > 0.5 and values.max() < 1.3
