"""Golden losses: the first 20 steps of a tiny recipe of each family, so that a refactor which changes the
numbers cannot pass unseen.

Recorded on torch 2.13, one rank, fp32, dropout off. Other releases of torch, and other processors, round and
sum in another order: hence the tolerances. Where other numbers are wanted, record them anew: `python -m
pytest tests/pretrain/test_golden.py -s` prints them.
"""

from pathlib import Path

import pytest
import torch

from tests.processes import run_processes
from tests.recipes import OBJECTIVES, recipe
from tests.training import losses, quiet, train_run
from trifold.pretrain.run import prepare

GOLDEN: dict[str, list[float]] = {
    "decoder": [
        5.995918, 5.862069, 5.668517, 5.531671, 5.414524, 5.287953, 5.173813, 5.093276, 4.972991, 4.885169,
        4.810208, 4.745153, 4.680003, 4.649418, 4.610147, 4.581639, 4.551895, 4.552668, 4.530934, 4.506278,
    ],
    "encoder": [
        5.919499, 5.796938, 5.688914, 5.564994, 5.479064, 5.397810, 5.241041, 5.158262, 5.057335, 4.970749,
        4.893195, 4.845815, 4.719859, 4.726091, 4.709879, 4.644495, 4.638443, 4.629586, 4.666256, 4.573019,
    ],
    "encoder-decoder": [
        5.996319, 5.868995, 5.681336, 5.562821, 5.403659, 5.310952, 5.188928, 5.090611, 4.982353, 4.901736,
        4.835785, 4.770815, 4.711369, 4.668436, 4.639759, 4.604807, 4.524347, 4.532198, 4.564216, 4.539197,
    ],
}  # fmt: skip
TOLERANCE = 1e-5 if torch.__version__.startswith("2.13") else 1e-4  # relative


@pytest.mark.parametrize("family", OBJECTIVES)
def test_the_first_losses_of_a_tiny_recipe_are_the_recorded_ones(family: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, "golden", family, steps=20)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    prepare(config, 1, quiet)
    run_processes(1, train_run, config)
    found = [loss for loss, _ in losses(config.run).values()]
    print(family, [round(loss, 6) for loss in found])
    assert found == pytest.approx(GOLDEN[family], rel=TOLERANCE)
