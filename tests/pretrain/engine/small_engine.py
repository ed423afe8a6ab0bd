"""A tiny decoder of odd sizes, an engine that trains it, and readers of its state."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.recipes import model_config
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.config.pretraining import CausalConfig, DataConfig, PretrainConfig, SourceConfig
from trifold.pretrain.config.training import EngineConfig, OptimizerConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine, StepResult

TOKENS, VOCAB, STAGES = 7, 101, (1, 2, 3)


def recipe(
    kind: Any = "adamw", stage: Any = 1, precision: Any = "fp32", offload: bool = False, **engine: Any
) -> PretrainConfig:
    model = ModelConfig(
        family="decoder",
        vocab_size=VOCAB,
        dim=33,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_dim=37,
        max_positions=64,
        dropout=0.1,
        init_std=0.1,
    )
    return PretrainConfig(
        run="unused",
        model=model,
        data=DataConfig(sources=(SourceConfig(path="unused"),), heldout_fraction=0.1, row_length=TOKENS),
        objective=CausalConfig(),
        optimizer=OptimizerConfig(kind=kind, lr=1e-2),
        engine=EngineConfig(zero_stage=stage, precision=precision, offload=offload, **engine),
        steps=100,
        step_rows=8,
        micro_rows=2,
    )


def engine_of(
    config: PretrainConfig, place: RankInfo, change: Callable[[Transformer], object] = lambda model: None
) -> Engine:
    model = build(model_config(config), seed=0)
    change(model)
    return Engine(model, config, place)


def rows(step: int) -> Batch:
    """8 rows, 5 in every third step: then the last micro is half padding, and some ranks get a micro of
    nothing but padding.
    """
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (8, TOKENS + 1), generator=g)
    targets = tokens[:, 1:].masked_fill(torch.rand(8, TOKENS, generator=g) < 0.3, IGNORE)
    segments = torch.ones_like(targets)
    if step % 3 == 2:
        targets[5:], segments[5:] = IGNORE, 0
    return Batch(tokens[:, :-1], segments, targets)


def share(step: int, place: RankInfo) -> tuple[list[Batch], list[int], int]:
    """This rank's micros of two rows, dealt out round by round, their seeds, and the targets of the whole
    step.
    """
    whole = rows(step)
    used = 3 if step % 3 == 2 else 4  # micros
    indices = [round_ * place.world + place.rank for round_ in range(-(-used // place.world))]
    empty = Batch(*(torch.full((2, TOKENS), fill) for fill in (0, 0, IGNORE)))
    micros = [
        Batch(*(t[2 * i : 2 * i + 2] for t in (whole.tokens, whole.segments, whole.targets)))
        if i < used
        else empty
        for i in indices
    ]
    return micros, [1000 * step + i for i in indices], int((whole.targets != IGNORE).sum())


def train(engine: Engine, *steps: int) -> list[StepResult]:
    return [engine.train_step(*share(step, engine.place), lr_factor=1 / (1 + step)) for step in steps]


def reader(parts: list[dict[str, Any]]) -> Any:
    """Ranges of whole parameters, put together from every rank's slices; fails where elements are missing or
    held twice.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for name, piece in part.items():
            target = whole.setdefault(
                name,
                {key: torch.full((torch.Size(piece.shape).numel(),), torch.nan) for key in piece.tensors},
            )
            for key, values in piece.tensors.items():
                there = target[key][piece.start : piece.start + values.numel()]
                assert there.isnan().all(), f"{name} {key} is held twice"
                there.copy_(values)
    assert not any(t.isnan().any() for tensors in whole.values() for t in tensors.values())
    return lambda name, start, stop: {key: tensor[start:stop] for key, tensor in whole[name].items()}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"{n} {key}"
        for n, piece in before.items()
        for key, values in piece.tensors.items()
        if not values.equal(after[n].tensors[key])
    ]


def gathered(state: dict[str, Any]) -> list[dict[str, Any]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, state)
    return everyone
