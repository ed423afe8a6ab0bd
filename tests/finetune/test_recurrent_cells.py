"""Every task on every family that can do it: trained for two steps, published, and verified by the stock
class (a proof).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.finetune.small_tasks import folder_of, recipe, write_pairs, write_tags
from trifold.finetune.evaluation.model_selection import best_step
from trifold.finetune.run import prepare, train
from trifold.modeling.errors import UserError
from trifold.pretrain.distributed import RankInfo
from trifold.pretrain.publish.publish import publish
from trifold.pretrain.storage.disk import DiskPath

pytestmark = pytest.mark.proof
TEXT = "Mr Ada sees Bob. In Cleo we know Dan. Mr Eve likes Finn, yes."


def _files(folder: Path, kind: str) -> dict[str, Any]:
    place = folder / kind
    if kind == "ner":
        write_tags(place, 12, seed=1)
    elif kind == "translation":
        return {"kind": kind, "train": [write_pairs(place, 12, 1)], "dev": [write_pairs(place, 12, 1)]}
    elif kind == "summarization":
        place = place.with_suffix(".jsonl")
        place.write_text((json.dumps({"document": TEXT, "summary": "Mr Ada sees Bob."}) + "\n") * 6)
    else:
        asked = [
            {
                "id": str(i),
                "question": f"Who sees {i}?",
                "answers": [{"answer_start": 3, "text": "Ada"}],
                "is_impossible": False,
            }
            for i in range(6)
        ]
        asked += [{"id": "none", "question": "Why?", "answers": [], "is_impossible": True}]
        place.write_text(json.dumps({"data": [{"paragraphs": [{"context": TEXT, "qas": asked}]}]}))
    return {"kind": kind, "train": [str(place)], "dev": [str(place)]}


CELLS = {
    ("translation", "decoder"): "LlamaForCausalLM",
    ("translation", "encoder-decoder"): "T5GemmaForConditionalGeneration",
    ("summarization", "encoder"): "ModernBertForTokenClassification",
    ("summarization", "decoder"): "LlamaForCausalLM",
    ("summarization", "encoder-decoder"): "T5GemmaForConditionalGeneration",
    ("ner", "encoder"): "ModernBertForTokenClassification",
    ("ner", "decoder"): "LlamaForTokenClassification",
    ("ner", "encoder-decoder"): "T5GemmaForTokenClassification",
    ("ner written", "encoder-decoder"): "T5GemmaForConditionalGeneration",
    ("ner written", "decoder"): "LlamaForCausalLM",
    ("qa", "encoder"): "ModernBertForQuestionAnswering",
    ("qa", "decoder"): "LlamaForQuestionAnswering",
    ("qa prompted", "decoder"): "LlamaForCausalLM",
    ("qa", "encoder-decoder"): "T5GemmaForConditionalGeneration",
}


@pytest.mark.parametrize(("cell", "family"), CELLS, ids=map("-".join, CELLS))
def test_every_cell_trains_and_publishes_verified(cell: str, family: str, tmp_path: Path) -> None:
    kind, _, way = cell.partition(" ")
    task = _files(tmp_path, kind) | ({"stride": 8} if kind == "qa" else {}) | ({way: True} if way else {})
    changes: dict[str, Any] = {
        "steps": 2,
        "evaluate_every": 2,
        "checkpoints": {"every": 2},
        "row_length": 128,
    }
    folder = folder_of(tmp_path, family, max_positions=128)
    config = recipe(tmp_path / "run", folder, task, **changes)
    prepare(config, lambda what, done: None)
    train(config, RankInfo.single())
    out = publish(
        tmp_path / "run",
        tmp_path / "out",
        on_event=lambda event, **facts: None,
        checkpoint=best_step(DiskPath(tmp_path / "run")),
    )
    assert json.loads((out / "config.json").read_text())["architectures"] == [CELLS[cell, family]]


def test_an_encoder_refuses_to_translate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an encoder cannot"):
        prepare(
            recipe(tmp_path / "run", folder_of(tmp_path, "encoder"), _files(tmp_path, "translation")),
            lambda what, done: None,
        )
