"""A fine-tuning run's promises, end to end in real processes: from a published folder to scores that beat a
trivial system.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.finetune.small_tasks import folder_of, recipe, write_pairs, write_tags
from tests.finetune.training import fail_on_event, metrics, scores_of, tags, train_run, train_until_killed
from tests.processes import run_processes
from tests.training import quiet
from trifold.finetune.config import FinetuneConfig
from trifold.finetune.evaluation.evaluate import LoadedModel, score_predictions
from trifold.finetune.evaluation.model_selection import best_step
from trifold.finetune.run import make_tokenizer, open_rows, prepare, train
from trifold.finetune.tasks import open_tasks
from trifold.modeling.errors import UserError
from trifold.pretrain.checkpoint.checkpoint import open_checkpoint
from trifold.pretrain.data.tokenizer.tokenizer import Tokenizer
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.lora_adapter import publish_adapter
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.storage.disk import DiskPath
from trifold.pretrain.storage.json_files import read_json_object, write_json
from trifold.pretrain.storage.jsonl import read_lines


def test_an_encoder_learns_tags_from_context_and_is_published_for_the_stock_class(tmp_path: Path) -> None:
    write_tags(tmp_path / "test.conll", 30, seed=3)
    task = tags(tmp_path) | {"test": [str(tmp_path / "test.conll")]}
    config = recipe(tmp_path / "run", folder_of(tmp_path, "encoder"), task)
    prepare(config, quiet)
    run_processes(2, train_run, config)
    found = scores_of(config)
    assert found["test"]["examples"] == 30 and found["test"]["scores"]["f1"] > 90
    assert len(read_lines(Path(config.run) / "predictions-test.jsonl")) == 30
    assert found["scores"]["f1"] > 95 > 70 > found["trivial"]["scores"]["f1"]
    lines = read_lines(Path(config.run) / "predictions.jsonl")
    assert len(lines) == found["examples"] == 60 and lines[0]["prediction"] == lines[0]["references"]
    out = publish(
        Path(config.run),
        tmp_path / "out",
        on_event=fail_on_event,
        checkpoint=best_step(DiskPath(Path(config.run))),
    )
    card = (out / published_folder.CARD).read_text()
    assert f"| f1 | {found['scores']['f1']:.2f} |" in card
    assert f"| f1 | {found['test']['scores']['f1']:.2f} |" in card and "30 test examples" in card
    pipeline = pytest.importorskip("transformers").pipeline(
        "token-classification", model=str(out), aggregation_strategy="first"
    )
    assert [(e["entity_group"], e["word"].strip()) for e in pipeline("Mr Ada sees Bob")] == [("PER", "Ada")]
    assert [(e["entity_group"], e["word"].strip()) for e in pipeline("In Ada we see Bob")] == [("LOC", "Ada")]


@pytest.mark.parametrize(("family", "stage"), [("encoder-decoder", 3), ("decoder", 1)])
def test_translation_is_learned_and_published(family: str, stage: int, tmp_path: Path) -> None:
    task = {
        "kind": "translation",
        "train": [write_pairs(tmp_path / "train", 400, 1)],
        "dev": [write_pairs(tmp_path / "dev", 40, 2)],
    }
    config = recipe(
        tmp_path / "run", folder_of(tmp_path, family), task, steps=80, engine={"zero_stage": stage}
    )
    prepare(config, quiet)
    run_processes(2, train_run, config, timeout=400)  # ZeRO-3 on a busy machine
    found = scores_of(config)
    assert found["scores"]["bleu"] > 40 > 2 * found["trivial"]["scores"]["bleu"]
    publish(
        Path(config.run),
        tmp_path / "out",
        on_event=fail_on_event,
        checkpoint=best_step(DiskPath(Path(config.run))),
    )


def _each(rank_info: RankInfo, configs: list[FinetuneConfig]) -> None:
    for config in configs:
        train(config, rank_info)


@pytest.mark.proof
@pytest.mark.parametrize("family", ["encoder", "encoder-decoder"])
def test_ranks_that_share_rows_learn_a_task_as_ranks_with_rows_of_their_own_do(
    family: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, family)
    task = tags(tmp_path)
    if family == "encoder-decoder":
        task = {
            "kind": "translation",
            "train": [write_pairs(tmp_path / "train", 400, 1)],
            "dev": [write_pairs(tmp_path / "dev", 40, 2)],
        }
    alone, shared = (
        recipe(tmp_path / f"run-{ranks}", folder, task, steps=20, engine={"sequence_parallel": ranks})
        for ranks in (1, 2)
    )
    for config in (alone, shared):
        prepare(config, quiet)
    run_processes(2, _each, [alone, shared], timeout=280)
    expected, found = metrics(alone), metrics(shared)
    exact = [name for name in expected if name.startswith("rows")]
    assert [found.pop(name) for name in exact] == [expected.pop(name) for name in exact]
    assert found == pytest.approx(expected, rel=1e-4)
    assert scores_of(shared)["scores"] == pytest.approx(scores_of(alone)["scores"])


def test_a_killed_run_continues_bit_for_bit_with_dropout_and_chooses_the_same_best(tmp_path: Path) -> None:
    folder, task = folder_of(tmp_path, "encoder"), tags(tmp_path)
    changes: dict[str, Any] = {
        "steps": 20,
        "evaluate_every": 5,
        "checkpoints": {"every": 5},
        "schedule": {"final": 1.0},
    }
    changes["model"] = {"from": str(folder), "dropout": 0.1}
    straight, broken = (recipe(tmp_path / name, folder, task, **changes) for name in ("straight", "broken"))
    for config in (straight, broken):
        prepare(config, quiet)
    run_processes(2, train_run, straight)
    with pytest.raises(AssertionError, match=r"ended without a result|onnection"):
        run_processes(2, train_until_killed, broken, 13)
    run_processes(2, train_run, broken)
    assert metrics(straight) == metrics(broken) and len(metrics(straight)) == 20 * 3 + 5 * 2
    assert best_step(DiskPath(Path(straight.run))) == best_step(DiskPath(Path(broken.run)))
    assert scores_of(straight) == scores_of(broken)
    with pytest.raises(AssertionError, match=r"UserError: .*another recipe.*\n  seed: 0 there, 7 here\n"):
        run_processes(1, train_run, straight.model_copy(update={"seed": 7}))
    with pytest.raises(AssertionError, match=r"UserError: .*has done 20 steps, and `steps` is 10"):
        run_processes(1, train_run, straight.model_copy(update={"steps": 10}))


def test_training_ends_early_when_the_score_stays_and_the_best_is_what_is_scored(tmp_path: Path) -> None:
    config = recipe(
        tmp_path / "run",
        folder_of(tmp_path, "encoder"),
        tags(tmp_path),
        steps=100,
        evaluate_every=4,
        checkpoints={"every": 4},
        patience=2,
        optimizer={"lr": 1e-2},
        schedule={"final": 1.0},
    )
    prepare(config, quiet)
    run_processes(1, train_run, config)
    events = read_lines(Path(config.run) / "events.jsonl")
    scored = [line for line in read_lines(Path(config.run) / "metrics.jsonl") if "f1" in line]
    history = [(line["step"], line["f1"]) for line in scored]
    first_best = max(history, key=lambda pair: (pair[1], -pair[0]))
    best = min(scored, key=lambda line: (-line["f1"], line["heldout_loss"]))  # of equal scores
    assert [event["event"] for event in events][-2:] == ["finished", "scored"] and events[-2][
        "step"
    ] == history[-1][0] < 100
    assert history.index(first_best) == len(history) - 3 and scores_of(config)["step"] == best["step"]
    run_processes(1, train_run, config)  # again: there is nothing left to train
    assert max(line["step"] for line in read_lines(Path(config.run) / "metrics.jsonl")) == history[-1][0]


def test_two_tasks_take_turns_by_weight_and_frozen_parameters_stay(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "encoder-decoder")
    dev = [write_pairs(tmp_path / "dev", 8, 3)]
    first, second = (
        {"kind": "translation", "train": [write_pairs(tmp_path / name, 40, 1)], "dev": dev} for name in "ab"
    )
    config = recipe(
        tmp_path / "run",
        folder,
        {**first, "weight": 3.0},
        more=[{**second, "prompt": "b: {source}"}],
        steps=4,
        evaluate_every=4,
        checkpoints={"every": 4},
        freeze=["embed.*", "encoder.blocks.0.*"],
        optimizer={"lr": 1e-2, "layer_decay": 0.5},
    )
    prepare(config, quiet)
    vocabulary = Tokenizer.open(tmp_path / "run" / "tokenizer")
    rows, _ = open_rows(config, open_tasks(config, vocabulary, "encoder-decoder"), vocabulary)
    said = [
        vocabulary.decode(source[source > 0])
        for row in map(rows.row, range(64))
        if (source := row.source) is not None
    ]
    assert sum("b: " in text for text in said) == 16
    run_processes(2, train_run, config)
    [checkpoint] = (tmp_path / "run" / "checkpoints").glob("step-*4-*")
    before, after = published_folder.load_model(folder)[1], open_checkpoint(DiskPath(checkpoint))
    moved = {name: not torch.equal(before[name], after.full(name)) for name in before}
    assert not moved["embed.weight"] and not moved["encoder.blocks.0.mlp.f.up.weight"]
    assert moved["encoder.blocks.1.mlp.f.up.weight"] and moved["decoder.blocks.0.mlp.f.up.weight"]


def test_adapters_alone_are_trained_and_published_merged(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "encoder")
    lora = {"rank": 4, "alpha": 8.0, "targets": ["q", "v", "up", "down"]}
    config = recipe(
        tmp_path / "run", folder, tags(tmp_path), lora=lora, optimizer={"lr": 1e-2}, engine={"zero_stage": 2}
    )
    prepare(config, quiet)
    run_processes(2, train_run, config)
    found, run = scores_of(config), Path(config.run)
    assert found["scores"]["f1"] > 50 > found["trivial"]["scores"]["f1"]
    out = publish(run, tmp_path / "out", on_event=fail_on_event, checkpoint=best_step(DiskPath(run)))
    before, after = published_folder.load_model(folder)[1], published_folder.load_model(out)[1]
    moved = {name for name in after if name in before and not torch.equal(before[name], after[name])}
    assert moved == {
        f"encoder.blocks.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.f.q", "attn.f.v", "mlp.f.up", "mlp.f.down")
    }
    peft = publish_adapter(
        run, tmp_path / "peft", on_event=fail_on_event, checkpoint=best_step(DiskPath(run))
    )
    settings = json.loads((peft / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder) and settings["modules_to_save"] == [
        "classifier"
    ]
    assert (peft / "adapter_model.safetensors").stat().st_size < 0.5 * (
        out / "model.safetensors"
    ).stat().st_size
    opened = LoadedModel(out)
    task = open_tasks(config, opened.tokenizer, "encoder")[0]
    predictions = task.predict(opened, task.dev, config.generation, 256)
    assert (
        score_predictions(task, predictions, task.dev) == found["scores"]
    )  # merged, it says what it said adapted


def test_examples_that_change_before_the_first_checkpoint_make_another_tokenizer(tmp_path: Path) -> None:
    new = {
        "config": published_folder.load_model(folder_of(tmp_path, "encoder"))[0].model_dump(mode="json")
        | {"vocab_size": 388}
    }
    config = recipe(tmp_path / "run", tmp_path, tags(tmp_path), model=new)
    first = make_tokenizer(config, quiet).fingerprint
    assert make_tokenizer(config, quiet).fingerprint == first
    (tmp_path / "train.conll").write_text((tmp_path / "train.conll").read_text().replace("Ada", "Zoya"))
    assert make_tokenizer(config, quiet).fingerprint != first


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    encoder, both = folder_of(tmp_path, "encoder"), folder_of(tmp_path, "encoder-decoder")
    pairs = {
        "kind": "translation",
        "train": [write_pairs(tmp_path / "p", 4, 1)],
        "dev": [write_pairs(tmp_path / "p", 4, 1)],
    }
    with pytest.raises(UserError, match="this task writes text, and an encoder cannot: give a decoder"):
        prepare(recipe(tmp_path / "a", encoder, pairs), quiet)
    with pytest.raises(UserError, match=r"row_length \(65\) exceeds the longest text .* \(64 tokens\)"):
        prepare(recipe(tmp_path / "b", both, pairs, row_length=65), quiet)
    for changes, said in (
        ({"freeze": ["*"]}, r"freeze: \* leave nothing to train"),
        ({"best": "heldout_loss"}, "`best` is 'heldout_loss'; the scores of this task are bleu, chrf"),
    ):
        with pytest.raises(UserError, match=said):
            config = recipe(tmp_path / "f", both, pairs, **changes)
            prepare(config, quiet)
            train(config, RankInfo.single())
    words = {"path": str(tmp_path / "vocabulary")}
    for changes, said in (
        ({"vocab_size": 300}, "has 395 pieces, and model.config.vocab_size is 300"),
        ({"max_positions": 63}, "that model.config"),
    ):
        new = {"config": published_folder.load_model(both)[0].model_dump(mode="json") | changes}
        with pytest.raises(UserError, match=said):
            prepare(recipe(tmp_path / "n", both, pairs, model=new, tokenizer=words), quiet)
    with pytest.raises(UserError, match="freeze: no parameter has a name like 'embedding"):
        config = recipe(tmp_path / "d", both, pairs, freeze=["embedding*"])
        prepare(config, quiet)
        train(config, RankInfo.single())
    record = read_json_object(both / published_folder.RECORD)
    write_json(both / published_folder.RECORD, record | {"fingerprints": {"tokenizer": "another"}})
    with pytest.raises(
        UserError, match=r"its tokenizer's fingerprint is .*, its model was trained with another"
    ):
        prepare(recipe(tmp_path / "c", both, pairs), quiet)
