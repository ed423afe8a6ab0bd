"""Scores of checkpoints beside real training on a real Ray cluster: a small encoder, a held-out text, and a
task that it is taught.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import ray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trifold.finetune.run
import trifold.launch.commands.pretrain
from tests.finetune.small_tasks import NAMES, VERBS, write_tags
from tests.processes import run_processes
from tests.published import MODELS
from trifold.launch.cluster import capacity, scorer
from trifold.launch.cluster.timing import Timing
from trifold.launch.recipe.reader import CLONE, resolve, write
from trifold.launch.recipe.schema import ClusterConfig, FinetuneRecipe, PretrainRecipe
from trifold.launch.terminal import Terminal
from trifold.launch.watch.progress import run_status
from trifold.modeling.errors import UserError
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.monitor.metrics import Recorder
from trifold.pretrain.monitor.run_folder import queue_scores, queued_scores
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.storage.jsonl import read_lines

TASK = """
run: unused
model: {from: unused, dropout: 0.1}
task: {kind: ner, train: [FOLDER/train.conll], dev: [FOLDER/dev.conll]}
row_length: 32
steps: 4
step_rows: 4
micro_rows: 4
optimizer: {lr: 3e-3}
evaluate_every: 4
checkpoints: {every: 4}
"""

MODEL = MODELS["modernbert"].model_dump(mode="json") | {
    "vocab_size": 392,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "mlp_dim": 32,
    "max_positions": 32,
}


def recipe(folder: Path, run: str, **changes: Any) -> PretrainRecipe:
    """Twelve steps with a checkpoint every four; its held-out text is the one that training is evaluated on
    too.
    """
    draw = random.Random(0)
    for name, number in (("text.txt", 600), ("heldout.txt", 40)):
        said = (
            f"Mr {draw.choice(NAMES)} {draw.choice(VERBS)} {draw.choice(NAMES)}, as we know."
            for _ in range(number)
        )
        (folder / name).write_text("\n\n".join(said))
    write_tags(folder / "train.conll", 60, seed=1)
    write_tags(folder / "dev.conll", 20, seed=2)
    (folder / "task.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    values: dict[str, Any] = {
        "run": str(folder / run),
        "model": MODEL,
        "data": {
            "sources": [{"path": f"{folder}/text.txt"}],
            "heldout": [{"path": f"{folder}/heldout.txt"}],
            "row_length": 32,
        },
        "objective": {"kind": "masked"},
        "optimizer": {"lr": 0.003},
        "steps": 12,
        "step_rows": 4,
        "micro_rows": 2,
        "evaluate_every": 12,
        "checkpoints": {"every": 4},
        "cluster": {"workers": 1, "threads_per_worker": 1},
        "scoring": {"held_out": {"people": [{"path": f"{folder}/heldout.txt"}]}},
    }
    return PretrainRecipe.model_validate_json(json.dumps(values | changes))


def pretrain(config: PretrainRecipe) -> str:
    shown = io.StringIO()
    trifold.launch.commands.pretrain.pretrain(config, Terminal(file=shown, width=200))
    return shown.getvalue()


def taught(place: Any, config: FinetuneRecipe) -> None:
    trifold.finetune.run.prepare(config, lambda what, done: None)
    trifold.finetune.run.train(config, place)


def waiting_at(step: int, scores: int):
    """Training that does not begin `step` before so many checkpoints are scored. Made here, so that Ray ships
    it by value.
    """

    def train(config, place):
        import time

        from trifold.pretrain import run
        from trifold.pretrain.engine.engine import Engine
        from trifold.pretrain.monitor.run_folder import scored_checkpoints
        from trifold.pretrain.storage.jsonl import read_lines

        train_step, deadline = Engine.train_step, time.monotonic() + 90

        def patient(self, *given):
            done = [
                record for record in read_lines(run.Path(config.run) / "metrics.jsonl") if "loss" in record
            ]
            while (
                len(done) + 1 == step
                and len(scored_checkpoints(run.Path(config.run))) < scores
                and time.monotonic() < deadline
            ):
                time.sleep(0.1)
            return train_step(self, *given)

        Engine.train_step = patient
        run.train(config, place)

    return train


def losses(run: Path) -> dict[int, tuple[float, str]]:
    return {
        line["step"]: (line["loss"], line["rows_hash"])
        for line in read_lines(run / "metrics.jsonl")
        if "loss" in line
    }


def scores(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if "checkpoint" in line]


def failures(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if event["event"] == "scoring_failed"]


def scored_beside(folder: Path, **changes: Any) -> Path:
    """A folder with the run `beside`, whose tenth step waited for the scores of a checkpoint, and what it
    `said`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trifold.launch.commands.pretrain.run.train", waiting_at(10, 1))
        patch.setattr("os.cpu_count", lambda: 1)  # tokenize here
        (folder / "said").write_text(pretrain(recipe(folder, "beside", **changes)))
    return folder


