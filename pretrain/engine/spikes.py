"""Loss spikes and bad batches: in, the recipe's rule and the steps applied so far; out, the most that the
next step may have, and what becomes of a step that has more.

All of it is a pure function of what a checkpoint keeps, so a replay takes the same decisions. A step is
judged before the optimizer moves, and so did no harm: going back undoes what happened to the weights in
memory, and which checkpoint it goes back to changes no number, because the steps up to the bad one are taken
again bit for bit. That is why the rows of the bad step alone are left out.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from trifold.modeling.errors import UserError
from trifold.pretrain.config.training import SpikesConfig, TrainingConfig


class StepLimits(NamedTuple):
    """The most that a step may have to be applied; beyond what is not finite, which never is."""

    loss: float = math.inf
    grad_norm: float = math.inf


UNLIMITED = StepLimits()


def step_limits(rule: SpikesConfig, recent: Sequence[tuple[float, float]]) -> StepLimits:
    """`recent`: loss and gradient norm of the applied steps, as many as the rule looks at; while there are
    fewer, there is no limit.
    """
    if len(recent) < rule.window:
        return UNLIMITED
    medians = (median(values) for values in zip(*recent, strict=True))
    return StepLimits(
        *(
            factor * value if factor else math.inf
            for factor, value in zip((rule.loss, rule.grad_norm), medians, strict=True)
        )
    )


def limit_exceeded(loss: float, grad_norm: float, most: StepLimits) -> str:
    """Why a step was not applied."""
    for name, value, limit in (("loss", loss, most.loss), ("gradient norm", grad_norm, most.grad_norm)):
        if not math.isfinite(value):
            return f"its {name} is not finite"
        if value > limit:
            return f"its {name} {value:.4g} exceeds {limit:.4g}"
    raise AssertionError(f"loss {loss}, gradient norm {grad_norm} and {most}: such a step is applied")


def consecutive_skips(skips: Sequence[tuple[int, int]], row: int) -> int:
    """How many ranges of `skips` end right before `row`, one after another: how often the step that begins
    there was bad already.
    """
    count = 0
    for first, last in sorted(skips, reverse=True):
        if last + 1 == row:
            row, count = first, count + 1
    return count


def raise_if_stopping(
    config: TrainingConfig, step: int, first: int, last: int, why: str, in_a_row: int
) -> None:
    """Raises UserError where the rule says that the run stops at a bad step."""
    where = f"step {step} (rows {first} to {last}) was not applied: {why}"
    if config.spikes.policy == "stop":
        raise UserError(
            f"{where}, and spikes.policy is stop. Nothing was saved since the newest checkpoint in"
            f" {config.run}; continue from it with"
            " spikes.policy=skip or rollback to pass over these rows."
        )
    if in_a_row >= config.nonfinite_limit:
        raise UserError(
            f"{where}. It is bad step number {in_a_row} in a row (nonfinite_limit is"
            f" {config.nonfinite_limit}). Lower optimizer.lr, or"
            f" train in fp32, and continue from the newest checkpoint in {config.run}."
        )
