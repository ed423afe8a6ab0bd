"""A run folder keeps its recipe: what may change on it is a table, everything else is refused key by key."""

import json
from pathlib import Path

import pytest

from trifold.launch.recipe.changes import reconcile_run_folder
from trifold.launch.recipe.reader import resolve, write
from trifold.launch.recipe.schema import FinetuneRecipe, PretrainRecipe
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.format import COMMIT, Marker, Origin
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.config.flatten import flatten
from trifold.pretrain.config_changes import SAFE, differences
from trifold.pretrain.storage.jsonl import append_line

BASE = {
    "run": "runs/x",
    "model": {
        "family": "decoder",
        "vocab_size": 512,
        "dim": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
    }
    | {"head_dim": 16, "mlp_dim": 64, "max_positions": 128},
    "data": {"sources": [{"path": "a.txt"}], "heldout_fraction": 0.1, "row_length": 128},
    "objective": {"kind": "causal"},
    "optimizer": {"lr": 0.001},
    "schedule": {"kind": "wsd", "warmup_steps": 2, "decay_steps": 5},
    "steps": 20,
    "step_rows": 4,
    "micro_rows": 2,
}


def recipe(**changed: object) -> PretrainRecipe:
    values = json.loads(json.dumps(BASE))
    for key, value in changed.items():
        *parents, last = key.split("__")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return PretrainRecipe.model_validate_json(json.dumps(values))


def verdict(step: int = 10, old: PretrainRecipe | None = None, **changed: object) -> bool:
    [change] = differences(old or recipe(), recipe(**changed), step)
    return change.safe


def test_what_decides_rows_model_or_steps_so_far_is_unsafe():
    assert not verdict(seed=1)
    assert not verdict(step_rows=8)
    assert not verdict(model__dim=48)
    assert not verdict(data__row_length=64)
    assert not verdict(data__heldout_fraction=0.2)
    assert not verdict(optimizer__lr=0.002)
    assert not verdict(optimizer__kind="muon")


def test_where_and_how_it_runs_is_safe():
    assert verdict(cluster__workers=7)
    assert verdict(engine__zero_stage=3)
    assert verdict(checkpoints__every=3)
    assert verdict(evaluate_every=3)
    assert verdict(run="elsewhere")


def test_micro_rows_are_safe_only_without_dropout():
    assert verdict(micro_rows=4)
    old = recipe(model__dropout=0.1)
    assert not verdict(old=old, model__dropout=0.1, micro_rows=4)


def test_stages_are_safe_while_every_step_so_far_read_the_same_rows():
    stages = [{"steps": 10, "step_rows": 2, "micro_rows": 1}]
    staged, short = recipe(stages=stages), recipe(data__row_length=64)
    longer = [{"steps": 10, "row_length": 64}], [{"steps": 9, "row_length": 64}]
    for old, new, safe_until in (
        (short, recipe(stages=longer[0]), 10),  # short rows until then, as they were
        (short, recipe(stages=longer[1]), 9),
        (staged, recipe(stages=stages, step_rows=6), 10),
        (staged, recipe(), 0),
    ):
        for step in (9, 10, 11):
            assert all(change.safe for change in differences(old, new, step)) == (step <= safe_until), (
                new.stages,
                step,
            )
    other_micros = [stages[0] | {"micro_rows": 2}]
    assert verdict(old=staged, stages=other_micros)
    assert not verdict(old=recipe(model__dropout=0.1, stages=stages), model__dropout=0.1, stages=other_micros)


def test_an_average_beside_the_weights_may_begin_and_end_at_any_step():
    assert verdict(ema=0.99)


def test_steps_are_safe_while_no_used_rate_would_have_been_another():
    assert verdict(step=10, steps=40)  # wsd, before its decay
    assert not verdict(step=18, steps=40)  # within it
    cosine = recipe(schedule__kind="cosine", schedule__decay_steps=0)
    assert not verdict(step=10, old=cosine, schedule__kind="cosine", schedule__decay_steps=0, steps=40)


def test_before_the_first_step_everything_is_safe():
    assert verdict(step=0, seed=3)
    assert verdict(step=0, model__vocab_size=300)
    assert not verdict(step=1, model__vocab_size=300)


def test_sources_added_or_lost_are_unsafe():
    [*changes] = differences(recipe(), recipe(data__sources=[{"path": "a.txt"}, {"path": "b.txt"}]), 10)
    assert changes and not all(change.safe for change in changes)


def test_every_line_of_the_table_names_a_key_that_exists(monkeypatch):
    from fnmatch import fnmatch

    keys = flatten(
        recipe(data__heldout=[{"path": "h.txt"}], data__heldout_fraction=0.0).model_dump(mode="json")
    )
    monkeypatch.setenv("TRIFOLD_DATA", "/data")
    keys |= flatten(resolve("configs/finetune/wnut17.yaml", kind=FinetuneRecipe).model_dump(mode="json"))
    for pattern in SAFE:
        assert any(fnmatch(key, pattern) for key in keys), pattern


