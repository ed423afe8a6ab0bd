"""Which rows each step trains on, in closed form: a config and a step come in, the stage, the first row and
the first micro-batch of the step go out.

A run numbers its rows and its micro-batches from 0 to its end, across stages. So the cursor stays one
integer, and the dropout of every micro-batch has a key of its own. The loader, a checkpoint's cursor and the
FLOPs of a step all use this file.

Example: a stage of 2 steps of 8 rows in micro-batches of 4, then steps of 16 rows in micro-batches of 8. Step
2 is the second stage's first: its first row is 16 and its first micro-batch 4. Step 3 begins at row 32 and
micro-batch 6.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from trifold.pretrain.config.pretraining import PretrainConfig, StageConfig


class ResolvedStage(NamedTuple):
    """A stage with every value filled in, and its first step, row and micro-batch. A run without stages has
    one.
    """

    row_length: int
    step_rows: int
    micro_rows: int
    stage: int = 0  # its number
    first_step: int = 0
    first_row: int = 0
    first_micro: int = 0

    @property
    def micros(self) -> int:
        """Micro-batches of one step that hold rows."""
        return -(-self.step_rows // self.micro_rows)


class StepPosition(NamedTuple):
    """A step's stage, its first row (the cursor when it begins) and its first micro-batch, both counted over
    the run.
    """

    stage: ResolvedStage
    row: int
    micro: int


def resolve_stages(config: PretrainConfig) -> list[ResolvedStage]:
    """The run's stages in order. The last has the config's own values, and no end."""
    resolved: list[ResolvedStage] = []
    step = 0
    for stage in (*config.stages, StageConfig(steps=config.steps)):
        row = micro = 0
        if resolved:
            _, row, micro = locate_step(resolved, step)
        resolved.append(
            ResolvedStage(
                row_length=stage.row_length or config.data.row_length,
                step_rows=stage.step_rows or config.step_rows,
                micro_rows=stage.micro_rows or config.micro_rows,
                stage=len(resolved),
                first_step=step,
                first_row=row,
                first_micro=micro,
            )
        )
        step += stage.steps
    return resolved


def locate_step(stages: Sequence[ResolvedStage], step: int) -> StepPosition:
    """Where a step's rows and micro-batches begin. `step` may also be the number of finished steps: then the
    row is the run's cursor.
    """
    stage = stages[bisect_right(stages, step, key=lambda stage: stage.first_step) - 1]
    done = step - stage.first_step
    return StepPosition(
        stage, stage.first_row + done * stage.step_rows, stage.first_micro + done * stage.micros
    )
