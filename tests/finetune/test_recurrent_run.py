"""Recurrent models through the same runs: learned, killed and resumed bit for bit, published without a stock
class, read back and used.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.finetune.small_tasks import folder_of, recipe, vocabulary, write_pairs
from tests.finetune.training import fail_on_event, metrics, scores_of, tags, train_run, train_until_killed
from tests.processes import run_processes
from tests.training import quiet
from trifold.finetune.evaluation.evaluate import LoadedModel
from trifold.finetune.evaluation.model_selection import best_step
from trifold.finetune.evaluation.predict import predict
from trifold.finetune.run import prepare, train
from trifold.modeling.config import ModelConfig
from trifold.modeling.errors import UserError
from trifold.modeling.generation.config import Generation
from trifold.modeling.transformer import build
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.publish import published_folder
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.publish.verify import verify
from trifold.pretrain.storage.disk import DiskPath

ALONE = RankInfo.single()


def recurrent_folder(where: Path, family: str, **changes: Any) -> Path:
    """A published folder of a small LSTM with new weights."""
    sizes: dict[str, Any] = {"dim": 48, "num_layers": 2, "max_positions": 64, "embed_scale": 48**0.5}
    tokenizer = vocabulary(where)
    config = ModelConfig(family=family, cell="lstm", vocab_size=tokenizer.vocab_size, **sizes | changes)  # type: ignore[arg-type]
    folder = where / f"published-{family}"
    folder.mkdir()
    published_folder.write_folder(folder, config, build(config, 5).state_dict(), tokenizer)
    published_folder.write_record(folder, config, tokenizer, "no data", {})
    return folder


def pairs(folder: Path) -> dict[str, Any]:
    return {
        "kind": "translation",
        "train": [write_pairs(folder / "train", 400, 1)],
        "dev": [write_pairs(folder / "dev", 40, 2)],
    }


def test_translation_is_learned_with_attention_and_its_folder_is_used(tmp_path: Path) -> None:
    folder = recurrent_folder(tmp_path, "encoder-decoder", alignment="additive")
    config = recipe(
        tmp_path / "run",
        folder,
        pairs(tmp_path),
        steps=160,
        evaluate_every=80,
        checkpoints={"every": 80},
        optimizer={"lr": 1e-2},
    )
    prepare(config, quiet)
    train(config, ALONE)
    found = scores_of(config)
    assert found["scores"]["bleu"] > 60 > 3 * found["trivial"]["scores"]["bleu"]
    out = publish(
        Path(config.run),
        tmp_path / "out",
        on_event=fail_on_event,
        checkpoint=best_step(DiskPath(Path(config.run))),
    )
    assert verify(out).ok and "trifold generate" in (out / published_folder.CARD).read_text()
    [said] = predict(LoadedModel(out), ["Mr Ada sees Bob."], Generation(max_new=24, beams=3))
    assert set(str(said["text"]).replace(".", "").split()) <= {
        *"Mr Ada Bob Cleo Dan Eve Finn Gus Hana sees calls knows likes".split()
    }


def test_a_tagger_with_a_crf_learns_from_context_and_answers_as_it_was_scored(tmp_path: Path) -> None:
    folder = recurrent_folder(tmp_path, "encoder")
    config = recipe(
        tmp_path / "run", folder, tags(tmp_path) | {"crf": True}, steps=60, optimizer={"lr": 1e-2}
    )
    prepare(config, quiet)
    train(config, ALONE)
    found = scores_of(config)
    assert found["scores"]["f1"] > 95 > 70 > found["trivial"]["scores"]["f1"]
    out = publish(
        Path(config.run),
        tmp_path / "out",
        on_event=fail_on_event,
        checkpoint=best_step(DiskPath(Path(config.run))),
    )
    assert verify(out).ok
    said = list(predict(LoadedModel(out), ["Mr Ada sees Bob", "In Ada we see Bob"], Generation()))
    assert [[(e["type"], e["text"]) for e in one["entities"]] for one in said] == [
        [("PER", "Ada")],
        [("LOC", "Ada")],
    ]


def test_a_crf_is_refused_where_it_could_not_be_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task\.crf is for recurrent models"):
        prepare(
            recipe(tmp_path / "run", folder_of(tmp_path, "encoder"), tags(tmp_path) | {"crf": True}), quiet
        )
    with pytest.raises(UserError, match="a model of cell lstm has none"):
        config = recipe(
            tmp_path / "run", recurrent_folder(tmp_path / "run", "encoder"), tags(tmp_path), lora={"rank": 2}
        )
        prepare(config, quiet)
        train(config, ALONE)


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.proof) for stage in (1, 2))])
def test_a_killed_run_continues_bit_for_bit_with_dropout_at_every_stage(stage: int, tmp_path: Path) -> None:
    folder, task = (
        recurrent_folder(tmp_path, "encoder-decoder", alignment="hard"),
        pairs(tmp_path),
    )  # it draws, besides
    changes: dict[str, Any] = {
        "steps": 10,
        "evaluate_every": 5,
        "checkpoints": {"every": 5},
        "engine": {"zero_stage": stage},
    }
    changes["model"] = {"from": str(folder), "dropout": 0.1}
    straight, broken = (
        recipe(tmp_path / name, folder, task, evaluate_examples=4, **changes)
        for name in ("straight", "broken")
    )
    for config in (straight, broken):
        prepare(config, quiet)
    run_processes(2, train_run, straight)
    with pytest.raises(AssertionError, match=r"ended without a result|onnection"):
        run_processes(2, train_until_killed, broken, 8)
    run_processes(2, train_run, broken)
    assert metrics(straight) == metrics(broken) and len(metrics(straight)) == 10 * 3 + 3
    assert scores_of(straight) == scores_of(broken)
