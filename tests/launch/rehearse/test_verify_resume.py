"""`trifold verify-resume`: passes on recipes of every kind, and catches a continuation that is not exact."""

import math
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

import trifold.pretrain.run
from tests.finetune.small_tasks import folder_of, write_tags
from trifold.launch.demo.world import write_world
from trifold.launch.recipe.reader import resolve_any
from trifold.launch.rehearse import verify_resume
from trifold.launch.rehearse.verify_resume import WINDOW, Leg, differences, draw_legs
from trifold.launch.terminal import Terminal
from trifold.modeling.errors import UserError
from trifold.pretrain.data.loader import Loader
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.storage.jsonl import append_line

OBJECTIVES = {"decoder": "causal", "encoder": "masked", "encoder-decoder": "spans"}


def tiny(folder: Path, family: str = "decoder") -> str:
    """A recipe with dropout on the generated small world."""
    write_world(folder / "world", train=300, heldout=40)
    shape = {
        "vocab_size": 500,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "mlp_dim": 48,
    }
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": shape | {"family": family, "max_positions": 64, "dropout": 0.1},
        "data": {
            "sources": [{"path": f"{folder}/world/train.txt"}],
            "heldout": [{"path": f"{folder}/world/heldout.txt"}],
            "row_length": 64,
        },
        "objective": {"kind": OBJECTIVES[family]},
        "optimizer": {"lr": 1e-3},
        "steps": 4000,
        "step_rows": 6,
        "micro_rows": 2,
        "evaluate_rows": 16,
        "cluster": {"threads_per_worker": 1},
    }
    return written(folder, values)


def tiny_tags(folder: Path) -> str:
    """A fine-tuning recipe: an encoder with new weights learns tags."""
    write_tags(folder / "train.conll", 100, seed=1)
    write_tags(folder / "dev.conll", 20, seed=2)
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": {"from": str(folder_of(folder, "encoder")), "dropout": 0.1},
        "task": {"kind": "ner", "train": [f"{folder}/train.conll"], "dev": [f"{folder}/dev.conll"]},
        "row_length": 64,
        "optimizer": {"lr": 1e-3},
        "steps": 400,
        "step_rows": 6,
        "micro_rows": 2,
        "cluster": {"threads_per_worker": 1},
    }
    return written(folder, values)


def written(folder: Path, values: dict[str, Any]) -> str:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "tiny.yaml")


def verify(config: str, kills: int) -> str:
    """What is printed, the refusal last."""
    console = Terminal(width=140, file=StringIO(), record=True)
    try:
        verify_resume.verify_resume(config, [], kills, 0, console)
    except UserError as refusal:
        console.print(f"REFUSED: {refusal}", markup=False, soft_wrap=True)
    said = console.export_text()
    print(said)
    return said


def other_cursor(recipe: Any, place: RankInfo) -> None:
    """Training whose continuation reads each step's rows one row late."""
    make = Loader.__init__

    def late(self: Loader, *parts: Any, start: int, skips: Any, **facts: Any) -> None:
        make(self, *parts, start=start, skips=[(0, 0)] if start else skips, **facts)

    Loader.__init__ = late
    trifold.pretrain.run.train(recipe, place)


def test_a_continuation_with_another_cursor_is_caught(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(verify_resume.TRAIN, "pretrain", other_cursor)
    said = verify(tiny(tmp_path), kills=1)
    assert (
        "same: other rows at steps" in said and "moved: the same rows, losses differ by up to 0.0e+00" in said
    )
    assert "run does not resume exactly: see the differences of same;" in said


@pytest.mark.proof
@pytest.mark.parametrize("kind", [*OBJECTIVES, "tags"])
def test_ten_kills_at_random_moments_leave_the_same_run(kind: str, tmp_path: Path) -> None:
    said = verify(tiny_tags(tmp_path) if kind == "tags" else tiny(tmp_path, kind), kills=10)
    assert "REFUSED" not in said and "had ended" not in said
    assert "same: the same rows, losses differ by up to 0.0e+00" in said and "moved: the same rows" in said


def test_kills_are_drawn_from_the_seed_each_in_its_own_window_and_moves_always_move(tmp_path: Path) -> None:
    recipe = resolve_any(tiny(tmp_path), ["cluster.workers=3"])
    legs = draw_legs(recipe, 21, seed=5)
    assert legs == draw_legs(recipe, 21, seed=5) != draw_legs(recipe, 21, seed=6)
    assert legs[0] == Leg("straight", 3, 1) and sum(leg.moment is not None for leg in legs) == 21
    for run, kills in (("same", 11), ("moved", 10)):
        mine = [leg for leg in legs if leg.run == run]
        assert len(mine) == kills + 1 and mine[-1].moment is None
        assert [(leg.step - 1) // WINDOW for leg in mine[:-1]] == list(range(kills))
        assert all(0 <= leg.rank < leg.workers for leg in mine)
        places = [(leg.workers, leg.stage) for leg in mine]
        assert set(places) == {(3, 1)} if run == "same" else all(a != b for a, b in pairwise(places))
    assert {leg.moment for leg in legs} == {"step", "save", "evaluation", None}
    shared = resolve_any(
        tiny(tmp_path),
        ["cluster.workers=4", "engine.sequence_parallel=2", "model.num_kv_heads=2", "model.num_heads=2"],
    )
    assert {leg.workers for leg in draw_legs(shared, 21, seed=5)} == {2, 4}


def test_one_bit_of_a_loss_one_row_or_a_missing_step_is_a_difference(tmp_path: Path) -> None:
    def told(run: str, *losses: float, rows: str = "aa") -> Path:
        for step, loss in enumerate(losses, start=1):
            append_line(
                tmp_path / run / "metrics.jsonl", {"step": step, "loss": 9.0, "rows_hash": "ff"}
            )  # of an attempt before
            append_line(tmp_path / run / "metrics.jsonl", {"step": step, "loss": loss, "rows_hash": rows})
            append_line(tmp_path / run / "metrics.jsonl", {"step": step, "heldout_loss": 2.0})
        return tmp_path / run

    straight = told("straight", 4.0, 1.9)
    assert differences(straight, told("equal", 4.0, 1.9)) == ([], 0.0)
    rows, largest = differences(straight, told("bit", 4.0, math.nextafter(1.9, 2)))
    assert rows == [] and 0 < largest < 1e-15
    assert differences(straight, told("rows", 4.0, 1.9, rows="ab")).rows == [1, 2]
    assert differences(straight, told("short", 4.0)) == ([2], math.inf)
    assert differences(straight, told("nan", 4.0, math.nan)).largest == math.inf
