"""A run's promises, from text to checkpoints, in real processes: exact continuation, the same rows at any
world, clear refusals.
"""

import errno
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_processes
from tests.recipes import OBJECTIVES, model_config, recipe, write_corpus
from tests.training import losses, quiet, rejections, train_run, train_until, train_until_killed
from trifold.modeling.errors import UserError
from trifold.modeling.flops import train_flops_per_row
from trifold.pretrain import session
from trifold.pretrain.checkpoint.checkpoint import newest_verified
from trifold.pretrain.checkpoint.format import COMMIT
from trifold.pretrain.config import pretraining as dials
from trifold.pretrain.config import training
from trifold.pretrain.config.objectives import ContinuationConfig, InfillingConfig, MixtureConfig
from trifold.pretrain.config.pretraining import PretrainConfig
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.engine.engine import Engine
from trifold.pretrain.run import make_tokenizer, open_rows, prepare, train
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.jsonl import append_line, read_lines
from trifold.pretrain.storage.storage import checkpoint_root
from trifold.pretrain.storage.storage_path import StorageOptions
from trifold.pretrain.train import micro_seed


@pytest.mark.parametrize("family", OBJECTIVES)
def test_a_run_killed_at_a_step_continues_bit_for_bit_with_dropout_on(family: str, tmp_path: Path) -> None:
    auto = training.EngineConfig(recompute="auto")
    straight, broken = (
        recipe(tmp_path, "straight", family, engine=auto),
        recipe(tmp_path, "broken", family, engine=auto),
    )
    for config in (straight, broken):
        prepare(config, 1, quiet)
    run_processes(2, train_run, straight)
    with pytest.raises(AssertionError, match=r"ended without a result|onnection"):
        run_processes(2, train_until_killed, broken, 6)
    assert len(losses(broken.run)) < 12
    run_processes(2, train_run, broken)
    assert losses(straight.run) == losses(broken.run)
    lines = read_lines(Path(broken.run) / "events.jsonl")
    assert [event["recompute"] for event in lines if event["event"] == "started"] == [
        False,
        False,
    ]  # memory suffices without
    events = [event["event"] for event in lines]
    assert events.count("started") == 2 and "resumed" in events and events[-1] == "finished"


def full_from(rank_info: RankInfo, config: PretrainConfig, step: int) -> str:
    """What the run says whose disk has no room for the checkpoint of `step` and later ones."""

    def operation(name: str, path: Path) -> None:
        if name == "write" and any(
            f"step-{later:08d}" in str(path) for later in range(step, config.steps + 1)
        ):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    options = StorageOptions(before_write=operation)
    session.checkpoint_root = lambda run, storage: checkpoint_root(run, storage).with_options(options)
    try:
        train(config, rank_info)
    except UserError as refusal:
        return str(refusal)
    return "trained to its end"


def test_a_full_disk_stops_the_run_at_that_save_and_the_checkpoint_before_stays(tmp_path: Path) -> None:
    config = recipe(tmp_path, "full", steps=400)
    prepare(config, 1, quiet)
    said = run_processes(1, full_from, config, 8)[0]
    assert re.search(
        r"step \d+ was trained but could not be saved: the disk of .* is full: this rank's part"
        r" needs \d+ bytes",
        said,
    )
    assert said.endswith("the checkpoint before stays. Fix this and rerun the same command.")
    assert len(losses(config.run)) < 400
    found = newest_verified(DiskPath(Path(config.run)), lambda *_, **__: None)
    assert found is not None and found.state.step == 4


def parts_of(run: str) -> dict[int, dict[str, float]]:
    """What each step's line says of the parts of a mixture, training and held out."""
    found: dict[int, dict[str, float]] = {}
    for record in read_lines(Path(run) / "metrics.jsonl"):
        told = {
            key: value
            for key, value in record.items()
            if key.startswith(("loss_", "targets_", "heldout_loss_", "heldout_targets_"))
        }
        found[record["step"]] = found.get(record["step"], {}) | told
    return found


