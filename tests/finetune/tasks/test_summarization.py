"""Sentences picked or summaries written."""

import json
from pathlib import Path
from typing import Any

from tests.finetune.small_tasks import OracleTagger
from tests.published import tokenizer
from trifold.finetune.config import SummarizationConfig
from trifold.finetune.examples.sentences import split_sentences
from trifold.finetune.tasks.summarization import Extraction, Summarization, most_similar, open_summarization
from trifold.modeling.batch import IGNORE
from trifold.modeling.generation.config import Generation

DOCUMENT = "Ada met Bob. Nobody knows why!\nThe river was cold? 東京は大きい。Gus was in town."


def task(tmp_path: Path, family: Any, row_length: int = 200) -> Any:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"document": DOCUMENT, "summary": "Ada met Bob when Gus was in town."}) + "\n")
    return open_summarization(
        SummarizationConfig(train=(str(path),), dev=(str(path),)), tokenizer(), family, row_length
    )


def test_sentences_end_at_stops_and_lines_in_any_language() -> None:
    sentences = [DOCUMENT[a:b] for a, b in split_sentences(DOCUMENT)]
    assert sentences == [
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

    model = OracleTagger([segment], 2, wrong=0)
    [summary] = extraction.predict(model, extraction.dev, Generation(), 200)
    assert summary == "Ada met Bob. Gus was in town."
    assert extraction.baseline(extraction.dev) == (
        "lead-3",
        ["Ada met Bob. Nobody knows why! The river was cold?"],
    )
    assert extraction.scores(extraction.statistics([summary], extraction.dev).sum(axis=0))["rouge1"] > 85
    assert len(task(tmp_path, "encoder", 12).segments(extraction.train)[0].tokens) == 12


def test_decoders_and_encoder_decoders_write(tmp_path: Path) -> None:
    for family in ("decoder", "encoder-decoder"):
        writing = task(tmp_path, family)
        [segment] = writing.segments(writing.train)
        assert isinstance(writing, Summarization) and tokenizer().decode(segment.targets[-4:]).endswith(
            "own.</s>"
        )
