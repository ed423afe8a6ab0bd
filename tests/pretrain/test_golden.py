"""Golden losses: the first 20 steps of a tiny recipe of each family, so that a refactor which changes the numbers cannot pass unseen.

Recorded on torch 2.13, one rank, fp32, dropout off. Other releases of torch, and other processors, round and sum in another order:
hence the tolerances. Where other numbers are wanted, record them anew: `python -m pytest tests/pretrain/test_golden.py -s` prints them.
"""

from pathlib import Path

import pytest
import torch

from tests.pretrain.test_run import OBJECTIVES, losses, prepare, quiet, recipe, trained
from tests.processes import run_processes

GOLDEN: dict[str, list[float]] = {
    "decoder": [
        5.995918, 5.862069, 5.668517, 5.531671, 5.414524, 5.287953, 5.173813, 5.093276, 4.972991, 4.885169,
        4.810208, 4.745153, 4.680003, 4.649418, 4.610147, 4.581639, 4.551895, 4.552668, 4.530934, 4.506278,
    ],
    "encoder": [
        5.941907, 5.831774, 5.713660, 5.569084, 5.489797, 5.406398, 5.238475, 5.160181, 5.078658, 4.982469,
        4.877701, 4.862676, 4.780650, 4.764109, 4.668584, 4.679520, 4.665475, 4.685933, 4.652283, 4.602804,
    ],
    "encoder-decoder": [
        6.014825, 5.869899, 5.692778, 5.550459, 5.427753, 5.345898, 5.200243, 5.102822, 5.017198, 4.910528,
        4.847330, 4.773687, 4.737324, 4.660832, 4.645507, 4.614429, 4.562529, 4.550778, 4.572805, 4.544259,
    ],
}  # fmt: skip
TOLERANCE = 1e-5 if torch.__version__.startswith("2.13") else 1e-4  # relative


@pytest.mark.parametrize("family", OBJECTIVES)
def test_the_first_losses_of_a_tiny_recipe_are_the_recorded_ones(family: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, "golden", family, steps=20)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    prepare(config, 1, quiet)
    run_processes(1, trained, config)
    found = [loss for loss, _ in losses(config.run).values()]
    print(family, [round(loss, 6) for loss in found])
    assert found == pytest.approx(GOLDEN[family], rel=TOLERANCE)
