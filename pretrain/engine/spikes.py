"""Loss spikes and bad steps: the limits that the next step must keep, and what happens to a step that exceeds
them.

All of it is a pure function of what a checkpoint keeps, so a replay takes the same decisions. A step is
judged before the optimizer changes anything, so a bad step does no harm: a rollback undoes what went wrong
in memory, and every step up to the bad one is taken again bit for bit, whichever checkpoint it returns to.
That is why only the rows of the bad step are left out.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from trifold.modeling.errors import UserError
from trifold.pretrain.config.training import SpikesConfig, TrainingConfig


class StepLimits(NamedTuple):
    """The largest loss and gradient norm with which a step is applied. One that is not finite never is."""

    loss: float = math.inf
    grad_norm: float = math.inf


UNLIMITED = StepLimits()


def step_limits(config: SpikesConfig, recent: Sequence[tuple[float, float]]) -> StepLimits:
    """The limits of the next step, from (loss, gradient norm) of the last applied steps; none while
    `recent` has fewer than `config.window` steps.
    """
    if len(recent) < config.window:
        return UNLIMITED
    losses, norms = zip(*recent, strict=True)
    return StepLimits(
        loss=config.loss * median(losses) if config.loss else math.inf,
        grad_norm=config.grad_norm * median(norms) if config.grad_norm else math.inf,
    )


def limit_exceeded(loss: float, grad_norm: float, limits: StepLimits) -> str:
    """Why a step was not applied."""
    for name, value, limit in (("loss", loss, limits.loss), ("gradient norm", grad_norm, limits.grad_norm)):
        if not math.isfinite(value):
            return f"its {name} is not finite"
        if value > limit:
            return f"its {name} {value:.4g} exceeds {limit:.4g}"
    raise AssertionError(f"loss {loss}, gradient norm {grad_norm} and {limits}: such a step is applied")


def consecutive_skips(skips: Sequence[tuple[int, int]], row: int) -> int:
    """The number of adjacent ranges of `skips` that end right before `row`: how often the step that begins
    there was bad already.
    """
    count = 0
    for first, last in sorted(skips, reverse=True):
        if last + 1 == row:
            row, count = first, count + 1
    return count


def raise_if_stopping(
    config: TrainingConfig, step: int, first: int, last: int, reason: str, in_a_row: int
) -> None:
    """Raises UserError where the recipe stops the run at this bad step. `first` and `last` are its rows,
    `in_a_row` the number of bad steps in a row.
    """
    message = f"step {step} (rows {first} to {last}) was not applied: {reason}"
    if config.spikes.policy == "stop":
        raise UserError(
            f"{message}, and spikes.policy is stop. Nothing was saved since the newest checkpoint in"
            f" {config.run}; continue from it with spikes.policy=skip or rollback to leave these rows out."
        )
    if in_a_row >= config.nonfinite_limit:
        raise UserError(
            f"{message}. It is bad step number {in_a_row} in a row (nonfinite_limit is"
            f" {config.nonfinite_limit}). Lower optimizer.lr, or train in fp32, and continue from the newest"
            f" checkpoint in {config.run}."
        )