@pytest.fixture(scope="module")
def beside(ray_cluster, tmp_path_factory) -> Path:
    """Beside a worker that holds every CPU of the cluster."""
    folder = tmp_path_factory.mktemp("scoring")
    scoring = {"held_out": {"people": [{"path": f"{folder}/heldout.txt"}]}, "cpus": 0}
    cpus = (
        ray.cluster_resources()["CPU"] if ray.is_initialized() else 3
    )  # else the run makes a cluster of as many
    return scored_beside(
        folder, scoring=scoring, cluster={"workers": 1, "threads_per_worker": 1, "cpus_per_worker": cpus}
    )


@pytest.fixture(scope="module")
def tagged(ray_cluster, tmp_path_factory) -> Path:
    """The same with a task."""
    folder = tmp_path_factory.mktemp("tagged")
    return scored_beside(folder, scoring=with_tags(folder))


def with_tags(folder: Path) -> dict[str, Any]:
    return {
        "held_out": {"people": [{"path": f"{folder}/heldout.txt"}]},
        "tasks": {"tags": f"{folder}/task.yaml"},
    }


def test_scores_of_checkpoints_join_metrics_while_training_goes_on_and_those_of_the_last_at_its_end(beside):
    run = beside / "beside"
    lines = read_lines(run / "metrics.jsonl")
    first, last = scores(run)[0], scores(run)[-1]
    later = [line["step"] for line in lines[lines.index(first) :] if "loss" in line]
    assert first["step"] in (4, 8) and later[-2:] == [11, 12]
    assert (
        lines[-1] == last
        and last["checkpoint"] == "step-00000012-g0001"
        and not failures(run)
        and not queued_scores(run)
    )
    (evaluated,) = (line for line in lines if line["step"] == 12 and "heldout_loss" in line)
    for name in ("heldout_loss", "accuracy", "heldout_targets"):
        assert last[f"people/{name}"] == pytest.approx(evaluated[name], rel=1e-6)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {event.step for event in board.Scalars("people/heldout_loss")} >= {first["step"], 12}
    said = f"step 12: people/heldout_loss {last['people/heldout_loss']:.3f}"
    assert said in (beside / "said").read_text() and run_status(run, False)["scores"] == said


@pytest.mark.proof
def test_training_is_bit_for_bit_the_same_without_a_scorer_and_scores_the_same_without_ray(tagged):
    write(recipe(tagged, "alone", scoring=with_tags(tagged)), tagged / "recipe.yaml")
    command = [
        sys.executable,
        "-m",
        "trifold.launch.cli",
        "pretrain",
        str(tagged / "recipe.yaml"),
        "--workers",
        "0",
    ]
    subprocess.run(command, check=True, cwd=CLONE)
    assert losses(tagged / "alone") == losses(tagged / "beside") and len(losses(tagged / "alone")) == 12
    (alone,) = scores(tagged / "alone")
    last = scores(tagged / "beside")[-1]
    assert {name for name in alone if "/" in name} >= {"people/heldout_loss", "tags/f1"}
    assert [(name, value) for name, value in alone.items() if "/" in name] == [
        item for item in last.items() if "/" in item[0]
    ]


@pytest.mark.proof
def test_a_named_task_scores_as_finetuning_from_the_published_folder_does(tagged):
    folder = publish(tagged / "beside", tagged / "published", on_event=lambda event, **facts: None)
    config = resolve(
        tagged / "task.yaml", [f"model.from={folder}", f"run={tagged / 'taught'}"], FinetuneRecipe
    )
    run_processes(1, taught, config)
    found = json.loads((tagged / "taught" / "scores.json").read_text())["scores"]
    last = scores(tagged / "beside")[-1]
    assert last["tags/f1"] > 0 and found == {
        name.removeprefix("tags/"): value for name, value in last.items() if name.startswith("tags/")
    }


@pytest.mark.proof
def test_a_scorer_that_is_killed_comes_back_and_the_run_goes_on(ray_cluster, tmp_path, monkeypatch):
    def kill() -> None:
        while not (
            found := [
                pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if b".score\0" in words(pid)
            ]
        ):
            time.sleep(0.05)
        os.kill(found[0], signal.SIGKILL)

    def words(pid: int) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes() + b"\0"
        except OSError:
            return b""

    monkeypatch.setattr("trifold.launch.commands.pretrain.run.train", waiting_at(10, 1))
    threading.Thread(target=kill, daemon=True).start()
    pretrain(recipe(tmp_path, "killed"))
    run = tmp_path / "killed"
    assert ["process died" in failure["reason"] for failure in failures(run)] == [True]
    assert (
        scores(run)[0]["step"] in (4, 8)
        and scores(run)[-1]["step"] == 12
        and sorted(losses(run)) == list(range(1, 13))
    )
    assert not [event for event in read_lines(run / "events.jsonl") if event["event"] == "failed"]


