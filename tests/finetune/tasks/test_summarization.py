"""Sentences picked or summaries written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.finetune.tasks.small_questions import Knowing
from tests.published import tokenizer
from trifold.finetune import config
from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.tasks.summarization import Extraction, Summarization, most_similar, open_summarization
from trifold.modeling.batch import IGNORE

DOCUMENT = "Ada met Bob. Nobody knows why!\nThe river was cold? 東京は大きい。Gus was in town."


def task(tmp_path: Path, family: Any, row_length: int = 200) -> Any:
    place = tmp_path / "p.jsonl"
    place.write_text(
        json.dumps({"document": DOCUMENT, "summary": "Ada met Bob when Gus was in town."}) + "\n"
    )
    return open_summarization(
        config.SummarizationConfig(train=(str(place),), dev=(str(place),)), tokenizer(), family, row_length
    )


def test_sentences_end_at_stops_and_lines_in_any_language() -> None:
    found = [DOCUMENT[a:b] for a, b in split_sentences(DOCUMENT)]
    assert found == [
        "Ada met Bob.",
        "Nobody knows why!",
        "The river was cold?",
        "東京は大きい。",
        "Gus was in town.",
    ]


def test_the_oracle_picks_what_the_summary_says_and_an_encoder_is_taught_it(tmp_path: Path) -> None:
    extraction = task(tmp_path, "encoder")
    assert (
        isinstance(extraction, Extraction)
        and most_similar(extraction.train[0]) == {0, 4}
        and extraction.number == 2
    )
    [segment] = extraction.segments(extraction.train)
    assert segment.targets[segment.targets != IGNORE].tolist() == [1, 0, 0, 0, 1]

    class Taught(Knowing):
        def logits(self, batch: Any) -> torch.Tensor:
            best = torch.zeros_like(batch.tokens)
            best[0, : len(segment.targets)] = torch.from_numpy(np.maximum(segment.targets, 0))
            return torch.nn.functional.one_hot(best, 2)

    [said] = extraction.predict(Taught([]), extraction.dev, None, 200)  # type: ignore[arg-type]
    assert said == "Ada met Bob. Gus was in town."
    assert extraction.baseline() == ("lead-3", ["Ada met Bob. Nobody knows why! The river was cold?"])
    assert extraction.scores(extraction.statistics([said], extraction.dev).sum(axis=0))["rouge1"] > 85
    assert len(task(tmp_path, "encoder", 12).segments(extraction.train)[0].tokens) == 12


def test_decoders_and_encoder_decoders_write(tmp_path: Path) -> None:
    for family in ("decoder", "encoder-decoder"):
        writing = task(tmp_path, family)
        [segment] = writing.segments(writing.train)
        assert isinstance(writing, Summarization) and tokenizer().decode(segment.targets[-4:]).endswith(
            "own.</s>"
        )
