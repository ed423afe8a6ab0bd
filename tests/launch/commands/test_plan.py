"""What a plan says, and that a run is set beside it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trifold.launch.commands.plan import Machine, compare_to_measured, plan, predict, rate_of
from trifold.launch.recipe.reader import resolve
from trifold.launch.recipe.schema import PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.pretrain.engine.memory_estimate import RankMemory
from trifold.pretrain.storage.jsonl import append_line

GIVEN = Machine(
    4,
    "cpu",
    memory=2**34,
    tokens_per_second=1000.0,
    write_bytes_per_second=1e6,
    price_per_hour=2.0,
    hours_per_failure=100.0,
)


@pytest.fixture
def recipe(tmp_path: Path) -> PretrainRecipe:
    return resolve(
        "configs/demo/decoder.yaml", [f"run={tmp_path}", "micro_rows=4", "step_rows=64", "steps=1000"]
    )


def test_seconds_price_and_failures_follow_from_the_rate(recipe: PretrainRecipe) -> None:
    found = predict(recipe, GIVEN)
    assert found["step_seconds"] == 64 * recipe.data.row_length / 4000
    assert found["micros_of_a_rank"] == 4
    assert found["checkpoint_seconds"] == found["checkpoint_bytes"] / 4e6
    assert found["run_hours"] == pytest.approx(
        1000 * found["step_seconds"] / 3600 * (1 + found["lost_share"])
    )
    assert found["run_price"] == pytest.approx(found["run_hours"] * 4 * 2.0)
    assert found["hours_between_failures"] == 25.0
    assert found["lost_share_at_best"] <= found["lost_share"]


def test_ranks_that_share_rows_hold_less_take_half_as_long_for_a_micro_and_send_each_other_heads(
    recipe: PretrainRecipe,
) -> None:
    shared = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"sequence_parallel": 2})})
    alone, found = predict(recipe, GIVEN), predict(shared, GIVEN)
    assert (
        found["step_seconds"] == alone["step_seconds"]
        and found["micros_of_a_rank"] == 2 * alone["micros_of_a_rank"]
    )
    assert (
        found["memory_activations_bytes"] < 0.75 * alone["memory_activations_bytes"]
    )  # masks of packed rows stay whole on the CPU
    assert (
        found["memory_weights_bytes"] == alone["memory_weights_bytes"]
        and found["checkpoint_bytes"] == alone["checkpoint_bytes"]
    )
    model = recipe.model
    assert isinstance(model, ModelConfig)
    positions = (
        recipe.micro_rows * recipe.data.row_length / 2
    )  # of a rank in a micro; half of what they are in four heads stays there
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim  # queries, keys, values, results
    sent = found["sent_bytes_of_a_rank_and_step"] - alone["sent_bytes_of_a_rank_and_step"]
    assert sent == found["micros_of_a_rank"] * 2 * model.num_layers * 4 * positions * heads / 2


def test_a_recipe_that_does_not_fit_is_told_what_does(recipe: PretrainRecipe, tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said:
        found = plan(recipe, replace(GIVEN, memory=30 * 2**20), Terminal(file=said, width=200))
    assert found["memory_peak_bytes"] > 30 * 2**20 and 0 < found["largest_micro_rows"] < 4
    assert f"micro_rows to {found['largest_micro_rows']} at most" in (tmp_path / "said").read_text()


def test_a_plan_says_whether_blocks_are_recomputed(recipe: PretrainRecipe, tmp_path: Path) -> None:
    auto = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"recompute": "auto"})})
    with (tmp_path / "said").open("w") as said:
        ample, tight = (
            plan(auto, replace(GIVEN, memory=memory), Terminal(file=said, width=200))
            for memory in (2**34, 30 * 2**20)
        )
    assert (ample["recompute"], tight["recompute"]) == (False, True)
    assert tight["memory_activations_bytes"] < ample["memory_activations_bytes"]
    assert [line.split()[-2] for line in (tmp_path / "said").read_text().splitlines() if "recompute" in line][
        :2
    ] == ["no", "yes"]


def test_what_a_process_holds_besides_is_not_known_from_a_rate_and_none_of_it_is_a_gpus(
    recipe: PretrainRecipe, tmp_path: Path
) -> None:
    with (tmp_path / "said").open("w") as said:
        found = plan(recipe, GIVEN, Terminal(file=said, width=200))
    assert found["memory_process_bytes"] is None
    assert found["memory_peak_bytes"] == sum(found[f"memory_{part}_bytes"] for part in RankMemory._fields)
    [line] = [line for line in (tmp_path / "said").read_text().splitlines() if "memory: process" in line]
    assert "not known without steps here" in line
    assert predict(recipe, replace(GIVEN, device="cuda"))["memory_process_bytes"] == 0


def test_fp8_is_planned_for_a_gpu_alone(recipe: PretrainRecipe) -> None:
    fp8 = recipe.model_copy(
        update={"engine": recipe.engine.model_copy(update={"fp8": True, "precision": "bf16"})}
    )
    with pytest.raises(UserError, match="on the CPU"):
        predict(fp8, GIVEN)
    assert predict(fp8, replace(GIVEN, device="cuda"))["step_seconds"] > 0


def test_a_rate_cannot_be_measured_on_a_device_that_is_not_here(recipe: PretrainRecipe) -> None:
    with pytest.raises(UserError, match="--tokens-per-second"):
        predict(recipe, replace(GIVEN, device="cuda", tokens_per_second=None))


def test_a_run_is_set_beside_its_plan_and_gives_its_rate_to_the_next(
    recipe: PretrainRecipe, tmp_path: Path
) -> None:
    assert compare_to_measured(recipe) is None
    with (tmp_path / "said").open("w") as said:
        plan(recipe, GIVEN, Terminal(file=said))
    append_line(tmp_path / "events.jsonl", {"event": "started", "world": 2})
    for step, seconds in enumerate((9.0, 2.0, 2.0), start=1):
        append_line(
            tmp_path / "metrics.jsonl",
            {"step": step, "seconds": seconds, "tokens_per_s": 4096 / seconds, "peak_bytes": 2**25},
        )
    append_line(tmp_path / "events.jsonl", {"event": "save_committed", "bytes": 1000, "seconds": 0.5})
    table = compare_to_measured(recipe)
    assert table is not None and table.row_count == 4
    written = json.loads((tmp_path / "plan.json").read_text())
    assert (
        written["measured"]["step_seconds"] == 2.0
        and written["step_seconds"] == 64 * recipe.data.row_length / 4000
    )
    assert rate_of(tmp_path) == 1024.0