def test_a_checkpoint_that_was_deleted_or_damaged_is_named_and_not_scored(beside):
    run = beside / "beside"
    alone = scorer.Scorer(recipe(beside, "beside"), {}, 1)
    with pytest.raises(UserError, match="deleted before it was read"):
        alone.score("step-00000004-g0001")  # two are kept
    file = run / "checkpoints" / "step-00000008-g0001" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"rank-00000.safetensors: its sha256 is"):
        alone.score("step-00000008-g0001")


def test_scores_that_a_cut_off_group_finds_too_are_one_line_of_the_metrics(tmp_path):
    places = [RankInfo(rank, 2, rank, "cpu", None, 1) for rank in (1, 0, 0)]
    queue_scores(tmp_path, {"step": 8, "checkpoint": "step-00000008-g0001", "tags/f1": 50.0})
    for generation, place in enumerate(places, 1):
        with closing(Recorder(tmp_path, place, generation)) as recorder:
            recorder.take_queued_scores()
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 8, "checkpoint": "step-00000008-g0001", "tags/f1": 50.0, "generation": 2}
    ]


def test_a_host_that_came_back_and_took_the_scorer_in_is_room_for_a_worker(tmp_path, monkeypatch):
    hosts = [{"NodeID": name, "Resources": {"CPU": 1.0}} for name in ("one", "two", "back")]
    monkeypatch.setattr(capacity, "hosts", lambda _: hosts)
    monkeypatch.setattr(capacity.ray._private.state, "available_resources_per_node", lambda: {"back": {}})
    policy = capacity.ResizePolicy(ClusterConfig(workers=3, min_workers=2), 1, 2, Timing(resize=0))
    running = Counter(["one", "two"])
    assert policy.new_size(running, {}) is None
    assert policy.new_size(running, {"back": {"CPU": 1.0, "GPU": 0.0}}) == 3


def test_there_is_room_for_whole_groups_of_ranks_that_share_rows(monkeypatch):
    hosts = [{"NodeID": name, "Resources": {"CPU": cpus}} for name, cpus in (("one", 2.0), ("two", 3.0))]
    monkeypatch.setattr(capacity, "hosts", lambda _: hosts)
    monkeypatch.setattr(
        capacity.ray._private.state,
        "available_resources_per_node",
        lambda: {"one": {"CPU": 2.0}, "two": {"CPU": 1.0}},
    )
    assert capacity.free_workers(ClusterConfig(workers=8), 1, Timing()) == (3, 5)
    assert capacity.free_workers(ClusterConfig(workers=8), 2, Timing()) == (2, 4)
    assert capacity.free_workers(ClusterConfig(workers=8), 4, Timing()) == (0, 4)


def test_what_cannot_be_scored_is_refused_before_the_run_starts(tmp_path):
    def refused(why: str, model: dict[str, Any] = MODEL, **scoring: Any) -> None:
        config = recipe(tmp_path, "refused", model=model, scoring=scoring)
        with pytest.raises(UserError, match=why):
            tasks = scorer.resolve_tasks(config)
            trifold.launch.commands.pretrain.run.make_tokenizer(config, lambda what, done: None)
            scorer.prepare(config, tasks, 1, lambda what, done: None)

    (tmp_path / "pairs.tsv").write_text("source\ttarget\none\tuno\n")
    recipe(tmp_path, "refused")
    written = TASK.replace("FOLDER", str(tmp_path))
    translation = f"{{kind: translation, train: [{tmp_path}/pairs.tsv], dev: [{tmp_path}/pairs.tsv]}}"
    (tmp_path / "translation.yaml").write_text(
        "\n".join(
            line if not line.startswith("task:") else f"task: {translation}" for line in written.splitlines()
        )
    )
    (tmp_path / "long.yaml").write_text(written.replace("row_length: 32", "row_length: 64"))
    refused(
        "scoring.held_out.novels: .*novels.txt", held_out={"novels": [{"path": str(tmp_path / "novels.txt")}]}
    )
    refused("scoring.tasks.x: there is no recipe none.yaml", tasks={"x": "none.yaml"})
    refused(
        "scoring.tasks.x: this task writes text, and an encoder cannot",
        tasks={"x": str(tmp_path / "translation.yaml")},
    )
    refused(
        "scoring.tasks: no published architecture expresses this model",
        MODEL | {"norm_places": ["inner"]},
        tasks={"x": str(tmp_path / "task.yaml")},
    )
    refused(r"scoring.tasks.x: row_length \(64\) exceeds", tasks={"x": str(tmp_path / "long.yaml")})
