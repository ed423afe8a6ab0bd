"""Which rows each step trains on, in closed form: in, a recipe and a step; out, the stage, the first row and
the first micro of the step.

A run numbers its rows and its micros from 0 to its end, whatever the stage, so the cursor stays one integer
and every micro's dropout has a key of its own. The loader, a checkpoint's cursor and the FLOPs of a step all
ask here.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from trifold.pretrain.config.pretraining import PretrainConfig, StageConfig


class ResolvedStage(NamedTuple):
    """A stage with every value filled in, and where it begins. A run without stages has one part."""

    row_length: int
    step_rows: int
    micro_rows: int
    stage: int = 0
    first_step: int = 0
    first_row: int = 0
    first_micro: int = 0

    @property
    def micros(self) -> int:
        """Micros of one step that hold rows."""
        return -(-self.step_rows // self.micro_rows)


class StepPosition(NamedTuple):
    """A step's part, its first row (the cursor when it begins) and its first micro, both counted over the
    run.
    """

    part: ResolvedStage
    row: int
    micro: int


def resolve_stages(config: PretrainConfig) -> list[ResolvedStage]:
    """The run's stages one after another; the last has the recipe's own values, and no end."""
    found: list[ResolvedStage] = []
    step = 0
    for stage in (*config.stages, StageConfig(steps=config.steps)):
        _, row, micro = locate_step(found, step) if found else (None, 0, 0)
        row_length, step_rows = (
            stage.row_length or config.data.row_length,
            stage.step_rows or config.step_rows,
        )
        found.append(
            ResolvedStage(
                row_length, step_rows, stage.micro_rows or config.micro_rows, len(found), step, row, micro
            )
        )
        step += stage.steps
    return found


def locate_step(parts: Sequence[ResolvedStage], step: int) -> StepPosition:
    """Where a step's rows and micros begin; `step` may be the number of finished ones, and so the run's
    cursor.
    """
    part = parts[bisect_right(parts, step, key=lambda part: part.first_step) - 1]
    done = step - part.first_step
    return StepPosition(part, part.first_row + done * part.step_rows, part.first_micro + done * part.micros)
