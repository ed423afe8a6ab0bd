"""Which checkpoint of a fine-tuning run is the best."""

from types import SimpleNamespace
from typing import Any

import pytest

from trifold.finetune.evaluation import model_selection
from trifold.finetune.evaluation.model_selection import best_step


@pytest.mark.parametrize(
    ("checkpoints", "best"),
    [
        ([(1, -50.0, 3.0), (2, -60.0, 4.0), (3, -55.0, 1.0)], 2),
        ([(1, 0.0, 3.0), (2, 0.0, 2.0), (3, 0.0, 2.5)], 2),  # a score of 0 everywhere
        ([(1, -60.0, 2.0), (2, -60.0, 2.0)], 1),
        ([(1, -60.0, None), (2, -60.0, 2.0)], 2),
        ([(1, None, 1.0)], None),
    ],
)
def test_equal_scores_are_decided_by_the_lower_heldout_loss_then_the_earlier_step(
    checkpoints: list[tuple[int, Any, Any]], best: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [
        SimpleNamespace(step=step, selection_loss=score, heldout_loss=loss)
        for step, score, loss in checkpoints
    ]
    markers = [SimpleNamespace(state=state) for state in states]
    monkeypatch.setattr(model_selection, "intact_markers", lambda root: markers)
    assert best_step(None) == best
