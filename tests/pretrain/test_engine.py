"""The engine's promises, in real processes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.batch import IGNORE, Batch
from modeling.config import ModelConfig
from pretrain.config import Causal, Data, Optimizer, Pretrain, Source
from pretrain.config import Engine as EngineConfig
from pretrain.engine import Engine, Place
from tests.processes import run_processes

ROWS, TOKENS, VOCAB, DIM = 12, 7, 101, 33


class Tiny(nn.Module):
    """A stand-in with the Transformer's forward contract: tied embeddings, sizes that no world divides."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)
        self.dropout = dropout

    def forward(self, batch: Batch, per_token: bool = False) -> Any:
        x_BTD = self.embed(batch.tokens)
        for layer in self.layers:
            x_BTD = x_BTD + F.dropout(torch.tanh(layer(x_BTD)), self.dropout, self.training)
        logits_BTV = (self.norm(x_BTD) @ self.embed.weight.T).float()
        if per_token:
            nll_BT = F.cross_entropy(logits_BTV.transpose(1, 2), batch.targets, ignore_index=IGNORE, reduction="none")
            return nll_BT, logits_BTV.argmax(-1) == batch.targets
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")


def recipe(stage: int = 1, precision: str = "fp32", **optimizer: Any) -> Pretrain:
    model = ModelConfig(
        family="decoder", vocab_size=VOCAB, dim=DIM, num_layers=3, num_heads=1, num_kv_heads=1, head_dim=32, mlp_dim=64, max_positions=64
    )
    return Pretrain(
        run="unused",
        model=model,
        data=Data(sources=(Source(path="unused"),), heldout_fraction=0.1, row_length=TOKENS),
        objective=Causal(),
        optimizer=Optimizer(**{"lr": 1e-2, **optimizer}),
        engine=EngineConfig(zero_stage=stage, precision=precision),
        steps=100,
        step_rows=ROWS,
        micro_rows=2,
    )


def rows(step: int) -> Batch:
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, TOKENS + 1), generator=g)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=g) < 0.3] = IGNORE
    return Batch(tokens[:, :-1], torch.ones_like(targets), targets)


def share(step: int, place: Place) -> tuple[list[Batch], list[int], int]:
    """This rank's micros of two rows, dealt out round by round, their seeds, and the global count of targets."""
    whole, micros, seeds = rows(step), [], []
    for micro in range(place.rank, ROWS // 2, place.world):
        part = slice(2 * micro, 2 * micro + 2)
        micros.append(Batch(whole.tokens[part], whole.segments[part], whole.targets[part]))
        seeds.append(1000 * step + micro)
    return micros, seeds, int((whole.targets != IGNORE).sum())


def losses(engine: Engine, steps: range) -> list[tuple[float, float]]:
    results = [engine.train_step(*share(step, engine.place), lr_factor=1.0) for step in steps]
    assert all(r.finite for r in results)
    return [(r.loss, r.grad_norm) for r in results]


def full(parts: list[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Whole flat tensors from every rank's slices; fails where elements are missing or written twice."""
    whole: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        for name, piece in part.items():
            target = whole.setdefault(name, {k: torch.full((torch.Size(piece.shape).numel(),), torch.nan) for k in piece.tensors})
            for key, values in piece.tensors.items():
                there = target[key][piece.start : piece.start + values.numel()]
                assert there.isnan().all(), f"{name} {key} is written twice"
                there.copy_(values)
    assert not any(t.isnan().any() for tensors in whole.values() for t in tensors.values())
    return whole


def reader(parts: list[dict[str, Any]]) -> Any:
    whole = full(parts)
    return lambda name, start, stop: {key: tensor[start:stop] for key, tensor in whole[name].items()}


def _thin(place: Place) -> Any:
    engine = Engine(Tiny(), recipe(), place)
    first = losses(engine, range(3))
    state = engine.slices()
    second = losses(engine, range(3, 6))
    return first, state, second


def _thin2(place: Place, parts) -> Any:
    engine = Engine(Tiny(), recipe(), place)
    engine.load(reader(parts), 3)
    return losses(engine, range(3, 6))


def test_thin() -> None:
    results = run_processes(2, _thin)
    print(results[0][0])
    one = run_processes(1, _thin)
    print(one[0][0], one[0][2])
    again = run_processes(2, _thin2, [r[1] for r in results])
    print(again[0], results[0][2])
    assert again[0] == results[0][2]
