"""The engine's promises, in real processes: a model of odd sizes at every stage, precision, optimizer and
world.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.paths import ROOT
from tests.pretrain.engine.small_engine import (
    STAGES,
    changed,
    engine_of,
    gathered,
    reader,
    recipe,
    rows,
    share,
    train,
)
from tests.processes import run_processes
from tests.recipes import model_config
from trifold.modeling.batch import IGNORE
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import Transformer, build
from trifold.pretrain.config.training import EngineConfig as EngineConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import StepResult
from trifold.pretrain.engine.spikes import StepLimits

CELLS = [
    (kind, stage, precision, offload)
    for kind in ("adamw", "muon")
    for stage in STAGES
    for precision in ("fp32", "bf16", "autocast")
    for offload in (False, True)
]


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN while the loss stays finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.nan


SPOIL: dict[str, Callable[[Any], Any]] = {
    "loss": lambda loss: loss.detach() * torch.inf + loss,
    "gradient": Poison.apply,
}


def _every_cell(place: RankInfo, stage: int) -> dict[Any, dict[str, Any]]:
    return {cell: _cell(place, *cell) for cell in CELLS if cell[1] == stage}


def _cell(place: RankInfo, kind: str, stage: int, precision: str, offload: bool) -> dict[str, Any]:
    """Four steps straight; the state after two; from that state the same again, with bad steps in between and
    wide limits at the end.
    """
    config = recipe(kind, stage, precision, offload)
    engine = engine_of(config, place)
    start = train(engine, 0, 1)
    state = engine.slices()
    straight = train(engine, 2, 3)

    spoilt: list[str] = []

    def spoil(model: Transformer) -> None:
        forward = model.forward
        model.forward = lambda *a, **k: SPOIL[spoilt.pop()](forward(*a, **k)) if spoilt else forward(*a, **k)

    engine = engine_of(config, place, spoil)
    train(engine, 7)  # what is loaded must replace everything
    engine.load(reader(gathered(state)), 2)
    loaded = changed(state, engine.slices())
    resumed = train(engine, 2)
    before = engine.slices()
    bad: dict[Any, Any] = {}
    for what in SPOIL:
        if place.rank == place.world - 1:
            spoilt.append(what)
        (step,) = train(engine, 9)
        bad[what] = (step.applied, engine.optimizer_step, changed(before, engine.slices()))
    for limits in (StepLimits(loss=1e-3), StepLimits(grad_norm=1e-3)):
        step = engine.train_step(*share(9, place), 1.0, limits)
        assert step.grad_norm > 1e-3
        bad[limits] = (step.applied, engine.optimizer_step, changed(before, engine.slices()))
    resumed += [engine.train_step(*share(3, place), 1 / 4, StepLimits(1e3, 1e3))]
    return {
        "start": start,
        "state": state,
        "straight": straight,
        "loaded": loaded,
        "resumed": resumed,
        "bad": bad,
    }


@cache
def two(stage: int) -> list[dict[Any, dict[str, Any]]]:
    """What each of two ranks found in every cell of a stage."""
    return run_processes(2, _every_cell, stage, timeout=280)


@pytest.mark.parametrize("cell", CELLS)
def test_resumed_run_continues_bit_for_bit(cell: Any) -> None:
    for rank in two(cell[1]):
        assert rank[cell]["loaded"] == []
        assert rank[cell]["resumed"] == rank[cell]["straight"]
        assert all(step.applied for step in rank[cell]["start"] + rank[cell]["straight"])


UNHARMED = dict.fromkeys(
    ("loss", "gradient", StepLimits(loss=1e-3), StepLimits(grad_norm=1e-3)), (False, 3, [])
)  # not applied, nothing changed


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_that_is_not_finite_or_beyond_a_limit_changes_nothing_on_any_rank(cell: Any) -> None:
    for rank in two(cell[1]):
        assert rank[cell]["bad"] == UNHARMED


def _elsewhere(place: RankInfo, states: dict[str, Any]) -> dict[Any, list[StepResult]]:
    """From scratch, and from each state of two ranks to each stage here."""
    found: dict[Any, Any] = {}
    for kind in ("adamw", "muon"):
        for stage in STAGES:
            engine = engine_of(recipe(kind, stage), place)
            found[kind, stage] = train(engine, 0, 1, 2, 3)
            for before in STAGES:
                engine.load(reader(states[kind, before]), 2)
                found[kind, before, stage] = train(engine, 2, 3)
    return found


@pytest.mark.parametrize("world", [1, 3])
def test_other_worlds_and_stages_continue_within_rounding(world: int) -> None:
    states = {
        (k, s): [rank[k, s, "fp32", False]["state"] for rank in two(s)]
        for k in ("adamw", "muon")
        for s in STAGES
    }
    found = run_processes(world, _elsewhere, states)[0]
    for key, steps in found.items():
        reference = two(1)[0][key[0], 1, "fp32", False]
        expected = (reference["start"] + reference["straight"])[-len(steps) :]
        assert [s.loss for s in steps] == pytest.approx([s.loss for s in expected], rel=1e-5), key
        assert [s.grad_norm for s in steps] == pytest.approx([s.grad_norm for s in expected], rel=1e-4), key


def _plain_torch(place: RankInfo) -> tuple[list[tuple[float, float]], list[StepResult]]:
    """The same steps by torch alone: whole batch, one mean, its own clipping and AdamW, without dropout."""
    config = recipe()
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    model = build(model_config(config), seed=0)
    settings = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    expected = []
    for step in range(6):
        batch = rows(step)
        loss = model(batch) / (batch.targets != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr / (1 + step)
        optimizer.step()
        expected.append((loss.item(), norm.item()))
    return expected, train(engine_of(config, place), 0, 1, 2, 3, 4, 5)


def test_steps_equal_plain_torch() -> None:
    expected, found = run_processes(1, _plain_torch)[0]
    assert [(s.loss, s.grad_norm) for s in found] == [pytest.approx(e, rel=1e-5) for e in expected]


DECAY = 0.7


def _averages(place: RankInfo) -> dict[Any, Any]:
    """Weights and averages after each step in several cells; what evaluates while they are swapped; an
    average turned on late.
    """
    found: dict[Any, Any] = {}
    for kind, stage, precision, offload in [
        ("adamw", 1, "bf16", False),
        ("muon", 2, "autocast", True),
        ("adamw", 3, "fp32", False),
        ("muon", 3, "bf16", True),
    ]:
        plain = recipe(kind, stage, precision, offload)
        config = plain.model_copy(update={"ema": DECAY})
        spoilt: list[str] = []

        def spoil(model: Transformer, spoilt: list[str] = spoilt) -> None:
            freeze(model)
            forward = model.forward
            model.forward = lambda *a, **k: (
                SPOIL[spoilt.pop()](forward(*a, **k)) if spoilt else forward(*a, **k)
            )

        engine = engine_of(config, place, spoil)
        states = [gathered(engine.slices())]
        steps = []
        for step in range(4):
            if step == 2:
                before = engine.slices()
                spoilt.append("loss")
                train(engine, 9)
                kept = changed(before, engine.slices())
            steps += train(engine, step)
            states.append(gathered(engine.slices()))
        own = engine.evaluate(rows(0))[0]
        with engine.use_ema_weights():
            averaged = engine.evaluate(rows(0))[0]
        restored = engine.evaluate(rows(0))[0].equal(own), changed(states[-1][place.rank], engine.slices())
        as_trained = engine_of(plain, place, freeze)
        trained = train(as_trained, 0, 1, 2, 3)
        as_trained.load(_averages_as_weights(reader(states[-1])), 4)
        late = engine_of(config, place, freeze)
        late.load(_without_averages(reader(states[2])), 2)
        begun = gathered(late.slices())
        found[kind, stage, precision] = {
            "states": states,
            "kept": kept,
            "restored": restored,
            "averaged": averaged,
            "own": own,
            "begun": begun,
            "steps": steps,
            "trained": trained,
            "as_trained": as_trained.evaluate(rows(0))[0],
        }
    return found


def _without_averages(read: Any) -> Any:
    """A checkpoint of a run that kept none."""
    return lambda *a: {key: values for key, values in read(*a).items() if key != "ema"}


def _averages_as_weights(read: Any) -> Any:
    return lambda *a: (values := read(*a)) | {"fp32": values.get("ema", values["fp32"])}


def test_averaged_weights_are_the_formula_and_change_no_training() -> None:
    for cell, found in run_processes(2, _averages, timeout=280)[0].items():
        wholes = [reader(state) for state in found["states"]]
        names = {name for rank in found["states"][0] for name in rank}
        for name in names:
            tensors = [whole(name, 0, None) for whole in wholes]
            if name.startswith(FROZEN):
                assert all(values.keys() == {"fp32"} for values in tensors)
                continue
            assert tensors[0]["ema"].equal(tensors[0]["fp32"])
            for t in range(1, len(tensors)):
                weights = [DECAY ** (t - i) for i in range(1, t + 1)]
                expected = sum(
                    w * values["fp32"].double() for w, values in zip(weights, tensors[1 : t + 1], strict=True)
                ) / sum(weights)
                torch.testing.assert_close(tensors[t]["ema"].double(), expected, rtol=1e-6, atol=1e-7)
            begun = reader(found["begun"])(name, 0, None)
            assert begun["ema"].equal(tensors[2]["fp32"]) and begun["fp32"].equal(tensors[2]["fp32"])
        assert found["kept"] == [], cell  # a step that was not finite
        assert found["restored"] == (True, []), cell
        assert found["averaged"].equal(found["as_trained"]) and not found["averaged"].equal(found["own"]), (
            cell
        )
        assert found["steps"] == found["trained"], cell


FROZEN = ("embed.weight", "decoder.blocks.0.")


def freeze(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))


def _frozen_and_scores(place: RankInfo) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for stage in STAGES:
        for kind in ("adamw", "muon"):
            config = recipe(kind, stage, "bf16" if kind == "muon" else "fp32", offload=kind == "muon")
            engine = engine_of(
                config,
                place,
                lambda model: [
                    p.requires_grad_(not n.startswith(FROZEN)) for n, p in model.named_parameters()
                ],
            )
            first = gathered(engine.slices())
            train(engine, 0, 1)
            state = engine.slices()
            straight = train(engine, 2, 3)
            again = engine_of(
                config,
                place,
                lambda model: [
                    p.requires_grad_(not n.startswith(FROZEN)) for n, p in model.named_parameters()
                ],
            )
            again.load(reader(gathered(state)), 2)
            with pytest.raises(UserError, match=r"this recipe needs its (exp_avg|momentum)"):
                engine_of(config, place).load(reader(gathered(state)), 2)
            found["frozen", stage, kind] = (first, gathered(state), straight, train(again, 2, 3))
        batch = rows(0)
        engine = engine_of(recipe(stage=stage, recompute=True), place)
        train(engine, 0)
        nll, correct = engine.evaluate(batch)
        found["scores", stage] = (nll, correct, nll.equal(engine.evaluate(batch)[0]), train(engine, 1))
    return found


def test_frozen_parameters_stay_and_are_held_once_and_recompute_and_scores_agree() -> None:
    found = run_processes(2, _frozen_and_scores)[0]
    for stage in STAGES:
        for kind in ("adamw", "muon"):
            first, state, straight, resumed = found["frozen", stage, kind]
            assert resumed == straight
            reader(state)
            kinds = {name: set(piece.tensors) for rank in state for name, piece in rank.items()}
            assert len(kinds) == len(list(build(model_config(recipe()), 0).parameters()))
            moments = [{"fp32", "exp_avg", "exp_avg_sq"}, {"fp32", "momentum"}]
            assert all(
                (keys == {"fp32"}) if name.startswith(FROZEN) else (keys in moments)
                for name, keys in kinds.items()
            )
            moved = {
                entry.split()[0] for old, new in zip(first, state, strict=True) for entry in changed(old, new)
            }
            assert moved == {name for name in kinds if not name.startswith(FROZEN)}
        nll, correct, repeatable, after = found["scores", stage]
        assert repeatable and after[0].applied and nll.dtype == torch.float32 and correct.dtype == torch.bool
        torch.testing.assert_close(nll, found["scores", 1][0], rtol=1e-5, atol=1e-5)
        assert after[0].loss == pytest.approx(
            two(1)[0]["adamw", 1, "fp32", False]["start"][1].loss, rel=1e-5
        )  # recomputed or not


DOCS = ROOT / "docs" / "engine.md"
WORDS = {"adamw": "AdamW", "muon": "Muon"}


def _table(found: dict[Any, str]) -> str:
    """docs/engine.md: every cell of optimizer, stage, precision and offload, with what was found in it."""
    precisions = ("fp32", "bf16", "autocast")
    head = ["optimizer", "ZeRO", *(f"{p}{o}" for p in precisions for o in ("", ", offload"))]
    lines = [head, ["---"] * len(head)]
    for kind in WORDS:
        for stage in STAGES:
            lines.append(
                [
                    WORDS[kind],
                    str(stage),
                    *(found[kind, stage, p, o] for p in precisions for o in (False, True)),
                ]
            )
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# What the engine can do, cell by cell

Written by `tests/pretrain/engine/test_engine.py`, from two real ranks on the CPU. *exact*: it trains; state
saved as slices and loaded again gives the same losses and gradient norms to the last bit, dropout on; and a
step whose loss or gradient is not finite on one rank changes no number on any rank.

{rows}

In fp32, every stage's state continues on every other stage and on 1 and 3 ranks with losses within 1e-5
relative. Frozen parameters are exact at stages 1, 2 and 3 (AdamW in fp32, Muon in bf16 with offload), and
each is held once. Recomputation changes a loss by less than 1e-5. What `engine.compile` does at stage 3,
block by block, is held against uncompiled steps in `tests/pretrain/engine/test_compile.py`.
"""


def test_the_table_in_docs_says_what_was_found() -> None:
    found = {}
    for cell in CELLS:
        ranks = [rank[cell] for rank in two(cell[1])]
        resumed = all(rank["resumed"] == rank["straight"] and rank["loaded"] == [] for rank in ranks)
        unharmed = all(rank["bad"] == UNHARMED for rank in ranks)
        found[cell] = "exact" if resumed and unharmed else "differs"
    table = _table(found)
    if not DOCS.exists() or DOCS.read_text() != table:
        DOCS.write_text(table)
        pytest.fail(f"{DOCS.name} said something else: it was written anew; look at it and commit it")