def test_a_mixture_continues_bit_for_bit_and_its_parts_add_up_at_any_world(tmp_path: Path) -> None:
    mixture = MixtureConfig(
        parts=(
            dials.SpansConfig(),
            dials.SpansConfig(density=0.5, mode="X"),
            ContinuationConfig(mode="S"),
            InfillingConfig(),
        )
    )
    names = ("spans", "X", "S", "infilling")
    straight, broken, moved = (
        recipe(tmp_path, run, "encoder-decoder", objective=mixture, steps=4)
        for run in ("straight", "broken", "moved")
    )
    for config in (straight, broken, moved):
        prepare(config, 1, quiet)
    run_processes(2, _straight_and_in_legs, straight, broken, timeout=280)
    run_processes(1, train_run, moved.model_copy(update={"engine": training.EngineConfig(zero_stage=3)}))
    assert losses(straight.run) == losses(broken.run) and parts_of(straight.run) == parts_of(broken.run)
    for step, told in parts_of(straight.run).items():
        assert told == pytest.approx(parts_of(moved.run)[step], rel=1e-5)
    for record in read_lines(Path(straight.run) / "metrics.jsonl"):
        prefix = "heldout_" if "heldout_loss" in record else ""
        counts = [record[f"{prefix}targets_{name}"] for name in names]
        sums = [
            record.get(f"{prefix}loss_{name}", 0) * count for name, count in zip(names, counts, strict=True)
        ]
        assert sum(sums) / sum(counts) == pytest.approx(record[f"{prefix}loss"], rel=1e-5)
        assert not prefix or sum(counts) == record["heldout_targets"]
    assert min(counts) > 0


def _straight_and_in_legs(rank_info: RankInfo, straight: PretrainConfig, broken: PretrainConfig) -> None:
    train(straight, rank_info)
    _in_legs(rank_info, broken, (3, 4))


def test_other_world_sizes_and_zero_stages_see_the_same_rows_and_the_same_losses(tmp_path: Path) -> None:
    straight = recipe(tmp_path, "straight")
    prepare(straight, 1, quiet)
    run_processes(2, train_run, straight)
    moved = recipe(tmp_path, "moved")
    prepare(moved, 1, quiet)
    legs: list[tuple[int, int, Any]] = [(4, 2, 1), (8, 1, 3), (12, 3, 2)]
    for stop, world, stage in legs:
        leg = moved.model_copy(update={"engine": training.EngineConfig(zero_stage=stage)})
        run_processes(world, train_until, leg, stop)
    assert [rows for _, rows in losses(straight.run).values()] == [
        rows for _, rows in losses(moved.run).values()
    ]
    for step, (loss, _) in losses(straight.run).items():
        assert math.isclose(loss, losses(moved.run)[step][0], rel_tol=1e-5), step