def test_an_existing_folder_refuses_each_unsafe_key_and_keeps_its_recipe(tmp_path):
    run = str(tmp_path / "run")
    reconcile_run_folder(recipe(run=run))
    assert reconcile_run_folder(recipe(run=run, seed=7)) == []  # nothing was made yet
    reconcile_run_folder(recipe(run=run))
    (tmp_path / "run" / "tokenizer").mkdir()
    append_line(tmp_path / "run" / "metrics.jsonl", {"step": 3})
    with pytest.raises(UserError) as refusal:
        reconcile_run_folder(recipe(run=run, seed=5, step_rows=8, cluster__workers=4))
    assert "seed: 0 there, 5 here" in str(refusal.value) and "step_rows: 4 there, 8 here" in str(
        refusal.value
    )
    assert "cluster" not in str(refusal.value)
    assert resolve(tmp_path / "run" / "config.yaml").seed == 0
    assert [change.key for change in reconcile_run_folder(recipe(run=run, cluster__workers=4))] == [
        "cluster.workers"
    ]
    assert resolve(tmp_path / "run" / "config.yaml").cluster.workers == 4


def test_a_folder_that_was_only_prepared_here_is_compared_with_the_checkpoint_that_was_trained_elsewhere(
    tmp_path,
):
    there = {"run": str(tmp_path / "run"), "checkpoints__storage": str(tmp_path / "store")}
    reconcile_run_folder(recipe(**there))
    (tmp_path / "run" / "tokenizer").mkdir()
    assert [change.key for change in reconcile_run_folder(recipe(**there, seed=7))] == [
        "seed"
    ]  # nothing is trained anywhere
    checkpoint = tmp_path / "store" / "run" / "checkpoints" / "step-00000010-g0001"
    checkpoint.mkdir(parents=True)
    (checkpoint / COMMIT).write_bytes(marker_of(recipe(**there), 10))
    with pytest.raises(UserError, match="seed: 0 there, 7 here"):
        reconcile_run_folder(recipe(**there, seed=7))


def save_checkpoint(config: PretrainRecipe, step: int) -> None:
    """A marker as a checkpoint of this recipe has it."""
    folder = Path(config.run) / "checkpoints" / f"step-{step:08d}-g0001"
    folder.mkdir(parents=True)
    (folder / COMMIT).write_bytes(marker_of(config, step))


def marker_of(config: PretrainRecipe, step: int) -> bytes:
    values = config.model_dump(mode="json")
    state = CheckpointState(step, step, step, [], "rows", values, values["model"])
    return Marker("run", 1, 1, Origin("host", {}, None), "time", state, {}).render()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", 7, "seed: 0 there, 7 here"),
        ("optimizer__lr", 0.01, "optimizer.lr: 0.001 there, 0.01 here"),
        ("optimizer__weight_decay", 0.0, "optimizer.weight_decay: 0.1 there, 0.0 here"),
        ("optimizer__clip", 0.5, "optimizer.clip: 1.0 there, 0.5 here"),
        ("model__dropout", 0.1, "model.dropout: 0.0 there, 0.1 here"),
        ("schedule__warmup_steps", 4, "schedule.warmup_steps: 2 there, 4 here"),
        ("schedule__kind", "inverse_sqrt", "schedule.kind: 'wsd' there, 'inverse_sqrt' here"),
        ("steps", 9, "has done 10 steps, and `steps` is 9: raise it to 10 or more"),
    ],
)
def test_a_config_yaml_that_was_edited_is_compared_with_the_checkpoint(key, value, message, tmp_path):
    trained = recipe(run=str(tmp_path), schedule__decay_steps=0)
    reconcile_run_folder(trained)
    save_checkpoint(trained, 10)
    edited = recipe(run=str(tmp_path), schedule__decay_steps=0, **{key: value})
    write(edited, tmp_path / "config.yaml")
    with pytest.raises(UserError) as error:
        reconcile_run_folder(resolve(tmp_path / "config.yaml"))
    assert message in str(error.value)


def test_safe_edits_of_config_yaml_are_reported_key_by_key(tmp_path):
    trained = recipe(run=str(tmp_path))
    reconcile_run_folder(trained)
    save_checkpoint(trained, 10)
    write(recipe(run=str(tmp_path), cluster__workers=4, ema=0.9), tmp_path / "config.yaml")
    changes = reconcile_run_folder(resolve(tmp_path / "config.yaml"))
    assert {change.key: (change.old, change.new) for change in changes} == {
        "cluster.workers": (1, 4),
        "ema": (0.0, 0.9),
    }
