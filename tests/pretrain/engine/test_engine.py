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
from trifold.pretrain.distributed import RankInfo, all_gather
from trifold.pretrain.engine.engine import StepResult
from trifold.pretrain.engine.spikes import StepLimits

PRECISIONS = ("fp32", "bf16", "autocast")
CELLS = [
    (kind, stage, precision, offload)
    for kind in ("adamw", "muon")
    for stage in STAGES
    for precision in PRECISIONS
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


def spoiled_by(kinds: list[str]) -> Callable[[Transformer], None]:
    """A change of a model: its next loss is spoiled as the last of `kinds` says, which is removed."""

    def change(model: Transformer) -> None:
        forward = model.forward

        def spoiled_forward(*args: Any, **kwargs: Any) -> Any:
            losses = forward(*args, **kwargs)
            return losses._replace(total=SPOIL[kinds.pop()](losses.total)) if kinds else losses

        model.forward = spoiled_forward

    return change


def _every_cell(rank_info: RankInfo, stage: int) -> dict[Any, dict[str, Any]]:
    return {cell: _cell(rank_info, *cell) for cell in CELLS if cell[1] == stage}


def _cell(rank_info: RankInfo, kind: str, stage: int, precision: str, offload: bool) -> dict[str, Any]:
    """Four steps; the state after two; and another engine that takes the last two from that state, with bad
    steps in between and wide limits at the end.
    """
    config = recipe(kind, stage, precision, offload)
    engine = engine_of(config, rank_info)
    start = train(engine, 0, 1)
    state = engine.slices()
    straight = train(engine, 2, 3)

    spoil: list[str] = []
    engine = engine_of(config, rank_info, spoiled_by(spoil))
    train(engine, 7)  # loading must replace everything
    engine.load(reader(all_gather(state)), 2)
    different = changed(state, engine.slices())
    resumed = train(engine, 2)

    before = engine.slices()
    bad: dict[Any, tuple[bool, int, list[str]]] = {}
    for what in SPOIL:
        if rank_info.rank == rank_info.world - 1:
            spoil.append(what)
        (step,) = train(engine, 9)
        bad[what] = (step.applied, engine.optimizer_step, changed(before, engine.slices()))
    for limits in LIMITS:
        step = engine.train_step(*share(9, rank_info), 1.0, limits)
        assert step.grad_norm > 1e-3
        bad[limits] = (step.applied, engine.optimizer_step, changed(before, engine.slices()))

    resumed += [engine.train_step(*share(3, rank_info), 1 / 4, StepLimits(1e3, 1e3))]
    return {
        "start": start,
        "state": state,
        "straight": straight,
        "different": different,
        "resumed": resumed,
        "bad": bad,
    }


@cache
def two_ranks(stage: int) -> list[dict[Any, dict[str, Any]]]:
    """What each of two ranks measured in every cell of a stage."""
    return run_processes(2, _every_cell, stage, timeout=280)


@pytest.mark.parametrize("cell", CELLS)
def test_resumed_run_continues_bit_for_bit(cell: Any) -> None:
    for rank in two_ranks(cell[1]):
        assert rank[cell]["different"] == []
        assert rank[cell]["resumed"] == rank[cell]["straight"]
        assert all(step.applied for step in rank[cell]["start"] + rank[cell]["straight"])


LIMITS = (StepLimits(loss=1e-3), StepLimits(grad_norm=1e-3))
# of each bad step: not applied, three steps of the optimizer so far, nothing changed
UNCHANGED: dict[Any, Any] = dict.fromkeys(("loss", "gradient", *LIMITS), (False, 3, []))


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_that_is_not_finite_or_exceeds_a_limit_changes_nothing_on_any_rank(cell: Any) -> None:
    for rank in two_ranks(cell[1]):
        assert rank[cell]["bad"] == UNCHANGED


def _continue_elsewhere(rank_info: RankInfo, states: dict[Any, Any]) -> dict[Any, list[StepResult]]:
    """Steps of this world: from scratch, and from the states that two ranks saved at each stage."""
    results: dict[Any, list[StepResult]] = {}
    for kind in ("adamw", "muon"):
        for stage in STAGES:
            engine = engine_of(recipe(kind, stage), rank_info)
            results[kind, stage] = train(engine, 0, 1, 2, 3)
            for saved_stage in STAGES:
                engine.load(reader(states[kind, saved_stage]), 2)
                results[kind, saved_stage, stage] = train(engine, 2, 3)
    return results


@pytest.mark.parametrize("world", [1, 3])
def test_other_worlds_and_stages_continue_within_rounding(world: int) -> None:
    states = {
        (kind, stage): [rank[kind, stage, "fp32", False]["state"] for rank in two_ranks(stage)]
        for kind in ("adamw", "muon")
        for stage in STAGES
    }
    results = run_processes(world, _continue_elsewhere, states)[0]
    for key, steps in results.items():
        reference = two_ranks(1)[0][key[0], 1, "fp32", False]
        expected = (reference["start"] + reference["straight"])[-len(steps) :]
        assert [s.loss for s in steps] == pytest.approx([s.loss for s in expected], rel=1e-5), key
        assert [s.grad_norm for s in steps] == pytest.approx([s.grad_norm for s in expected], rel=1e-4), key


def _plain_torch(rank_info: RankInfo) -> tuple[list[tuple[float, float]], list[StepResult]]:
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
        loss = model(batch).total / (batch.targets != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr / (1 + step)
        optimizer.step()
        expected.append((loss.item(), norm.item()))
    return expected, train(engine_of(config, rank_info), 0, 1, 2, 3, 4, 5)


def test_steps_equal_plain_torch() -> None:
    expected, steps = run_processes(1, _plain_torch)[0]
    assert [(s.loss, s.grad_norm) for s in steps] == [pytest.approx(e, rel=1e-5) for e in expected]


DECAY = 0.7
ALL = 10**9  # reads to the end of a parameter


def _averages(rank_info: RankInfo) -> dict[Any, Any]:
    cells = [
        ("adamw", 1, "bf16", False),
        ("muon", 2, "autocast", True),
        ("adamw", 3, "fp32", False),
        ("muon", 3, "bf16", True),
    ]
    return {cell: _averages_of(rank_info, *cell) for cell in cells}


def _averages_of(rank_info: RankInfo, kind: str, stage: int, precision: str, offload: bool) -> dict[str, Any]:
    """Weights and averages after each step, evaluation by either, and an average that is turned on late."""
    plain = recipe(kind, stage, precision, offload)
    config = plain.model_copy(update={"ema": DECAY})
    spoil: list[str] = []

    def change(model: Transformer) -> None:
        freeze(model)
        spoiled_by(spoil)(model)

    engine = engine_of(config, rank_info, change)
    states = [all_gather(engine.slices())]
    steps: list[StepResult] = []
    for step in range(4):
        if step == 2:
            before = engine.slices()
            spoil.append("loss")
            train(engine, 9)
            changed_by_bad_step = changed(before, engine.slices())
        steps += train(engine, step)
        states.append(all_gather(engine.slices()))

    trained_nll = engine.evaluate(rows(0))[0]
    with engine.use_ema_weights():
        averaged_nll = engine.evaluate(rows(0))[0]
    same_nll = engine.evaluate(rows(0))[0].equal(trained_nll)
    restored = same_nll, changed(states[-1][rank_info.rank], engine.slices())

    without_ema = engine_of(plain, rank_info, freeze)
    steps_without_ema = train(without_ema, 0, 1, 2, 3)
    without_ema.load(_averages_as_weights(reader(states[-1])), 4)
    turned_on_late = engine_of(config, rank_info, freeze)
    turned_on_late.load(_without_averages(reader(states[2])), 2)
    return {
        "states": states,
        "changed_by_bad_step": changed_by_bad_step,
        "restored": restored,
        "averaged_nll": averaged_nll,
        "trained_nll": trained_nll,
        "late_state": all_gather(turned_on_late.slices()),
        "steps": steps,
        "steps_without_ema": steps_without_ema,
        "nll_of_averages_as_weights": without_ema.evaluate(rows(0))[0],
    }


def _without_averages(read: Any) -> Any:
    """Reads a checkpoint of a run that kept no averages."""
    return lambda *key: {name: values for name, values in read(*key).items() if name != "ema"}


def _averages_as_weights(read: Any) -> Any:
    """Reads the averaged weights in place of the trained ones."""

    def read_averages(*key: Any) -> dict[str, Tensor]:
        values = read(*key)
        return values | {"fp32": values.get("ema", values["fp32"])}

    return read_averages


def test_averaged_weights_are_the_formula_and_change_no_training() -> None:
    for cell, result in run_processes(2, _averages, timeout=280)[0].items():
        readers = [reader(state) for state in result["states"]]
        late = reader(result["late_state"])
        for name in {name for rank in result["states"][0] for name in rank}:
            tensors = [read(name, 0, ALL) for read in readers]
            if name.startswith(FROZEN):
                assert all(values.keys() == {"fp32"} for values in tensors)
                continue
            assert tensors[0]["ema"].equal(tensors[0]["fp32"])
            for t in range(1, len(tensors)):
                weights = torch.tensor([DECAY ** (t - i) for i in range(1, t + 1)], dtype=torch.float64)
                values = torch.stack([tensors[i]["fp32"].double() for i in range(1, t + 1)])
                expected = (weights[:, None] * values).sum(0) / weights.sum()
                torch.testing.assert_close(tensors[t]["ema"].double(), expected, rtol=1e-6, atol=1e-7)
            begun = late(name, 0, ALL)
            assert begun["ema"].equal(tensors[2]["fp32"]) and begun["fp32"].equal(tensors[2]["fp32"])
        assert result["changed_by_bad_step"] == [], cell
        assert result["restored"] == (True, []), cell
        assert result["averaged_nll"].equal(result["nll_of_averages_as_weights"]), cell
        assert not result["averaged_nll"].equal(result["trained_nll"]), cell
        assert result["steps"] == result["steps_without_ema"], cell


FROZEN = ("embed.weight", "decoder.blocks.0.")


def freeze(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN))


def _frozen_cell(rank_info: RankInfo, kind: str, stage: int) -> dict[str, Any]:
    config = recipe(kind, stage, "bf16" if kind == "muon" else "fp32", offload=kind == "muon")
    engine = engine_of(config, rank_info, freeze)
    initial = all_gather(engine.slices())
    train(engine, 0, 1)
    state = all_gather(engine.slices())
    straight = train(engine, 2, 3)

    resumed = engine_of(config, rank_info, freeze)
    resumed.load(reader(state), 2)
    with pytest.raises(UserError, match=r"has \['fp32'\] of .*requires its (exp_avg|momentum)"):
        engine_of(config, rank_info).load(reader(state), 2)  # a recipe that freezes nothing
    return {"initial": initial, "state": state, "straight": straight, "resumed": train(resumed, 2, 3)}


def _scores(rank_info: RankInfo, stage: int) -> dict[str, Any]:
    engine = engine_of(recipe(stage=stage, recompute=True), rank_info)
    train(engine, 0)
    nll_BT, correct_BT = engine.evaluate(rows(0))
    again_BT, _ = engine.evaluate(rows(0))
    return {"nll": nll_BT, "correct": correct_BT, "again": again_BT, "next": train(engine, 1)[0]}


def _frozen_and_scores(rank_info: RankInfo) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for stage in STAGES:
        for kind in ("adamw", "muon"):
            results["frozen", stage, kind] = _frozen_cell(rank_info, kind, stage)
        results["scores", stage] = _scores(rank_info, stage)
    return results


@cache
def frozen_and_scores() -> dict[Any, Any]:
    """What the first of two ranks measured."""
    return run_processes(2, _frozen_and_scores)[0]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_do_not_change_and_are_saved_once(stage: int, kind: str) -> None:
    result = frozen_and_scores()["frozen", stage, kind]
    assert result["resumed"] == result["straight"]
    reader(result["state"])  # fails where an element is missing or saved twice

    keys = {name: set(part.tensors) for rank in result["state"] for name, part in rank.items()}
    assert len(keys) == len(list(build(model_config(recipe()), 0).parameters()))
    for name, tensors in keys.items():
        if name.startswith(FROZEN):
            assert tensors == {"fp32"}
        else:
            assert tensors in ({"fp32", "exp_avg", "exp_avg_sq"}, {"fp32", "momentum"})

    moved: set[str] = set()
    for before, after in zip(result["initial"], result["state"], strict=True):
        moved |= {entry.split()[0] for entry in changed(before, after)}
    assert moved == {name for name in keys if not name.startswith(FROZEN)}


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_is_repeatable_and_recomputation_changes_no_loss(stage: int) -> None:
    scores = frozen_and_scores()["scores", stage]
    assert scores["nll"].dtype == torch.float32 and scores["correct"].dtype == torch.bool
    assert scores["nll"].equal(scores["again"])
    torch.testing.assert_close(scores["nll"], frozen_and_scores()["scores", 1]["nll"], rtol=1e-5, atol=1e-5)
    without_recompute = two_ranks(1)[0]["adamw", 1, "fp32", False]["start"][1]
    assert scores["next"].applied
    assert scores["next"].loss == pytest.approx(without_recompute.loss, rel=1e-5)


DOCS = ROOT / "docs" / "engine.md"
NAMES = {"adamw": "AdamW", "muon": "Muon"}
INTRODUCTION = """
# What the engine can do, cell by cell

Written by `tests/pretrain/engine/test_engine.py`, from two real ranks on the CPU. *exact*: it trains; state
saved as slices and loaded again gives the same losses and gradient norms to the last bit, dropout on; and a
step whose loss or gradient is not finite on one rank changes no number on any rank.
"""
CONCLUSION = """
In fp32, every stage's state continues on every other stage and on 1 and 3 ranks with losses within 1e-5
relative over these steps. Frozen parameters are exact at stages 1, 2 and 3 (AdamW in fp32, Muon in bf16 with
offload), and each is saved once. Recomputation changes a loss by less than 1e-5. `engine.compile` at stage 3,
block by block, is compared with uncompiled steps in `tests/pretrain/engine/test_compile.py`.
"""


def _table(results: dict[Any, str]) -> str:
    """docs/engine.md: the result of every cell of optimizer, stage, precision and offload."""
    columns = [(precision, offload) for precision in PRECISIONS for offload in (False, True)]
    head = ["optimizer", "ZeRO", *(f"{precision}{', offload' * offload}" for precision, offload in columns)]
    lines = [head, ["---"] * len(head)]
    for kind, name in NAMES.items():
        for stage in STAGES:
            lines.append([name, str(stage), *(results[kind, stage, *column] for column in columns)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{INTRODUCTION.lstrip()}\n{table}\n{CONCLUSION}"


def test_the_table_in_docs_is_what_was_measured() -> None:
    results = {}
    for cell in CELLS:
        ranks = [rank[cell] for rank in two_ranks(cell[1])]
        resumed = all(rank["resumed"] == rank["straight"] and rank["different"] == [] for rank in ranks)
        unchanged = all(rank["bad"] == UNCHANGED for rank in ranks)
        results[cell] = "exact" if resumed and unchanged else "differs"
    table = _table(results)
    if not DOCS.exists() or DOCS.read_text() != table:
        DOCS.write_text(table)
        pytest.fail(f"{DOCS.name} was out of date and has been rewritten: review and commit it")