def state_of(config: PretrainConfig) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint holds of weights, moments and averages."""
    checkpoint = newest_verified(DiskPath(Path(config.run)), lambda event, **facts: None)
    assert checkpoint is not None and checkpoint.state.step == config.steps
    return {
        f"{name} {key}": checkpoint.full(name, key)
        for name in checkpoint.names
        for key in checkpoint.keys(name)
    }


def test_a_run_of_stages_continues_bit_for_bit_from_any_of_them_and_elsewhere_within_rounding(
    tmp_path: Path,
) -> None:
    stages = (
        dials.StageConfig(steps=3, row_length=16, step_rows=4, micro_rows=1),
        dials.StageConfig(steps=4, row_length=32),
    )
    straight, broken, moved = (
        recipe(tmp_path, run, stages=stages, ema=0.8) for run in ("straight", "broken", "moved")
    )
    for config in (straight, broken, moved):
        prepare(config, 1, quiet)
    assert (
        len(list((tmp_path / "shards-decoder").glob("rows-*"))) == 4
    )  # three to train on, one held out: nothing is left to the ranks

    run_processes(2, train_run, straight, timeout=280)
    with pytest.raises(AssertionError, match=r"ended without a result|onnection"):
        run_processes(
            2, _in_legs, broken, (2, 3), 6, timeout=280
        )  # in the first stage, at its end, in the second after a save
    run_processes(2, _in_legs, broken, (7, 12), timeout=280)  # at the second's end
    assert losses(straight.run) == losses(broken.run) and len(losses(straight.run)) == 12
    expected, found = state_of(straight), state_of(broken)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)

    run_processes(3, train_until, moved.model_copy(update={"engine": training.EngineConfig(zero_stage=3)}), 2)
    run_processes(1, train_run, moved)
    assert [rows for _, rows in losses(moved.run).values()] == [
        rows for _, rows in losses(straight.run).values()
    ]
    for step, (loss, _) in losses(straight.run).items():
        assert math.isclose(loss, losses(moved.run)[step][0], rel_tol=1e-5), step

    steps = [record for record in read_lines(Path(straight.run) / "metrics.jsonl") if "loss" in record]
    assert [record["stage"] for record in steps] == [0] * 3 + [1] * 4 + [2] * 5
    assert [record["rows"] for record in steps[2:5]] == [[8, 11], [12, 17], [18, 23]]
    assert [record["tokens"] <= most for record, most in zip(steps, (64, 128, 192, 384), strict=False)] == [
        True
    ] * 4
    work = [record["mfu"] * record["seconds"] for record in steps]
    expected_work = [
        rows * train_flops_per_row(model_config(straight), length)
        for rows, length in ((4, 16), (6, 32), (6, 48))
    ]
    assert [work[0] / work[-1], work[3] / work[-1]] == pytest.approx(
        [flops / expected_work[-1] for flops in expected_work[:2]]
    )
    scores = [
        record for record in read_lines(Path(straight.run) / "metrics.jsonl") if "heldout_loss" in record
    ]
    assert (
        scores[0]["heldout_loss_ema"] == scores[0]["heldout_loss"]
        and scores[-1]["heldout_loss_ema"] != scores[-1]["heldout_loss"]
    )

    with pytest.raises(AssertionError, match=r"UserError: .*stages"):
        run_processes(1, train_run, straight.model_copy(update={"stages": stages[:1]}))


def _in_legs(rank_info: RankInfo, config: PretrainConfig, stops: tuple[int, ...], killed: int = 0) -> None:
    """Train anew up to each of `stops`, then until `killed`."""
    for stop in stops:
        train_until(rank_info, config, stop)
    if killed:
        train_until_killed(rank_info, config, killed)


def _all_in_legs(rank_info: RankInfo, configs: list[PretrainConfig]) -> None:
    for config in configs:
        _in_legs(rank_info, config, (3, 7))


def test_every_schedule_ends_at_its_final_rate_in_a_resumed_run(tmp_path: Path) -> None:
    kinds = [
        training.ScheduleConfig(kind="cosine", warmup_steps=2, final=0.2),
        training.ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=3, final=0.2),
        training.ScheduleConfig(kind="inverse_sqrt", warmup_steps=2, final=0.2),
    ]
    configs = [recipe(tmp_path, schedule.kind, schedule=schedule, steps=7) for schedule in kinds]
    for config in configs:
        prepare(config, 1, quiet)
    run_processes(1, _all_in_legs, configs)
    for config in configs:
        rates = [
            record["lr"] / 3e-3 for record in read_lines(Path(config.run) / "metrics.jsonl") if "lr" in record
        ]
        assert (
            rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
            and rates[-1] == pytest.approx(0.2)
            and len(rates) == 7
        )
        assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-2] > 0.2


def test_a_stop_request_saves_what_was_trained(tmp_path: Path) -> None:
    config = recipe(tmp_path, "stopped")
    prepare(config, 1, quiet)
    run_processes(1, train_until, config, 3)
    checkpoint = newest_verified(DiskPath(Path(config.run)), lambda event, **facts: None)
    assert checkpoint is not None and checkpoint.state.step == 3
    assert read_lines(Path(config.run) / "events.jsonl")[-1]["event"] == "stopped"


def _trained_on_nan(rank_info: RankInfo, config: PretrainConfig, bad: tuple[int, ...]) -> str:
    forward = Engine.train_step

    def spoiled(self: Engine, micros: Any, *rest: Any) -> Any:
        step = len(losses(config.run))
        if step in bad:
            self._engine.module.embed.weight.data[5] *= math.nan if rank_info.rank == 1 else 1
        return forward(self, micros, *rest)

    Engine.train_step = spoiled
    try:
        train(config, rank_info)
    except UserError as refusal:
        return str(refusal)
    return ""


def test_too_many_nonfinite_steps_stop_the_run_naming_step_and_rows(tmp_path: Path) -> None:
    config = recipe(tmp_path, "spoiled", nonfinite_limit=2)
    prepare(config, 1, quiet)
    said = run_processes(2, _trained_on_nan, config, (5, 6, 7, 8))
    assert (
        "step 7 (rows 36 to 41) was not applied: its loss is not finite. It is bad step number 2 in a row"
        in said[0]
    )
    skipped = [
        event for event in read_lines(Path(config.run) / "events.jsonl") if event["event"] == "bad_step"
    ]
    assert [event["rows"] for event in skipped] == [[30, 35], [36, 41]]
    checkpoint = newest_verified(DiskPath(Path(config.run)), lambda event, **facts: None)
    assert checkpoint is not None and checkpoint.state.step == 4
    assert all(torch.isfinite(checkpoint.full(name)).all() for name in checkpoint.names)


def test_a_run_is_continued_only_by_the_config_and_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    config = recipe(tmp_path, "run", steps=4)
    prepare(config, 1, quiet)
    run_processes(1, train_run, config)
    optimizer, model = config.optimizer, config.model
    others: dict[str, dict[str, Any]] = {
        "seed: 0 there, 7 here": {"seed": 7},
        "optimizer.lr: 0.003 there, 0.001 here": {"optimizer": optimizer.model_copy(update={"lr": 1e-3})},
        "optimizer.clip: 1.0 there, 0.5 here": {"optimizer": optimizer.model_copy(update={"clip": 0.5})},
        "optimizer.weight_decay: 0.1 there, 0.0 here": {
            "optimizer": optimizer.model_copy(update={"weight_decay": 0.0})
        },
        "model.dropout: 0.1 there, 0.0 here": {"model": model.model_copy(update={"dropout": 0.0})},
        "schedule.warmup_steps: 0 there, 2 here": {"schedule": training.ScheduleConfig(warmup_steps=2)},
        "step_rows: 6 there, 8 here": {"step_rows": 8},
    }
    wsd = config.model_copy(
        update={"run": f"{config.run}-wsd", "schedule": training.ScheduleConfig(kind="wsd")}
    )
    prepare(wsd, 1, quiet)
    fewer = wsd.model_copy(update={"steps": 2})
    changed = [config.model_copy(update=update) for update in others.values()]
    first, message, *messages = run_processes(1, rejections, [wsd, fewer, *changed])[0]
    assert first == "" and "run-wsd has done 4 steps, and `steps` is 2" in message
    for expected, message in zip(others, messages, strict=True):
        assert expected in message
    assert len(losses(config.run)) == 4

    write_corpus(tmp_path / "corpus.txt", documents=200)
    prepare(config, 1, quiet)
    with pytest.raises(
        AssertionError, match=r"UserError: .*fingerprint .* have changed\. Give another `run` folder"
    ):
        run_processes(1, train_run, config)


def test_a_change_before_the_first_checkpoint_remakes_the_tokenizer_and_a_later_one_does_not(
    tmp_path: Path,
) -> None:
    config, told = recipe(tmp_path, "run"), []

    def made(config: PretrainConfig) -> str:
        told.clear()
        return make_tokenizer(config, lambda what, _: told.append(what)).fingerprint

    first = made(config)
    assert made(config) == first and not told
    (tmp_path / "corpus.txt").write_text((tmp_path / "corpus.txt").read_text().replace("Anna", "Zoya"))
    second = made(config)
    assert second != first and told == ["making the tokenizer again: what it is made of has changed"]
    small = config.model_copy(update={"tokenizer": dials.TokenizerConfig(sample_bytes=9000)})
    taken = config.model_copy(
        update={
            "tokenizer": dials.TokenizerConfig(path=f"{config.run}/tokenizer"),
            "run": str(tmp_path / "taken"),
        }
    )
    assert second != made(small) == made(taken)
    assert made(config) == second == made(taken)

    (tmp_path / "run" / "checkpoints" / "step-00000004-g0001").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000004-g0001" / COMMIT).touch()
    write_corpus(tmp_path / "corpus.txt", documents=200)
    assert made(config) == second and not told


def test_heldout_loss_does_not_depend_on_the_world(tmp_path: Path) -> None:
    scores = []
    for world in (1, 3):
        config = recipe(tmp_path, f"world-{world}", steps=1, checkpoints=training.CheckpointConfig(every=1))
        prepare(config, 1, quiet)
        run_processes(world, train_run, config)
        scores.append(
            [r["heldout_loss"] for r in read_lines(Path(config.run) / "metrics.jsonl") if "heldout_loss" in r]
        )
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_heldout_documents_are_never_trained_on(tmp_path: Path) -> None:
    config = recipe(tmp_path, "run")
    prepare(config, 1, quiet)
    rows, heldout = open_rows(config)
    (train_corpus,), (heldout_corpus,) = (
        [stream.corpus for stream in side.streams] for side in (rows[-1], heldout)
    )
    documents = [
        {bytes(c.document(i)) for i in range(c.num_documents)} for c in (train_corpus, heldout_corpus)
    ]
    assert documents[1] and not documents[0] & documents[1]


def test_dropout_seeds_differ_between_micros_and_seeds() -> None:
    seeds = {micro_seed(seed, micro) for seed in range(10) for micro in range(100)}
    assert len(seeds) == 1000


def test_half_a_line_of_a_killed_writer_does_not_swallow_the_next(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_line(file, {"step": 1})
    with file.open("a") as torn:
        torn.write('{"step": 2, "lo')
    append_line(file, {"step": 3})
    assert read_lines(file) == [{"step": 1}, {"step": 3}]
    assert json.loads(file.read_text().splitlines()[-1]) == {"step": 3}
