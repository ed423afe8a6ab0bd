"""ZeRO-1's step beside DeepSpeed's own, in one process, with parameters that only some micro batches give a
gradient.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.pretrain.engine.small_engine import engine_of, recipe, share, train
from tests.processes import run_processes
from trifold.modeling.transformer import Transformer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine, StepResult
from trifold.pretrain.engine.zero import zero1_step


def _partly_used(model: Transformer) -> None:
    """Of each four micro batches the first gives `early` a gradient, and the last `late`."""
    model.early, model.late = nn.Parameter(torch.full((2, 5), 0.5)), nn.Parameter(torch.full((3,), 0.5))
    forward, calls = model.forward, list[None]()

    def forward_and_more(*args: Any) -> Any:
        calls.append(None)
        more = {1: model.early.square().sum(), 0: model.late.sum()}.get(len(calls) % 4, 0)
        losses = forward(*args)
        return losses._replace(total=losses.total + 3 * more)

    model.forward = forward_and_more


def _theirs(engine: Any, zero: Any) -> None:
    """DeepSpeed's own step, but for its reduction in bf16, which rounds."""
    step, engine.buffered_allreduce_fallback, zero.set_loss_and_limits = (
        zero.step,
        lambda *_, **__: None,
        lambda *_: None,
    )

    def step_and_tell() -> None:
        step()
        zero.outcome = torch.tensor([float(zero._global_grad_norm), 0], dtype=torch.float64)

    zero.step = step_and_tell


def _both(
    rank_info: RankInfo, precision: str
) -> list[tuple[list[StepResult], dict[str, Any], float, StepResult | None]]:
    """Two steps, what the first made, and of ours one more, whose gradient is infinite: ours, then
    DeepSpeed's.
    """
    found = []
    config = recipe("muon", stage=1, precision=precision)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"clip": 0.5})})
    for ours in (True, False):
        zero1_step.install_fused_zero1_step = zero1_step.install_fused_zero1_step if ours else _theirs
        engine: Engine = engine_of(config, rank_info, _partly_used)
        steps, state, bad = train(engine, 0), engine.slices(), None
        engine._zero.clip_grad = 100.0  # now nothing is clipped
        steps += train(engine, 1)
        momentum = sum(
            float(piece.tensors["momentum"].norm())
            for piece in engine.slices().values()
            if "momentum" in piece.tensors
        )
        if ours:
            engine._engine.module.early.register_hook(lambda grad: grad * math.inf)
            bad = engine.train_step(*share(2, rank_info), 1.0)
        found.append((steps, state, momentum, bad))
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_is_deepspeeds_own_and_an_infinite_norm_is_told(precision: str) -> None:
    (ours, state, momentum, bad), (theirs, expected, unclipped, _) = run_processes(1, _both, precision)[0]
    assert bad is not None and not bad.applied and math.isfinite(bad.loss) and bad.grad_norm == math.inf
    assert min(step.grad_norm for step in ours) > 0.5, "nothing was clipped"
    assert [(s.loss, s.grad_norm) for s in ours] == [
        pytest.approx((s.loss, s.grad_norm), rel=1e-4) for s in theirs
    ]
    assert momentum == pytest.approx(unclipped, rel=1e-2)
    for name, piece in state.items():
        for key, values in piece.tensors.items():
            torch.testing.assert_close(
                values, expected[name].tensors[key], rtol=1e-4, atol=1e-6, msg=f"{name} {key}"
            )


def _unused(rank_info: RankInfo, precision: str) -> bool:
    """Whether parameters that get a gradient in every step but the second stay as they were in that."""
    config = recipe("adamw", stage=1, precision=precision)
    config = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"weight_decay": 0.0, "betas": (0.0, 0.0)})}
    )
    engine = engine_of(config, rank_info, _partly_used)
    train(engine, 0)
    model = engine._engine.module
    del model.forward  # without what uses them
    before = [p.detach().clone() for p in (model.early, model.late)]
    train(engine, 1)
    return all(torch.equal(*pair) for pair in zip(before, (model.early, model.late), strict=True)) and bool(
        model.early.ne(0.5).any()
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_parameter_without_a_gradient_in_a_step_does_not_take_the_last_one_again(precision: str) -> None:
    assert run_processes(1, _unused, precision) == [True]


def _three_steps(rank_info: RankInfo, precision: str) -> list[StepResult]:
    return train(engine_of(recipe("muon", stage=1, precision=precision), rank_info), 0, 1, 2)


@pytest.mark.parametrize(("precision", "distance"), [("bf16", 1e-2), ("fp32", 1e-5)])
def test_two_ranks_take_the_steps_of_one(precision: str, distance: float) -> None:
    (one,), (first, second) = (
        run_processes(1, _three_steps, precision),
        run_processes(2, _three_steps, precision),
    )
    assert first == second and all(step.applied for step in first)
    assert (first[0].loss, first[0].grad_norm) == pytest.approx((one[0].loss, one[0].grad_norm), rel=1e-5)
    assert [(s.loss, s.grad_norm) for s in first] == [
        pytest.approx((s.loss, s.grad_norm), rel=distance) for s in one
    ]
