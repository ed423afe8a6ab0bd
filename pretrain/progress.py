"""Where a run is: all that a resumed run needs besides weights and moments."""

from dataclasses import dataclass, field, replace
from typing import Any

from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.engine.engine import StepResult


@dataclass
class Progress:
    """The position of a run, changed by the training loop after each step."""

    step: int = 0  # finished optimizer steps, skipped ones included
    tokens: int = 0  # read so far, without padding
    skipped_in_a_row: int = 0  # the last steps that were skipped, one after another
    skips: list[tuple[int, int]] = field(default_factory=list)  # rows (first, last) that are never read
    recent: list[tuple[float, float]] = field(default_factory=list)  # (loss, gradient norm) of applied steps

    @classmethod
    def from_state(cls, state: CheckpointState) -> "Progress":
        """The position that a checkpoint recorded."""
        return cls(
            step=state.step,
            tokens=state.tokens,
            skipped_in_a_row=state.skipped_in_a_row,
            skips=list(state.skips),
            recent=list(state.recent),
        )

    def to_state(self) -> dict[str, Any]:
        """The fields of CheckpointState of the same names."""
        return dict(vars(self))

    def advance(self, step: StepResult, tokens: int, window: int) -> None:
        """A step is done, applied or skipped. `window`: how many applied steps `recent` keeps."""
        self.step += 1
        self.tokens += tokens
        if step.applied:
            self.skipped_in_a_row = 0
            self.recent = [*self.recent, (step.loss, step.grad_norm)][-window:]
        else:
            self.skipped_in_a_row += 1

    def rewind(self, earlier: "Progress", skip: tuple[int, int]) -> None:
        """Return to `earlier`, and leave out the rows `skip` in addition to all that are left out already."""
        vars(self).update(vars(replace(earlier, skips=[*self.skips, skip])))
