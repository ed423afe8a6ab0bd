"""A tiny decoder of odd sizes, an engine that trains it, and readers of its state."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.recipes import model_config
from trifold.modeling.batch import IGNORE, Batch
from trifold.modeling.config import ModelConfig
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.checkpoint.slice import ReadSlice, Slice
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
    config: PretrainConfig, rank_info: RankInfo, change: Callable[[Transformer], Any] = lambda model: None
) -> Engine:
    """The engine of a recipe without `auto`, of a model that `change` was applied to."""
    model = build(model_config(config), seed=0)
    change(model)
    return Engine(model, config.engine, config.optimizer, rank_info, config.ema)


def rows(step: int) -> Batch:
    """8 rows, 5 in every third step: then the last micro is half padding, and some ranks get a micro that is
    all padding.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (8, TOKENS + 1), generator=generator)
    ignored = torch.rand(8, TOKENS, generator=generator) < 0.3
    targets = tokens[:, 1:].masked_fill(ignored, IGNORE)
    segments = torch.ones_like(targets)
    if step % 3 == 2:
        targets[5:], segments[5:] = IGNORE, 0
    return Batch(tokens[:, :-1], segments, targets)


def share(step: int, rank_info: RankInfo) -> tuple[list[Batch], list[int], int]:
    """This rank's micro batches of two rows, their seeds, and the number of targets of the step."""
    batch = rows(step)
    used = 3 if step % 3 == 2 else 4  # micros
    indices = [round_ * rank_info.world + rank_info.rank for round_ in range(-(-used // rank_info.world))]
    empty = Batch(*(torch.full((2, TOKENS), fill) for fill in (0, 0, IGNORE)))
    micros = []
    for i in indices:
        two_rows = slice(2 * i, 2 * i + 2)
        micro = Batch(batch.tokens[two_rows], batch.segments[two_rows], batch.targets[two_rows])
        micros.append(micro if i < used else empty)
    return micros, [1000 * step + i for i in indices], int((batch.targets != IGNORE).sum())


def train(engine: Engine, *steps: int) -> list[StepResult]:
    return [engine.train_step(*share(step, engine.rank_info), lr_factor=1 / (1 + step)) for step in steps]


def reader(ranks: list[dict[str, Slice]]) -> ReadSlice:
    """Reads parameters from every rank's slices. Fails where elements are missing or saved twice."""
    full: dict[str, dict[str, Tensor]] = {}
    for slices in ranks:
        for name, part in slices.items():
            numel = torch.Size(part.shape).numel()
            tensors = full.setdefault(name, {key: torch.full((numel,), torch.nan) for key in part.tensors})
            for key, values in part.tensors.items():
                target = tensors[key][part.start : part.start + values.numel()]
                assert target.isnan().all(), f"{name} {key} is saved twice"
                target.copy_(values)
    for name, tensors in full.items():
        assert not any(tensor.isnan().any() for tensor in tensors.values()), f"{name} is incomplete"
    return lambda name, start, stop: {key: tensor[start:stop] for key, tensor in full[name].items()}


def changed(before: dict[str, Slice], after: dict[str, Slice]) -> list[str]:
    """The parameters and moments of a rank that differ in any bit."""
    return [
        f"{name} {key}"
        for name, part in before.items()
        for key, values in part.tensors.items()
        if not values.equal(after[name].tensors[key])
    ]
