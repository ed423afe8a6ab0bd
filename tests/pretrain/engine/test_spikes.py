"""A poisoned row under each policy, in real runs of one and two ranks; limits and skips, by numbers."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import trifold.finetune.run
from tests.finetune import small_tasks
from tests.finetune.small_tasks import folder_of, write_tags
from tests.processes import run_processes
from tests.recipes import recipe
from tests.training import losses, quiet
from trifold.modeling.errors import UserError
from trifold.modeling.transformer import Transformer
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.state import CheckpointState
from trifold.pretrain.config import training
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.config.training import SpikesConfig, TrainingConfig
from trifold.pretrain.data.loader import Loader, StepRows
from trifold.pretrain.data.row_order import row_at_cursor
from trifold.pretrain.data.stages import locate_step, resolve_stages
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.spikes import (
    UNLIMITED,
    StepLimits,
    consecutive_skips,
    limit_exceeded,
    step_limits,
)
from trifold.pretrain.progress import Progress
from trifold.pretrain.run import prepare, train
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.jsonl import read_lines

POISON = 3  # a token that fills the rows of a poisoned step; the model's loss on them is made huge
RULE: dict[str, Any] = {"loss": 3.0, "window": 3}


def spoil(rows: set[int]) -> None:
    """From here on the steps of this process that read these rows are poisoned."""
    share, forward = Loader.share, Transformer.forward

    def spoilt(self: Loader, step: int) -> StepRows:
        loaded = share(self, step)
        if any(loaded.first <= row <= loaded.last for row in rows):
            for micro in loaded.micros:
                micro.tokens[:] = POISON
        return loaded

    def huge(self: Transformer, batch: Any) -> Any:
        losses = forward(self, batch)
        trains = losses.correct is None
        return (
            losses._replace(total=1000 * losses.total)
            if trains and (batch.tokens == POISON).all()
            else losses
        )

    Loader.share, Transformer.forward = spoilt, huge


def poisoned(
    rank_info: RankInfo, configs: list[Any], rows: set[int], fatal: PretrainConfig | None = None
) -> list[str]:
    """Train one after another; the UserError of each, or "". In `fatal` the last rank is killed when it rolls
    back.
    """
    spoil(rows)
    messages = []
    for config in configs:
        if config == fatal and rank_info.rank == rank_info.world - 1:
            Progress.rewind = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        try:
            (train if isinstance(config, PretrainConfig) else trifold.finetune.run.train)(config, rank_info)
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def prepared(folder: Path, run: str, every: int = 4, limit: int = 3, **rule: Any) -> PretrainConfig:
    config = recipe(
        folder,
        run,
        steps=9,
        checkpoints=training.CheckpointConfig(every=every),
        spikes=SpikesConfig(**RULE | rule),
        nonfinite_limit=limit,
    )
    prepare(config, 1, quiet)
    return config


def events(config: TrainingConfig) -> list[dict[str, Any]]:
    return [
        event
        for event in read_lines(Path(config.run) / "events.jsonl")
        if event["event"] in ("bad_step", "resumed", "finished")
    ]


def newest(config: TrainingConfig) -> CheckpointState:
    checkpoint = newest_verified(DiskPath(Path(config.run)), lambda event, **facts: None)
    assert checkpoint is not None
    return checkpoint.state


def rows_read(config: TrainingConfig) -> list[list[int]]:
    """Of the last line of each step."""
    return list(
        {r["step"]: r["rows"] for r in read_lines(Path(config.run) / "metrics.jsonl") if "loss" in r}.values()
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_poisoned_row_is_skipped_rolled_back_or_stops_the_run(world: int, tmp_path: Path) -> None:
    skip, rollback, stop = (
        prepared(tmp_path, policy, policy=policy) for policy in ("skip", "rollback", "stop")
    )
    early = prepared(tmp_path, "early", every=100, policy="rollback")  # no checkpoint to go back to
    never = prepared(tmp_path, "never", limit=2, policy="rollback")
    messages = run_processes(world, poisoned, [skip, rollback, stop, early, never], {31, 38})[
        0
    ]  # of the step after, too

    assert rows_read(skip) == [[6 * i, 6 * i + 5] for i in range(9)]
    assert [(e["event"], e["step"]) for e in events(skip)] == [
        ("bad_step", 6),
        ("bad_step", 7),
        ("finished", 9),
    ]
    assert (
        newest(skip).optimizer_step == 7 and newest(skip).skips == [] and newest(skip).skipped_in_a_row == 0
    )

    expected = [[6 * i, 6 * i + 5] for i in (0, 1, 2, 3, 4, 7, 8, 9, 10)]
    for config, back in ((rollback, [("resumed", 4)]), (early, [])):
        assert rows_read(config) == expected
        assert (
            newest(config).skips == [(30, 35), (36, 41)]
            and newest(config).cursor == 54
            and newest(config).optimizer_step == 9
        )
        assert [(e["event"], e["step"]) for e in events(config)] == [
            *(2 * [("bad_step", 6), *back]),
            ("finished", 9),
        ]
        assert [e["rows"] for e in events(config) if e["event"] == "bad_step"] == [[30, 35], [36, 41]]
    assert losses(rollback.run) == losses(early.run)  # going back changes no bit

    assert (
        messages[2].startswith("step 6 (rows 30 to 35) was not applied: its loss ")
        and "spikes.policy is stop" in messages[2]
    )
    assert newest(stop).step == 4
    assert (
        "step 6 (rows 36 to 41)" in messages[4]
        and "bad step number 2 in a row (nonfinite_limit is 2)" in messages[4]
    )
    assert [bool(text) for text in messages] == [False, False, True, False, True]


def test_a_run_killed_while_it_goes_back_takes_the_same_decisions_bit_for_bit(tmp_path: Path) -> None:
    straight, broken = (prepared(tmp_path, run, policy="rollback") for run in ("straight", "broken"))
    with pytest.raises(AssertionError, match=r"ended without a result|onnection"):
        run_processes(2, poisoned, [straight, broken], {31}, broken)
    assert [e["event"] for e in events(broken)] == ["bad_step", "resumed"]
    run_processes(2, poisoned, [broken], {31})
    assert losses(straight.run) == losses(broken.run) and newest(straight).skips == newest(broken).skips == [
        (30, 35)
    ]
    assert newest(straight).recent == newest(broken).recent


def test_a_fine_tune_rolls_back_as_pretraining_does(tmp_path: Path) -> None:
    write_tags(tmp_path / "train.conll", 300, seed=1)
    write_tags(tmp_path / "dev.conll", 20, seed=2)
    task = {"kind": "ner", "train": [str(tmp_path / "train.conll")], "dev": [str(tmp_path / "dev.conll")]}
    rule, every = (
        {"spikes": RULE | {"policy": "rollback"}, "steps": 8},
        {"evaluate_every": 4, "checkpoints": {"every": 4}},
    )
    config = small_tasks.recipe(tmp_path / "run", folder_of(tmp_path, "encoder"), task, **rule, **every)
    trifold.finetune.run.prepare(config, quiet)
    assert run_processes(1, poisoned, [config], {31})[0] == [""]
    assert [(e["event"], e["step"]) for e in events(config)] == [
        ("bad_step", 6),
        ("resumed", 4),
        ("finished", 8),
    ]
    assert rows_read(config) == [[6 * i, 6 * i + 5] for i in (0, 1, 2, 3, 4, 6, 7, 8)]
    state = newest(config).task
    assert (
        state is not None
        and newest(config).skips == [(30, 35)]
        and [step for step, _ in state.history]
        == [
            0,
            4,
            8,
        ]
    )


def test_the_limits_are_so_many_times_the_medians_of_the_last_applied_steps() -> None:
    rule = SpikesConfig(loss=2.0, grad_norm=10.0, window=3)
    recent = [(4.0, 1.0), (2.0, 9.0), (3.0, 0.5)]
    assert step_limits(rule, recent) == StepLimits(6.0, 10.0)
    assert step_limits(rule, recent[1:]) == step_limits(SpikesConfig(window=3), recent) == UNLIMITED
    assert step_limits(SpikesConfig(grad_norm=10.0, window=3), recent) == StepLimits(math.inf, 10.0)
    assert limit_exceeded(7.0, 1.0, StepLimits(6.0, 10.0)) == "its loss 7 exceeds 6"
    assert limit_exceeded(5.0, 11.0, StepLimits(6.0, 10.0)) == "its gradient norm 11 exceeds 10"
    assert limit_exceeded(math.nan, 1.0, UNLIMITED) == "its loss is not finite"
    assert limit_exceeded(5.0, math.inf, UNLIMITED) == "its gradient norm is not finite"


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), max_size=3),
    st.dictionaries(st.integers(0, 19), st.integers(1, 3), max_size=6),
)
def test_steps_and_rows_stay_a_closed_form_however_often_a_step_is_bad(
    stages: list[tuple[int, int]], bad: dict[int, int]
) -> None:
    plan = resolve_stages(recipe_of(stages))
    skips: list[tuple[int, int]] = []

    def rows_of(step: int) -> list[int]:
        part, cursor, _ = locate_step(plan, step)
        return [row_at_cursor(cursor + offset, skips) for offset in range(part.step_rows)]

    read = []
    for step in range(20):
        for times in range(bad.get(step, 0)):
            assert consecutive_skips(skips, rows_of(step)[0]) == times
            skips.append((rows_of(step)[0], rows_of(step)[-1]))
        read.append(rows_of(step))
    assert [rows_of(step) for step in range(20)] == read  # a replay, from the list alone
    left_out = [row for first, last in skips for row in range(first, last + 1)]
    assert sorted([*left_out, *(row for rows in read for row in rows)]) == list(range(read[-1][-1] + 1))


def recipe_of(stages: list[tuple[int, int]]) -> PretrainConfig:
    model: Any = {
        "family": "decoder",
        "vocab_size": 10,
        "dim": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    return PretrainConfig.model_validate(
        {
            "run": "unused",
            "model": model | {"mlp_dim": 8, "max_positions": 8},
            "data": {"sources": ({"path": "unused"},), "heldout_fraction": 0.1, "row_length": 8},
            "objective": {"kind": "causal"},
            "optimizer": {"lr": 1e-3},
            "stages": tuple({"steps": steps, "step_rows": rows, "micro_rows": 1} for steps, rows in stages),
            "steps": 20,
            "step_rows": 4,
            "micro_rows": 2,
        }
    )
