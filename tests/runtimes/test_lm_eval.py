"""lm-evaluation-harness scores a published decoder on a local task (YAML and JSON lines) with the
log-likelihoods that we compute.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.published import tokenizer
from tests.runtimes.folders import LINES, write_random
from trifold.modeling.batch import Batch
from trifold.modeling.transformer import Transformer

pytest.importorskip("lm_eval", reason="pip install 'trifold[runtimes]'")
pytestmark = pytest.mark.proof
ENDS = ["by the river", "in town number 3", "why?"]


@torch.no_grad()
def _log_likelihood(model: Transformer, context: str, end: str) -> float:
    """Of the tokens of `end` after BOS and `context`, in nats."""
    known, ids = (tokenizer().encode_batch([text])[0].tolist() for text in (context, context + end))
    tokens = torch.tensor([[tokenizer().bos, *ids]])
    log_p = model.logits(Batch(tokens, torch.ones_like(tokens), tokens)).log_softmax(-1)[0]
    return sum(log_p[i, ids[i]].item() for i in range(len(known), len(ids)))


def _evaluated(
    folder: Path, task: dict[str, Any], rows: list[dict[str, Any]], **settings: Any
) -> list[dict[str, Any]]:
    """What lm-eval says of each row of a task that it reads from a YAML file beside a file of JSON lines."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    place = folder.parent / task["task"]
    place.mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}, "cache_dir": str(place)},
    }
    (place / "task.yaml").write_text(yaml.safe_dump({**data, "test_split": "test", **task}))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32", **settings},
        tasks=[task["task"]],
        device="cpu",
        batch_size=2,
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found is not None
    return sorted(found["samples"][task["task"]], key=lambda sample: sample["doc_id"])


def test_choices_and_whole_texts_have_our_log_likelihoods(tmp_path: Path) -> None:
    folder = tmp_path / "decoder"
    model = write_random(folder, "llama, own head, other theta")
    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": 0,
    }
    rows: list[dict[str, Any]] = [{"text": line, "ends": ENDS} for line in LINES]
    for sample, row in zip(_evaluated(folder, {"task": "choices", **choices}, rows), rows, strict=True):
        theirs = [float(answer[0][0]) for answer in sample["resps"]]
        assert theirs == pytest.approx(
            [_log_likelihood(model, row["text"], f" {end}") for end in ENDS], abs=1e-3
        )

    # lm-eval puts BOS before a whole text by itself: the tokenizer's own would be a second one, and counted
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    for sample, row in zip(
        _evaluated(folder, {"task": "whole", **rolling}, rows, add_bos_token=False), rows, strict=True
    ):
        assert float(sample["resps"][0][0]) == pytest.approx(
            _log_likelihood(model, "", row["text"]), abs=1e-3
        )
